"""A configuration read back from the JSON that a run keeps of it."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from moerec.config import Config
from moerec.errors import InputError


def read_config(path: Path) -> Config:
    """The configuration in a run's `config.json`; its checks run anew.

    Raises:
      InputError: the file is missing, is no JSON, or has not exactly the fields of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; is this the directory of a run?") from error
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error})") from error
    return _build(Config, values, path, "config")


def _build(kind: Any, value: Any, path: Path, place: str) -> Any:
    if not dataclasses.is_dataclass(kind):
        is_tuple = typing.get_origin(kind) in (tuple, types.GenericAlias) or kind is tuple
        return tuple(value) if is_tuple and isinstance(value, list) else value
    names = {field.name for field in dataclasses.fields(kind)}
    found = set(value) if isinstance(value, dict) else set()
    for name in sorted(names ^ found):
        raise InputError(f"{path}: {place}.{name} is {'missing' if name in names else 'unknown'}: of another version")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _build(hints[name], value[name], path, f"{place}.{name}") for name in sorted(names)})  # type: ignore[operator]
