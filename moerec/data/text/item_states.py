"""Vectors of items' texts by a language model, as they are stored beside the data: in parts, so that what was computed
stays when the rest was not.

A folder `item_states/` with `meta.json` (which texts, which model, how wide) and `part-0000k.npy`, float32 `[n, X]` of
the items of the source in their order. An item without a text has zeros.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moerec.data.dataset import ItemTable
from moerec.errors import InputError
from moerec.files import read_json, replacing, write_json

FOLDER, META = "item_states", "meta.json"
PART = 1024  # items of a part


class StateStore(NamedTuple):
    """Attributes:
    folder: where the parts are. n_items: of the source.
    """

    folder: Path
    n_items: int

    @property
    def n_parts(self) -> int:
        return -(-self.n_items // PART)

    def span(self, part: int) -> slice:
        """The items of a part."""
        return slice(part * PART, min((part + 1) * PART, self.n_items))

    def list_missing(self) -> list[int]:
        """The parts that are yet to be computed."""
        return [part for part in range(self.n_parts) if not self._path(part).is_file()]

    def write(self, part: int, state_IX: np.ndarray) -> None:
        """Stores the states of the items of a part, whole or not at all."""
        with replacing(self._path(part)) as file:
            np.save(file, state_IX.astype(np.float32), allow_pickle=False)

    def read(self) -> np.ndarray:
        """`[I, X]` float32 of all items.

        Raises:
          InputError: a part is missing, or damaged.
        """
        parts: list[np.ndarray] = []
        for part in range(self.n_parts):
            path, span = self._path(part), self.span(part)
            try:
                with path.open("rb") as file:
                    found = np.lib.format.read_array(file, allow_pickle=False)
            except Exception as error:  # of a damaged header Python's own tokenizer may tell
                reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
                told = f"states of items cannot be read ({reason}); where there is no file, training computes them"
                raise InputError(f"{path}: {told}") from None
            is_whole = found.ndim == 2 and found.dtype == np.float32 and len(found) == span.stop - span.start
            if not is_whole or (parts and found.shape[1] != parts[0].shape[1]) or not np.all(np.isfinite(found)):
                raise InputError(f"{path}: is no float32 array of {span.stop - span.start} items' states; delete it")
            parts.append(found)
        return np.concatenate(parts)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npy"


def order_as_source(values_I: np.ndarray, item_number: np.ndarray) -> np.ndarray:
    """Values of items in the order of the source. Args: by a data set's numbers; `RunData.item_number`."""
    return values_I[item_number]


def digest_texts(text_I: np.ndarray) -> str:
    """SHA-256 of texts in their order."""
    found = hashlib.sha256()
    for text in text_I.tolist():
        found.update(text.encode() + b"\0")
    return found.hexdigest()


def open_store(folder: Path, catalogue: ItemTable, item_number: np.ndarray, model: str | None) -> StateStore:
    """The store of a catalogue's states in `folder`; one of other texts or of another model is emptied.

    Args: item_number: as `order_as_source`. model: digest of the one that computes; None: only read what is there.

    Raises:
      InputError: nothing is computed, and the store is of other texts.
    """
    store = StateStore(folder / FOLDER, catalogue.n_items)
    meta: dict[str, Any] = {"texts": digest_texts(order_as_source(catalogue.text, item_number)), "model": model}
    path = store.folder / META
    known = read_json(path) if path.is_file() else {}
    if model is None:
        if known.get("texts") != meta["texts"]:
            raise InputError(f"{store.folder}: holds no states of these items' texts; training computes them")
        return store
    if known != meta:
        store.folder.mkdir(parents=True, exist_ok=True)
        for stale in store.folder.glob("part-*.npy"):
            stale.unlink()
        write_json(path, meta)
    return store


def standardise(state_IX: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and deviation 1 over the items that have a text; zeros stay where there is none.

    States of language models share a large direction, and a few columns outweigh all others.
    """
    return standardise_like(state_IX, state_IX)


def standardise_like(state_IX: np.ndarray, known_IX: np.ndarray) -> np.ndarray:
    """Columns moved and scaled as those of the states `known_IX` are by `standardise`; zeros stay."""
    known = known_IX[np.any(known_IX != 0, axis=1)].astype(np.float64)
    if not len(known):
        return state_IX
    scaled = (state_IX - known.mean(axis=0)) / np.maximum(known.std(axis=0), 1e-6)
    return np.where(np.any(state_IX != 0, axis=1)[:, None], scaled, 0).astype(np.float32)
