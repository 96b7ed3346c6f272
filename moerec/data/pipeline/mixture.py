"""Several streams in one: a batch is rows of events, of items with their texts and of documents, one behind another.

How many rows each stream has follows from its share and the number of the step (`RowShares`); a batch's shape never
changes. What a stream gives is the same however many rows are taken of it at a time, so that with the same number of
steps a stream alone, in a batch of as many rows as it has here, trains on the same slots.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np

from moerec.config import Config
from moerec.data.load import RunData, make_reader, read_digests
from moerec.data.pipeline.behind_events import TextsBehindEvents
from moerec.data.pipeline.events import PackedStream, Render, StreamOptions
from moerec.data.pipeline.item_texts import TO_ITEM, TO_TEXT, ItemTextStream, make_item_texts
from moerec.data.pipeline.shares import RowShares
from moerec.data.text.corpus import load_corpus
from moerec.data.text.stream import TextStream
from moerec.errors import InputError
from moerec.types import EVENT, Batch, Target

FOLDER = "data.text"  # in the directory of a run: its documents, prepared; `data` has its tables


class RowSource(Protocol):
    """The iterator of a stream of which any number of rows can be taken, and whose position can be saved."""

    def take(self, n_rows: int) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Widths(NamedTuple):
    """What all rows of a batch have alike: services of the catalogue, features of the context, fields of a profile."""

    n_services: int
    n_context: int
    n_fields: int

    @classmethod
    def of(cls, data: RunData) -> "Widths":
        """Those of a run."""
        codes, _ = data.dataset.profile_codes
        return cls(data.dataset.catalogue.n_services, data.dataset.log.context.shape[1], codes.shape[1])

    def widen(self, batch: Batch) -> Batch:
        """Rows without words, or without events, as rows of a batch that has both."""

        def pad(code_BTX: np.ndarray, width: int) -> np.ndarray:
            return np.pad(code_BTX, ((0, 0), (0, 0), (0, width - code_BTX.shape[2])))

        request = batch.request
        return batch._replace(
            service_BT=np.where(batch.kind_BT == EVENT, batch.service_BT, self.n_services).astype(np.int32),
            request=request._replace(
                context_BTC=pad(request.context_BTC, self.n_context), field_BTY=pad(request.field_BTY, self.n_fields)
            ),
            token_BT=np.zeros_like(batch.item_BT) if batch.token_BT is None else batch.token_BT,
        )


class MixedStream(grain.IterDataset[Batch]):
    """Endless batches mixed of the batches' rows of several streams."""

    def __init__(
        self, streams: Mapping[str, grain.IterDataset], tasks: tuple[str, ...], shares: RowShares, widths: Widths
    ):
        """Args: the streams by name, in the order of `shares`; all tasks of any of them."""
        super().__init__()
        self._streams, self._rest = dict(streams), (tasks, shares, widths)

    def __iter__(self) -> "MixedIterator":
        iterators: dict[str, Any] = {name: iter(stream) for name, stream in self._streams.items()}
        return MixedIterator(iterators, *self._rest)


class MixedIterator(grain.DatasetIterator[Batch]):
    """State: the step, from which the shares follow, and the positions of the streams."""

    def __init__(self, streams: Mapping[str, RowSource], tasks: tuple[str, ...], shares: RowShares, widths: Widths):
        super().__init__()
        self._streams, self._tasks, self._shares, self._widths = streams, tasks, shares, widths
        self._step = 0

    def __next__(self) -> Batch:
        parts = []
        for name, n_rows in self._shares.split(self._step).items():
            if n_rows:
                batch = self._widths.widen(self._streams[name].take(n_rows))
                none = Target(np.zeros_like(batch.item_BT), np.zeros(batch.item_BT.shape, np.float32))
                parts.append(batch._replace(targets={task: batch.targets.get(task, none) for task in self._tasks}))
        self._step += 1
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, "streams": {name: rows.get_state() for name, rows in self._streams.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        if sorted(state["streams"]) != sorted(self._streams):
            raise ValueError(f"streams {', '.join(state['streams'])}, not {', '.join(self._streams)}")
        self._step = int(state["step"])
        for name, rows in self._streams.items():
            rows.set_state(state["streams"][name])


def make_mixed_stream(
    config: Config, data: RunData, renders: Mapping[str, Render], options: StreamOptions
) -> MixedStream:
    """The stream of a config with words beside events. Args: renders: of each stream, what its own tasks want."""
    corpus, texts, items = data.corpus, data.item_texts, data.dataset.catalogue
    assert corpus is not None
    assert texts is not None
    streams: dict[str, grain.IterDataset] = {}
    reader = make_reader(config.data, data)
    for name in config.data.mix.shares:
        if name == "events":
            streams[name] = PackedStream(reader, items, renders[name], options)
        elif name == "documents":
            streams[name] = TextStream(corpus, renders[name], options)
        else:
            ways, most = [way for way in (TO_ITEM, TO_TEXT) if way in config.tasks], config.data.mix.history
            behind = TextsBehindEvents(reader, texts, items, ways, most, options) if most else None
            streams[name] = ItemTextStream(texts, items, ways, renders[name], options, behind)
    shares = RowShares.of(config.data.mix.shares, options.n_rows)
    return MixedStream(streams, config.tasks, shares, Widths.of(data))


def add_words(config: Config, data: RunData, workdir: Path) -> RunData:
    """The data with the corpus and the items' texts, where a config has words beside events.

    Raises:
      InputError: as `load_corpus`; or `workdir` holds a run on other documents.
    """
    mix = config.data.mix
    if not mix.has_words:
        return data
    of_text = dataclasses.replace(config.data, mix=type(mix)(), source="text", prepared=mix.prepared)
    known = read_digests(workdir).get("text_sha256", "")
    corpus = load_corpus(of_text, workdir, config.model.text.vocab_size, known=known, folder=FOLDER)
    if mix.documents and not corpus.n_trained_K:
        raise InputError("config.data.corpus: no document is left to train on")
    items = data.dataset.catalogue
    texts = make_item_texts(items, corpus.tokenizer, corpus.end, mix.max_tokens, mix.held_out)
    return dataclasses.replace(data, corpus=corpus, item_texts=texts)
