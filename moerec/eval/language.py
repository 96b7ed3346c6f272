"""How well a language model predicts held-out documents, and a run that is of text alone."""

import dataclasses
import functools
import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.config.stored import store_config
from moerec.convert.paths import first_match
from moerec.data.load import DIGEST, read_digests
from moerec.data.packing import place_sequences
from moerec.data.text.corpus import TOKENIZER, Corpus, load_corpus
from moerec.data.text.stream import TokenReader, pack_tokens
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.files import read_json, write_json
from moerec.nn.model import TEXT_SIZES, Predictor, SequenceModel
from moerec.nn.sharding import make_mesh
from moerec.tasks import LanguageModel, sum_token_nll
from moerec.train.base_model.hf_run import find_tokenizer, keep_origin
from moerec.train.base_model.warm_start import find_checkpoint
from moerec.train.loop import Evaluator, TrainResult, fit
from moerec.train.run_dir import CONFIG, METRICS
from moerec.types import Batch, Catalog

MOST_SOURCES = 32  # files of documents, of which each is measured by itself


def list_batches(reader: TokenReader, shape: tuple[int, int], most_tokens: int) -> Iterator[Batch]:
    """All documents once, cut into windows of a row, with their targets; at most so many tokens."""
    n_slots = np.maximum(reader.lengths - 1, 0)
    n_windows = -(-n_slots // shape[1])
    owner = np.repeat(np.arange(len(n_slots)), n_windows)
    skipped = (np.arange(len(owner)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)) * shape[1]
    length = np.minimum(n_slots[owner] - skipped, shape[1])
    length = np.minimum(length, most_tokens - (np.cumsum(length) - length))
    first, length = (reader.start[owner] + skipped)[length > 0], length[length > 0]
    while len(length):
        placed = place_sequences(length, *shape)
        own = slice(placed.n)
        packed = pack_tokens(reader.ids, first[own], length[own], placed, shape)
        yield packed.batch._replace(targets={LanguageModel.name: LanguageModel().render(packed)})
        first, length = first[placed.n :], length[placed.n :]


@functools.partial(jax.jit, static_argnums=(3,))
def _sum_nll(predictor: Predictor, batch: Batch, catalog: Catalog, chunk: int) -> tuple[jax.Array, jax.Array]:
    target, outputs = batch.targets[LanguageModel.name], predictor.encode(batch, catalog)
    return sum_token_nll(predictor.params, outputs, target, chunk), jnp.sum(target.weight_BT)


def measure_nats(config: Config, predictor: Predictor, batches: Iterator[Batch], catalog: Catalog) -> tuple[float, int]:
    """The mean negative log-probability of a token in nats, and how many there are."""
    total, n_tokens = 0.0, 0.0
    for batch in batches:
        nll, weight = _sum_nll(predictor, batch, catalog, config.loss.vocab_chunk)
        total, n_tokens = total + float(nll), n_tokens + float(weight)
    return total / max(n_tokens, 1), round(n_tokens)


def make_language_evaluator(config: Config, corpus: Corpus) -> Evaluator:
    """Scores what is trained by the probability of a held-out token (geometric mean); 0 where none is held out."""
    reader = TokenReader(corpus, valid=True)
    shape = config.train.batch_size, config.data.history_len

    def evaluate(predictor: Predictor, catalog: Catalog) -> tuple[float, dict[str, float]]:
        batches = list_batches(reader, shape, config.train.n_valid)
        nats, n_tokens = measure_nats(config, predictor, batches, catalog)
        if not n_tokens:
            return 0.0, {}
        return math.exp(-nats), {"valid/lm/nats": nats, "valid/lm/perplexity": _find_perplexity(nats)}

    return evaluate


def run_language(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains a language model, measures it on the held-out documents and writes `metrics.json`.

    Raises:
      InputError: a document, the tokenizer or the config cannot be used, or `workdir` holds a run on other documents.
    """
    # What the model refuses is refused before anything is written.
    jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config.model, TEXT_SIZES))
    make_mesh(config.train.mesh_data, config.train.mesh_expert, config.train.mesh_model)
    known = read_digests(workdir)
    accept = functools.partial(_refuse_other_tokenizer, config) if not known else None
    first_tokenizer = _find_first_tokenizer(config, workdir)
    corpus = load_corpus(config.data.corpus, workdir, config.model.text.vocab_size, first_tokenizer, accept)
    if known and known["sha256"] != corpus.digest:
        raise InputError(f"{workdir}: this directory holds a run on other documents")
    store_config(workdir / CONFIG, config)
    if not known:
        keep_origin(config, workdir)
    write_json(workdir / DIGEST, corpus.digests)
    if (workdir / METRICS).exists():
        return read_json(workdir / METRICS)
    reader, shape = TokenReader(corpus, valid=True), (config.train.batch_size, config.data.history_len)
    options = config.train
    if not np.any(reader.lengths >= 2):  # nothing tells which step is best: the last one is kept
        options = dataclasses.replace(options, eval_every=0)
        print("no document is held out (data.corpus.valid_fraction): nothing is validated", file=sys.stderr)
    evaluate = make_language_evaluator(config, corpus)
    trained = fit(dataclasses.replace(config, train=options), corpus, workdir, evaluate)
    metrics = {
        **trained.describe(config),
        "dataset": {
            "n_train_documents": int(np.sum(~corpus.is_valid)),
            "n_train_tokens": int(corpus.length[~corpus.is_valid].sum()),
        },
        "valid": {"step": trained.step, **trained.valid},
        "tasks": {"lm": _evaluate(config, corpus, trained, shape)},
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    write_json(workdir / METRICS, metrics)
    return metrics


def format_language(metrics: dict[str, Any]) -> str:
    """A line for each task of a run of text alone."""
    found = metrics["tasks"]["lm"]
    if not found["n_tokens"]:
        return "lm: no document is held out (data.corpus.valid_fraction)"
    size = f"{found['n_tokens']:,} tokens of {found['n_documents']:,} held-out documents"
    told = f"{found['nats_per_token']:.4f} nats, perplexity {found['perplexity']:.2f}"
    told += f", {found['bits_per_byte']:.4f} bits a byte"
    return f"lm: {told}; {size}"


def _find_perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond lies no float64


def _evaluate(config: Config, corpus: Corpus, trained: TrainResult, shape: tuple[int, int]) -> dict[str, Any]:
    """The held-out documents of all sources, and of each one where there are several (`sources`)."""
    sources = range(len(corpus.sources)) if 1 < len(corpus.sources) <= MOST_SOURCES else [None]
    measured = []
    for source in sources:
        reader = TokenReader(corpus, valid=True, source=source)
        batches = list_batches(reader, shape, most_tokens=int(reader.lengths.sum()))
        measured.append(measure_nats(config, trained.predictor, batches, trained.catalog))
    is_valid, n_tokens = corpus.is_valid, sum(n for _, n in measured)
    nats = measured[0][0] if len(measured) == 1 else sum(nats * n for nats, n in measured) / max(n_tokens, 1)
    found = _describe(corpus, is_valid, nats, n_tokens)
    if len(measured) > 1:
        own = [is_valid & (corpus.source == source) for source in sources]
        rows = [_describe(corpus, chosen, *part) for chosen, part in zip(own, measured, strict=True)]
        found["sources"] = dict(zip(corpus.sources, rows, strict=True))
    return found


def _describe(corpus: Corpus, chosen: np.ndarray, nats: float, n_tokens: int) -> dict[str, Any]:
    """Bits per byte are over all bytes of the documents, although a document's first token is given and not told; its
    end is told, and is no byte.
    """
    if not n_tokens:
        return {"n_tokens": 0, "n_documents": 0}
    n_bytes = int(corpus.n_bytes[chosen].sum())
    return {
        "nats_per_token": nats,
        "perplexity": _find_perplexity(nats),
        "bits_per_byte": nats * n_tokens / math.log(2) / max(n_bytes, 1),
        "n_tokens": n_tokens,
        "n_documents": int(chosen.sum()),
        "n_bytes": n_bytes,
    }


def _refuse_other_tokenizer(config: Config, tokenizer: TextTokenizer) -> None:
    """Raises: InputError, where rows of tokens are taken over from a model to which they mean other tokens."""
    if not config.train.init_from or first_match("token_encoder/row_VD", config.train.init_fresh):
        return
    base = find_checkpoint(Path(config.train.init_from))[0]
    try:
        there = TextTokenizer.load(find_tokenizer(base))
    except InputError:  # a folder of weights alone: whoever names a tokenizer has to know
        print(f"{base}: has no tokenizer; its rows of tokens are taken for those of this one", file=sys.stderr)
        return
    token = "" if there.content == tokenizer.content else tokenizer.find_conflict(there)
    if token:
        raise InputError(
            f"config.data.corpus.tokenizer: {token!r} has another id in {base}; an empty one takes over that of "
            "the base (or init_fresh and init_drop leave token_encoder and text_head out)"
        )


def _find_first_tokenizer(config: Config, workdir: Path) -> Path | None:
    """The tokenizer of the model that training begins with, where it is what is needed."""
    if not config.train.init_from or config.data.corpus.tokenizer or (workdir / TOKENIZER).is_file():
        return None
    return find_tokenizer(find_checkpoint(Path(config.train.init_from))[0])
