"""Folders of documents that were prepared: what is in them, what is refused, and that a stream of them is the same."""

import collections
import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moerec.config import CorpusConfig, DataConfig
from moerec.data.pipeline.events import StreamOptions
from moerec.data.prepare.shards import Meta
from moerec.data.text import prepare as module
from moerec.data.text.corpus import END, TOKENIZER, Corpus, load_corpus, open_corpus
from moerec.data.text.prepare import find_first, is_current_text, prepare_text
from moerec.data.text.stream import TextStream
from moerec.data.text.token_shards import RECORD_TOKENS, MemoryTokens, TextMeta, TokenWriter, list_records, open_tokens
from moerec.errors import InputError
from tests.data.text.test_corpus import N_BARE, draw_texts, read_ids, share_of, split, write_texts
from tests.data.text.test_stream import RENDER, assert_same_batch

ROOT = Path(__file__).resolve().parents[3]


def make_config(folder: Path, texts: dict[str, list[str]], weights: tuple[str, ...] = (), **fields) -> DataConfig:
    """A corpus in each file of its own kind."""
    folder.mkdir(exist_ok=True)
    sources = []
    for k, (name, own) in enumerate(texts.items()):
        path = folder / f"{name}.{('jsonl', 'jsonl.gz', 'parquet')[k % 3]}"
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": own}), path)
        else:
            content = "".join(json.dumps({"text": text}) + "\n" for text in own).encode()
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        sources.append(f"{name}={path}")
    options = {"vocab_size": N_BARE, "valid_fraction": 0.3, **fields}
    corpus = CorpusConfig(sources=tuple(sources), weights=weights, **options)
    return DataConfig(source="text", corpus=corpus, n_shards=3)


TEXTS = {
    "one": draw_texts(30, seed=1),
    "two": [*draw_texts(20, seed=2), "long " * 3000],
    "three": draw_texts(25, seed=3),
}


def decode(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(ids[:-1]) for ids in split(corpus)]


@pytest.mark.parametrize("reader", ["memory", "shards"])
def test_a_folder_holds_all_corpora_document_by_document(tmp_path, reader):
    config = make_config(tmp_path / "in", TEXTS)
    report = prepare_text(config, tmp_path / "out")
    corpus, meta = open_corpus(tmp_path / "out", reader == "memory")
    expected = [text for own in TEXTS.values() for text in own]
    assert decode(corpus) == expected
    assert corpus.names == ("one", "two", "three")
    assert corpus.source.tolist() == [k for k, own in enumerate(TEXTS.values()) for _ in own]
    assert corpus.n_bytes.tolist() == [len(text.encode()) for text in expected]
    assert corpus.is_valid.tolist() == [share_of(text) < 0.3 for text in expected]
    assert all(ids[-1] == corpus.tokenizer.id_of(END) == meta.end for ids in split(corpus))
    assert len(meta.shards) == 3
    assert meta.token_bytes == 2
    for row, (name, own) in zip(report.corpora, TEXTS.items(), strict=True):
        assert (row["name"], row["n_documents"], row["n_duplicates"]) == (name, len(own), 0)
        assert row["n_tokens"] == sum(len(text.encode()) + 1 for text in own)
        assert row["n_valid"] == sum(share_of(text) < 0.3 for text in own)


def test_equal_documents_are_kept_once_across_corpora_and_never_lie_on_both_sides(tmp_path):
    texts = {"one": ["a", "b", "a", "c"], "two": ["d", "b", "e", "A", "d"], "three": ["e", "f", "a "]}
    texts = {name: [text * 3 for text in own] for name, own in texts.items()}
    corpus, meta = _prepare(tmp_path, texts)
    assert decode(corpus) == [text * 3 for text in ("a", "b", "c", "d", "e", "A", "f", "a ")]
    assert [row["n_duplicates"] for row in meta.corpora] == [1, 2, 1]
    kept, _ = _prepare(tmp_path / "all", texts, duplicates="keep")
    assert decode(kept) == [text for own in texts.values() for text in own]
    sides = collections.defaultdict(set)
    for text, is_held in zip(decode(kept), kept.is_valid.tolist(), strict=True):
        sides[text].add(is_held)
    assert all(len(found) == 1 for found in sides.values())
    assert {text: {is_held} for text, is_held in zip(decode(corpus), corpus.is_valid.tolist(), strict=True)} == sides


def _prepare(folder: Path, texts: dict[str, list[str]], **fields) -> tuple[Corpus, TextMeta]:
    folder.mkdir(exist_ok=True)
    prepare_text(make_config(folder / "in", texts, **fields), folder / "out")
    return open_corpus(folder / "out", in_memory=True)


def test_the_first_of_equal_hashes_is_found():
    key = np.random.default_rng(0).integers(0, 3, (50, 2)).astype("<u8")
    seen, expected = set(), []
    for row in map(tuple, key.tolist()):
        expected.append(row not in seen)
        seen.add(row)
    assert find_first(key).tolist() == expected
    assert find_first(key[:0]).tolist() == []


@pytest.mark.parametrize("at_once", [1, 7])
def test_batches_of_documents_change_nothing(tmp_path, monkeypatch, at_once):
    _, meta = _prepare(tmp_path, TEXTS, vocab_size=N_BARE + 20)
    monkeypatch.setattr(module, "_BATCH", at_once)
    _, again = _prepare(tmp_path / "again", TEXTS, vocab_size=N_BARE + 20)
    assert (again.sha256, again.tokenizer_sha256) == (meta.sha256, meta.tokenizer_sha256)


def test_no_corpus_is_in_memory_as_a_whole(tmp_path, monkeypatch):
    """While documents are read, no more of them are alive than two batches have, and the one that is being made."""
    alive, most = [0], [0]

    class Counted(str):
        def __init__(self, *_):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    read = module.TextSource.read
    monkeypatch.setattr(module.TextSource, "read", lambda self: (Counted(text) for text in read(self)))
    monkeypatch.setattr(module, "_BATCH", 4)
    prepare_text(make_config(tmp_path / "in", {"one": draw_texts(500)}), tmp_path / "out")
    assert most[0] <= 16


@pytest.mark.parametrize("weights", [(), ("one=1", "two=2", "three=0")])
def test_memory_shards_and_the_run_itself_give_one_stream(tmp_path, weights):
    config = make_config(tmp_path / "in", TEXTS, weights)
    prepare_text(config, tmp_path / "out")
    (tmp_path / "run").mkdir()
    corpora = [
        open_corpus(tmp_path / "out", in_memory=True)[0],
        open_corpus(tmp_path / "out", in_memory=False)[0],
        load_corpus(config, tmp_path / "run", N_BARE),
    ]
    options = StreamOptions(n_rows=3, row_len=50, history_len=30, seed=1)
    streams = [iter(TextStream(corpus, RENDER, options)) for corpus in corpora]
    for _ in range(40):
        first, *others = (next(stream) for stream in streams)
        for other in others:
            assert_same_batch(first, other)
    assert len({corpus.digest for corpus in corpora}) == 1
    if weights:
        assert streams[0].get_state()["rows"] == [40, 80, 0]


def test_training_reads_a_prepared_folder(tmp_path):
    """And needs the documents no more; a run keeps to the tokenizer that it began with."""
    config = make_config(tmp_path / "in", TEXTS, vocab_size=N_BARE + 9)
    prepare_text(config, tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "gone")
    (tmp_path / "run").mkdir()
    prepared = dataclasses.replace(config, prepared=str(tmp_path / "out"))
    corpus = load_corpus(prepared, tmp_path / "run", N_BARE + 9)
    assert decode(corpus) == [text for own in TEXTS.values() for text in own]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [TOKENIZER]
    with pytest.raises(InputError, match=r"^config\.model\.text\.vocab_size: 265 rows, but the tokenizer has 270"):
        load_corpus(prepared, tmp_path / "run", 265)
    prepare_text(make_config(tmp_path / "in", TEXTS, vocab_size=N_BARE + 8), tmp_path / "out")
    with pytest.raises(InputError, match=r"tokenizer\.json: is not the tokenizer of "):
        load_corpus(prepared, tmp_path / "run", N_BARE + 9)


def test_what_a_run_has_prepared_is_taken_again_and_other_documents_do_not_take_its_place(tmp_path, monkeypatch):
    config, run = make_config(tmp_path / "in", TEXTS), tmp_path / "run"
    run.mkdir()
    known = load_corpus(config, run, N_BARE).digest
    with monkeypatch.context() as patch:
        patch.setattr("moerec.data.text.corpus.prepare_text", None)
        assert load_corpus(config, run, N_BARE, known=known).digest == known
    (tmp_path / "in" / "one.jsonl").write_text('{"text": "something else"}\n' * 3)
    before = (run / "data" / "meta.json").read_bytes()
    assert not is_current_text(config, run / "data", run / TOKENIZER)
    with pytest.raises(InputError, match=r"run: this directory holds a run on other documents$"):
        load_corpus(config, run, N_BARE, known=known)
    assert (run / "data" / "meta.json").read_bytes() == before


def test_a_bad_line_is_named_with_its_file_and_nothing_is_written(tmp_path):
    config = make_config(tmp_path / "in", TEXTS)
    path = tmp_path / "in" / "one.jsonl"
    path.write_text(path.read_text() + '{"text": 3}\n')
    with pytest.raises(InputError, match=r"one\.jsonl:31: the field text must be a string$"):
        prepare_text(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sources": ("one",)}, r"sources: 'one' is not of the form \"name=path\""),
        ({"sources": ("a b=x",)}, r"sources: 'a b=x' is not of the form"),
        ({"sources": ("a=x", "a=y")}, r"sources: 'a' is there twice"),
        ({"path": "x", "sources": ("a=x",)}, "sources: there is a path, too"),
        ({"sources": ("a=x",), "weights": ("b=1",)}, "weights: 'b' is no corpus of sources"),
        ({"sources": ("a=x", "b=y"), "weights": ("b=1",)}, "weights: that of 'a' is missing"),
        ({"sources": ("a=x",), "weights": ("a=-1",)}, "weights: '-1' of 'a' is no number of at least 0"),
        ({"sources": ("a=x",), "weights": ("a=nan",)}, "weights: 'nan' of 'a' is no number"),
        ({"sources": ("a=x",), "weights": ("a=0",)}, "weights: must not all be 0"),
        ({"duplicates": "some"}, "duplicates: 'some' is none of drop, keep"),
        ({"city_documents": 0}, "city_documents: must be at least 1"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused_with_its_field(fields, told):
    with pytest.raises(InputError, match=rf"^config\.data\.corpus\.{told}"):
        CorpusConfig(**fields)


@pytest.mark.parametrize(
    ("sources", "weights", "told"),
    [
        (("a=nowhere.txt",), (), r"^nowhere\.txt: no such file$"),
        (("a=city:songs",), (), r"^config\.data\.corpus\.sources: 'city:songs' is none of the texts descriptions, "),
        (("a={folder}/a.jsonl", "b={folder}/b.jsonl"), ("a=1", "b=1"), r"sources: b: no document is left to train on$"),
    ],
)
def test_a_corpus_that_cannot_be_had_is_refused(tmp_path, sources, weights, told):
    write_texts(tmp_path / "in", draw_texts(4), "a.jsonl")
    (tmp_path / "in" / "b.jsonl").write_text("")
    sources = tuple(source.format(folder=tmp_path / "in") for source in sources)
    config = DataConfig(source="text", corpus=CorpusConfig(sources=sources, weights=weights, vocab_size=N_BARE))
    with pytest.raises(InputError, match=told) as error:
        prepare_text(config, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_as_written_is_refused(tmp_path):
    _, meta = _prepare(tmp_path, TEXTS)
    out = tmp_path / "out"
    for name in (*meta.shards, *meta.files, "meta.json"):
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        whole = (out / name).read_bytes()
        (out / name).write_bytes(bytes(content))
        with pytest.raises(InputError, match=rf"{name}: .*(damaged|is no JSON)") as error:
            open_corpus(out, in_memory=False)
        assert "\n" not in str(error.value)
        (out / name).write_bytes(whole)
    open_corpus(out, in_memory=False)
    (out / "meta.json").unlink()
    with pytest.raises(InputError, match=r"out: not a prepared folder, or not a whole one"):
        open_corpus(out, in_memory=False)


def test_a_folder_of_text_is_none_of_tables_nor_the_other_way_round(tmp_path):
    _prepare(tmp_path, TEXTS)
    with pytest.raises(InputError, match=r"out: holds documents of text, which data\.source=text reads$"):
        Meta.load(tmp_path / "out")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "meta.json").write_text('{"format_version": 2}')
    with pytest.raises(InputError, match=r"tables: holds no documents of text; data\.source=prepared reads tables$"):
        open_corpus(tmp_path / "tables", in_memory=False)


def test_texts_of_the_city_are_a_corpus(tmp_path):
    sources = ("reviews=city:reviews", "all=city:all")
    corpus_config = CorpusConfig(sources=sources, city_documents=40, vocab_size=N_BARE, valid_fraction=0.2)
    (tmp_path / "run").mkdir()
    corpus = load_corpus(DataConfig(source="text", corpus=corpus_config), tmp_path / "run", N_BARE)
    assert corpus.names == ("reviews", "all")
    assert 30 < np.sum(corpus.source == 0) <= 40
    assert sum(corpus.n_trained_K) == corpus.length[~corpus.is_valid].sum()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_any_runs_of_tokens_are_read_from_shards(tmp_path, dtype):
    """Across records, documents and shards, in any order, empty runs too."""
    rng = np.random.default_rng(0)
    n_tokens = np.array([1, 5, RECORD_TOKENS, 2 * RECORD_TOKENS + 1, 3, RECORD_TOKENS - 1, 9])
    ids = rng.integers(0, np.iinfo(dtype).max // 2, n_tokens.sum()).astype(dtype)
    with TokenWriter(tmp_path, int(n_tokens.sum()), 3, np.dtype(dtype)) as writer:
        for part in (range(3), range(3, 7)):
            ends = np.cumsum(n_tokens)
            documents = [ids[ends[d] - n_tokens[d] : ends[d]] for d in part]
            writer.write(documents, [len(document) for document in documents])
    assert len(writer.shards) > 1
    start_of = list_records(n_tokens)
    assert np.all(np.diff(start_of) <= RECORD_TOKENS)
    assert set(np.cumsum(n_tokens)) <= set(start_of.tolist()), "a record has tokens of two documents"
    meta = TextMeta((), {}, "", 0, "", np.dtype(dtype).itemsize, writer.shards)
    shards, memory = (open_tokens(tmp_path, meta, n_tokens, in_memory) for in_memory in (False, True))
    for n in (0, 1, 7):
        start = rng.integers(0, len(ids), n)
        length = np.minimum(rng.integers(0, 9000, n), len(ids) - start)
        expected = [ids[a : a + k] for a, k in zip(start, length, strict=True)]
        for tokens in (shards, memory, MemoryTokens(ids)):
            found = tokens.read(start, length)
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, np.concatenate([np.zeros(0, np.int32), *expected]))
    with pytest.raises(InputError, match=r"the shards hold \d+ (tokens|records), unlike documents\.parquet"):
        open_tokens(tmp_path, meta, n_tokens[:-1], in_memory=False)


def test_ids_that_do_not_fit_two_bytes_get_four(tmp_path):
    corpus, meta = _prepare(tmp_path, {"one": draw_texts(20)})
    spec = json.loads(corpus.tokenizer.content)
    spec["model"]["vocab"]["far"] = 70_000
    (tmp_path / "own.json").write_text(json.dumps(spec))
    wide, wide_meta = _prepare(tmp_path, {"one": draw_texts(20)}, tokenizer=str(tmp_path / "own.json"))
    assert (meta.token_bytes, wide_meta.token_bytes) == (2, 4)
    np.testing.assert_array_equal(read_ids(wide), read_ids(corpus))


def prepare_by_command(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.prepare", "--config=configs/language_city.py"]
    small = ["--config.data.corpus.city_documents=20", "--config.data.corpus.vocab_size=300"]
    line = [*command, f"--out={tmp_path / 'out'}", *small, *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_prepares_documents_and_tells_how_many(tmp_path):
    done = prepare_by_command(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    corpus, _ = open_corpus(tmp_path / "out", in_memory=True)
    assert [row["name"] for row in found["corpora"]] == ["descriptions", "reviews", "questions", "instructions"]
    assert sum(row["n_documents"] for row in found["corpora"]) == len(corpus.length)
    assert found["n_vocab"] == corpus.tokenizer.n_vocab == 300
    assert corpus.weights == (1, 1, 1, 1)
    assert "descriptions: " in done.stdout


def test_the_command_ends_with_two_and_the_line_of_a_defect(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    sources = f'--config.data.corpus.sources=("bad={path}",)'
    done = prepare_by_command(tmp_path, sources, "--config.data.corpus.weights=()")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{path}:2: is no JSON" in done.stderr
    assert not (tmp_path / "out").exists()
