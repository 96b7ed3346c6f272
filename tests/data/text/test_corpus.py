"""Documents as token ids, against the texts that they were read from."""

import gzip
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from moerec.config import CorpusConfig, DataConfig
from moerec.data.text import prepare as module
from moerec.data.text.corpus import END, TOKENIZER, Corpus, load_corpus
from moerec.data.text.tokenizer import SPECIAL, TextTokenizer
from moerec.errors import InputError

TEXTS = {  # by the file that holds them
    "a.jsonl": ["first\nin two lines ", "Ещё один — с буквами ё", "ends as if <|endoftext|>", "<|im_start|>user"],
    "b.txt": ["a file is one document\n\n  of several lines\n"],
    "c.jsonl.gz": ["packed 漢字", "x"],
    "d.txt.gz": ["🙂"],
}
WORDS = ("tea", "bread", "book", "lamp", "river", "green")
N_BARE = 256 + len(SPECIAL)  # tokens of a tokenizer that has learned nothing


def write_files(folder: Path, texts: dict[str, list[str]]) -> Path:
    folder.mkdir()
    for name, own in texts.items():
        lines = "\n".join(json.dumps({"text": text}) for text in [own[0], "", *own[1:]])
        content = (lines if ".jsonl" in name else own[0]).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def write_texts(folder: Path, texts: list[str], name: str = "all.jsonl") -> Path:
    return write_files(folder, {name: texts})


def draw_texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{k}: " + " ".join(rng.choice(WORDS, rng.integers(1, 9))) for k in range(n)]


def load(path: Path, workdir: Path, rows: int = 10_000, first_tokenizer: Path | None = None, **fields) -> Corpus:
    workdir.mkdir(exist_ok=True)
    config = CorpusConfig(**{"path": str(path), "vocab_size": N_BARE, "valid_fraction": 0.0, **fields})
    return load_corpus(DataConfig(source="text", corpus=config), workdir, rows, first_tokenizer)


def read_ids(corpus: Corpus) -> np.ndarray:
    """All tokens."""
    return corpus.tokens.read(np.zeros(1, np.int64), corpus.offsets[-1:])


def split(corpus: Corpus) -> list[list[int]]:
    """The ids of each document."""
    ids = read_ids(corpus)
    return [ids[start:stop].tolist() for start, stop in itertools.pairwise(corpus.offsets.tolist())]


def share_of(text: str) -> float:
    """Below which share of the documents that are held out this one is among them."""
    first_four = hashlib.sha256(text.encode()).hexdigest()[:8]
    return sum(int(first_four[2 * k : 2 * k + 2], 16) * 256**k for k in range(4)) / 2**32


def find_texts(n: int, is_held: bool, start: str) -> list[str]:
    """Texts that are held out at a share of one half, or that are not."""
    found = (f"{start} {k}" for k in range(10_000))
    return list(itertools.islice((text for text in found if (share_of(text) < 0.5) == is_held), n))


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_documents_decode_to_their_texts_and_each_has_an_end(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(module, "_BATCH", at_once)
    folder = write_files(tmp_path / "in", TEXTS)
    (folder / "notes.md").write_text("no document")
    corpus = load(folder, tmp_path / "run")
    texts = [text for name in sorted(TEXTS) for text in TEXTS[name]]
    end = corpus.tokenizer.id_of(END)
    assert corpus.end == end
    assert corpus.names == tuple(sorted(TEXTS))
    assert corpus.offsets[0] == 0
    assert (corpus.offsets.dtype, read_ids(corpus).dtype, corpus.n_bytes.dtype) == (np.int64, np.int32, np.int64)
    documents = split(corpus)
    assert [ids[-1] for ids in documents] == [end] * len(texts)
    assert not any(end in ids[:-1] for ids in documents), "a text that spells the end has one"
    assert [corpus.tokenizer.decode(ids[:-1]) for ids in documents] == texts
    assert corpus.n_bytes.tolist() == [len(text.encode()) for text in texts]
    # A token that has learned nothing is a byte.
    assert corpus.length.tolist() == [len(text.encode()) + 1 for text in texts]


def test_a_file_is_a_corpus_too(tmp_path):
    folder = write_files(tmp_path / "in", TEXTS)
    corpus = load(folder / "c.jsonl.gz", tmp_path / "run")
    assert [corpus.tokenizer.decode(ids[:-1]) for ids in split(corpus)] == TEXTS["c.jsonl.gz"]
    assert corpus.catalog.service_I.shape == (0,)


def test_documents_are_held_out_by_their_own_hash(tmp_path):
    """So each keeps its side among others, in another order or file; a larger share has all of a smaller."""
    texts = draw_texts(400)
    texts[7] = texts[3]
    held = {}
    for share in (0.0, 0.1, 0.5):
        folder = write_texts(tmp_path / f"{share}", texts)
        found = load(folder, tmp_path / f"run {share}", valid_fraction=share, duplicates="keep")
        assert found.is_valid.tolist() == [share_of(text) < share for text in texts]
        held[share] = set(np.flatnonzero(found.is_valid).tolist())
        assert abs(len(held[share]) - share * 400) <= 5 * math.sqrt(400 * share * (1 - share))
    assert held[0.0] < held[0.1] < held[0.5]
    order = np.random.default_rng(1).permutation(150)
    some = [texts[k] for k in order]
    moved = write_files(tmp_path / "moved", {"0.jsonl": draw_texts(90, seed=5), "1.jsonl": some})
    found = load(moved, tmp_path / "run moved", valid_fraction=0.5, duplicates="keep")
    assert found.is_valid[90:].tolist() == [k in held[0.5] for k in order.tolist()]


def test_the_tokenizer_learns_from_what_is_trained_on_alone(tmp_path):
    held, trained = find_texts(20, True, "quagquag quagquag"), find_texts(20, False, "lamplamp lamplamp")
    folder = write_texts(tmp_path / "in", [x for pair in zip(held, trained, strict=True) for x in pair])

    def learned(share: float) -> str:
        corpus = load(folder, tmp_path / f"run {share}", vocab_size=N_BARE + 40, valid_fraction=share)
        return " ".join(json.loads(corpus.tokenizer.content)["model"]["vocab"])

    assert "lamp" in learned(0.5)
    assert "qu" not in learned(0.5)
    assert "quag" in learned(0.0), "it would have been learned"


def test_a_corpus_of_which_everything_is_held_out_is_refused(tmp_path):
    folder = write_texts(tmp_path / "in", find_texts(2, True, "text"))
    with pytest.raises(InputError, match=r"^[^\n]*in: no document is left to train on$"):
        load(folder, tmp_path / "run", valid_fraction=0.5)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"^[^\n]*empty\.txt: no document is left to train on$"):
        load(tmp_path / "empty.txt", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_the_tokenizer_is_made_once_and_kept(tmp_path):
    """Other documents do not make another one of it, nor does one that a model has, once the run has its own."""
    first = load(write_texts(tmp_path / "in", draw_texts(50)), tmp_path / "run", vocab_size=N_BARE + 20)
    assert (tmp_path / "run" / TOKENIZER).read_bytes() == first.tokenizer.content
    assert first.tokenizer.n_vocab == N_BARE + 20
    other = write_texts(tmp_path / "other", ["zzzz yyyy " * 9])
    gone = tmp_path / "gone.json"
    for again in (
        load(tmp_path / "in", tmp_path / "run", vocab_size=N_BARE),
        load(other, tmp_path / "run", first_tokenizer=gone),
        load(other, tmp_path / "run", tokenizer=str(gone)),
    ):
        assert again.tokenizer.content == first.tokenizer.content
    anew = load(tmp_path / "in", tmp_path / "another", vocab_size=N_BARE + 20)
    assert anew.tokenizer.content == first.tokenizer.content, "the same documents give the same bytes"
    assert anew.digests == first.digests
    (tmp_path / "run" / TOKENIZER).write_text("{")
    with pytest.raises(InputError, match=r"^[^\n]*run/tokenizer\.json: is no tokenizer"):
        load(other, tmp_path / "run")


@pytest.mark.parametrize(("is_named", "has_first", "taken"), [(1, 0, "named"), (0, 1, "first"), (1, 1, "named")])
def test_a_tokenizer_that_is_named_comes_before_that_of_the_first_model(tmp_path, is_named, has_first, taken):
    given = {name: tmp_path / f"{name}.json" for name in ("named", "first")}
    for size, path in enumerate(given.values(), 1):
        TextTokenizer.train(draw_texts(40, seed=size), N_BARE + 10 * size).save(path)
    folder = write_texts(tmp_path / "in", draw_texts(5))
    options = {"tokenizer": str(given["named"])} if is_named else {}
    corpus = load(folder, tmp_path / "run", first_tokenizer=given["first"] if has_first else None, **options)
    assert corpus.tokenizer.content == (tmp_path / "run" / TOKENIZER).read_bytes() == given[taken].read_bytes()
    assert [corpus.tokenizer.decode(ids[:-1]) for ids in split(corpus)] == draw_texts(5)


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows_is_refused_and_not_kept(tmp_path):
    """Else the directory would be bound to the mistake."""
    folder, run = write_texts(tmp_path / "in", draw_texts(50)), tmp_path / "run"
    told = f"config.model.text.vocab_size: {N_BARE + 4} rows, but the tokenizer has {N_BARE + 5} tokens"
    with pytest.raises(InputError, match=f"^{told}$"):
        load(folder, run, N_BARE + 4, vocab_size=N_BARE + 5)
    assert not list(run.iterdir())
    assert load(folder, run, N_BARE + 4, vocab_size=N_BARE + 4).tokenizer.n_vocab <= N_BARE + 4


def test_a_tokenizer_without_an_end_of_documents_is_refused_by_name_and_not_kept(tmp_path):
    folder, run, own = write_texts(tmp_path / "in", draw_texts(5)), tmp_path / "run", tmp_path / "own.json"
    TextTokenizer.train(draw_texts(5), N_BARE, special=("<s>",)).save(own)
    with pytest.raises(InputError, match=r"^[^\n]*own\.json: [^\n]*<\|endoftext\|>[^\n]*$"):
        load(folder, run, tokenizer=str(own))
    assert not list(run.iterdir())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"path": ""}, r"config\.data\.corpus\.path is missing: a file of documents, or a folder of such files"),
        ({"path": "nowhere.txt"}, r"nowhere\.txt: no such file"),
        ({"path": "nowhere"}, r"nowhere: the name must end in .*"),
        ({"tokenizer": "nowhere.json"}, r"nowhere\.json: no such file"),
        ({"vocab_size": 5}, r"vocab_size 5 is too small: .*"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, fields, told):
    folder = write_texts(tmp_path / "in", ["text"])
    with pytest.raises(InputError, match=f"^{told}$"):
        load(**{"path": folder, "workdir": tmp_path / "run", **fields})
    assert not list((tmp_path / "run").iterdir())


def test_digests_are_equal_for_equal_documents_and_sides_alone(tmp_path):
    texts = draw_texts(30)
    same = load(write_texts(tmp_path / "same", texts), tmp_path / "run", valid_fraction=0.3)
    renamed = write_texts(tmp_path / "renamed", texts, "other.jsonl.gz")
    assert load(renamed, tmp_path / "run", valid_fraction=0.3).digests == same.digests
    changed = {
        "letter": [*texts[:-1], texts[-1] + "s"],
        "order": [texts[1], texts[0], *texts[2:]],
        "fewer": texts[:-1],
        "joined": [texts[0] + texts[1], *texts[2:]],
    }
    found = {
        name: load(write_texts(tmp_path / name, x), tmp_path / "run", valid_fraction=0.3) for name, x in changed.items()
    }
    found["sides"] = load(tmp_path / "same", tmp_path / "run", valid_fraction=0.5)
    halves = write_files(tmp_path / "halves", {"1.jsonl": texts[:9], "2.jsonl": texts[9:]})
    found["corpora"] = load(halves, tmp_path / "run", valid_fraction=0.3)
    assert len({same.digest, *(corpus.digest for corpus in found.values())}) == 1 + len(found)
    assert {corpus.items_digest for corpus in found.values()} == {same.items_digest}
