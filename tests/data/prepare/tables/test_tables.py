"""The readers give back what was written, number rows as a line counter does, and name what is wrong with a file."""

import csv
import decimal
import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.prepare.tables import (
    as_binary,
    as_lists,
    find_inexact,
    open_table,
    parquet,
    print_any,
    read_batches,
    text,
)
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


def test_lists_lose_no_element_and_are_not_split_again():
    for kind in (pa.list_, pa.large_list, pa.list_view):
        lists = pa.array([["a", None, "b"], None, [], ["c,d", ""]], kind(pa.string()))
        assert as_lists(lists).to_pylist() == [[b"a", b"b"], [], [], [b"c,d", b""]]
        assert as_binary(lists).to_pylist() == [b"a,b", b"", b"", b"c,d,"]
    pairs = pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.string(), 2))
    assert as_lists(pairs).to_pylist() == [[b"a", b"b"], [], [b"c"]]
    assert as_lists(pairs[1:]).to_pylist() == [[], [b"c"]]
    assert as_lists(pa.array([[1.5, float("nan"), 3.0, None]])).to_pylist() == [[b"1.5", b"3"]]


@given(st.lists(st.one_of(st.none(), st.floats(), st.integers(-(2**60), 2**60).map(float)), max_size=20))
def test_floats_are_printed_as_the_numbers_they_are(values):
    found = as_binary(pa.array(values, pa.float64())).to_pylist()
    for value, word in zip(values, found, strict=True):
        if value is None or value != value:
            assert word == b""
        elif value == int(value if abs(value) < 2**53 else 0) and abs(value) < 2**53:
            assert word == str(int(value)).encode()
        else:
            assert float(word) == value


@pytest.mark.parametrize(
    ("kind", "values", "inexact"),
    [
        (pa.float64(), [1.0, None, float("nan"), 2.5, 2.0**53, 2.0**53 - 1, float("inf")], [3, 4, 6]),
        (pa.float32(), [1.0, 2.0**24, 2.0**24 - 1, 0.1], [1, 3]),
        (pa.int64(), [2**62, None], []),
        (pa.string(), ["2.5", "nan"], []),
    ],
)
def test_floats_that_are_no_exact_ids_are_found(kind, values, inexact):
    assert [k for k, bad in enumerate(find_inexact(pa.array(values, kind))) if bad] == inexact


def test_every_type_is_printed_or_named(tmp_path):
    """Views, which arrow cannot take from, and what has no text are printed in the quarantine all the same."""
    table = pa.table(
        {
            "view": pa.array(["x", None], pa.string_view()),
            "bytes": pa.array([b"x", b"\xff"], pa.binary_view()),
            "fixed": pa.array([b"xy", None], pa.binary(2)),
            "pairs": pa.array([{"a": 1}, None]),
            "nothing": pa.array([None, None]),
            "money": pa.array([decimal.Decimal("1.50"), None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (batch,) = read_batches(open_table(tmp_path, "a.parquet"), list(table.column_names))
    assert {name: print_any(array) for name, array in batch.columns.items()} == {
        "view": ["x", ""], "bytes": ["x", "\\xff"], "fixed": ["xy", ""], "pairs": ["{'a': 1}", "None"],
        "nothing": ["", ""], "money": ["1.50", ""],
    }  # fmt: skip


def test_a_folder_of_parts_is_one_table(tmp_path):
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    parts = {"part-1": pa.table({"b": [3], "a": ["z"]}), "part-0": pa.table({"a": ["x", "y"], "b": [1.0, 2.0]})}
    for name, part in parts.items():
        pq.write_table(part, folder / f"{name}.snappy.parquet")
    for name in ("_SUCCESS", ".part-0.snappy.parquet.crc"):
        (folder / name).write_bytes(b"")
    for name in ("a.parquet", "a.parquet/"):
        assert read_all(tmp_path, name, ["a", "b"]) == ({1: (b"x", b"1"), 2: (b"y", b"2"), 3: (b"z", b"3")}, [])
    pq.write_table(pa.table({"a": ["z"], "c": [1]}), folder / "part-2.parquet")
    with pytest.raises(InputError, match=r"^a\.parquet/part-2\.parquet: other columns than a\.parquet/part-0\.snappy"):
        open_table(tmp_path, "a.parquet")
    (folder / "part-2.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"^a\.parquet/part-2\.parquet: cannot be read as Parquet"):
        open_table(tmp_path, "a.parquet")
    (folder / "part-2.parquet").unlink()
    for wrong, message in (("notes.txt", "no Parquet file"), ("year=2024", "a folder within a table")):
        (folder / wrong).mkdir() if "=" in wrong else (folder / wrong).write_bytes(b"")
        with pytest.raises(InputError, match=rf"^a\.parquet/{wrong}: {message}"):
            open_table(tmp_path, "a.parquet")
        (folder / wrong).rmdir() if "=" in wrong else (folder / wrong).unlink()
    (tmp_path / "b.parquet").mkdir()
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(InputError, match=r"^b\.parquet: a folder without a Parquet file"):
        open_table(tmp_path, "b.parquet")
    with pytest.raises(InputError, match=r"^b\.csv: no file; only a Parquet table may be a folder"):
        open_table(tmp_path, "b.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n", b"\r\n\r\n\r\n"])
def test_blank_lines_at_the_end_are_no_rows(tmp_path, name, ending):
    separator = b"," if name == "a.csv" else b"\t"
    write(tmp_path / name, separator.join([b"a", b"b"]) + b"\n\n" + separator.join([b"1", b"2"]) + ending)
    assert read_all(tmp_path, name, ["a", "b"]) == ({1: (b"", b""), 2: (b"1", b"2")}, [])


@pytest.mark.parametrize(
    ("name", "header", "hint"),
    [
        ("a.csv", b"user;item", "one column that holds ';'; the separator of format csv is ','"),
        ("a.csv", b"user\titem", "one column that holds a tab; the separator of format csv is ','"),
        ("a.tsv", b"user,item", "one column that holds ','; the separator of format tsv is a tab"),
        ("a.tsv", b"user|item", "one column that holds '|'; the separator of format tsv is a tab"),
    ],
)
def test_another_separator_is_hinted_at(tmp_path, name, header, hint):
    write(tmp_path / name, header + b"\n1;2\n")
    with pytest.raises(InputError) as error:
        open_table(tmp_path, name).require("user", "data.schema.user")
    assert str(error.value).endswith(f"there are: {header.decode()} ({hint})")


def test_a_column_name_that_is_no_utf8_is_told(tmp_path):
    pq.write_table(pa.table({"user": ["a"], "zzzz": ["b"]}), tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw.replace(b"zzzz", b"z\xffzz"))
    with pytest.raises(InputError, match=r"^a\.parquet: .*bad UTF-8"):
        open_table(tmp_path, "a.parquet")
    write(tmp_path / "a.csv", "user,item\n1,2\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"^a\.csv, header: bad UTF-8 .*; the file seems to be UTF-16$"):
        open_table(tmp_path, "a.csv")


@pytest.mark.parametrize("place", [25, 200, 3000, -3000])
def test_a_broken_block_of_a_gzip_file_is_refused(tmp_path, place):
    lines = b"".join(b"%d\t%d\n" % (k * 7919 % 9973, k * k % 9967) for k in range(20_000))
    data = bytearray(gzip.compress(b"a\tb\n" + lines))
    place %= len(data)
    data[place : place + 20] = b"\xff" * 20
    (tmp_path / "a.tsv.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"^a\.tsv\.gz(, header|, after row \d+)?: "):
        read_all(tmp_path, "a.tsv.gz", ["a"])


def test_a_value_that_a_dictionary_holds_once_is_unpacked_for_few_rows_at_a_time(tmp_path, monkeypatch):
    """Ten kilobytes of a file may stand for gigabytes; other tables are read in batches of the usual length."""
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 1 << 22)
    table = pa.table({"a": ["x" * (1 << 16)] * 1000, "b": [str(k) for k in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", row_group_size=400)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 15
    sizes = [len(batch.rows) for batch in read_batches(open_table(tmp_path, "a.parquet"), ["a", "b"])]
    assert (max(sizes) << 16, sum(sizes)) == (1 << 22, 1000)
    sizes = [len(batch.rows) for batch in read_batches(open_table(tmp_path, "a.parquet"), ["b"])]
    assert sizes == [1000]
    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", (1 << 16) - 1)
    with pytest.raises(InputError, match=r"^a\.parquet, column a: a value has more than 65,535 bytes$"):
        next(read_batches(open_table(tmp_path, "a.parquet"), ["a", "b"]))


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_column_that_unpacks_to_far_more_than_it_takes_is_refused(tmp_path, monkeypatch, use_dictionary):
    table = pa.table({"a": ["x" * (1 << 21)], "b": ["y"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=use_dictionary)
    monkeypatch.setattr(parquet, "MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"^a\.parquet, column a: [\d,]+ bytes that would unpack to 2,097,\d+"):
        next(read_batches(open_table(tmp_path, "a.parquet"), ["a"]))
    assert len(list(read_batches(open_table(tmp_path, "a.parquet"), ["b"]))) == 1


@pytest.mark.parametrize(
    "kind",
    [
        "list",
        "large_list",
        "fixed_size_list",
        "list_view",
        "list_of_dictionary",
        "view",
        "list_of_views",
        "lists",
        "structs",
        "map",
    ],
)
def test_what_lists_and_views_take_is_known_before_they_are_unpacked(tmp_path, monkeypatch, kind):
    """A dictionary's long value in every list, or the many elements of one list."""
    text, rows = "x" * (1 << 12), 1000
    of_kind = {
        "list": pa.list_(pa.string()),
        "large_list": pa.large_list(pa.string()),
        "fixed_size_list": pa.list_(pa.string(), 4),
        "list_of_dictionary": pa.list_(pa.dictionary(pa.int32(), pa.string())),
        "view": pa.string_view(),
        "list_of_views": pa.list_(pa.string_view()),
        "list_view": pa.list_view(pa.string()),
        "lists": pa.list_(pa.list_(pa.string())),
        "structs": pa.list_(pa.struct([("x", pa.string())])),
        "map": pa.map_(pa.string(), pa.string()),
    }[kind]
    value, n_bytes = (text, 1 << 12) if kind == "view" else ([text] * 4, 4 * ((1 << 12) + 1))
    if kind == "lists":
        value, n_bytes = [value], n_bytes + 1
    elif kind == "structs":
        value, n_bytes = [{"x": text}] * 4, n_bytes + 4
    elif kind == "map":
        value, n_bytes = [(text, text)] * 2, n_bytes + 2
    pq.write_table(pa.table({"a": pa.array([value] * rows, of_kind)}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 16
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 50 * n_bytes)
    sizes = [len(batch.rows) for batch in read_batches(open_table(tmp_path, "a.parquet"), ["a"])]
    assert sizes == [50] * 20
    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", n_bytes - 1)
    with pytest.raises(InputError, match=rf"^a\.parquet, column a: a value has more than {n_bytes - 1:,} bytes$"):
        next(read_batches(open_table(tmp_path, "a.parquet"), ["a"]))


def test_lists_of_very_many_elements_are_refused_before_they_are_read(tmp_path, monkeypatch):
    table = pa.table({"a": pa.array([[1.5] * 1000, [2.5]]), "b": ["y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "MAX_ELEMENTS", 1000)
    with pytest.raises(
        InputError, match=r"^a\.parquet, column a\.list\.element: 1,001 elements of lists in one row group"
    ):
        next(read_batches(open_table(tmp_path, "a.parquet"), ["a"]))
    assert len(list(read_batches(open_table(tmp_path, "a.parquet"), ["b"]))) == 1
    monkeypatch.setattr(parquet, "MAX_ELEMENTS", 1001)
    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", 20_000)  # as they would be printed
    with pytest.raises(InputError, match=r"^a\.parquet, column a: a value has more than 20,000 bytes$"):
        next(read_batches(open_table(tmp_path, "a.parquet"), ["a"]))
