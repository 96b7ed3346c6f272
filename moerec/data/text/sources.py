"""The corpora of a config: named files, folders and texts of the built-in world, each read as a stream of documents."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moerec.config import CityConfig, DataConfig
from moerec.data.city.texts import KINDS, write_documents
from moerec.data.text.documents import list_files, read_documents
from moerec.errors import InputError

MOST_FILES = 32  # of a folder that is the whole corpus: each is one by itself, so that it is measured by itself
_CITY = "city:"  # how the place of texts of the built-in world begins


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A corpus: documents in a fixed order, read anew each time they are asked for.

    Attributes:
      name: in tables and metrics. files: of its documents, in their order; none of the built-in world's texts.
      weight: its share of the tokens that are trained on, over the sum of all; None where that is by size.
      city: of the built-in world's texts, else None: kind, the world, its seed and the number of documents.
    """

    name: str
    files: tuple[Path, ...]
    weight: float | None = None
    city: tuple[str, CityConfig, int, int] | None = None

    def read(self) -> Iterator[str]:
        """The documents. Raises: InputError, as `read_documents`."""
        if self.city is not None:
            yield from write_documents(*self.city)
        for file in self.files:
            yield from read_documents(file)

    def describe(self) -> dict[str, Any]:
        """What the documents are made of: each file's size and time of change, or the world."""
        if self.city is not None:
            kind, world, seed, n = self.city
            return {"city": kind, "world": dataclasses.asdict(world), "seed": seed, "n_documents": n}
        stats = {str(file): file.stat() for file in self.files}
        return {"files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def list_sources(config: DataConfig) -> list[TextSource]:
    """The corpora of `data.corpus`, in the order of the config.

    A folder that is `path` has a corpus for each of its files, or where these are many one of them all.

    Raises:
      InputError: there is none, a file is missing or of another kind, or a kind of texts is unknown.
    """
    corpus = config.corpus
    if not corpus.path and not corpus.sources:
        raise InputError("config.data.corpus.path is missing: a file of documents, or a folder of such files")
    if corpus.path:
        path = Path(corpus.path)
        files = tuple(list_files(path)) if path.is_dir() else (path,)
        groups = [(file,) for file in files] if len(files) <= MOST_FILES else [files]
        return [TextSource(group[0].name if len(group) == 1 else path.name, group) for group in groups]
    weights, found = corpus.weight_of, []
    for name, place in corpus.source_of.items():
        weight = weights.get(name)
        if place.startswith(_CITY):
            kind = place.removeprefix(_CITY)
            if kind not in KINDS:
                raise InputError(f"config.data.corpus.sources: {place!r} is none of the texts {', '.join(KINDS)}")
            found.append(TextSource(name, (), weight, (kind, config.city, config.seed, corpus.city_documents)))
            continue
        path = Path(place)
        found.append(TextSource(name, tuple(list_files(path)) if path.is_dir() else (path,), weight))
    return found
