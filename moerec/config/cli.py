"""The shell around every command: flags, the typed configuration with its overrides, exit codes, `--json`.

A command is `python -m experiments.NAME --config=configs/X.py [--config.field=value …] --workdir=DIR`. Exit codes:
0 done, 1 the work failed, 2 wrong use or bad input (one line each, on standard error), 130 interrupted, 143 terminated.
A traceback is a defect of ours.
"""

import contextlib
import dataclasses
import errno
import inspect
import json
import os
import re
import select
import signal
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from moerec.config import Config, checked
from moerec.config.python_file import did_you_mean, import_plugin, list_leaves, load_config
from moerec.config.terminal import safe_output
from moerec.config.value_types import list_groups, require_types
from moerec.errors import TERMINATED, InputError, Terminated, WorkError
from moerec.files import to_plain

Main = Callable[[Any, flags.FlagValues], Mapping[str, Any] | None]
INTERRUPTED = 130
_OF_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}
_MOST_TOLD = 1500  # characters of an error
ExtraFlags = Mapping[str, tuple[Any, str]]  # name: (default, help); the default gives the type


def run(
    main: Main,
    default_config: str | None = None,
    extra_flags: ExtraFlags | None = None,
    *,
    config_type: type | None = Config,
    workdir: bool = True,
) -> typing.NoReturn:
    """Runs `main(config, flags)` on the command line and exits with the code above.

    default_config: the file that is used without `--config`.
    extra_flags: `{"top_k": (10, "items of a list")}`, of the default's type (bool, int, float, str, list of str
    separated by commas, tuple of str given one by one), read as `flags.top_k`; global flags of absl work too.
    config_type: the class that `get_config()` must return; None for a command without one (`config` is then None).
    workdir: whether `--workdir` must be given.
    `main` may return a dict, which `--json` prints (not finite numbers as null); its `exit_code` is then used.
    """
    sys.unraisablehook = _interrupt_again
    code = execute(main, sys.argv, default_config, extra_flags, config_type=config_type, workdir=workdir)
    if code in (1, INTERRUPTED, TERMINATED):
        # Loader and checkpoint threads may be in the middle of something: what they hold is not needed, and a
        # half-written checkpoint is never read, but taking them down in order can take long, complain, or crash.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt_again(unraisable: Any) -> None:
    """An interruption that hits a callback of the garbage collector is ignored by Python: it is sent once more.

    A little later and from another thread: sent from here it would be raised in this hook, and ignored again.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def execute(
    main: Main,
    argv: Sequence[str],
    default_config: str | None = None,
    extra_flags: ExtraFlags | None = None,
    *,
    config_type: type | None = Config,
    workdir: bool = True,
) -> int:
    """`run` in process, on `argv` (the program's name first): returns the exit code."""
    with safe_output():
        return _execute(main, argv, default_config, extra_flags or {}, config_type, workdir)


def _execute(
    main: Main,
    argv: Sequence[str],
    default_config: str | None,
    extra_flags: ExtraFlags,
    config_type: type | None,
    workdir: bool,
) -> int:
    try:
        values = _define_flags(config_type, default_config, extra_flags)
        if any(arg in ("-h", "-help", "--help", "--helpfull") for arg in argv[1:]):
            print(_help(main, values, config_type if "--helpfull" in argv else None))
            return 0
        config = _parse(values, list(argv), default_config, config_type)
        for name in values.plugin:
            import_plugin(name)
        if workdir and not values.workdir:
            raise InputError("--workdir is missing: the directory of the run")
        result = main(config, values)
        if values.json:
            print(json.dumps(to_plain(result or {}), ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()
        return int(result.get("exit_code", 0)) if result else 0
    except InputError as error:
        return _fail(2, error)
    except WorkError as error:
        return _fail(1, error)
    except Terminated as error:
        return _fail(TERMINATED, error)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except MemoryError:
        return _fail(1, "out of memory")
    except BrokenPipeError as error:
        return 1 if _reader_left() else _fail(1, f"a process of ours went away: {error.strerror}")
    except (FileExistsError, NotADirectoryError) as error:
        return _fail(2, f"{error.filename}: {error.strerror}; a directory is needed there")
    except OSError as error:  # the machine's answer (no space, no permission), not a defect of ours
        if error.filename is None and error.errno not in _OF_THE_MACHINE:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(1, f"{place}{error.strerror}")


def _reader_left() -> bool:
    """Whether whoever read the output has enough of it; what is left to print then goes nowhere."""
    try:
        sys.stdout.flush()
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        left = any(event & select.POLLERR for _, event in output.poll(0))
    except BrokenPipeError:
        left = True
    except (OSError, ValueError):  # standard output is no file, as in tests
        return False
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _fail(code: int, reason: object) -> int:
    _reader_left()
    told = " ".join(str(reason).split("\n")).strip()
    if len(told) > _MOST_TOLD:  # with a name or a value of the input in it
        told = f"{told[: _MOST_TOLD - 300]} … {told[-300:]}"
    print("error:", told, file=sys.stderr, flush=True)
    return code


def _define_flags(config_type: type | None, default_config: str | None, extra: ExtraFlags) -> flags.FlagValues:
    values = flags.FlagValues()
    values.append_flag_values(flags.FLAGS)
    if config_type is not None:
        default = f" (default: {default_config})" if default_config else ""
        flags.DEFINE_string("config", None, f"a Python file with get_config(){default}", values)
    flags.DEFINE_string("workdir", "", "the directory of the run", values)
    flags.DEFINE_multi_string("plugin", [], "a module that registers losses, tasks, memories or baselines", values)
    flags.DEFINE_bool("json", False, "print the result as one JSON object, last on standard output", values)
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


def _help(main: Main, values: flags.FlagValues, config_type: type | None) -> str:
    lines = [(inspect.getdoc(inspect.getmodule(main)) or inspect.getdoc(main) or "").strip(), "", "Flags:"]
    for name in values:
        if name not in flags.FLAGS:
            flag = values[name]
            default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
            if name == "config":
                lines.append("  --config.FIELD=VALUE: sets one field of it; --helpfull lists them all")
    if config_type is not None:
        lines += ["", "Fields and their defaults:"]
        comments = _read_comments(config_type())
        lines += [f"  --{path}={value!r}{comments.get(path, '')}" for path, value in list_leaves(config_type())]
    return "\n".join(lines)


def _read_comments(config: Any) -> dict[str, str]:
    """Field -> what the comment behind it in the source says of it."""
    found = {}
    for group, place in list_groups(config):
        for name, comment in re.findall(r"^    (\w+): [^#\n]*?  (# .*)$", inspect.getsource(type(group)), re.MULTILINE):
            found[f"{place}.{name}"] = f"  {comment}"
    return found


def _parse(values: flags.FlagValues, argv: list[str], default_config: str | None, config_type: type | None) -> Any:
    """Parses the flags into `values` and returns the checked configuration, all overrides applied."""
    from ml_collections import config_flags  # machines that only train from Python may lack it

    config = None
    try:
        args = [_expand_home(arg) for arg in values.read_flags_from_files(argv[1:], force_gnu=False)]
        if config_type is not None:
            path, args = _split_config(args)
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


def _split_config(args: list[str]) -> tuple[str | None, list[str]]:
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
        raise InputError(f"--{match[1]}: no such field{did_you_mean(match[1], known)}")
