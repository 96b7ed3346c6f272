"""The prepared folder: a catalogue, the users, and ArrayRecord shards with one record per user.

    meta.json          what is in the folder; written last
    items.parquet      service, id, text, attributes, in catalogue order
    users.parquet      id, n_events, and the profile fields as `profile.NAME`
    events-0000k-of-0000n.array_record
    quarantine.jsonl   only where rows were put aside

A record is the user's events, oldest first, as bytes of `record_dtype`; the users of the shards, one after another,
are those of users.parquet. The folder appears under its name only when it is whole.
"""

import bisect
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moerec.data.dataset import Dataset, EventLog, ItemTable
from moerec.errors import InputError

FORMAT_VERSION = 2
META = "meta.json"
_PROFILE = "profile."
_COLUMNS = ("item", "action", "time_us", "context", "utc_offset")  # of a record, as `EventLog` takes them


def record_dtype(n_context: int) -> np.dtype:
    """One event within a record: 18 + 2C bytes, little-endian, packed; columns as in `EventLog`."""
    context = ("context", "<i2", (n_context,))
    return np.dtype([("item", "<i4"), ("action", "<i2"), ("time_us", "<i8"), context, ("utc_offset", "<i4")])


@dataclasses.dataclass(frozen=True)
class Meta:
    """What meta.json holds; `shards` names each file with its number of users and bytes."""

    services: tuple[str, ...]
    actions: tuple[str, ...]
    context: dict[str, tuple[str, ...]]
    profile: tuple[str, ...]
    n_users: int
    n_events: int
    n_items: int
    shards: tuple[dict, ...]
    extra: dict = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def dtype(self) -> np.dtype:
        return record_dtype(len(self.context))

    def to_json(self) -> str:
        fields = dataclasses.asdict(self) | {"record": [list(part) for part in self.dtype.descr]}
        return json.dumps(fields, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "Meta":
        """Raises InputError where the folder is not a whole prepared one of this version."""
        path = Path(folder) / META
        if not path.is_file():
            raise InputError(f"{folder}: not a prepared folder, or not a whole one: it has no {META}")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise InputError(f"{path}: format version {version}, not {FORMAT_VERSION}; prepare again")
            fields.pop("record")
            for name in ("services", "actions", "profile", "shards"):
                fields[name] = tuple(fields[name])
            fields["context"] = {name: tuple(values) for name, values in fields["context"].items()}
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a description of a prepared folder ({error!r})") from error


@contextlib.contextmanager
def replace_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to fill and puts it in the place of `out` at the end; `out` stays as it was if anything fails.

    What dead runs left of earlier attempts is removed. Refuses to replace a folder that is not a prepared one.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / META).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not a prepared folder, so it is not replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        _sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class ShardWriter:
    """Writes users in order, spread evenly over the shards. A context; `shards` describes the files after it."""

    def __init__(self, folder: Path, n_users: int, n_shards: int):
        n_shards = min(n_shards, n_users)
        self._bounds = [n_users * k // n_shards for k in range(n_shards + 1)] if n_shards else [0]
        self._paths = [folder / f"events-{k:05d}-of-{n_shards:05d}.array_record" for k in range(n_shards)]
        self._done = 0
        self._writer: ArrayRecordWriter | None = None

    def write(self, events: np.ndarray, lengths: np.ndarray):
        """Appends users with `lengths[p]` events each; `events` has `record_dtype`, all users' in a row."""
        data = events.tobytes()
        ends = (np.cumsum(lengths) * events.dtype.itemsize).tolist()
        start = k = 0
        while k < len(ends):
            shard = bisect.bisect_right(self._bounds, self._done) - 1
            if self._done == self._bounds[shard]:
                self._open(shard)
            n = min(self._bounds[shard + 1] - self._done, len(ends) - k)
            for end in ends[k : k + n]:
                self._writer.write(data[start:end])  # type: ignore[union-attr]
                start = end
            self._done += n
            k += n

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error):
        self._close()

    @property
    def shards(self) -> tuple[dict, ...]:
        return tuple(
            {"file": path.name, "n_users": hi - lo, "n_bytes": path.stat().st_size}
            for path, lo, hi in zip(self._paths, self._bounds[:-1], self._bounds[1:], strict=True)
        )

    def _open(self, shard: int):
        self._close()
        # grain reads single records only from groups of one
        self._writer = ArrayRecordWriter(str(self._paths[shard]), "group_size:1,uncompressed")

    def _close(self):
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def write_items(folder: Path, services: Sequence[str], offsets: np.ndarray, columns: dict[str, pa.Array]):
    """Writes items.parquet; `columns` are id, text and attributes in catalogue order."""
    codes = np.repeat(np.arange(len(services), dtype=np.int32), np.diff(offsets))
    names = pa.array(list(services), pa.string()).take(pa.array(codes))
    pq.write_table(pa.table({"service": names, **columns}), folder / "items.parquet")


def write_users(folder: Path, ids: pa.Array, n_events: np.ndarray, profile: dict[str, pa.Array]):
    """Writes users.parquet."""
    fields = {"id": ids, "n_events": pa.array(n_events, pa.int64())}
    fields |= {_PROFILE + name: values for name, values in profile.items()}
    pq.write_table(pa.table(fields), folder / "users.parquet")


def write_meta(folder: Path, meta: Meta):
    """Writes meta.json; whatever it tells of must be there already."""
    (folder / META).write_text(meta.to_json(), encoding="utf-8")


def write_dataset(dataset: Dataset, folder: Path, n_shards: int):
    """Writes a data set that is in memory as a prepared folder."""
    log, catalogue = dataset.log, dataset.catalogue
    events = np.empty(log.n_events, record_dtype(log.context.shape[1]))
    for name in _COLUMNS:
        events[name] = getattr(log, name)
    lengths = np.diff(log.offsets)
    with replace_folder(folder) as partial:
        with ShardWriter(partial, log.n_users, n_shards) as writer:
            writer.write(events, lengths)
        texts = {"id": catalogue.ids, "text": catalogue.text, "attributes": catalogue.attributes}
        write_items(
            partial, catalogue.services, catalogue.offsets, {name: _strings(values) for name, values in texts.items()}
        )
        write_users(partial, _strings(dataset.users), lengths, {k: _strings(v) for k, v in dataset.profile.items()})
        meta = Meta(
            services=catalogue.services,
            actions=dataset.actions,
            context=dataset.context,
            profile=tuple(dataset.profile),
            n_users=log.n_users,
            n_events=log.n_events,
            n_items=catalogue.n_items,
            shards=writer.shards,
            extra={},
        )
        write_meta(partial, meta)


def load_dataset(folder: Path) -> Dataset:
    """Reads a prepared folder into memory. Raises InputError, naming the file, where something is missing or cut."""
    folder = Path(folder)
    meta = Meta.load(folder)
    records: list[bytes] = []
    for path in _shard_paths(folder, meta):
        reader = ArrayRecordReader(str(path))
        records += reader.read_all()
        reader.close()
    lengths = _lengths(records, meta.dtype)
    events = np.frombuffer(b"".join(records), meta.dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if len(lengths) != meta.n_users or len(events) != meta.n_events:
        raise InputError(f"{folder}: the shards hold {len(lengths)} users and {len(events)} events, unlike {META}")
    items, users = _read_parquet(folder / "items.parquet"), _read_parquet(folder / "users.parquet")
    if len(items) != meta.n_items or len(users) != meta.n_users:
        raise InputError(f"{folder}: {len(items)} items and {len(users)} users in the tables, unlike {META}")
    code = {name: k for k, name in enumerate(meta.services)}
    services = np.array([code.get(name, -1) for name in items["service"].unique().to_pylist()], np.int64)
    names = items["service"].combine_chunks().dictionary_encode()
    n_items = np.bincount(services[names.indices.to_numpy(zero_copy_only=False)], minlength=len(code))
    if len(events) and (events["item"].min() < 0 or events["item"].max() >= meta.n_items):
        raise InputError(f"{folder}: an event's item is outside the catalogue")
    return Dataset(
        catalogue=ItemTable(
            services=meta.services,
            offsets=np.concatenate([[0], np.cumsum(n_items)]).astype(np.int64),
            ids=_unicode(items["id"]),
            text=_objects(items["text"]),
            attributes=_objects(items["attributes"]),
        ),
        log=EventLog(offsets, *(events[name].copy() for name in _COLUMNS)),
        users=_unicode(users["id"]),
        actions=meta.actions,
        context=meta.context,
        profile={name: _unicode(users[_PROFILE + name]) for name in meta.profile},
    )


@dataclasses.dataclass(frozen=True)
class UserSource:
    """Random access to the users of a prepared folder: `source[p]` is `[events]` of `dtype`, oldest first."""

    records: grain.sources.ArrayRecordDataSource
    dtype: np.dtype

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, user: int) -> np.ndarray:
        return np.frombuffer(self.records[user], self.dtype)


def open_source(folder: Path) -> UserSource:
    """Opens the shards of a prepared folder. Raises InputError where one is missing or cut."""
    folder = Path(folder)
    meta = Meta.load(folder)
    paths = [str(path) for path in _shard_paths(folder, meta)]
    return UserSource(grain.sources.ArrayRecordDataSource(paths), meta.dtype)


def read_users(source: UserSource, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The events of these users in a row (`[sum of lengths]` of `source.dtype`) and `[n]` int64 lengths."""
    records = source.records.__getitems__([int(index) for index in indices])
    return np.frombuffer(b"".join(records), source.dtype), _lengths(records, source.dtype)


def _lengths(records: Sequence[bytes], dtype: np.dtype) -> np.ndarray:
    return np.fromiter(map(len, records), np.int64, len(records)) // dtype.itemsize


def _shard_paths(folder: Path, meta: Meta) -> list[Path]:
    for shard in meta.shards:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["n_bytes"]:
            raise InputError(f"{path}: missing or not of the {shard['n_bytes']} bytes that {META} tells")
    return [folder / shard["file"] for shard in meta.shards]


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _strings(values: np.ndarray) -> pa.Array:
    return pa.array(values.tolist(), pa.string())


def _unicode(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=np.str_)


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    """Texts each of its own length: in a unicode array all take the room of the longest."""
    return np.array(column.to_pylist(), dtype=object)


def _clear_stale(out: Path):
    for stale in (*out.parent.glob(f"{out.name}.replaced-*"), *out.parent.glob(f"{out.name}.partial-*")):
        if _is_running(stale.name.rpartition("-")[2]):
            continue
        if ".replaced-" in stale.name and not out.exists() and (stale / META).is_file():
            stale.rename(out)  # that run died between its two renames
        else:
            shutil.rmtree(stale)


def _is_running(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
