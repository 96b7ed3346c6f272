"""Runs of text alone: what is measured against loops over the held-out documents, and what is kept and refused."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import (
    Config,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)
from moerec.convert.logits import compute_logits, make_text_batch
from moerec.convert.paths import flatten, unflatten
from moerec.data.text.corpus import END, TOKENIZER, Corpus, load_corpus
from moerec.data.text.stream import TokenReader
from moerec.data.text.token_shards import MemoryTokens
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.language import HeldOut, format_language, list_batches, make_language_evaluator, share_out
from moerec.nn.model import Predictor
from moerec.train.checkpoint import Checkpoints
from moerec.train.run_dir import load_run
from tests.small_model import worst_gap
from tests.tiny import share_trainers

ROWS, ROW_LEN, V = 4, 24, 300
ANIMALS, PLACES = ("cat", "dog", "owl", "hen", "fox"), ("the mat", "a hill", "my bed", "the road")


@pytest.fixture(scope="module", autouse=True)
def trainers():
    """Most tests train the same model: it is traced and compiled once for all of them."""
    with share_trainers():
        yield


def write_documents(path: Path, animals: tuple[str, ...] = ANIMALS) -> Path:
    """Sentences of one form, one to four of them in a document."""
    pairs = list(itertools.product(animals, PLACES))
    texts = [" ".join(f"The {a} sat on {p}." for a, p in pairs[k : k + 1 + k % 4]) for k in range(len(pairs))]
    texts += [f"{text} And then the {animals[k % len(animals)]} slept." for k, text in enumerate(texts)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_config(path: Path, valid_fraction: float = 0.2, groups: tuple[str, ...] = (), **train) -> Config:
    steps = {"steps": 24, "batch_size": ROWS, "log_every": 4, "eval_every": 8, "save_every": 6, "n_valid": 100}
    return Config(
        name="words",
        tasks=("lm",),
        data=DataConfig(
            source="text",
            corpus=CorpusConfig(path=str(path), vocab_size=280, valid_fraction=valid_fraction),
            seq_len=ROW_LEN,
            history_len=ROW_LEN,
        ),
        model=ModelConfig(
            n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, dropout=0.0, text=TextConfig(V)
        ),
        loss=LossConfig(vocab_chunk=128),
        optim=OptimConfig(learning_rate=0.03, warmup_steps=3, groups=groups),
        train=TrainConfig(**{**steps, **train}),
        eval=EvalConfig(n_probed=0),
        baselines=(),
    )


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "all.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, documents):
    """A run and what it returned."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run_experiment(make_config(documents), folder)


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(metrics))
    return {name: x for name, x in plain.items() if name not in ("wall_s", "tokens_per_s", "peak_memory_gib")}


def read_sides(path: Path, folder: Path) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """The ids of the documents that are trained on and of those held out, the end on both sides, and these texts."""
    tokenizer = TextTokenizer.load(folder / TOKENIZER)
    sides: tuple[list, list, list] = ([], [], [])
    for line in path.read_text().splitlines():
        text = json.loads(line)["text"]
        is_held = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") < 0.2 * 2**32
        end = tokenizer.id_of(END)
        sides[is_held].append([end, *tokenizer.encode(text).tolist(), end])
        sides[2].extend([text] * is_held)
    return sides


def measure_by_hand(folder: Path, held: list[list[int]]) -> list[float]:
    """The negative log-probability of each token that is predicted, a window after the other, each in a row alone."""
    windows = [ids[k : k + ROW_LEN + 1] for ids in held for k in range(0, len(ids) - 1, ROW_LEN)]
    token, segment = np.zeros((2, len(windows), ROW_LEN), np.int32)
    for row, ids in enumerate(windows):
        token[row, : len(ids) - 1], segment[row, : len(ids) - 1] = ids[:-1], 1
    logits = compute_logits(load_run(folder).predictor.params, make_text_batch(token, segment))
    nats = []
    for ids, logit_TV in zip(windows, np.asarray(logits, np.float64), strict=True):
        for following, logit_V in zip(ids[1:], logit_TV, strict=False):
            nats.append(math.log(np.exp(logit_V).sum()) - logit_V[following])
    return nats


def test_metrics_are_those_of_loops_over_the_held_out_documents(finished, documents):
    folder, metrics = finished
    _, held, texts = read_sides(documents, folder)
    assert max(map(len, held)) > ROW_LEN + 1, "no document is cut"
    nats = measure_by_hand(folder, held)
    found = stored(folder)["tasks"]["lm"]
    assert without_times(stored(folder)) == without_times(metrics)
    assert found["n_documents"] == len(held) > 3
    assert found["n_tokens"] == sum(len(ids) - 1 for ids in held) == len(nats)
    assert found["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-5)


def test_something_is_learned(finished, documents):
    """Held-out documents are told better than by how often tokens are, let alone by chance."""
    folder, metrics = finished
    trained, held, _ = read_sides(documents, folder)
    count = np.bincount([token for ids in trained for token in ids[1:]], minlength=V) + 1.0
    unigram = -np.mean([math.log(count[token] / count.sum()) for ids in held for token in ids[1:]])
    assert metrics["tasks"]["lm"]["nats_per_token"] < 0.9 * unigram < 0.9 * math.log(V)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    valid = {line["step"]: line["valid/lm/nats"] for line in lines if "valid/lm/nats" in line}
    assert set(valid) == {8, 16, 24}
    assert metrics["best_step"] == min(valid, key=lambda step: valid[step])
    assert metrics["valid"]["valid/lm/nats"] == pytest.approx(valid[metrics["best_step"]])
    assert metrics["valid"]["valid/lm/perplexity"] == pytest.approx(math.exp(valid[metrics["best_step"]]))


def test_the_same_command_again_gives_the_same_and_trains_nothing(finished, documents, monkeypatch):
    folder, metrics = finished
    monkeypatch.setattr("moerec.eval.language.fit", None)
    again = run_experiment(make_config(documents), folder)
    assert again == json.loads(json.dumps(metrics))


def test_a_run_that_was_interrupted_ends_like_an_undisturbed_one(tmp_path, finished, documents, monkeypatch):
    save_last = Checkpoints.save_last

    def save_and_fail(self, step, state, progress):
        save_last(self, step, state, progress)
        if step == 12:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_last", save_and_fail)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_config(documents), tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "save_last", save_last)
    metrics = run_experiment(make_config(documents), tmp_path / "run")
    assert without_times(metrics) == without_times(finished[1])
    params = [load_run(folder).predictor.params for folder in (finished[0], tmp_path / "run")]
    assert worst_gap(*params) == 0


def test_a_directory_is_of_its_documents(tmp_path, finished, documents):
    """Also where the same file holds other ones by now."""
    path = tmp_path / "mine.jsonl"
    shutil.copy(documents, path)
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(InputError, match=r"this directory holds another run: config\.data\.corpus\.path"):
        run_experiment(make_config(path), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        (tmp_path / "run" / "config.json").read_text().replace(str(documents), str(path))
    )
    run_experiment(make_config(path), tmp_path / "run")
    path.write_text(path.read_text().replace("my bed", "my bad"))
    with pytest.raises(InputError, match=r"^[^\n]*run: this directory holds a run on other documents$"):
        run_experiment(make_config(path), tmp_path / "run")


def test_training_begins_with_the_parameters_and_the_tokenizer_of_another_run(tmp_path, finished, capsys):
    """Of other documents, of which a tokenizer would have learned other tokens; nothing moves, as all is frozen."""
    first, _ = finished
    other = write_documents(tmp_path / "other.jsonl", ("yak", "eel", "ant", "bee"))
    config = make_config(other, groups=("*=frozen",), steps=1, init_from=str(first))
    metrics = run_experiment(config, tmp_path / "run")
    assert (tmp_path / "run" / TOKENIZER).read_bytes() == (first / TOKENIZER).read_bytes()
    assert worst_gap(load_run(tmp_path / "run").predictor.params, load_run(first).predictor.params) == 0
    assert f"parameters from {first}" in capsys.readouterr().err
    _, held, _ = read_sides(other, tmp_path / "run")
    assert metrics["tasks"]["lm"]["nats_per_token"] == pytest.approx(
        np.mean(measure_by_hand(tmp_path / "run", held)), rel=1e-5
    )


def test_a_finished_run_does_not_need_the_one_that_it_began_with(tmp_path, finished, documents):
    """Nor does one whose config names a tokenizer need that of another run."""
    first = shutil.copytree(finished[0], tmp_path / "first")
    config = make_config(documents, groups=("*=frozen",), steps=1, init_from=str(first))
    metrics = run_experiment(config, tmp_path / "run")
    (first / TOKENIZER).rename(tmp_path / "own.json")
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=dataclasses.replace(
        config.data.corpus, tokenizer=str(tmp_path / "own.json"))))  # fmt: skip
    named = run_experiment(own, tmp_path / "named")
    assert named["tasks"] == metrics["tasks"] == finished[1]["tasks"]
    shutil.rmtree(first)
    assert run_experiment(config, tmp_path / "run") == json.loads(json.dumps(metrics))


def name_tokenizer(config: Config, path: Path) -> Config:
    corpus = dataclasses.replace(config.data.corpus, tokenizer=str(path))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=corpus))


def test_a_tokenizer_under_which_rows_mean_other_tokens_leaves_nothing(tmp_path, finished, documents):
    TextTokenizer.train(["yak yak yak", "eel eel eel"], 300).save(tmp_path / "other.json")
    config = make_config(documents, groups=("*=frozen",), steps=1, init_from=str(finished[0]))
    with pytest.raises(InputError, match=r"^config\.data\.corpus\.tokenizer: .* has another id in ") as error:
        run_experiment(name_tokenizer(config, tmp_path / "other.json"), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    run_experiment(config, tmp_path / "run")


def test_a_tokenizer_that_knows_more_tokens_is_taken(tmp_path, finished, documents):
    spec = json.loads((finished[0] / TOKENIZER).read_bytes())
    added = {**spec["added_tokens"][-1], "id": 280, "content": "<|new|>"}
    spec["added_tokens"].append(added)
    (tmp_path / "more.json").write_text(json.dumps(spec))
    config = make_config(documents, groups=("*=frozen",), steps=1, init_from=str(finished[0]))
    metrics = run_experiment(name_tokenizer(config, tmp_path / "more.json"), tmp_path / "run")
    assert metrics["tasks"] == finished[1]["tasks"]


def test_a_model_that_is_refused_leaves_nothing(tmp_path, documents):
    config = make_config(documents)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=MoEConfig(layers=(0,))))
    with pytest.raises(InputError, match=r"^config\.model\.moe\.services: "):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_held_out_documents_the_last_parameters_are_kept(tmp_path, documents):
    """And training does not stop early, for nothing was validated."""
    metrics = run_experiment(make_config(documents, valid_fraction=0.0, patience=1), tmp_path / "run")
    assert metrics["steps"] == metrics["best_step"] == 24
    assert metrics["tasks"] == {"lm": {"n_tokens": 0, "n_documents": 0}}
    assert format_language(metrics) == "lm: no document is held out (data.corpus.valid_fraction)"
    assert metrics["valid"] == {"step": 24}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"corpus": CorpusConfig()}}, r"^config\.data\.corpus\.path is missing"),
        ({"model": {"text": TextConfig(0)}}, r"^config\.model\.text\.vocab_size: the task lm needs words"),
        (
            {"model": {"text": TextConfig(270)}},
            r"^config\.model\.text\.vocab_size: 270 rows, but the tokenizer has 280",
        ),
        ({"train": {"init_from": "nowhere"}}, r"^config\.train\.init_from: \S*nowhere is no run"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, documents, change, told):
    config = make_config(documents)
    ((part, fields),) = change.items()
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})
    with pytest.raises(InputError, match=told) as error:
        run_experiment(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=9),
    st.tuples(st.integers(1, 3), st.integers(1, 6)),
    st.integers(0, 60),
)
def test_all_documents_are_measured_once_or_windows_that_lie_evenly_among_them(lengths, shape, most):
    """In their order, in windows of a row from each document's beginning, before which the end stands."""
    reader = make_reader(lengths)
    expected, windows = [], []
    for first, stop in itertools.pairwise([0, *np.cumsum(lengths).tolist()]):
        document = [7, *range(100 + first, 100 + stop)]
        slots = [(document[k], document[k + 1], k % shape[1]) for k in range(stop - first)]
        windows += [slots[k : k + shape[1]] for k in range(0, len(slots), shape[1])]
        expected += slots
    found = []
    for batch in list_batches(reader, shape, most):
        label_BT, weight_BT = batch.targets["lm"]
        assert weight_BT.shape == shape
        for slot in zip(*np.nonzero(batch.segment_BT), strict=True):
            assert weight_BT[slot] == 1
            found.append((batch.token_BT[slot], label_BT[slot], batch.position_BT[slot]))
        assert not np.any(weight_BT[batch.segment_BT == 0])
    if most >= len(expected):
        assert found == expected
        return
    n_windows = sum(position == 0 for _, _, position in found)
    assert n_windows == max(1, len(windows) * most // len(expected))
    left = iter(windows)
    for window in [w for w in windows if w[0] in found]:
        assert window in left, "out of order"
        assert all(slot in found for slot in window), "a window in part"
    places = [k for k, w in enumerate(windows) if w[0] in found]
    assert max(np.diff([-1, *places, len(windows)])) <= 2 * -(-len(windows) // n_windows), "they lie together"


def make_reader(lengths: list[int]) -> TokenReader:
    """Held-out documents of such lengths."""
    no_tokenizer: Any = None
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    is_valid, tokens = np.ones(len(lengths), bool), MemoryTokens(np.arange(100, 100 + offsets[-1], dtype="<u2"))
    source = np.zeros(len(lengths), np.int32)
    corpus = Corpus(no_tokenizer, offsets, tokens, is_valid.astype(np.int64), is_valid, 7, ("one",), source)
    return TokenReader(corpus, valid=True)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 100))
def test_what_is_measured_is_shared_out_evenly(wanted, total):
    given_out = share_out(total, wanted)
    assert sum(given_out) <= total
    assert all(a <= b for a, b in zip(given_out, wanted, strict=True))
    if sum(wanted) <= total:
        assert given_out == wanted
    short = [a for a, b in zip(given_out, wanted, strict=True) if a < b]
    assert all(a >= max(given_out) - 1 for a in short), "somebody gets less than others and less than it wants"
    assert not short or sum(given_out) == total


def make_uniform(folder: Path) -> Predictor:
    """The model of a run, with a final norm of zeros: each of its V tokens is as probable as any other."""
    params = load_run(folder).predictor.params
    leaves = flatten(params)
    return Predictor(unflatten(params, leaves | {"final_norm/scale": 0 * leaves["final_norm/scale"]}), None)


@pytest.mark.parametrize("size", [261, 280])
def test_bits_per_byte_are_those_of_whole_documents_whatever_the_tokens_are(tmp_path, documents, finished, size):
    """A model for which all tokens are equal needs log2 V bits for each token and for the end of each document.

    A tokenizer of 261 tokens has one for each byte, so its documents take (bytes + 1) log2 V bits; if a first token
    were given, its byte would be counted and not told, and a tokenizer of longer tokens would be given more.
    """
    config = make_config(documents)
    corpus_config = dataclasses.replace(config.data.corpus, vocab_size=size)
    data = dataclasses.replace(config.data, corpus=corpus_config)
    corpus = load_corpus(data, tmp_path, V)
    valid = HeldOut(config, corpus).measure(make_uniform(finished[0]), corpus.catalog)
    _, held, texts = read_sides(documents, tmp_path)
    n_told, n_bytes = sum(len(ids) - 1 for ids in held), sum(len(text.encode()) for text in texts)
    if size == 261:
        assert n_told == n_bytes + len(texts)
    assert valid["n_tokens"] == n_told
    assert valid["nats_per_token"] == pytest.approx(math.log(V), rel=1e-5)
    assert valid["bits_per_byte"] == pytest.approx(n_told * math.log2(V) / n_bytes, rel=1e-5)


def test_the_result_is_told_in_a_line(finished):
    found = finished[1]["tasks"]["lm"]
    told = format_language(finished[1])
    assert told == (
        f"lm: {found['nats_per_token']:.4f} nats, perplexity {found['perplexity']:.2f}, "
        f"{found['bits_per_byte']:.4f} bits a byte; {found['n_tokens']} tokens of {found['n_documents']} held-out "
        "documents"
    )


def test_nats_beyond_all_bounds_are_a_number(finished, documents):
    """Of a model that is sure of what does not come."""
    folder, _ = finished
    config, run = make_config(documents), load_run(folder)
    corpus = load_corpus(config.data, folder, V)
    leaves = flatten(run.predictor.params)
    sure = unflatten(run.predictor.params, leaves | {"final_norm/scale": 1e4 * leaves["final_norm/scale"]})
    score, valid = make_language_evaluator(config, corpus)(Predictor(sure, None), corpus.catalog)
    assert score == 0
    assert valid["valid/lm/nats"] > 1000
    assert 1e300 < valid["valid/lm/perplexity"] < math.inf


def test_files_of_documents_are_measured_apart_and_together(tmp_path):
    """Each file's documents by hand; and what they add up to is the whole."""
    folder = tmp_path / "documents"
    folder.mkdir()
    animals = {"one.jsonl": ANIMALS, "two.jsonl": ("ant", "bee", "yak", "emu", "ape")}
    for name, own in animals.items():
        write_documents(folder / name, own)
    metrics = run_experiment(make_config(folder, steps=2), tmp_path / "run")
    found, n_trained = metrics["tasks"]["lm"], 0
    assert list(found["by_corpus"]) == list(animals)
    for name, row in found["by_corpus"].items():
        trained, held, texts = read_sides(folder / name, tmp_path / "run")
        nats, n_trained = measure_by_hand(tmp_path / "run", held), n_trained + len(trained)
        assert row["n_documents"] == len(held) > 1
        assert row["n_tokens"] == len(nats)
        assert row["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-5)
        assert row["n_bytes"] == sum(len(text.encode()) for text in texts)
        assert row["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / row["n_bytes"], rel=1e-5)
        assert metrics["valid"][f"valid/lm/bits_per_byte/{name}"] > 0
        assert f"  {name}  {row['bits_per_byte']:.4f} bits a byte" in format_language(metrics)
    for key in ("n_documents", "n_tokens", "n_bytes"):
        assert found[key] == sum(row[key] for row in found["by_corpus"].values())
    bits = sum(row["bits_per_byte"] * row["n_bytes"] for row in found["by_corpus"].values())
    assert found["bits_per_byte"] == pytest.approx(bits / found["n_bytes"])
    assert metrics["dataset"]["n_train_documents"] == n_trained
    assert [row["n_duplicates"] for row in metrics["dataset"]["corpora"].values()] == [0, 0]
    assert sum(row["share"] for row in metrics["dataset"]["corpora"].values()) == pytest.approx(1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in animals)
