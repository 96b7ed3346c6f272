"""Chromium without a window, spoken to over a pair of pipes (its DevTools protocol): no port, no package."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
TIMEOUT_S = 90


def find_browser() -> str | None:
    """The path of the first one that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `errors` are what it has reported: exceptions, and what went to its console or log as an error."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer, self._number = read, write, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result; what else is said meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, width: int, scheme: str = "light") -> None:
        """Loads a file into a window of so many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def capture(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        is_error = method == "Runtime.exceptionThrown"
        is_error |= method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert")
        is_error |= method == "Log.entryAdded" and params["entry"]["level"] == "error"
        if is_error:
            self.errors.append(json.dumps(params))
        return message


@contextlib.contextmanager
def open_browser(path: str) -> Iterator[Browser]:
    """Starts the browser of this path, and ends it."""
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [path, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        # It reads from 3 and writes to 4; the ends go by way of high numbers, since one of them may be 3 or 4.
        actions = [
            (os.POSIX_SPAWN_DUP2, from_us, 203),
            (os.POSIX_SPAWN_DUP2, to_us, 204),
            (os.POSIX_SPAWN_DUP2, 203, 3),
            (os.POSIX_SPAWN_DUP2, 204, 4),
            (os.POSIX_SPAWN_CLOSE, 203),
            (os.POSIX_SPAWN_CLOSE, 204),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        process = os.posix_spawn(path, command, dict(os.environ), file_actions=actions, setpgroup=0)
        try:
            os.close(from_us)
            os.close(to_us)
            yield Browser(from_browser, to_browser)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(to_browser)
            os.close(from_browser)
