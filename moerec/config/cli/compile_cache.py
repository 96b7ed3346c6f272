"""Compiled programs kept between processes, in a folder of the user's: JAX's persistent cache, for every command.

JAX writes an entry in place and never replaces one. Here stands what follows from that: what an interruption has left
half-written is removed when it is met, and the folder is kept below a size. JAX's own limit on the size takes a lock
for every entry that is read, needs one more package, and writes nothing more once a process was killed between an
entry and the file with the time of its last use.
"""

import contextlib
import hashlib
import os
import platform
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2 << 30
LEAST_COMPILE_S = 0.0  # all: what is hardly read faster than it is made would be made at each start
_FOLDER, _SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
_FAILED = r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)"


@contextlib.contextmanager
def compile_cache(choice: str) -> Iterator[None]:
    """Within it JAX looks programs up before it compiles them, and keeps those that it compiles.

    A folder that cannot be written, or an entry that cannot be read, is told in a line and costs only time.

    Args: choice: a folder; "off"; or "" for JAX_COMPILATION_CACHE_DIR, and without it the user's cache folder.
    """
    is_off = choice == "off" or (not choice and os.environ.get(_ENABLED, "").lower() in ("0", "false", "off", "no"))
    if is_off:
        _set_option(_ENABLED, False)
        yield
        return
    named = os.environ.get(_FOLDER) if not choice else None
    folder = Path(named) if named else _open_folder(choice)
    if folder is None:
        yield
        return
    _set_option(_FOLDER, str(folder))
    if _SECONDS not in os.environ:
        _set_option(_SECONDS, LEAST_COMPILE_S)
    with _heeding_failures(folder):
        yield


def _set_option(variable: str, value: bool | float | str) -> None:
    """For this process, whether or not it has imported JAX, and for its children."""
    os.environ[variable] = str(value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(variable.lower(), value)


def _open_folder(choice: str) -> Path | None:
    """The folder for this machine, there and with room in it; None, with the reason told, where it cannot be used."""
    try:
        above = Path(choice) if choice else find_user_cache() / "moerec" / "jit"
        folder = above / name_machine()
        # Who can write there can have code of theirs run here.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "is not writable", str(folder))
        limit_size(above, MOST_BYTES)
    except (OSError, RuntimeError) as error:
        place = getattr(error, "filename", None) or choice or "the user's cache folder"
        told = f"{place}: {getattr(error, 'strerror', None) or error}"
        print(f"compiled programs are not kept: {told} (--compile_cache=DIR moves them)", file=sys.stderr)
        return None
    return folder


def find_user_cache() -> Path:
    """`$XDG_CACHE_HOME`, or `~/.cache`. Raises: RuntimeError, where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"


def name_machine() -> str:
    """A folder's name for machines whose processors are the same.

    Programs for a CPU hold its instructions: one that another machine has put into a shared home may crash. JAX's keys
    tell processors apart as far as XLA does; that two never meet does not rest on it.
    """
    facts = [platform.machine(), platform.system()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
        named = r"(?:vendor_id|cpu family|model|stepping|flags|Features|CPU (?:implementer|architecture|variant|part))"
        facts += re.findall(rf"^{named}\s*:.*$", first, re.MULTILINE)
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:12]}"


def limit_size(above: Path, most_bytes: int) -> None:
    """Removes the entries that were used least recently, of all machines, until they take less than nine tenths."""
    found = []
    for path in above.glob("*/*-cache"):
        with contextlib.suppress(OSError):  # another process has removed it
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= most_bytes:
        return
    for _, size, path in sorted(found):
        if total <= 0.9 * most_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


@contextlib.contextmanager
def _heeding_failures(folder: Path) -> Iterator[None]:
    """JAX warns of an entry that it cannot read or write, and compiles: told in one line, and what is damaged goes."""
    told = set()
    with warnings.catch_warnings():
        # At the head, so that whoever makes errors of warnings does not make one of this.
        warnings.filterwarnings("always", message=_FAILED)
        show = warnings.showwarning

        def heed(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            failed = re.fullmatch(_FAILED, str(message), re.DOTALL)
            if not failed:
                show(message, *args, **kwargs)
                return
            doing, name, reason = failed.groups()
            if doing == "reading":
                remove_damaged(folder, name)
            if doing not in told:
                told.add(doing)
                done = "could not be read and is compiled anew" if doing == "reading" else "could not be kept"
                print(f"{folder}: the compiled {name} {done} ({reason.splitlines()[0]})", file=sys.stderr)

        warnings.showwarning = heed
        yield


def remove_damaged(folder: Path, name: str) -> None:
    """Removes the entries of a program that are cut off, or all of it where none is: JAX would never replace them."""
    entries = [path for path in folder.glob("*-cache") if path.name.startswith(f"{name}-")]
    damaged = [path for path in entries if not _is_whole(path)]
    for path in damaged or entries:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_whole(path: Path) -> bool:
    try:
        zlib.decompress(path.read_bytes())
    except (OSError, zlib.error):
        return False
    return True
