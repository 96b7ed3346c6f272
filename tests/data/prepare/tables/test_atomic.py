"""RecBole's atomic files: the typed header, and the real files of ml-100k."""

import gzip

import pytest

from moerec.data.prepare.tables import as_binary, open_table, read_batches
from moerec.data.prepare.tables.atomic import parse_header, sequence_separators
from moerec.errors import InputError


def test_names_lose_their_types_and_sequences_get_a_separator():
    types = parse_header(["user_id:token", "a:b:float", "class:token_seq", "v:float_seq"], "x.inter")
    assert types == {"user_id": "token", "a:b": "float", "class": "token_seq", "v": "float_seq"}
    assert sequence_separators(types) == {"class": " ", "v": " "}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["user_id"], "x.inter, header, column 'user_id': no type"),
        ([":token"], "x.inter, header, column ':token': no type"),
        (["a:int"], "x.inter, header, column a: type 'int' is none of token, float, token_seq, float_seq"),
        (["a:token", "a:float"], "x.inter, header, column a: the name occurs twice"),
    ],
)
def test_wrong_headers_are_named(fields, message):
    with pytest.raises(InputError) as error:
        parse_header(fields, "x.inter")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("ending", "n"), [("inter", 100_000), ("item", 1682), ("user", 943)])
def test_the_real_files_read_as_their_lines_do(data_dir, ending, n):
    name = f"ml-100k.{ending}.gz"
    table = open_table(data_dir / "ml100k", name)
    with gzip.open(data_dir / "ml100k" / name, "rb") as file:
        header, *lines = file.read().splitlines()
    assert [f"{column}:{kind}" for column, kind in parse_header(header.decode().split("\t"), name).items()] == [
        *header.decode().split("\t")
    ]
    seen = 0
    for batch in read_batches(table, list(table.columns)):
        columns = [as_binary(batch.columns[column]).to_pylist() for column in table.columns]
        for values, row in zip(zip(*columns, strict=True), batch.rows, strict=True):
            assert b"\t".join(values) == lines[row - 1]
        seen += len(batch.rows)
    assert seen == n == len(lines)
