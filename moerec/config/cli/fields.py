"""The fields of a configuration as lines, each an override that can be pasted; and the nearest to a wrong name."""

import dataclasses
import difflib
import inspect
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from moerec.config.python_file import did_you_mean, list_leaves
from moerec.config.value_types import list_groups
from moerec.errors import InputError
from moerec.files import to_plain


def format_fields(config: Any, paths: Sequence[str] | None = None) -> list[str]:
    """A line a field: the override that sets it, the class's default where it is another one, and its comment.

    Args: paths: of the fields that are wanted (`config.model.n_layers`); all by default.
    """
    defaults, comments = dict(list_leaves(type(config)())), _read_comments(config)
    lines = []
    for path, value in list_leaves(config):
        if paths is not None and path not in paths:
            continue
        is_default = path in defaults and defaults[path] == value
        notes = [] if is_default or path not in defaults else [f"default {write_value(defaults[path])}"]
        notes += [comments[path]] if path in comments else []
        told = f"  # {'; '.join(notes)}" if notes else ""
        lines.append(f"--{path}={shlex.quote(write_value(value))}{told}")
    return lines


def write_value(value: Any) -> str:
    """A field's value as the parser of flags reads it: text as it is, a tuple as Python writes one."""
    if isinstance(value, bool):
        return str(value).lower()
    return _write_literal(value) if isinstance(value, tuple) else str(value)


def _write_literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_write_literal, value))}{',' if len(value) == 1 else ''})"
    # JSON's escapes are among Python's, and its quotes are the double ones, which need no care within the shell's.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _read_comments(config: Any) -> dict[str, str]:
    """Field -> what the comment behind it in the source says of it."""
    found = {}
    for group, place in list_groups(config):
        for name, comment in re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", inspect.getsource(type(group)), re.MULTILINE):
            found[f"{place}.{name}"] = comment
    return found


def select_fields(config: Any, prefix: str) -> list[str]:
    """The paths of the fields that begin with `model.moe`, or `config.model.moe`; all of them with an empty prefix.

    Raises:
      InputError: none does.
    """
    start = "config." + prefix.removeprefix("--").removeprefix("config").removeprefix(".")
    found = [path for path, _ in list_leaves(config) if path.startswith(start)]
    if not found:
        raise InputError(f"--print_config={prefix}: no field begins so{suggest_field(start, config)}")
    return found


def nest_fields(config: Any, paths: Sequence[str]) -> dict[str, Any]:
    """The values of these fields as JSON types, in groups as in the configuration."""
    nested: dict[str, Any] = {}
    for path, value in list_leaves(config):
        if path in paths:
            _, *groups, name = path.split(".")
            place = nested
            for group in groups:
                place = place.setdefault(group, {})
            place[name] = to_plain(value)
    return nested


def suggest_field(path: str, config: Any) -> str:
    """The field, or group, that a path which is none may have meant, as the end of a message.

    A component that is wrong is compared with the names on its own level; only then is the path taken as a whole.
    """
    known = [name for name, _ in list_leaves(config)]
    inner = path.removeprefix("config.")
    if not any(name.endswith(f".{inner}") for name in known):  # a field without its groups is nearer than its likes
        mended = _mend(inner.split("."), config)
        if mended:
            is_leaf = f"config.{mended}" in known
            return f"; did you mean {'' if is_leaf else 'the group '}config.{mended}?"
    return did_you_mean(path, known)


def _mend(parts: Sequence[str], group: Any) -> str | None:
    """The path below a group in which each component that it lacks is replaced by one like it."""
    names = [field.name for field in dataclasses.fields(group)]
    likely = parts[:1] if parts[0] in names else difflib.get_close_matches(parts[0], names)
    for name in likely:
        value = getattr(group, name)
        if len(parts) == 1:
            return name
        below = _mend(parts[1:], value) if dataclasses.is_dataclass(value) else None
        if below:
            return f"{name}.{below}"
    return None
