"""A configuration read back from the JSON that a run keeps of it, and what differs between two."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moerec.config import Config
from moerec.config.value_types import require_type
from moerec.errors import InputError


def read_config(path: Path) -> Config:
    """The configuration in a run's `config.json`; its checks run anew.

    Raises:
      InputError: the file is missing, is no JSON, or has not exactly the fields of this version, of their types.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; is this the directory of a run?") from error
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error})") from error
    try:
        return _build(Config, values, "config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _build(kind: Any, value: Any, place: str) -> Any:
    if not dataclasses.is_dataclass(kind):
        value = tuple(value) if typing.get_origin(kind) is tuple and isinstance(value, list) else value
        require_type(place, value, kind)  # before the checks of its group, which would stumble over it
        return value
    names = {field.name for field in dataclasses.fields(kind)}
    found = set(value) if isinstance(value, dict) else set()
    for name in sorted(names ^ found):
        raise InputError(f"{place}.{name} is {'missing' if name in names else 'unknown'}: of another version")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _build(hints[name], value[name], f"{place}.{name}") for name in sorted(names)})  # type: ignore[operator]


def list_differences(old: Any, new: Any, place: str) -> Iterator[str]:
    """What differs between two plain configurations, field by field, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from list_differences(old.get(name), new.get(name), f"{place}.{name}")
    elif old != new:
        yield f"{place} was {old!r} and is {new!r}"
