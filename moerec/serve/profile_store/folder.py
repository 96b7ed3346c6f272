"""The files of a store, opened so that nothing outside its folder is read or written, whatever stands in the folder.

No component below the folder may be a link: a file is opened relative to its directory's descriptor, without following
links, and must be a regular file with one name. A hard link is refused, too, since what is written in place here would
change under its other name (a backup made of hard links, say).
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from moerec.errors import InputError
from moerec.files import require_utf8

META = "profile_store.json"
STATES = "states"
USERS = "users.bin"
IDS = "ids.bin"
_SHARD = re.compile(r"c\.(0|[1-9][0-9]{0,11})\.0")  # as Zarr calls them
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in a file's place must not keep us waiting


def find_folder(folder: Path | str) -> Path:
    """The store's path without links and `..`, which TensorStore would not take.

    Raises InputError where it is not UTF-8.
    """
    require_utf8(folder)
    return Path(os.path.realpath(folder))


def name_shard(number: int) -> str:
    """The name of a shard's file below the store."""
    return f"{STATES}/c.{number}.0"


def is_shard(name: str) -> bool:
    """Whether a path below the store is that of a shard."""
    first, slash, last = name.partition("/")
    return first == STATES and bool(slash) and _SHARD.fullmatch(last) is not None


@contextlib.contextmanager
def open_file(folder: Path, name: str, flags: int) -> Iterator[int]:
    """A descriptor of a regular file of the store. Args: `name`, its path below the folder, of one or two components.

    Raises:
      InputError: the file, or the directory that it is in, is a link, has a second name, or is no file.
      FileNotFoundError: it is not there.
    """
    with open_parent(folder, name) as (parent, base):
        try:
            handle = os.open(base, flags | _OPEN, 0o666, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise InputError(_refusal(folder / name)) from None
            raise _with_path(error, folder / name) from None
    try:
        _require_own(os.fstat(handle), folder / name)
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def open_parent(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """A descriptor of the directory that a file of the store is in, and the file's name in it."""
    directory, _, base = name.rpartition("/")
    with contextlib.ExitStack() as stack:
        parent = os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, parent)
        if directory:
            try:
                parent = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise InputError(_refusal(folder / directory)) from None
                raise _with_path(error, folder / directory) from None
            stack.callback(os.close, parent)
        yield parent, base


def refuse_links(folder: Path) -> None:
    """Raises InputError where anything in the folder or among its states is a link or no file: TensorStore reads them
    by their paths.
    """
    for directory in (folder, folder / STATES):
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # another process is at work
                found = os.lstat(directory / name)
                if not (directory == folder and name == STATES and stat.S_ISDIR(found.st_mode)):
                    _require_own(found, directory / name)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files, ours and TensorStore's, of processes that are dead."""
    for directory in ("", f"{STATES}/"):
        for name in os.listdir(folder / directory):
            if name.endswith((".tmp", ".__lock")):
                with open_parent(folder, directory + name) as (parent, base):
                    os.unlink(base, dir_fd=parent)


def _require_own(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise InputError(_refusal(path))


def _refusal(path: Path) -> str:
    return f"{path}: is a link, or no file; what is in a store must be its own, and have one name"


def _with_path(error: OSError, path: Path) -> OSError:
    return type(error)(error.errno, error.strerror, str(path))
