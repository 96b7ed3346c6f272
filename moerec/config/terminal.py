"""Text from data made safe to show: control characters are written out, not obeyed.

Names and titles come from whoever wrote a catalogue. A terminal obeys what they may hold (colours, the title of the
window, a line that is overwritten), and a page shows text in another order than it has.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# C0 and C1 controls and DEL; line and paragraph separators; what turns the direction of text; what annotates or tags it
# invisibly; halves of surrogate pairs, which no encoding has.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters as JSON writes them (backslash, u, four digits), so that JSON remains what it was.

    Args: keep: control characters that stay, such as line ends.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _write_out(found[0]), text)


def _write_out(text: str) -> str:
    """UTF-16 code units, as in JSON."""
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def announce(name: str, work: str) -> None:
    """What a run sets about next, as a line of its own on standard error, after the run's name."""
    print(printable(f"{name}  {work}" if name else work), file=sys.stderr, flush=True)


class SafeStream:
    """A text stream to which only printable text, line ends and tabs are written, whatever it is given.

    A carriage return stays where nothing else is written with it: so a progress line goes back to its beginning.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's own; what its encoding lacks is written out, too."""
        shown = printable(text, keep="\n\t" if text != "\r" else "\r")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            shown.encode(encoding)
        except UnicodeEncodeError:
            shown = "".join(c if c.encode(encoding, "ignore") else _write_out(c) for c in shown)
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Standard output and standard error as `SafeStream`s; and records of libraries' logs, which hold on to the streams
    that they found, with printable messages.
    """
    before, make_record = (sys.stdout, sys.stderr), logging.getLogRecordFactory()

    def make_safe(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        with contextlib.suppress(Exception):  # a message that cannot be formatted; logging tells of it
            record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
        return record

    sys.stdout, sys.stderr = (stream and SafeStream(stream) for stream in before)  # type: ignore[assignment]
    logging.setLogRecordFactory(make_safe)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        logging.setLogRecordFactory(make_record)
