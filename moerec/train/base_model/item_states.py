"""Vectors of items' texts by a language model: means of its last layer, computed once and stored with the data."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.convert.logits import encode_text, make_text_batch
from moerec.data.load import RunData, load_data, with_item_states
from moerec.data.pipeline.mixture import add_words
from moerec.data.text.item_states import FOLDER, open_store, order_as_source
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.files import locked, read_json, to_plain
from moerec.nn.model import SequenceModel
from moerec.train.base_model.hf_run import find_tokenizer
from moerec.train.run_dir import Run
from moerec.types import Batch

MOST_TOKENS = 64  # of a text; what is longer is cut
SLOTS = 8192  # of a batch
_SMALLEST = 8  # slots of the shortest rows


def add_item_states(config: Config, data: RunData, workdir: Path) -> RunData:
    """The data with the states of the items' texts, where the config asks for them; what is missing is computed.

    Raises:
      InputError: `data.item_states` is no run of a language model with a tokenizer.
    """
    if not config.data.item_states:
        return data
    base = Run(Path(config.data.item_states))
    path = base.folder / "config.json"
    if path.is_file() and "model_type" in read_json(path):
        told = "is a Hugging Face folder; experiments.import_hf makes a run of it"
        raise InputError(f"config.data.item_states: {base.folder} {told}")
    if not base.config.model.text.vocab_size:
        raise InputError(f"config.data.item_states: {base.folder} knows no words (model.text.vocab_size)")
    catalogue = data.dataset.catalogue
    # A city's shards are written anew by each process, and whoever opens the run makes it in memory.
    folder = workdir if config.data.source == "city" else data.folder or workdir
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with locked(folder / FOLDER):  # a prepared folder may be another run's, too
        store = open_store(folder, catalogue, data.item_number, digest_run(base.folder))
        missing = store.list_missing()
        if missing:
            texts = order_as_source(catalogue.text, data.item_number)
            tokenizer, predictor = _load_tokenizer(base), base.predictor
            n_left = sum(store.span(part).stop - store.span(part).start for part in missing)
            print(f"item states: {n_left:,} texts by {base.folder}", file=sys.stderr, flush=True)
            started = time.monotonic()
            for n_done, part in enumerate(missing, 1):
                own = texts[store.span(part)].tolist()
                store.write(part, encode_texts(predictor.params, tokenizer, own, predictor.router_bias_LE))
                if n_done % 8 == 0 or n_done == len(missing):
                    told = f"item states: {n_done} of {len(missing)} parts, {time.monotonic() - started:.0f} s"
                    print(told, file=sys.stderr, flush=True)
    return with_item_states(data, store.read(), workdir)


def load_all(config: Config, workdir: Path) -> RunData:
    """The data of a run with events, with all that its config wants beside: the items' states, and words.

    Raises:
      InputError: as `load_data`, `add_item_states` and `add_words`.
    """
    return add_words(config, add_item_states(config, load_data(config.data, workdir), workdir), workdir)


def encode_items(config: Config, texts: list[str]) -> np.ndarray:
    """`[n, X]` states of new items' texts by the language model that a run's are from, before `standardise_like`.

    Raises:
      InputError: the run of the language model is no longer there.
    """
    base = Run(Path(config.data.item_states))
    return encode_texts(base.predictor.params, _load_tokenizer(base), texts, base.predictor.router_bias_LE)


def _load_tokenizer(base: Run) -> TextTokenizer:
    path, n_rows = find_tokenizer(base.folder), base.config.model.text.vocab_size
    tokenizer = TextTokenizer.load(path)
    if tokenizer.n_vocab > n_rows:
        raise InputError(f"{path}: has {tokenizer.n_vocab} tokens, but the model has {n_rows} rows")
    return tokenizer


def digest_run(folder: Path) -> str:
    """SHA-256 of what the states hang on: a run's best checkpoint, its model's config and its tokenizer."""
    root, found = folder / "checkpoints" / "best", hashlib.sha256()
    model = to_plain(dataclasses.asdict(Run(folder).config.model))
    found.update(json.dumps([model, MOST_TOKENS], sort_keys=True).encode())
    found.update(find_tokenizer(folder).read_bytes())
    if not root.is_dir():
        raise InputError(f"{folder}: holds no checkpoint")
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("_")):
        found.update(str(path.relative_to(root)).encode() + b"\0")
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def encode_texts(
    model: SequenceModel, tokenizer: TextTokenizer, texts: list[str], router_bias_LE: jax.Array | None = None
) -> np.ndarray:
    """`[n, D]` float32, the mean over each text's tokens of the states of the last layer; zeros without a token."""
    offsets, ids = tokenizer.encode_batch(texts)
    length = np.minimum(np.diff(offsets), MOST_TOKENS)
    state = np.zeros((len(texts), model.config.d_model), np.float32)
    for which, width in _group_by_length(length):
        n_rows = max(SLOTS // width, 1)
        for first in range(0, len(which), n_rows):
            own = which[first : first + n_rows]
            place = np.arange(width)
            is_real = np.zeros((n_rows, width), bool)
            is_real[: len(own)] = place < length[own][:, None]
            token = np.zeros((n_rows, width), np.int32)
            at = np.minimum(offsets[own][:, None] + place, len(ids) - 1)
            token[: len(own)] = np.where(is_real[: len(own)], ids[at], 0)
            batch = make_text_batch(token, is_real.astype(np.int32))
            state[own] = np.asarray(_average(model, batch, router_bias_LE))[: len(own)]
    return state


def _group_by_length(length: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Texts of about one length, and the width of their rows, of which there are a few: each is a program."""
    width, lowest = _SMALLEST, 0
    while lowest < length.max(initial=0):
        which = np.flatnonzero((length > lowest) & (length <= width))
        if len(which):
            yield which, width
        lowest, width = width, 2 * width


@jax.jit
def _average(model: SequenceModel, batch: Batch, router_bias_LE: jax.Array | None) -> jax.Array:
    real_BT1 = (batch.segment_BT > 0)[..., None]
    total_BD = jnp.sum(jnp.where(real_BT1, encode_text(model, batch, router_bias_LE), 0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(real_BT1, axis=1), 1)
