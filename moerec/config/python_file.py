"""Configurations as Python files, and modules of a user's own that register parts under names."""

import dataclasses
import difflib
import importlib
import importlib.util
import re
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moerec.config import Config
from moerec.config.value_types import describe_misfit, fits, list_groups
from moerec.errors import InputError


def load_config(path: str, config_type: type = Config) -> Any:
    """Calls `get_config()` of the Python file `path`. Raises InputError with the file and the line."""
    file = Path(path)
    if not file.is_file():
        known = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise InputError(f"--config={path}: no such file{did_you_mean(str(file), known)}")
    spec = importlib.util.spec_from_file_location(f"config_of_run_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except SyntaxError as error:
        raise InputError(f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}") from None
    except Exception as error:
        raise InputError(_config_error(path, file, error, config_type)) from None
    if not isinstance(config, config_type):
        raise InputError(f"{path}: get_config() returned {type(config).__name__}, not {config_type.__name__}")
    for group, place in list_groups(config):
        known = [field.name for field in dataclasses.fields(group)]
        for name in vars(group):
            if name not in known:
                raise InputError(f"{path}: {place}.{name}: no such field{did_you_mean(name, known)}")
    return config


def _config_error(path: str, file: Path, error: Exception, config_type: type) -> str:
    here = str(file.resolve())
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if str(Path(frame.filename).resolve()) == here]
    line = f":{lines[-1]}" if lines else ""
    if isinstance(error, InputError):
        return f"{path}{line}: {error}"
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{path}: defines no get_config()"
    wrong = _wrong_type(error)
    if wrong:
        return f"{path}{line}: {wrong}"
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown:
        groups = {type(group).__name__: group for group, _ in list_groups(config_type())}
        own = [field.name for field in dataclasses.fields(groups[unknown[1]])] if unknown[1] in groups else []
        elsewhere = [field for field, _ in list_leaves(config_type())]
        meant = did_you_mean(unknown[2], own) or did_you_mean(f"config.{unknown[2]}", elsewhere)
        return f"{path}{line}: {unknown[1]} has no field {unknown[2]!r}{meant}"
    return f"{path}{line}: {type(error).__name__}: {error}"


def _wrong_type(error: Exception) -> str | None:
    """The first field of a wrong type, where the checks of one of our dataclasses stumbled over it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        group = frame.f_locals.get("self")
        if frame.f_code.co_name == "__post_init__" and dataclasses.is_dataclass(group):
            hints = typing.get_type_hints(type(group))
            for field in dataclasses.fields(group):
                if not fits(getattr(group, field.name), hints[field.name]):
                    return describe_misfit(
                        f"{type(group).__name__}.{field.name}", getattr(group, field.name), hints[field.name]
                    )
    return None


def list_leaves(config: Any) -> list[tuple[str, Any]]:
    """Every field that is no group: `config.model.n_layers` and its value."""
    return [
        (f"{place}.{field.name}", value)
        for group, place in list_groups(config)
        for field in dataclasses.fields(group)
        if not dataclasses.is_dataclass(value := getattr(group, field.name))
    ]


def import_plugin(name: str) -> None:
    """Imports a module, which registers what it has. A run directory alone never imports code: only who names it does.

    Raises:
      InputError: there is no such module, or it cannot be imported.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = f"no module {error.name}" if error.name != name else "no such module"
        raise InputError(f"--plugin={name}: {missing}; it is looked for where Python looks for modules") from None
    except Exception as error:
        raise InputError(f"--plugin={name}: {type(error).__name__}: {error}") from None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words, as the end of a message; nothing where none is near."""
    tail = [name for name in known if "." in word and name.endswith("." + word.rsplit(".", 1)[-1])]
    # What all names begin with says nothing about how near they are.
    heads = {name.rpartition("config.")[1] for name in (word, *known)}
    start = "config." if heads == {"config."} else ""
    names = {name.removeprefix(start): name for name in tail or known}
    nearest = difflib.get_close_matches(word.removeprefix(start), names, n=1, cutoff=0.3 if tail else 0.6)
    return f"; did you mean {names[nearest[0]]}?" if nearest else ""
