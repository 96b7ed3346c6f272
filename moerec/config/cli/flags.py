"""The flags of a command, and the typed configuration with its overrides."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from moerec.config import checked
from moerec.config.cli.fields import suggest_field, write_value
from moerec.config.python_file import did_you_mean, list_leaves, load_config
from moerec.config.value_types import list_groups, require_types
from moerec.errors import InputError

ExtraFlags = Mapping[str, tuple[Any, str]]  # name: (default, help); the default gives the type


def define_flags(config_type: type | None, default_config: str | None, extra: ExtraFlags) -> flags.FlagValues:
    """The flags of a command, unparsed, with those of the libraries."""
    values = flags.FlagValues()
    values.append_flag_values(flags.FLAGS)
    if config_type is not None:
        default = f" (default: {default_config})" if default_config else ""
        flags.DEFINE_string("config", None, f"a Python file with get_config(){default}", values)
        told = "print the configuration, or its fields that begin with PREFIX, and do nothing else"
        flags.DEFINE_string("print_config", None, told, values)
    flags.DEFINE_string("workdir", "", "the directory of the run", values)
    flags.DEFINE_multi_string("plugin", [], "a module that registers losses, tasks, memories or baselines", values)
    flags.DEFINE_bool("json", False, "print the result as one JSON object, last on standard output", values)
    told = "the folder of compiled programs, or off (default: $XDG_CACHE_HOME/moerec/jit, or ~/.cache/moerec/jit)"
    flags.DEFINE_string("compile_cache", "", told, values)
    for name, (default_value, help_text) in extra.items():
        if isinstance(default_value, bool):
            flags.DEFINE_bool(name, default_value, help_text, values)
        elif isinstance(default_value, int):
            flags.DEFINE_integer(name, default_value, help_text, flag_values=values)
        elif isinstance(default_value, float):
            flags.DEFINE_float(name, default_value, help_text, flag_values=values)
        elif isinstance(default_value, tuple):
            flags.DEFINE_multi_string(name, list(default_value), help_text, values)
        elif isinstance(default_value, list):
            flags.DEFINE_list(name, list(default_value), help_text, values)
        else:
            flags.DEFINE_string(name, default_value, help_text, values)
    return values


def parse_flags(
    values: flags.FlagValues, argv: Sequence[str], default_config: str | None, config_type: type | None
) -> Any:
    """Parses the flags into `values` and returns the checked configuration, all overrides applied."""
    from ml_collections import config_flags  # machines that only train from Python may lack it

    config = None
    try:
        args = [_expand_home(arg) for arg in values.read_flags_from_files(argv[1:], force_gnu=False)]
        if config_type is not None:
            args = ["--print_config=" if re.fullmatch("--?print_config", arg) else arg for arg in args]
            path, args = split_config(args)
            path = path or default_config
            if not path:
                _refuse_unknown(args, values)
                raise InputError("--config is missing, e.g. --config=configs/demo.py")
            config = load_config(path, config_type)
            _refuse_unknown_fields(args, config)
            args.insert(0, f"--config={path}")
            del values.config
            config_flags.DEFINE_config_dataclass(
                "config", config, flag_values=values, sys_argv=[argv[0], *args], parse_fn=lambda _: config
            )
        _refuse_repeated_lists(args, values)
        rest = values([argv[0], *args])
    except flags.UnrecognizedFlagError as error:
        raise InputError(_unknown_flag(error.flagname, values, config)) from None
    except InputError:
        raise
    except (flags.Error, ValueError, TypeError) as error:
        reason = re.sub(r"\('Non-boolean argument.*", "is neither true nor false", str(error))
        reason = re.sub(r"invalid literal for int\(\) with base 10: '.*'", "is no whole number", reason)
        reason = re.sub(r"could not convert string to float: '.*'", "is no number", reason)
        raise InputError(reason.removeprefix("flag ").removeprefix("ERROR:: ")) from None
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no flag; flags are written --name=value")
    flags.FLAGS.mark_as_parsed()  # libraries read their own flags there
    if config is None:
        return None
    require_types(values.config)
    return checked(values.config)


def repeat_arguments(values: flags.FlagValues) -> dict[str, str]:
    """The arguments with which another process gets the configuration that was parsed, whatever its file holds by then:
    field -> flag, and those of the file and the plugins under the names of their flags.
    """
    flag: Any = values["config"]
    arguments = {"config": f"--config={flag.config_filename}"}
    arguments |= {path: f"--{path}={write_value(value)}" for path, value in list_leaves(values.config)}
    return arguments | {f"plugin.{name}": f"--plugin={name}" for name in values.plugin}


def _expand_home(arg: str) -> str:
    """`--workdir=~/x` as the shell gives `--workdir ~/x`: it leaves alone what stands behind `=`.

    Nobody means a folder that is called `~`.
    """
    name, equals, value = arg.partition("=")
    return name + equals + re.sub(r"(^|,)~(?=/)", lambda found: found[1] + os.path.expanduser("~"), value)


def _refuse_repeated_lists(args: list[str], values: flags.FlagValues) -> None:
    """A list that is given twice would silently be its last part."""
    names = [arg.lstrip("-").split("=", 1)[0] for arg in args if arg.startswith("-")]
    for name in names:
        if names.count(name) > 1 and name in values and isinstance(values[name].parser, flags.ListParser):
            raise InputError(f"--{name} is given twice; write --{name}=a,b")


def split_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of the last `--config`, and the other arguments."""
    path, rest, arguments = None, [], iter(args)
    for arg in arguments:
        if arg in ("--config", "-config"):
            path = next(arguments, None)
        elif re.match("--?config=", arg):
            path = arg.split("=", 1)[1]
        else:
            rest.append(arg)
    return path, rest


def _refuse_unknown(args: list[str], values: flags.FlagValues) -> None:
    for arg in args:
        name = arg.lstrip("-").split("=", 1)[0]
        known = name in values or name.removeprefix("no") in values or name.startswith("config.")
        if arg.startswith("--") and not known:
            raise InputError(_unknown_flag(name, values, None))


def _unknown_flag(name: str, values: flags.FlagValues, config: Any) -> str:
    if config is not None and "." in name:  # --model.n_layer
        suggestion = suggest_field(f"config.{name}", config)
        if suggestion:
            return f"--{name}: no such flag{suggestion.replace('config.', '--config.', 1)}"
    known = [f"--{flag}" for flag in values] + [f"--{path}" for path, _ in (list_leaves(config) if config else [])]
    tail = [path for path in known if path.endswith(f".{name}")]  # --n_layers, --model.n_layers
    return f"--{name}: no such flag{did_you_mean(f'--{name}', tail or known)}"


def _refuse_unknown_fields(args: list[str], config: Any) -> None:
    groups = {place: group for group, place in list_groups(config)}
    known = [path for path, _ in list_leaves(config)]
    for arg in args:
        match = re.match(r"--?(?:no(?=config\.))?(config\.[^=]*)", arg)
        if not match or match[1] in known:
            continue
        if match[1] in groups:
            fields = ", ".join(field.name for field in dataclasses.fields(groups[match[1]]))
            raise InputError(f"--{match[1]}: is a group; set one of its fields: {fields}")
        raise InputError(f"--{match[1]}: no such field{suggest_field(match[1], config)}")
