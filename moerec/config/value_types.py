"""Whether the values of a configuration are of the types that its fields say, and the groups that it is made of."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from moerec.errors import InputError


def list_groups(config: Any, place: str = "config") -> Iterator[tuple[Any, str]]:
    """A configuration and all groups in it, each with its place (`config.model.moe`)."""
    yield config, place
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_groups(value, f"{place}.{field.name}")


def require_types(config: Any) -> None:
    """Raises: InputError, with the first field of a configuration whose value is of another type."""
    for group, place in list_groups(config):
        hints = typing.get_type_hints(type(group))
        for field in dataclasses.fields(group):
            require_type(f"{place}.{field.name}", getattr(group, field.name), hints[field.name])


def require_type(place: str, value: Any, hint: Any) -> None:
    """Raises: InputError, where the value is not of the type, a number that is not finite, or text with a NUL."""
    if not fits(value, hint):
        raise InputError(describe_misfit(place, value, hint))
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{place}: {value} is no finite number")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and "\0" in text:  # no path, and no name that could be looked for
            raise InputError(f"{place}: {value!r} holds a NUL character")


def describe_misfit(place: str, value: Any, hint: Any) -> str:
    """What is wrong with the value of a field, in words."""
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    is_one = typing.get_origin(hint) is tuple and isinstance(value, str)
    return f"{place}: {value!r} is not of type {name}" + (f"; write ({json.dumps(value)},)" if is_one else "")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of an annotation; whole numbers are floats, too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple and isinstance(value, tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
