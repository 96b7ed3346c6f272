"""From a config to the data of a run: generate, prepare or open it, permute the ids, split."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from moerec.config import DataConfig
from moerec.data import city
from moerec.data.dataset import (
    SECOND_US,
    UNKNOWN_TIME,
    Dataset,
    floor_seconds,
    mark_unseen,
    permute_items,
    shuffle_services,
)
from moerec.data.neighbors import (
    NEIGHBOR_FILES,
    ItemNames,
    Neighbors,
    NeighborTable,
    find_transition_neighbors,
    load_neighbors,
    make_text_table,
    save_neighbors,
)
from moerec.data.pipeline.events import EventReader, MemoryReader, ShardReader
from moerec.data.pipeline.item_texts import ItemTexts
from moerec.data.prepare.shards import Meta, load_dataset, open_source, write_dataset
from moerec.data.prepare.tables_to_shards import is_current, prepare
from moerec.data.splits import TRAIN, assign_split_ids, shuffle_ties
from moerec.data.text.corpus import Corpus
from moerec.data.text.item_states import open_store, standardise
from moerec.data.text.item_tokens import ITEM_TOKENS, PLAIN_WORDS, ItemVocabulary, TokenTable, make_vocabulary
from moerec.data.timezones import Zones, settle_zones
from moerec.errors import InputError
from moerec.files import read_json
from moerec.types import Catalog, NearItems

DIGEST = "data.json"  # in the directory of a run: {"sha256": the digest of its data, "items_sha256": that of the items}
Opened = tuple[Dataset, city.World | None, Path | None]  # the source's items and events, what made or what holds them
_VOCABULARY = "item_tokens_sha256"  # an entry of it


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
      dataset: with permuted item numbers. split_ids: `[events]` int8, of `moerec.data.splits`. tokens: items' texts.
      world: the city world behind it, or None.
      folder: the prepared folder that `dataset` was read from, or None.
      item_number: `[I]` int32, the number in `dataset` of each item of the source.
      quarantined: rows that were put aside when it was prepared, by file and reason.
      notes: lines about what is odd in its times and clocks.
      zones: those that its clocks are by; None where the events' times name the offsets of their own, or all show UTC.
      neighbors: the items' nearest, by the names of the tables that the config asks for (`Catalog.near`).
      item_states: `[I, X]` float32, of the items' texts by a language model, standardised; None where none is asked
        for, or they are not computed yet.
      corpus, item_texts: documents and items' texts, where the stream has words beside events (`add_words`).
    """

    dataset: Dataset
    split_ids: np.ndarray
    tokens: TokenTable
    world: city.World | None
    folder: Path | None
    item_number: np.ndarray
    quarantined: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    zones: Zones | None = None
    neighbors: Mapping[str, Neighbors] = dataclasses.field(default_factory=dict)
    item_states: np.ndarray | None = None
    corpus: Corpus | None = None
    item_texts: ItemTexts | None = None

    @property
    def item_tokens(self) -> ItemVocabulary:
        """What encodes items, of the catalogue and new ones."""
        return self.tokens.vocabulary

    @functools.cached_property
    def items_digest(self) -> str:
        """SHA-256 of the items in their numbering and of their tokens: equal where tables of items mean the same."""
        catalogue, found = self.dataset.catalogue, hashlib.sha256()
        for array in (catalogue.offsets, self.tokens.ids):
            found.update(np.ascontiguousarray(array).tobytes())
        for names in (catalogue.services, catalogue.ids.tolist()):
            found.update("\0".join(names).encode())
        return found.hexdigest()

    def keep_item_tokens(self, workdir: Path) -> None:
        """Writes the vocabulary beside the run, for items to come; plain words are always read off the catalogue."""
        if self.item_tokens.kind != PLAIN_WORDS:
            self.item_tokens.save(workdir / ITEM_TOKENS)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """What `DIGEST` holds of a run."""
        found = {"sha256": self.digest, "items_sha256": self.items_digest}
        if self.item_tokens.kind != PLAIN_WORDS:  # those are the catalogue's, and older runs have no such digest
            found[_VOCABULARY] = self.item_tokens.digest
        if self.corpus is not None:
            found["text_sha256"] = self.corpus.digest
        if self.item_states is not None:
            found["item_states_sha256"] = hashlib.sha256(self.item_states.tobytes()).hexdigest()
        return found

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the events, their split, the items and the users' fields: equal for equal data."""
        log, catalogue = self.dataset.log, self.dataset.catalogue
        found = hashlib.sha256()
        fields, _ = self.dataset.profile_codes
        events = [log.offsets, log.item, log.action, _coarsen(log.time_us), log.context]
        if log.utc_offset.any():
            events.append(log.utc_offset)
        for array in (*events, self.split_ids, catalogue.offsets, self.tokens.ids, fields):
            found.update(np.ascontiguousarray(array).tobytes())
        for names in (catalogue.services, catalogue.ids.tolist()):
            found.update("\0".join(names).encode())
        return found.hexdigest()

    @functools.cached_property
    def catalog(self) -> Catalog:
        """What a model is given of the items."""
        catalogue = self.dataset.catalogue
        count = np.bincount(self.dataset.log.item[self.split_ids == TRAIN], minlength=catalogue.n_items)
        found = Catalog(catalogue.service, self.tokens.ids, count.astype(np.float32))
        near = {name: NearItems(*table) for name, table in self.neighbors.items()}
        return found._replace(near=near, state_IX=self.item_states)


def _coarsen(time_us: np.ndarray) -> np.ndarray:
    """`[events]` in seconds where all are whole ones, as the digests of earlier runs have them."""
    is_whole = (time_us % SECOND_US == 0) | (time_us == UNKNOWN_TIME)
    return floor_seconds(time_us) if is_whole.all() else time_us


def load_data(config: DataConfig, workdir: Path) -> RunData:
    """Loads or makes the data of a run; tables are prepared into `workdir/data`, and anew when they change.

    Raises:
      InputError: whatever is wrong with the input, with its file, row and column; or `workdir` holds a run on other
        data (its `DIGEST` says so), which is left as it is: its checkpoints were trained on what would now be held out.
    """
    cache = workdir / "data"

    def accept(folder: Path) -> None:
        _require_same(_assemble(config, (load_dataset(folder), None, folder), workdir), workdir)

    if config.source == "tables" and not is_current(config, cache):
        prepare(config, cache, accept if (workdir / DIGEST).exists() else None)
    data = _assemble(config, _open(config, cache), workdir)
    _require_same(data, workdir)
    return _with_neighbors(config, data, workdir, is_kept=True)


def reload_data(config: DataConfig, workdir: Path) -> RunData:
    """The data of a run as it keeps them, wherever the tables are by now; nothing is written.

    Raises:
      InputError: they are not there, or are others.
    """
    from_memory = dataclasses.replace(config, reader="memory")  # a city's shards would be written anew
    data = _assemble(from_memory, _open(from_memory, workdir / "data"), workdir)
    _require_same(data, workdir)
    if config.item_states:
        store = open_store(data.folder or workdir, data.dataset.catalogue, data.item_number, model=None)
        data = with_item_states(data, store.read(), workdir)
    return _with_neighbors(config, data, workdir, is_kept=False)


def with_item_states(data: RunData, state_IX: np.ndarray, workdir: Path) -> RunData:
    """The data with the states of the source's items in their order.

    Raises:
      InputError: `workdir` holds a run on other states.
    """
    placed = np.empty_like(state_IX)
    placed[data.item_number] = standardise(state_IX)
    data = dataclasses.replace(data, item_states=placed)
    name = "item_states_sha256"
    if name in (known := read_digests(workdir)) and known[name] != data.digests[name]:
        raise InputError(f"{workdir}: this directory holds a run on other states of items (data.item_states)")
    return data


def _with_neighbors(config: DataConfig, data: RunData, workdir: Path, is_kept: bool) -> RunData:
    """The data with their items' neighbors, of the run's tables where it has some; `is_kept`: made ones are written.

    The tables are data beside the run: one of its texts that was extended is read as it is. One that was left behind
    by other events, or by other items, is made anew.
    """
    catalogue, found = data.dataset.catalogue, {}

    def count(n: int, within_service: bool) -> NeighborTable:
        neighbors = find_transition_neighbors(data.dataset, data.split_ids, n, within_service)
        return NeighborTable(ItemNames.of(catalogue), neighbors, source=data.digest)

    def compare_texts(n: int) -> NeighborTable:
        table = make_text_table(catalogue, n)
        if not np.any(table.neighbors.item_IX >= 0):
            raise InputError("data.text_neighbors: no items of a service share words (data.schema.text, attributes)")
        return dataclasses.replace(table, source=data.items_digest)

    makers: dict[str, Callable[[int], NeighborTable]] = {
        "text": compare_texts,
        "transitions": lambda n: count(n, within_service=True),
        "crossings": lambda n: count(n, within_service=False),
    }
    for name, n in config.neighbor_widths.items():
        path = workdir / NEIGHBOR_FILES[name]
        if path.exists():
            table = load_neighbors(path)
            source = data.items_digest if name == "text" else data.digest
            if table.neighbors.item_IX.shape[1] == n and table.source == source:
                found[name] = table.align(catalogue)
                continue
            if not is_kept:
                raise InputError(
                    f"{path}: was made of other events or items, or keeps another number of neighbors than {n}"
                )
        table = makers[name](n)
        found[name] = table.neighbors
        if is_kept:
            workdir.mkdir(parents=True, exist_ok=True)
            save_neighbors(path, table)
    return dataclasses.replace(data, neighbors=found)


def read_digests(workdir: Path) -> dict[str, str]:
    """`DIGEST` of a run; empty where it has none yet.

    Raises:
      InputError: it is damaged.
    """
    path = workdir / DIGEST
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found.get("sha256"), str):
        raise InputError(f"{path}: names no digest of the run's data")
    return found


def _require_same(data: RunData, workdir: Path) -> None:
    known = read_digests(workdir)
    if known and known["sha256"] != data.digest:
        raise InputError(
            f"{workdir}: this directory holds a run on other data; the tables or their preparation have changed"
        )
    if _VOCABULARY in known and known[_VOCABULARY] != data.item_tokens.digest:
        raise InputError(f"{workdir / ITEM_TOKENS}: is not the vocabulary that this run has encoded its items by")


def _assemble(config: DataConfig, opened: Opened, workdir: Path) -> RunData:
    """The data of what was opened; a run that keeps a vocabulary has its items encoded by that one."""
    dataset, world, folder = opened
    dataset, item_number = permute_items(dataset, config.seed)
    if config.split.shuffle_ties:
        dataset = shuffle_ties(dataset, config.seed)
    split_ids = assign_split_ids(dataset, config.split, config.seed)
    (zones, unzoned), log = settle_zones(dataset, config.schema), dataset.log
    if zones is not None:
        utc_offset = zones.find_utc_offsets(log.user, log.time_us, log.context)
        dataset = dataclasses.replace(dataset, log=dataclasses.replace(log, utc_offset=utc_offset))
    if world is None:  # all of the city's values are known, and its oracle asks for them
        dataset = mark_unseen(dataset, _find_requests(dataset, split_ids == TRAIN, config.first_event))
    catalogue = dataset.catalogue
    is_kept = _VOCABULARY in read_digests(workdir)
    vocabulary = ItemVocabulary.load(workdir / ITEM_TOKENS, config) if is_kept else make_vocabulary(catalogue, config)
    tokens = vocabulary.encode_items(catalogue.text, catalogue.attributes).trim()
    found = {} if folder is None else Meta.load(folder).extra
    notes = (*found.get("notes", ()), *([unzoned] if unzoned else []))
    return RunData(dataset, split_ids, tokens, world, folder, item_number, found.get("quarantined", {}), notes, zones)


def _find_requests(dataset: Dataset, keep: np.ndarray, first_event: bool) -> np.ndarray:
    """`[events]` bool, those whose context is trained on: all that are predicted in training."""
    if first_event:
        return keep
    kept = np.flatnonzero(keep)
    is_request = keep.copy()
    is_request[kept[np.unique(dataset.log.user[kept], return_index=True)[1]]] = False
    return is_request


def _open(config: DataConfig, cache: Path) -> Opened:
    if config.source == "text":
        raise InputError("config.data.source: documents of text have no events, users or items")
    if config.source == "city":
        dataset, generated = city.generate(config.city, config.seed)
        world: city.World | None = generated
        if config.city.random_services:  # the oracle knows items by their own services
            dataset, world = shuffle_services(dataset, config.seed), None
        if config.reader == "memory":
            return dataset, world, None
        write_dataset(dataset, cache, config.n_shards)
        return dataset, world, cache
    folder = cache if config.source == "tables" else Path(config.prepared)
    return load_dataset(folder), None, folder


def make_reader(config: DataConfig, data: RunData) -> EventReader:
    """The training events, from memory or from the shards; both give the same stream."""
    keep, (fields, _) = data.split_ids == TRAIN, data.dataset.profile_codes
    if config.reader == "memory" or data.folder is None:
        return MemoryReader(data.dataset.log, keep, fields)
    source = open_source(data.folder)
    log = data.dataset.log
    return ShardReader(source, log.offsets, keep, data.item_number, fields, log.utc_offset)
