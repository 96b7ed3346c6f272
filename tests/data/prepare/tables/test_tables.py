"""The readers give back what was written, number rows as a line counter does, and name what is wrong with a file."""

import csv
import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.prepare.tables import text
from moerec.data.prepare.tables import as_binary, open_table, read_batches
from moerec.errors import InputError


def read_all(folder, name, columns, format="auto"):
    """Row number -> values of the columns; and the ragged rows."""
    rows, ragged = {}, []
    for batch in read_batches(open_table(folder, name, format), columns):
        values = [as_binary(batch.columns[column]).to_pylist() for column in columns]
        rows.update(zip(batch.rows.tolist(), zip(*values, strict=True), strict=True))
        ragged += [(row.row, row.n_found) for row in batch.ragged]
    return rows, ragged


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# any bytes that cannot end a field or a line
FIELD = st.binary(max_size=6).map(lambda value: bytes(byte for byte in value if byte not in b"\t\r\n"))


# A row must fit into a block, in which bytes above 127 count twice.
@given(lines=st.lists(st.lists(FIELD, min_size=1, max_size=4), max_size=30), n=st.sampled_from([64, 96, 1 << 20]))
def test_any_bytes_and_any_number_of_fields_keep_their_row_numbers(tmp_path_factory, lines, n):
    folder = tmp_path_factory.mktemp("tsv")
    lines = [line for line in lines if line != [b""]]  # an empty line is a row of empty fields
    write(folder / "a.tsv", b"\n".join([b"x\ty\tz", *(b"\t".join(line) for line in lines)]) + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", n)
        rows, ragged = read_all(folder, "a.tsv", ["z", "x"])
    assert rows == {k: (line[2], line[0]) for k, line in enumerate(lines, 1) if len(line) == 3}
    assert ragged == [(k, len(line)) for k, line in enumerate(lines, 1) if len(line) != 3]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\t\n"), max_size=8)
CELLS = st.lists(st.tuples(TEXT.map(lambda text: "k" + text), TEXT), min_size=1, max_size=20)


@given(cells=CELLS)
def test_every_format_reads_the_same(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("formats")
    tab = "".join(f"{a}\t{b}\n" for a, b in cells).encode()
    for name in ("a.tsv", "a.tsv.gz"):
        write(folder / name, b"a\tb\n" + tab)
    for name in ("a.inter", "a.item.gz", "a.user"):
        write(folder / name, b"a:token\tb:token_seq\n" + tab)
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("a", "b"), *cells])
    for name in ("a.csv", "a.csv.gz"):
        write(folder / name, buffer.getvalue().encode())
    pq.write_table(pa.table({"a": [a for a, _ in cells], "b": [b for _, b in cells]}), folder / "a.parquet")
    expected = {k: (a.encode(), b.encode()) for k, (a, b) in enumerate(cells, 1)}
    for path in folder.iterdir():
        assert read_all(folder, path.name, ["a", "b"]) == (expected, []), path.name


def test_csv_takes_quotes_and_tsv_does_not(tmp_path):
    write(tmp_path / "a.csv", b'a,b\n"1\n2","x,""y"""\nragged\n3,4\n')
    write(tmp_path / "a.tsv", b'a\tb\n"1\tx\n2"\ty\n')
    assert read_all(tmp_path, "a.csv", ["a", "b"]) == ({1: (b"1\n2", b'x,"y"'), 3: (b"3", b"4")}, [(2, 1)])
    assert read_all(tmp_path, "a.tsv", ["a", "b"]) == ({1: (b'"1', b"x"), 2: (b'2"', b"y")}, [])


def test_line_ends_byte_order_mark_and_a_header_alone(tmp_path):
    write(tmp_path / "a.tsv", "\ufeffцена\tb\r\n1\t2\r\n3\t4".encode())
    assert read_all(tmp_path, "a.tsv", ["цена", "b"]) == ({1: (b"1", b"2"), 2: (b"3", b"4")}, [])
    write(tmp_path / "a.csv", '\ufeff"user, id","b"\r\n"1","2"\r\n'.encode())  # as spreadsheets write it
    assert read_all(tmp_path, "a.csv", ["user, id", "b"]) == ({1: (b"1", b"2")}, [])
    for ending in (b"", b"\n"):
        write(tmp_path / "b.tsv", b"a\tb" + ending)
        assert read_all(tmp_path, "b.tsv", ["a"]) == ({}, [])


def test_parquet_types_become_text(tmp_path):
    table = pa.table(
        {
            "n": pa.array([7, None], pa.int64()),
            "tags": pa.array([["a", "b"], None], pa.list_(pa.string())),
            "word": pa.array(["x", "y"]).dictionary_encode(),
            "flag": pa.array([True, False]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows, _ = read_all(tmp_path, "a.parquet", ["n", "tags", "word", "flag"])
    assert rows == {1: (b"7", b"a,b", b"x", b"true"), 2: (b"", b"", b"y", b"false")}


@pytest.mark.parametrize("keep", [5, 40, -9, -3])
def test_a_cut_gzip_file_is_refused(tmp_path, keep):
    whole = gzip.compress(b"a\tb\n" + b"".join(b"%d\t%d\n" % (k, k * k) for k in range(5000)))
    (tmp_path / "a.tsv.gz").write_bytes(whole[:keep])
    with pytest.raises(InputError, match=r"^a\.tsv\.gz, (header|after row \d+): cannot be read"):
        read_all(tmp_path, "a.tsv.gz", ["a"])


def test_a_damaged_file_is_refused(tmp_path):
    whole = bytearray(gzip.compress(b"a\tb\n" + b"1\t2\n" * 5000))
    whole[-6] ^= 1  # the checksum
    (tmp_path / "a.tsv.gz").write_bytes(whole)
    (tmp_path / "b.tsv.gz").write_bytes(b"a\tb\n")
    pq.write_table(pa.table({"a": list(range(1000))}), tmp_path / "whole.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    for name in ("a.tsv.gz", "b.tsv.gz", "c.parquet"):
        with pytest.raises(InputError, match=f"^{name}.*cannot be read"):
            read_all(tmp_path, name, ["a"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", b"", "a.tsv: the file is empty"),
        ("a.tsv", b"\n1\n", "a.tsv: the file is empty or its first line is"),
        ("a.tsv", b"a\xff\tb\n", "a.tsv, header: bad UTF-8"),
        ("a.txt", b"a\tb\n", "a.txt: the format is not clear"),
        ("a.tsv", b"b\tc\n", "a.tsv, header, column a: no such column (config.data.schema.user); there are: b, c"),
        ("a.csv", b"a,b,a\n", "a.csv, header, column a: the name occurs twice"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, data, message):
    write(tmp_path / name, data)
    with pytest.raises(InputError) as error:
        open_table(tmp_path, name).require("a", "data.schema.user")
    assert str(error.value).startswith(message)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^none\.tsv: no such file in "):
        open_table(tmp_path, "none.tsv")
