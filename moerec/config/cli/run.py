"""The shell around every command: flags, the typed configuration with its overrides, exit codes, `--json`.

A command is `python -m experiments.NAME --config=configs/X.py [--config.field=value …] --workdir=DIR`. Exit codes:
0 done, 1 the work failed, 2 wrong use or bad input (one line each, on standard error), 130 interrupted, 143 terminated.
A traceback is a defect of ours.
"""

import contextlib
import errno
import inspect
import json
import os
import select
import signal
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from moerec.config import Config
from moerec.config.cli.compile_cache import compile_cache
from moerec.config.cli.fields import format_fields, nest_fields, select_fields
from moerec.config.cli.flags import ExtraFlags, define_flags, parse_flags, split_config
from moerec.config.cli.malloc import keep_freed_memory
from moerec.config.python_file import import_plugin
from moerec.config.terminal import safe_output
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
_HELP = ("-h", "-help", "--help", "--helpfull")
_MOST_TOLD = 1500  # characters of an error


def run(
    main: Main,
    default_config: str | None = None,
    extra_flags: ExtraFlags | None = None,
    *,
    config_type: type | None = Config,
    workdir: bool = True,
    keep_programs: bool = True,
) -> typing.NoReturn:
    """Runs `main(config, flags)` on the command line and exits with the code above.

    default_config: the file that is used without `--config`.
    extra_flags: `{"top_k": (10, "items of a list")}`, of the default's type (bool, int, float, str, list of str
    separated by commas, tuple of str given one by one), read as `flags.top_k`; global flags of absl work too.
    config_type: the class that `get_config()` must return; None for a command without one (`config` is then None).
    workdir: whether `--workdir` must be given.
    keep_programs: whether compiled programs are kept; JAX writes those for devices that are not there, but cannot read
      them.
    `main` may return a dict, which `--json` prints (not finite numbers as null); its `exit_code` is then used.
    """
    sys.unraisablehook = _interrupt_again
    code = execute(
        main,
        sys.argv,
        default_config,
        extra_flags,
        config_type=config_type,
        workdir=workdir,
        keep_programs=keep_programs,
    )
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
    keep_programs: bool = True,
) -> int:
    """`run` in process, on `argv` (the program's name first): returns the exit code."""
    with safe_output():
        return _execute(main, argv, default_config, extra_flags or {}, config_type, workdir, keep_programs)


def _execute(
    main: Main,
    argv: Sequence[str],
    default_config: str | None,
    extra_flags: ExtraFlags,
    config_type: type | None,
    workdir: bool,
    keep_programs: bool,
) -> int:
    try:
        values = define_flags(config_type, default_config, extra_flags)
        if any(arg in _HELP for arg in argv[1:]):
            print("\n".join(_list_flags(main, values)))
            if "--helpfull" in argv and config_type is not None:
                print("\n".join(_list_fields(values, argv, default_config, config_type)))
            return 0
        config = parse_flags(values, argv, default_config, config_type)
        if config_type is not None and values.print_config is not None:
            _print_config(config, values)
            return 0
        for name in values.plugin:
            import_plugin(name)
        if workdir and not values.workdir:
            raise InputError("--workdir is missing: the directory of the run")
        keep_freed_memory()  # before JAX looks for devices
        with compile_cache(values.compile_cache if keep_programs else "off"):
            result = main(config, values)
        if values.json:
            _print_json(result or {})
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


def _list_flags(main: Main, values: flags.FlagValues) -> list[str]:
    """The documentation of the command, and a line for each of its flags."""
    lines = [(inspect.getdoc(inspect.getmodule(main)) or inspect.getdoc(main) or "").strip(), "", "Flags:"]
    for name in values:
        if name not in flags.FLAGS:
            flag = values[name]
            default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
            lines.append(f"  --{name}{'[=PREFIX]' * (name == 'print_config')}: {flag.help}{default}")
            if name == "config":
                lines.append("  --config.FIELD=VALUE: sets one field of it; --helpfull lists them all")
    return lines


def _list_fields(
    values: flags.FlagValues, argv: Sequence[str], default_config: str | None, config_type: type
) -> list[str]:
    """A line for each field: as the configuration that is named, or the default one, and the overrides set it."""
    args = [arg for arg in argv if arg not in _HELP]
    path = split_config(args)[0]
    if not path and not (default_config and os.path.exists(default_config)):
        return ["", "Fields and their defaults:", *(f"  {line}" for line in format_fields(config_type()))]
    config = parse_flags(values, args, default_config, config_type)
    title = f"Fields of {path or default_config}, with the overrides of this command:"
    return ["", title, *(f"  {line}" for line in format_fields(config))]


def _print_config(config: Any, values: flags.FlagValues) -> None:
    paths = select_fields(config, values.print_config)
    if values.json:
        _print_json(nest_fields(config, paths))
    else:
        print("\n".join(format_fields(config, paths)))


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(to_plain(value), ensure_ascii=False, allow_nan=False))


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
