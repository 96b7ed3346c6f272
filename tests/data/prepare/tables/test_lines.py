"""The stream gives the bytes of a file but for the mark at its start and blank lines at its end, and has limits."""

import gzip
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.prepare.tables import lines, open_table, read_batches
from moerec.data.prepare.tables.lines import LineStream
from moerec.errors import InputError

PIECES = st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"bc", b"\xef\xbb\xbf", b"\0\xff", b'"']), max_size=30)


def read_in_pieces(path, size):
    with LineStream(path, path.name) as stream:
        return b"".join(iter(lambda: stream.read(size), b""))


@given(pieces=PIECES, chunk=st.integers(1, 9), size=st.integers(1, 9), packed=st.booleans())
def test_the_stream_is_the_file_without_mark_and_blank_end(tmp_path_factory, pieces, chunk, size, packed):
    data = b"".join(pieces)
    path = tmp_path_factory.mktemp("lines") / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk)
        found = read_in_pieces(path, size)
    body = data.removeprefix(b"\xef\xbb\xbf")
    kept = body.rstrip(b"\r\n")
    assert found == kept + body[len(kept) : len(kept) + 1]


@given(pieces=PIECES, chunk=st.integers(1, 9), limit=st.integers(3, 6))
def test_a_line_over_the_limit_is_refused_and_no_line_within_it(tmp_path_factory, pieces, chunk, limit):
    """A line within one chunk may be as long as that."""
    data = b"".join(pieces)
    path = tmp_path_factory.mktemp("lines") / "a.csv"
    path.write_bytes(data)
    longest = max(map(len, re.split(b"[\r\n]", data.removeprefix(b"\xef\xbb\xbf"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk)
        patch.setattr(lines, "MAX_LINE_BYTES", limit)
        if longest > max(limit, chunk):
            with pytest.raises(InputError, match="a line has more than"):
                read_in_pieces(path, 4)
        elif longest <= limit:
            read_in_pieces(path, 4)


@pytest.mark.parametrize("head", [b"", b"user,item\na,b\n"])
@pytest.mark.parametrize(("unit", "message"), [(b"\0", "a line has more than 4,194,304 bytes"), (b"\n", "more than")])
def test_a_small_file_that_unpacks_to_much_is_refused_early(tmp_path, head, unit, message):
    """Of 64 MiB that would be unpacked, a few are; the bound holds for any number that follows."""
    n_bytes = 64 << 20
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(head + unit * n_bytes, 1))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"^a\.csv\.gz: .*{message}"):
            list(read_batches(open_table(tmp_path, "a.csv.gz"), ["user"]))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 24 << 20


def test_the_bytes_that_are_unpacked_before_a_refusal_are_few(tmp_path, monkeypatch):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"user,item\n" + bytes(64 << 20), 1))
    taken = []
    take = LineStream._take
    monkeypatch.setattr(LineStream, "_take", lambda self, chunk: (taken.append(len(chunk)), take(self, chunk)))
    with pytest.raises(InputError):
        list(read_batches(open_table(tmp_path, "a.csv.gz"), ["user"]))
    assert sum(taken) < 16 << 20


def test_rows_that_are_all_ragged_are_refused_before_they_are_kept(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"user,item\na,b\n" + b"x\n" * 70_000)
    with pytest.raises(InputError, match=r"^a\.csv, row 2, 1 fields, the header has 2; so have 65,536 rows close by"):
        list(read_batches(open_table(tmp_path, "a.csv"), ["user"]))


def test_a_quote_that_is_never_closed_is_refused_within_two_blocks(tmp_path, monkeypatch):
    from moerec.data.prepare.tables import text

    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 12)
    (tmp_path / "a.csv").write_bytes(b'user,item\na,"b\n' + b"c,d\n" * 10_000)
    with pytest.raises(InputError, match=r"^a\.csv: a row has more than 4,096 bytes; is a quote not closed\?$"):
        list(read_batches(open_table(tmp_path, "a.csv"), ["user"]))
