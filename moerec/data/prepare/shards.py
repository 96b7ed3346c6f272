"""The prepared folder: a catalogue, the users, and ArrayRecord shards with one record per user.

    meta.json          what is in the folder, with a checksum of each of the following files that is read; written last
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
import glob
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
from moerec.data.prepare.checksums import describe_file, require_intact, sum_fields
from moerec.errors import InputError, WorkError
from moerec.files import naming, parse_json, require_utf8

FORMAT_VERSION = 2
META = "meta.json"
ITEMS, USERS = "items.parquet", "users.parquet"
_PROFILE = "profile."
_COLUMNS = ("item", "action", "time_us", "context", "utc_offset")  # of a record, as `EventLog` takes them


class OtherVersion(InputError):
    """A prepared folder of another version of the program."""


def record_dtype(n_context: int) -> np.dtype:
    """One event within a record: 18 + 2C bytes, little-endian, packed; columns as in `EventLog`."""
    context = ("context", "<i2", (n_context,))
    return np.dtype([("item", "<i4"), ("action", "<i2"), ("time_us", "<i8"), context, ("utc_offset", "<i4")])


@dataclasses.dataclass(frozen=True)
class Meta:
    """What meta.json holds, beside a checksum of its own.

    `shards` names each file with its number of users, bytes and CRC-32; `files` has the latter two of the tables, and
    is filled in by `write_meta`.
    """

    services: tuple[str, ...]
    actions: tuple[str, ...]
    context: dict[str, tuple[str, ...]]
    profile: tuple[str, ...]
    n_users: int
    n_events: int
    n_items: int
    shards: tuple[dict, ...]
    extra: dict = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def dtype(self) -> np.dtype:
        return record_dtype(len(self.context))

    def to_json(self) -> str:
        fields = dataclasses.asdict(self) | {"record": [list(part) for part in self.dtype.descr]}
        return json.dumps(fields | {"crc32": sum_fields(fields)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "Meta":
        """Raises InputError where the folder is not a whole prepared one of this version."""
        require_utf8(folder)
        path = Path(folder) / META
        if not path.is_file():
            raise InputError(f"{folder}: not a prepared folder, or not a whole one: it has no {META}")
        try:
            fields = parse_json(path.read_bytes())
            if fields.get("kind") == "text":
                raise InputError(f"{folder}: holds documents of text, which data.source=text reads")
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise OtherVersion(f"{path}: format version {version}, not {FORMAT_VERSION}; prepare again")
            if fields.pop("crc32") != sum_fields(fields):
                raise InputError(f"{path}: is damaged: its checksum is not its own; prepare the folder again")
            fields.pop("record")
            for name in ("services", "actions", "profile", "shards"):
                fields[name] = tuple(fields[name])
            fields["context"] = {name: tuple(values) for name, values in fields["context"].items()}
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a description of a prepared folder ({error!r})") from error

    def require_intact(self, folder: Path) -> None:
        """Checks all files, each once in a process. Raises InputError, which names the one that is not as written."""
        require_intact(folder, {shard["file"]: shard for shard in self.shards} | self.files, META)


@contextlib.contextmanager
def replace_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to fill and puts it in the place of `out` at the end; `out` stays as it was if anything fails.

    Where `out` is a link, the folder that it points to is replaced, and the link stays. What dead runs left of earlier
    attempts is removed. Refuses to replace a folder that is not a prepared one.
    """
    require_utf8(out)
    out = Path(os.path.realpath(out))
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
        replaces = out.exists()
        if replaces:
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if replaces:
                old.rename(out)
            raise
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
            if not self._writer.ok():  # type: ignore[union-attr] # `write` alone tells nothing of a full disk
                self._close()
            self._done += n
            k += n

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *error):
        with contextlib.nullcontext() if kind is None else contextlib.suppress(WorkError):
            self._close()

    @property
    def shards(self) -> tuple[dict, ...]:
        return tuple(
            {"file": path.name, "n_users": hi - lo, **describe_file(path)}
            for path, lo, hi in zip(self._paths, self._bounds[:-1], self._bounds[1:], strict=True)
        )

    def _open(self, shard: int):
        self._close()
        self._path = self._paths[shard]
        # grain reads single records only from groups of one
        self._writer = ArrayRecordWriter(str(self._path), "group_size:1,uncompressed")

    def _close(self):
        """Raises WorkError where not all could be written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except RuntimeError as error:
                raise WorkError(f"{self._path}: cannot be written: {str(error).split(';')[0]}") from error


def write_items(folder: Path, services: Sequence[str], offsets: np.ndarray, columns: dict[str, pa.Array]):
    """Writes items.parquet; `columns` are id, text and attributes in catalogue order."""
    codes = np.repeat(np.arange(len(services), dtype=np.int32), np.diff(offsets))
    names = pa.array(list(services), pa.string()).take(pa.array(codes))
    _write_parquet(folder / ITEMS, {"service": names, **columns})


def write_users(folder: Path, ids: pa.Array, n_events: np.ndarray, profile: dict[str, pa.Array]):
    """Writes users.parquet."""
    fields = {"id": ids, "n_events": pa.array(n_events, pa.int64())}
    fields |= {_PROFILE + name: values for name, values in profile.items()}
    _write_parquet(folder / USERS, fields)


def _write_parquet(path: Path, columns: dict[str, pa.Array]):
    with naming(path):
        pq.write_table(pa.table(columns), path)


def write_meta(folder: Path, meta: Meta):
    """Writes meta.json; whatever it tells of must be there already."""
    meta = dataclasses.replace(meta, files={name: describe_file(folder / name) for name in (ITEMS, USERS)})
    with naming(folder / META):
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
    """Reads a prepared folder into memory. Raises InputError, naming the file, where something is not as written."""
    folder = Path(folder)
    meta = Meta.load(folder)
    meta.require_intact(folder)
    records: list[bytes] = []
    for shard in meta.shards:
        reader = ArrayRecordReader(str(folder / shard["file"]))
        records += reader.read_all()
        reader.close()
    lengths = _lengths(records, meta.dtype)
    events = np.frombuffer(b"".join(records), meta.dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if len(lengths) != meta.n_users or len(events) != meta.n_events:
        raise InputError(f"{folder}: the shards hold {len(lengths)} users and {len(events)} events, unlike {META}")
    items, users = _read_parquet(folder / ITEMS), _read_parquet(folder / USERS)
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
            ids=_objects(items["id"]),
            text=_objects(items["text"]),
            attributes=_objects(items["attributes"]),
        ),
        log=EventLog(offsets, *(events[name].copy() for name in _COLUMNS)),
        users=_objects(users["id"]),
        actions=meta.actions,
        context=meta.context,
        profile={name: _objects(users[_PROFILE + name]) for name in meta.profile},
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
    """Opens the shards of a prepared folder. Raises InputError, naming the file, where something is not as written."""
    folder = Path(folder)
    meta = Meta.load(folder)
    meta.require_intact(folder)
    paths = [str(folder / shard["file"]) for shard in meta.shards]
    return UserSource(grain.sources.ArrayRecordDataSource(paths), meta.dtype)


def read_users(source: UserSource, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The events of these users in a row (`[sum of lengths]` of `source.dtype`) and `[n]` int64 lengths."""
    records = source.records.__getitems__([int(index) for index in indices])
    return np.frombuffer(b"".join(records), source.dtype), _lengths(records, source.dtype)


def _lengths(records: Sequence[bytes], dtype: np.dtype) -> np.ndarray:
    return np.fromiter(map(len, records), np.int64, len(records)) // dtype.itemsize


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path.absolute())  # Arrow takes `~` and `gs:` at the beginning for what they are elsewhere
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _strings(values: np.ndarray) -> pa.Array:
    return pa.array(values.tolist(), pa.string())


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    """Strings each of its own length: in a unicode array all take the room of the longest."""
    return np.array(column.to_pylist(), dtype=object)


def _clear_stale(out: Path):
    name = glob.escape(out.name)
    for stale in (*out.parent.glob(f"{name}.replaced-*"), *out.parent.glob(f"{name}.partial-*")):
        if stale.is_symlink():  # a link that an earlier version moved aside; what it points to is not ours
            stale.unlink()
        if not stale.is_dir() or _is_running(stale.name.rpartition("-")[2]):
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
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)
