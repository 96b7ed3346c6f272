"""What every reader and generator makes and everything else consumes: a catalogue and an event log.

The log is columnar (compressed sparse rows): the events of user `p` are rows `offsets[p]:offsets[p + 1]`, oldest
first, equal times in their published order. Items are numbered so that each service owns one contiguous range.
"""

import dataclasses
import functools

import numpy as np

from moerec.errors import InputError

TOTAL = "all"  # the row of all services in every table
UNKNOWN_TIME = np.int64(np.iinfo(np.int64).min)
SECOND_US = 1_000_000  # microseconds of a second


def floor_seconds(time_us: np.ndarray) -> np.ndarray:
    """`[n]` int64 whole unix seconds of `[n]` microseconds since 1970; `UNKNOWN_TIME` stays what it is."""
    return np.where(time_us == UNKNOWN_TIME, UNKNOWN_TIME, time_us // SECOND_US)


@dataclasses.dataclass(frozen=True)
class ItemTable:
    """The items of all services: item `i` of service `z` has `offsets[z] <= i < offsets[z + 1]`.

    Attributes:
      services: names, in the order of the service codes.
      offsets: `[Z + 1]` int64, the ranges of the services.
      ids: `[I]` strings, the item's id in the source (unique within a service).
      text: `[I]` strings, title or description; empty where there is none.
      attributes: `[I]` strings, attribute tokens separated by a space (`brand=acme category=tea`); may be empty.
    """

    services: tuple[str, ...]
    offsets: np.ndarray
    ids: np.ndarray
    text: np.ndarray
    attributes: np.ndarray

    def __post_init__(self):
        n = len(self.ids)
        if len(self.offsets) != len(self.services) + 1 or self.offsets[0] != 0 or self.offsets[-1] != n:
            raise InputError("catalogue: offsets do not cover the items of all services")
        if TOTAL in self.services:
            raise InputError(f'catalogue: a service cannot be called "{TOTAL}", their sum in every table')
        if len(self.text) != n or len(self.attributes) != n:
            raise InputError("catalogue: text and attributes need one entry per item")

    @property
    def n_items(self) -> int:
        return len(self.ids)

    @property
    def n_services(self) -> int:
        return len(self.services)

    @functools.cached_property
    def service(self) -> np.ndarray:
        """`[I]` int32, the service code of each item."""
        return np.repeat(np.arange(self.n_services, dtype=np.int32), np.diff(self.offsets))


@dataclasses.dataclass(frozen=True)
class EventLog:
    """Events of all users, columnar.

    Attributes:
      offsets: `[users + 1]` int64.
      item: `[events]` int32, index into the catalogue.
      action: `[events]` int16, index into `Dataset.actions`.
      time_us: `[events]` int64, microseconds since 1970 UTC, or `UNKNOWN_TIME`.
      context: `[events, C]` int16, codes into `Dataset.context` values.
      utc_offset: `[events]` int32, seconds that the clock at the event's place is ahead of UTC; zeros if none is given.
    """

    offsets: np.ndarray
    item: np.ndarray
    action: np.ndarray
    time_us: np.ndarray
    context: np.ndarray
    utc_offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self):
        n = len(self.item)
        if not len(self.utc_offset):
            object.__setattr__(self, "utc_offset", np.zeros(n, np.int32))
        if self.offsets[0] != 0 or self.offsets[-1] != n or np.any(np.diff(self.offsets) < 0):
            raise InputError("event log: offsets must rise from 0 to the number of events")
        columns = (self.action, self.time_us, self.context, self.utc_offset)
        if any(len(column) != n for column in columns) or self.context.ndim != 2:
            raise InputError("event log: every column needs one entry per event")

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_events(self) -> int:
        return len(self.item)

    @functools.cached_property
    def known_context(self) -> tuple[np.ndarray, ...]:
        """Of each context feature the codes that some event has, in order."""
        return tuple(np.unique(column) for column in self.context.T)

    def take(self, rows: np.ndarray, offsets: np.ndarray) -> "EventLog":
        """The log of some of the events, by their numbers or a mask. Args: the offsets of the users who have them."""
        columns = (self.item, self.action, self.time_us, self.context, self.utc_offset)
        return EventLog(offsets, *(column[rows] for column in columns))

    @functools.cached_property
    def user(self) -> np.ndarray:
        """`[events]` int64, the user of each event."""
        return np.repeat(np.arange(self.n_users), np.diff(self.offsets))

    def users_of(self, rows: np.ndarray) -> np.ndarray:
        """`[n]` int64, whose the events in these rows are."""
        return np.searchsorted(self.offsets, rows, side="right") - 1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A catalogue, an event log and the names behind their codes.

    Attributes:
      users: `[users]` strings, ids in the source.
      actions: names of the action codes (at least one).
      context: feature name -> its values; code `k >= 1` is value `k - 1`, code 0 is "missing", and one more than there
        are values is "unseen" (`mark_unseen`).
      profile: field name -> `[users]` strings; the empty string is "missing".
    """

    catalogue: ItemTable
    log: EventLog
    users: np.ndarray
    actions: tuple[str, ...] = ("event",)
    context: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    profile: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def profile_codes(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """`[users, Y]` int32 codes of the profile fields, in their order, 0 missing; and how many each field has."""
        columns, sizes = [], []
        for values in self.profile.values():
            known, code = encode_strings(values)
            has_missing = known[:1] == [""]
            columns.append(code if has_missing else code + 1)
            sizes.append(len(known) + (not has_missing))
        n = self.log.n_users
        return np.stack(columns, axis=1).astype(np.int32) if columns else np.zeros((n, 0), np.int32), tuple(sizes)

    @functools.cached_property
    def profile_values(self) -> dict[str, tuple[str, ...]]:
        """The values of each profile field, "missing" aside, in the order of their codes: the first has code 1."""
        return {name: tuple(sorted(set(values.tolist()) - {""})) for name, values in self.profile.items()}

    @functools.cached_property
    def event_service(self) -> np.ndarray:
        """`[events]` int32, the service of each event's item."""
        return self.catalogue.service[self.log.item]


def encode_strings(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The different ones of `[n]` strings, sorted, and `[n]` int64, the place of each among them.

    Memory: each of the different strings once, however long the longest is.
    """
    known = sorted(set(values.tolist()))
    place = {value: k for k, value in enumerate(known)}
    return known, np.fromiter(map(place.__getitem__, values.tolist()), np.int64, len(values))


def permute_items(dataset: Dataset, seed: int) -> tuple[Dataset, np.ndarray]:
    """Renumbers the items at random within their service, so that no model can read anything from an id's value.

    Returns the data set, and `[I]` int32, the new number of each item.
    """
    catalogue = dataset.catalogue
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [lo + rng.permutation(hi - lo) for lo, hi in zip(catalogue.offsets[:-1], catalogue.offsets[1:], strict=True)]
    )
    return _renumber(dataset, order)


def shuffle_services(dataset: Dataset, seed: int) -> Dataset:
    """Gives items the services of others at random, each service as many as before: a control in which a service means
    nothing. Ids have to be unique over all services.
    """
    order = np.random.default_rng(1000 + seed).permutation(dataset.catalogue.n_items)
    return _renumber(dataset, order)[0]


def _renumber(dataset: Dataset, order: np.ndarray) -> tuple[Dataset, np.ndarray]:
    """The data set with item `order[k]` in place k of the catalogue; and `[I]` int32, the new number of each item."""
    catalogue = dataset.catalogue
    new_index = np.empty(len(order), np.int32)
    new_index[order] = np.arange(len(order), dtype=np.int32)
    permuted = dataclasses.replace(
        dataset,
        catalogue=dataclasses.replace(
            catalogue, ids=catalogue.ids[order], text=catalogue.text[order], attributes=catalogue.attributes[order]
        ),
        log=dataclasses.replace(dataset.log, item=new_index[dataset.log.item]),
    )
    return permuted, new_index


def find_multi_service_users(dataset: Dataset) -> np.ndarray:
    """`[users]` bool, those with events in two services or more."""
    pairs = np.unique(np.stack([dataset.log.user, dataset.event_service], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=dataset.log.n_users) > 1


def keep_last_events(dataset: Dataset, targets: np.ndarray, n: int) -> tuple[Dataset, np.ndarray]:
    """A data set in which each target is the last event of a user of its own, behind the `n` events before it.

    Returns it, and the targets' rows in it.
    """
    log = dataset.log
    user = log.users_of(targets)
    length = np.minimum(targets - log.offsets[user], n) + 1
    offsets = np.concatenate([[0], np.cumsum(length)])
    rows = np.arange(offsets[-1]) + np.repeat(targets + 1 - offsets[1:], length)
    kept = dataclasses.replace(
        dataset,
        log=log.take(rows, offsets),
        users=dataset.users[user],
        profile={name: values[user] for name, values in dataset.profile.items()},
    )
    return kept, offsets[1:] - 1


def mark_unseen(dataset: Dataset, is_known: np.ndarray) -> Dataset:
    """Gives context values that no known event has the code "unseen": a model could only guess what they mean.

    Args:
      is_known: `[events]` bool, those whose context is learnt from.
    """
    context = dataset.log.context.copy()
    for c, values in enumerate(dataset.context.values()):
        unseen = len(values) + 1
        code = np.full(unseen + 1, unseen, context.dtype)
        seen = np.unique(context[is_known, c])
        code[seen] = seen
        code[0] = 0
        context[:, c] = code[context[:, c]]
    return dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, context=context))
