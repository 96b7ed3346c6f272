"""Neighbors with the names of their items, so that they can be read against another catalogue: `NEIGHBOR_FILES`."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from moerec.data.dataset import ItemTable
from moerec.data.neighbors.best import Neighbors
from moerec.data.neighbors.text import WordCounts
from moerec.errors import InputError
from moerec.files import replacing

# In a run, by the kind of table.
NEIGHBOR_FILES = {"text": "neighbors.npz", "transitions": "transitions.npz", "crossings": "crossings.npz"}
FORMAT = 1


class ItemNames(NamedTuple):
    """What the items of a catalogue are called. Attributes: as those of `ItemTable`."""

    services: tuple[str, ...]
    offsets: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, catalogue: ItemTable) -> "ItemNames":
        """The names of a catalogue's items."""
        return cls(catalogue.services, catalogue.offsets, catalogue.ids)

    def find(self, catalogue: "ItemTable | ItemNames") -> np.ndarray:
        """`[items of the catalogue]` int64, the place here of the item of the same service and id; -1 where none is."""
        found = np.full(len(catalogue.ids), -1)
        ids, others = self.ids.tolist(), catalogue.ids.tolist()
        for z, service in enumerate(catalogue.services):
            if service in self.services:
                own = self.services.index(service)
                place = {ids[i]: i for i in range(self.offsets[own], self.offsets[own + 1])}
                lo, hi = catalogue.offsets[z : z + 2]
                found[lo:hi] = [place.get(name, -1) for name in others[lo:hi]]
        return found


@dataclasses.dataclass(frozen=True)
class NeighborTable:
    """Neighbors that know their items by name.

    Attributes:
      names: of the items that `neighbors` numbers. counts: by which words were weighed; None if it is not about texts.
      source: digest of the events that it was counted on, or, of texts, of the items that it was first made of.
    """

    names: ItemNames
    neighbors: Neighbors
    counts: WordCounts | None = None
    source: str = ""

    def align(self, catalogue: ItemTable) -> Neighbors:
        """The neighbors in the numbers of another catalogue, whose items are found by service and id.

        Items that the table does not have get no neighbors, and those that the catalogue does not have are left out.
        """
        here, there = self.names.find(catalogue), ItemNames.of(catalogue).find(self.names)
        shape = (catalogue.n_items, self.neighbors.item_IX.shape[1])
        item_IX, similarity_IX = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        known = np.flatnonzero(here >= 0)
        old_IX = self.neighbors.item_IX[here[known]]
        new_IX = np.where(old_IX >= 0, np.append(there, -1)[old_IX], -1)
        order = np.argsort(new_IX < 0, axis=1, kind="stable")  # what is left moves together
        similarity = np.where(new_IX >= 0, self.neighbors.similarity_IX[here[known]], 0)
        item_IX[known] = np.take_along_axis(new_IX, order, axis=1)
        similarity_IX[known] = np.take_along_axis(similarity, order, axis=1)
        return Neighbors(item_IX, similarity_IX)


def save_neighbors(path: Path, table: NeighborTable) -> None:
    """Writes the table atomically, without pickles."""
    columns: dict[str, Any] = {
        "format": np.int64(FORMAT),
        "offsets": table.names.offsets,
        **table.neighbors._asdict(),
        **_pack("services", table.names.services),
        **_pack("ids", table.names.ids.tolist()),
        **_pack("source", (table.source,)),
    }
    if table.counts is not None:
        matrix = table.counts.count_ZV
        columns |= {"count_data": matrix.data, "count_indices": matrix.indices, "count_indptr": matrix.indptr}
        columns |= {"n_items_Z": table.counts.n_items_Z, **_pack("words", table.counts.words)}
        columns |= _pack("count_services", table.counts.services)
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **columns)


def load_neighbors(path: Path) -> NeighborTable:
    """Reads what `save_neighbors` wrote.

    Raises:
      InputError: there is no such file, or it is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
        return _read_table(columns)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged archive is found out by zipfile, zlib, numpy or the parser of its headers
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: holds no neighbors ({type(error).__name__}: {reason})") from None


def _read_table(columns: dict[str, np.ndarray]) -> NeighborTable:
    if columns["format"] != FORMAT:
        raise ValueError(f"format {columns['format']}, and this version reads {FORMAT}")
    names = ItemNames(
        tuple(_unpack("services", columns)), columns["offsets"], np.array(_unpack("ids", columns), object)
    )
    neighbors = Neighbors(columns["item_IX"], columns["similarity_IX"])
    n, edges = len(names.ids), names.offsets
    if edges.dtype != np.int64 or len(edges) != len(names.services) + 1 or edges[0] != 0 or edges[-1] != n:
        raise ValueError("the offsets are not those of the items")
    if np.any(np.diff(edges) < 0):
        raise ValueError("the offsets fall")
    dtypes, shapes = [x.dtype for x in neighbors], [x.shape for x in neighbors]
    if dtypes != [np.dtype(np.int32), np.dtype(np.float32)] or shapes != [(n, *shapes[0][1:2])] * 2:
        raise ValueError("the columns are of other types or lengths")
    item_IX, similarity_IX = neighbors
    if np.any((item_IX < -1) | (item_IX >= n)) or not np.all(np.isfinite(similarity_IX)):
        raise ValueError("a neighbor is no item, or its similarity no number")
    (source,) = _unpack("source", columns)
    return NeighborTable(names, neighbors, _read_counts(columns) if "count_data" in columns else None, source)


def _read_counts(columns: dict[str, np.ndarray]) -> WordCounts:
    services, words = tuple(_unpack("count_services", columns)), tuple(_unpack("words", columns))
    parts = tuple(columns[f"count_{part}"] for part in ("data", "indices", "indptr"))
    matrix = scipy.sparse.csr_matrix(parts, (len(services), len(words)))
    matrix.check_format(full_check=True)
    n_items_Z = columns["n_items_Z"]
    if n_items_Z.shape != (len(services),) or n_items_Z.dtype != np.int64 or np.any(matrix.data < 0):
        raise ValueError("the counts of words are not those of the services")
    return WordCounts(services, words, matrix, n_items_Z)


def _pack(name: str, values: "list[str] | tuple[str, ...]") -> dict[str, np.ndarray]:
    """Strings end to end as UTF-8: as an array of numpy's, each would take the room of the longest."""
    coded = [value.encode() for value in values]
    edges = np.cumsum([0, *map(len, coded)], dtype=np.int64)
    return {f"{name}_utf8": np.frombuffer(b"".join(coded), np.uint8), f"{name}_edges": edges}


def _unpack(name: str, columns: dict[str, np.ndarray]) -> list[str]:
    text, edges = columns[f"{name}_utf8"].tobytes(), columns[f"{name}_edges"]
    if edges[0] != 0 or edges[-1] != len(text) or np.any(np.diff(edges) < 0):
        raise ValueError(f"{name} are not where they should be")
    places = edges.tolist()
    return [text[lo:hi].decode() for lo, hi in itertools.pairwise(places)]
