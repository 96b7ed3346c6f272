"""The bytes of a text file as a bounded stream: unpacked while they are read, with a limit on the length of a line.

A small gzip file may unpack to any number of bytes without a line end, or to nothing else but line ends. Either is
refused once a few megabytes of it have been read.
"""

import io
from pathlib import Path

import pyarrow as pa

from moerec.errors import InputError

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 4 << 20  # half a block of the parser, in which a byte above 127 takes two
MAX_BLANK_BYTES = 1 << 20  # of line ends behind one another
BOM = "\ufeff".encode()
_LINE_ENDS = b"\r\n"


class LineStream(io.RawIOBase):
    """A text file's bytes without the byte order mark at the start and without the blank lines at the end.

    Memory: one read's bytes and a chunk. Reading raises InputError at a line longer than `MAX_LINE_BYTES` and at more
    than `MAX_BLANK_BYTES` of line ends in a row; pa.ArrowException or OSError where a gzip file is damaged.
    """

    def __init__(self, path: Path, label: str):
        self._label = label
        self._stream = pa.input_stream(str(path), "gzip" if path.suffix == ".gz" else None)
        self._ready = bytearray()  # to be given out
        self._held = b""  # line ends that are given out only if more text follows
        self._line_bytes = 0  # of the line that is not yet at its end
        self._is_at_end = False
        start = self._stream.read(len(BOM))
        self._take(b"" if start == BOM else start)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        while not self._is_at_end and (size < 0 or len(self._ready) < size):
            chunk = self._stream.read(CHUNK_BYTES)
            if chunk:
                self._take(chunk)
            else:
                self._is_at_end = True
                self._ready += self._held[:1]
        n = len(self._ready) if size < 0 else size
        found = bytes(self._ready[:n])
        del self._ready[:n]
        return found

    def readinto(self, buffer) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self):
        self._stream.close()
        super().close()

    def _take(self, chunk: bytes):
        self._check_lines(chunk)
        text = chunk.rstrip(_LINE_ENDS)
        if text:
            self._ready += self._held
            self._ready += text
            self._held = b""
        self._held += chunk[len(text) :]
        if len(self._held) > MAX_BLANK_BYTES:
            raise InputError(f"{self._label}: more than {MAX_BLANK_BYTES:,} line ends in a row; is it a text table?")

    def _check_lines(self, chunk: bytes):
        """Lines within a chunk are short: only one that goes on from or into another chunk can be too long."""
        ends = [place for end in (b"\n", b"\r") if (place := chunk.find(end)) >= 0]
        longest = self._line_bytes + (min(ends) if ends else len(chunk))
        self._line_bytes = len(chunk) - 1 - max(map(chunk.rfind, (b"\n", b"\r"))) if ends else longest
        if max(longest, self._line_bytes) > MAX_LINE_BYTES:
            raise InputError(
                f"{self._label}: a line has more than {MAX_LINE_BYTES:,} bytes; is it a text table, with a header?"
            )
