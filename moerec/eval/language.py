"""How well a language model predicts held-out documents, and a run that is of text alone."""

import dataclasses
import functools
import math
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.config.stored import store_config
from moerec.config.terminal import printable
from moerec.convert.paths import first_match
from moerec.data.load import DIGEST, read_digests
from moerec.data.packing import place_sequences
from moerec.data.text.corpus import TOKENIZER, Corpus, load_corpus
from moerec.data.text.prepare import describe_corpora
from moerec.data.text.stream import Pieces, TokenReader, pack_tokens
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.files import read_json, write_json
from moerec.nn.model import TEXT_SIZES, Predictor, SequenceModel
from moerec.nn.sharding import make_mesh
from moerec.tasks import LanguageModel, sum_token_nll
from moerec.train.base_model.hf_run import find_tokenizer, keep_origin
from moerec.train.base_model.warm_start import find_checkpoint
from moerec.train.loop import BITS, Evaluator, fit
from moerec.train.run_dir import CONFIG, METRICS
from moerec.types import Batch, Catalog


def list_batches(reader: TokenReader, shape: tuple[int, int], most_tokens: int) -> Iterator[Batch]:
    """All documents once, cut into windows of a row from each one's beginning, with their targets.

    Where there are more than so many tokens, windows that lie evenly among all of them stand for the others.
    """
    whole = Pieces(reader.start, reader.lengths, np.ones(len(reader.start), bool)).split(shape[1])
    n_windows, n_tokens = len(whole.length), int(whole.length.sum())
    if n_tokens > most_tokens:
        n_chosen = max(1, n_windows * most_tokens // n_tokens)
        chosen = (2 * np.arange(n_chosen) + 1) * n_windows // (2 * n_chosen)  # the middle one of each part
        whole = Pieces(*(x[chosen] for x in whole))
    while len(whole.length):
        placed = place_sequences(whole.length, *shape)
        own = Pieces(*(x[: placed.n] for x in whole))
        packed = pack_tokens(reader.tokens, reader.end, own, placed, shape)
        yield packed.batch._replace(targets={LanguageModel.name: LanguageModel().render(packed)})
        whole = Pieces(*(x[placed.n :] for x in whole))


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


class HeldOut:
    """The held-out documents of each corpus, and what a model's predictions of them come to."""

    def __init__(self, config: Config, corpus: Corpus, widen: Callable[[Batch], Batch] = lambda batch: batch):
        """Args: widen: makes a batch of words one of a model that knows events, too (`Widths.widen`)."""
        self._config, self._corpus, self._widen = config, corpus, widen
        self._shape = config.train.batch_size, config.data.history_len
        self.readers = [TokenReader(corpus, valid=True, source=k) for k in range(len(corpus.names))]
        self.n_tokens = [int(reader.lengths.sum()) for reader in self.readers]

    def measure(self, predictor: Predictor, catalog: Catalog, most_tokens: int | None = None) -> dict[str, Any]:
        """What `metrics.json` holds as `tasks.lm`.

        The nats of all are the mean over all held-out tokens, whichever of them are looked at.

        Args: about how many tokens are looked at, of each corpus as many where it has them; None: all.
        """
        quotas = self.n_tokens if most_tokens is None else share_out(most_tokens, self.n_tokens)
        rows = {}
        for k, (name, reader, quota) in enumerate(zip(self._corpus.names, self.readers, quotas, strict=True)):
            batches = list_batches(reader, self._shape, max(quota, 1))
            nats, _ = measure_nats(self._config, predictor, map(self._widen, batches), catalog)
            rows[name] = self._describe(self._corpus.source == k, nats)
        n_tokens = sum(self.n_tokens)
        total = sum(row["nats_per_token"] * row["n_tokens"] for row in rows.values() if row["n_tokens"])
        whole = self._describe(np.ones(len(self._corpus.source), bool), total / max(n_tokens, 1))
        return whole | ({"by_corpus": rows} if n_tokens else {})

    def _describe(self, chosen: np.ndarray, nats: float) -> dict[str, Any]:
        """Each token of a document is predicted, the first one from the end of documents that stands before it, and its
        end, too. So nats times tokens is what it takes to tell the document whole, whatever the tokens are, and bits
        per byte of different tokenizers can be compared. An end is no byte.
        """
        chosen = chosen & self._corpus.is_valid
        n_tokens = int(self._corpus.length[chosen].sum())
        if not n_tokens:
            return {"n_tokens": 0, "n_documents": 0}
        n_bytes = int(self._corpus.n_bytes[chosen].sum())
        return {
            "nats_per_token": nats,
            "perplexity": _find_perplexity(nats),
            "bits_per_byte": nats * n_tokens / math.log(2) / n_bytes,
            "n_tokens": n_tokens,
            "n_documents": int(chosen.sum()),
            "n_bytes": n_bytes,
        }


def share_out(total: int, wanted: list[int]) -> list[int]:
    """`total` shared out evenly, where none gets more than it wants, and others get what is left."""
    given = [0] * len(wanted)
    for place, k in enumerate(sorted(range(len(wanted)), key=lambda k: wanted[k])):
        given[k] = min(wanted[k], (total - sum(given)) // (len(wanted) - place))
    return given


def make_language_evaluator(config: Config, corpus: Corpus) -> Evaluator:
    """Scores what is trained by the probability of a held-out token (geometric mean); 0 where none is held out."""
    held_out = HeldOut(config, corpus)

    def evaluate(predictor: Predictor, catalog: Catalog) -> tuple[float, dict[str, float]]:
        found = held_out.measure(predictor, catalog, config.train.n_valid)
        return (math.exp(-found["nats_per_token"]) if found["n_tokens"] else 0.0), describe_valid(found)

    return evaluate


def describe_valid(found: dict[str, Any]) -> dict[str, float]:
    """What a validation writes down of `HeldOut.measure`; nothing where no document is held out."""
    if not found["n_tokens"]:
        return {}
    valid = {"valid/lm/nats": found["nats_per_token"], "valid/lm/perplexity": found["perplexity"]}
    valid[BITS] = found["bits_per_byte"]
    rows = {name: row for name, row in found["by_corpus"].items() if row["n_tokens"]}
    return valid | {f"{BITS}/{name}": row["bits_per_byte"] for name, row in rows.items()}


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
    n_rows = config.model.text.vocab_size
    corpus = load_corpus(config.data, workdir, n_rows, first_tokenizer, accept, known.get("sha256", ""))
    store_config(workdir / CONFIG, config)
    if not known:
        keep_origin(config, workdir)
    write_json(workdir / DIGEST, corpus.digests)
    if (workdir / METRICS).exists():
        return read_json(workdir / METRICS)
    for line in describe_data(corpus):
        print(line, file=sys.stderr)
    options = config.train
    if not corpus.is_valid.any():  # nothing tells which step is best: the last one is kept
        options = dataclasses.replace(options, eval_every=0)
        print(
            "no document is held out (data.corpus.valid_fraction; a .txt is one document): nothing is validated",
            file=sys.stderr,
        )
    evaluate = make_language_evaluator(config, corpus)
    trained = fit(dataclasses.replace(config, train=options), corpus, workdir, evaluate)
    metrics = {
        **trained.describe(config),
        "dataset": {
            "n_train_documents": int(np.sum(~corpus.is_valid)),
            "n_train_tokens": sum(corpus.n_trained_K),
            "corpora": _describe_corpora(corpus),
        },
        "valid": {"step": trained.step, **trained.valid},
        "tasks": {"lm": HeldOut(config, corpus).measure(trained.predictor, trained.catalog)},
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    write_json(workdir / METRICS, metrics)
    return metrics


def format_language(metrics: dict[str, Any]) -> str:
    """A line for each task of a run of text alone, and one for each of several corpora."""
    found = metrics["tasks"]["lm"]
    if not found["n_tokens"]:
        return "lm: no document is held out (data.corpus.valid_fraction)"
    size = f"{found['n_tokens']:,} tokens of {found['n_documents']:,} held-out documents"
    told = f"{found['nats_per_token']:.4f} nats, perplexity {found['perplexity']:.2f}"
    told += f", {found['bits_per_byte']:.4f} bits a byte"
    rows = found["by_corpus"] if len(found["by_corpus"]) > 1 else {}
    width = max((len(printable(name)) for name in rows), default=0)
    lines = [
        f"  {printable(name).ljust(width)}  {row['bits_per_byte']:.4f} bits a byte; {row['n_tokens']:,} tokens"
        if row["n_tokens"]
        else f"  {printable(name).ljust(width)}  no document is held out"
        for name, row in rows.items()
    ]
    return "\n".join([f"lm: {told}; {size}", *lines])


def describe_data(corpus: Corpus) -> list[str]:
    """What there is of each corpus, duplicates that were dropped among it, and which ones nothing is held out of."""
    held = np.bincount(corpus.source[corpus.is_valid], minlength=len(corpus.names))
    none = [printable(name) for name, n in zip(corpus.names, held.tolist(), strict=True) if not n]
    odd = [f"no document of {', '.join(none)} is held out"] if none and held.any() else []
    return [*describe_corpora(corpus.counts), *odd]


def _describe_corpora(corpus: Corpus) -> dict[str, dict[str, Any]]:
    trained = corpus.source[~corpus.is_valid]
    n_documents = np.bincount(trained, minlength=len(corpus.names)).tolist()
    columns = (corpus.names, n_documents, corpus.n_trained_K, corpus.shares_K.tolist())
    found = {
        name: {"n_train_documents": n, "n_train_tokens": n_tokens, "share": share}
        for name, n, n_tokens, share in zip(*columns, strict=True)
    }
    for row in corpus.counts:
        found[row["name"]]["n_duplicates"] = row["n_duplicates"]
    return found


def _find_perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond lies no float64


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
