"""SIGTERM, with which clusters end a job: training saves and stops, within a grace period.

A thread of its own counts the signals, since Python runs no handler while the main thread compiles: so the period is
kept, and a second signal ends the process, whatever that thread is at.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from moerec.errors import TERMINATED

T = TypeVar("T")


class _Stop(BaseException):
    """Raised where a call is given up."""


class StopRequest:
    """Whether SIGTERM has come since the beginning of `catch`."""

    def __init__(self) -> None:
        self.is_made = False
        self._may_raise = False

    def unless_made(self, call: Callable[[], T]) -> T | None:
        """What the call returns; None where the request had come, or came in the meantime and the call was given up."""
        try:
            self._may_raise = True
            return None if self.is_made else call()
        except _Stop:
            return None
        finally:
            self._may_raise = False

    def _handle(self, *_: object) -> None:
        self.is_made = True
        if self._may_raise:
            self._may_raise = False
            raise _Stop

    @contextlib.contextmanager
    def catch(self, grace_s: float) -> Iterator[None]:
        """Within it SIGTERM makes the request; `grace_s` seconds later, or at a second one, the process is ended.

        Elsewhere than in the main thread, or where the program handles the signal itself, nothing is done.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        read, write = os.pipe()
        os.set_blocking(write, False)  # as the interpreter wants it
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(read, grace_s), daemon=True)
        watcher.start()
        signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(before)
            os.close(write)
            watcher.join()
            os.close(read)

    def _watch(self, read: int, grace_s: float) -> None:
        end: float | None = None  # of the period
        while True:
            wait_s = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([read], [], [], wait_s)[0]:
                _end("the grace period (train.grace_s) is over")
            numbers = os.read(read, 1)
            if not numbers:
                return
            if numbers[0] == signal.SIGTERM:
                if end is not None:
                    _end("a second time")
                self.is_made, end = True, time.monotonic() + grace_s


def _end(reason: str) -> NoReturn:
    os.write(2, f"\nerror: terminated, {reason}; the last checkpoint stays\n".encode())
    os._exit(TERMINATED)
