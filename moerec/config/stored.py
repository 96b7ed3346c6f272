"""A configuration in the JSON that a run keeps of it, and what differs between two.

The file carries the number of its format. A field that it lacks takes its default, so that a new field leaves old runs
readable; one that nothing is known of is named. Where a field changes its meaning, the number goes up, and runs of
earlier formats are read with the values by which they mean the same.
"""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moerec.config import Config
from moerec.config.value_types import require_type
from moerec.errors import InputError
from moerec.files import read_json, to_plain, write_json

FORMAT = 2
# Of each earlier format, what its runs had where they say nothing: in format 1 the attributes of items stood behind the
# words of their texts, in the same slots and the same vocabulary.
_EARLIER: dict[int, dict[str, dict[str, Any]]] = {1: {"data": {"item_tokens": "plain_words"}}}


def store_config(path: Path, config: Config) -> None:
    """Writes the resolved configuration, atomically."""
    write_json(path, {"format": FORMAT, **to_plain(dataclasses.asdict(config))})


def read_stored(path: Path) -> dict[str, Any]:
    """The plain configuration in a run's `config.json`, every field of this version in it.

    Raises:
      InputError: as `read_config`.
    """
    return to_plain(dataclasses.asdict(read_config(path)))


def read_config(path: Path) -> Config:
    """The configuration in a run's `config.json`; its checks run anew.

    Raises:
      InputError: the file is missing or damaged, is of another format, or has an unknown field or one of a wrong type.
    """
    values = read_json(path, "no such file; is this the directory of a run?")
    found = values.pop("format", None)
    if found is None:
        raise InputError(f"{path}: has no format number; runs from before format 1 cannot be read")
    if type(found) is not int or found not in (*_EARLIER, FORMAT):
        known = " and ".join(map(str, (*_EARLIER, FORMAT)))
        raise InputError(f"{path}: is of format {found!r}, and this version reads {known}")
    for name, fields in _EARLIER.get(found, {}).items():
        group = values.setdefault(name, {})
        if isinstance(group, dict):  # `_build` tells of what is none
            values[name] = {**fields, **group}
    try:
        return build_config(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build_config(values: dict[str, Any]) -> Config:
    """The configuration of a plain one without its format number.

    Raises:
      InputError: an unknown field, or one of a wrong type or value.
    """
    return _build(Config, values, "config")


def _build(kind: Any, value: Any, place: str) -> Any:
    if not dataclasses.is_dataclass(kind):
        value = tuple(value) if typing.get_origin(kind) is tuple and isinstance(value, list) else value
        require_type(place, value, kind)  # before the checks of its group, which would stumble over it
        return value
    if not isinstance(value, dict):
        raise InputError(f"{place}: {value!r} is no group of fields")
    names = {field.name for field in dataclasses.fields(kind)}
    for name in value:
        if name not in names:
            raise InputError(f"{place}.{name}: no such field; the run is of another version")
    hints = typing.get_type_hints(kind)
    fields = {name: _build(hints[name], inner, f"{place}.{name}") for name, inner in value.items()}
    return kind(**fields)  # type: ignore[operator]


def list_differences(old: Any, new: Any, place: str) -> Iterator[str]:
    """What differs between two plain configurations, field by field, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from list_differences(old.get(name), new.get(name), f"{place}.{name}")
    elif old != new:
        yield f"{place} was {old!r} and is {new!r}"
