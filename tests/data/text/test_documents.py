"""Documents of files that are written here, whole and damaged."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.text import documents as module
from moerec.data.text.documents import read_documents, read_folder
from moerec.errors import InputError

TEXTS = ["Первый\r\nдокумент", "the second\u2028one 👩‍👩‍👧", " "]
LINES = "".join(json.dumps({"id": f"{n}", "text": text}, ensure_ascii=n == 1) + "\n" for n, text in enumerate(TEXTS))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", TEXTS[0], [TEXTS[0]]),
        ("a.txt", "\ufeff" + TEXTS[1], [TEXTS[1]]),
        ("a.txt", "", []),
        ("a.jsonl", LINES, TEXTS),
        ("a.jsonl", LINES.replace("\n", "\r\n\n\n").rstrip(), TEXTS),
        ("a.jsonl", "", []),
        ("a.jsonl", '{"id": "x", "ru": "да", "n": 3, "en": "yes"}\n{"en": "", "ru": "нет"}', ["да", "yes", "нет"]),
        ("a.jsonl", '{"ru": "не он", "text": "он"}\n{"text": ""}\n', ["он"]),
    ],
)
def test_documents_are_what_was_written(name, content, documents, suffix, tmp_path):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix else content.encode())
    assert list(read_documents(path)) == documents


@given(st.lists(st.text(min_size=1), max_size=4), st.booleans())
def test_any_text_comes_back_from_json_lines(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.mktemp("documents") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts]
    path.write_bytes("".join(lines).encode())
    assert list(read_documents(path)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, ": no such file"),
        ("a.csv", b"a", ": the name must end in one of .txt, .txt.gz, .jsonl, .jsonl.gz, .parquet"),
        ("a.txt", b"one\ntwo \xff", ":2: is no UTF-8 text (byte 8 of the file)"),
        ("a.txt.gz", b"plain", ": is damaged (Not a gzipped file (b'pl'))"),
        ("a.txt.gz", gzip.compress(b"one two three", mtime=0)[:-10], ": is damaged ("),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:60], ": is damaged ("),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ":3: is no JSON (Expecting value"),
        ("a.jsonl", b'{"text": "\xff"}', ":1: is no JSON ('utf-8' codec"),
        ("a.jsonl", b'{"text": "\\ud800"}', ":1: is no JSON ("),
        ("a.jsonl", b'["text"]', ":1: is no JSON object"),
        ("a.jsonl", b'{"text": 3}', ":1: the field text must be a string"),
        ("a.jsonl", b'{"text": null, "ru": "x"}', ":1: the field text must be a string"),
        ("a.jsonl", b'{"id": "x", "n": 3}', ":1: has no field text, nor another string but the id"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}{message}')}") as error:
        list(read_documents(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "documents"),
    [
        ({"text": TEXTS, "title": ["a", "b", "c"]}, TEXTS),
        ({"id": ["x", "y"], "ru": ["да", None], "n": [1, 2], "en": ["yes", "no"]}, ["да", "yes", "no"]),
        ({"text": pa.array(["a", "", "a"]).dictionary_encode()}, ["a", "a"]),
        ({"text": pa.array(TEXTS, pa.large_string())}, TEXTS),
        ({"text": pa.array([], pa.string())}, []),
    ],
)
def test_documents_of_parquet_files_are_their_rows(columns, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PARQUET_ROWS", 2)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == documents


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b", None]}, ", row 3: has no text in text"),
        ({"id": ["a"], "ru": [None], "en": pa.array([None], pa.string())}, ", row 1: has no text in en"),
        ({"text": [1, 2]}, ", column text: must hold strings, not int64"),
        ({"id": ["a"], "n": [1]}, ": has no column text, nor another one of strings but the id"),
        (
            {"text": pa.array([b"a", b"b", b"c\xff"]).view(pa.string())},
            ", row 3, column text: is no UTF-8 text (byte 1)",
        ),
        (None, ", after row 0: cannot be read on: "),
    ],
)
def test_what_a_parquet_file_lacks_is_named(columns, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PARQUET_ROWS", 2)
    path = tmp_path / "a.parquet"
    if columns is None:
        path.write_bytes(b"PAR1 and no more")
    else:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}{message}')}") as error:
        list(read_documents(path))
    assert "\n" not in str(error.value)


def test_what_precedes_a_bad_line_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nb')
    documents = read_documents(tmp_path / "a.jsonl")
    assert next(documents) == "a"
    with pytest.raises(InputError, match=r"a\.jsonl:2: is no JSON"):
        next(documents)


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("3")
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"4"))
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.txt").write_text("no")
    assert list(read_folder(tmp_path)) == ["1", "2", "3", "4"]
    for folder, message in ((tmp_path / "x", "no such folder"), (tmp_path / "b.txt", "is no folder")):
        with pytest.raises(InputError, match=f"^{re.escape(str(folder))}: {message}$"):
            list(read_folder(folder))
    with pytest.raises(InputError, match="has no file of text"):
        list(read_folder(tmp_path / "d.txt"))


def test_the_real_texts_begin_as_they_do(data_dir):
    documents = read_documents(data_dir / "text" / "ru_en_libreoffice_help.jsonl.gz")
    with gzip.open(data_dir / "text" / "ru_en_libreoffice_help.jsonl.gz") as file:
        page = json.loads(file.readline())
    assert [next(documents), next(documents)] == [page["ru"], page["en"]]
