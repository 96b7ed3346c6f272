"""Requests of many users as batches of few shapes: each in a row of its own, from its first slot on.

So an answer does not depend on who else is in the batch, to the last bit. Rows are of a few lengths (`WIDTHS`), and as
many as `ROW_COUNTS` says, so that few programs are compiled.
"""

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset, EventLog
from moerec.data.histories import Histories, make_histories
from moerec.data.packing import Placement, Sequences, device_time, pack
from moerec.data.splits import parse_date
from moerec.errors import InputError
from moerec.serve.request import NOTHING, encode_context, encode_fields, hide_unknown
from moerec.train.run_dir import Run
from moerec.types import NO_TIME, Batch

ROW_COUNTS = (1, 32)  # rows of a batch
WIDTHS = tuple(16 * 4**n for n in range(16))  # slots of a row; the longest rows have `data.seq_len`

Moment: TypeAlias = float | str | datetime.datetime | np.datetime64 | None


class UserEvent(NamedTuple):
    """An event of somebody who is in no table.

    Attributes:
      item: its id. service: whose it is; may be left out where there is one. time: unix seconds, an ISO date and time
        (UTC unless it names an offset), or a datetime; None: not known. action: may be left out where there is one.
      context: features by name.
    """

    item: str
    service: str = ""
    time: Moment = None
    action: str = ""
    context: Mapping[str, str] = NOTHING


class UserHistory(NamedTuple):
    """Somebody who is in no table: events, oldest first, and static profile fields by name."""

    events: Sequence[UserEvent] = ()
    fields: Mapping[str, str] = NOTHING


class Requests(NamedTuple):
    """Requests of `n` users.

    Attributes:
      log: whose events they are. before: `n` histories, all events before each request.
      field_UY: `[n, Y]` codes of their profile fields. time_us, utc_offset: `[n]` int64 and int32, of the requests.
      context: `[n, C]` int64 codes. names: of the users, empty for those in no table.
    """

    log: EventLog
    before: Histories
    field_UY: np.ndarray
    time_us: np.ndarray
    utc_offset: np.ndarray
    context: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


class PackedRequests(NamedTuple):
    """Attributes:
    which: `[q]`, the requests of this batch. batch: a row each, and empty ones behind. slot: `[rows]` int32, the flat
      slot where each is answered; -1 where there is none.
    """

    which: np.ndarray
    batch: Batch
    slot: np.ndarray


def read_moment(moment: Moment, flag: str = "time") -> tuple[int, int | None]:
    """Microseconds since 1970 UTC (`UNKNOWN_TIME` for None), and how many seconds the clock is ahead, if that is said.

    Raises:
      InputError: it is no time, or lies outside what a model knows.
    """
    if moment is None:
        return int(UNKNOWN_TIME), None
    if isinstance(moment, str):
        read = parse_date(moment, flag)
        time_us, utc_offset = int(read.time_us), read.utc_offset
    elif isinstance(moment, np.datetime64):
        time_us, utc_offset = int(moment.astype("datetime64[us]").astype(np.int64)), None
    elif isinstance(moment, datetime.datetime):
        offset = moment.utcoffset()
        utc_offset = None if offset is None else int(offset.total_seconds())
        aware = moment if offset is not None else moment.replace(tzinfo=datetime.UTC)
        time_us = round(aware.timestamp() * SECOND_US)
    elif isinstance(moment, int | float | np.number) and not isinstance(moment, bool) and math.isfinite(moment):
        time_us, utc_offset = round(float(moment) * SECOND_US), None
    else:
        raise InputError(f"{flag}: {moment!r} is no time")
    if device_time(np.array([time_us]))[0] == NO_TIME:
        raise InputError(f"{flag}: {moment!r} must lie between 1932 and 2068")
    return time_us, utc_offset


class Moments(NamedTuple):
    """When `n` requests are made.

    Attributes:
      time_us: `[n]` int64, microseconds since 1970 UTC or `UNKNOWN_TIME`. utc_offset: `[n]` int32, seconds that the
        clock is ahead, where that was said; is_said: `[n]` bool, where it was.
    """

    time_us: np.ndarray
    utc_offset: np.ndarray
    is_said: np.ndarray


def read_moments(time: Moment | Sequence[Moment] | np.ndarray, n: int) -> Moments:
    """One time for all requests, or one for each."""
    if isinstance(time, Sequence | np.ndarray) and not isinstance(time, str):
        if len(time) != n:
            raise InputError(f"time: {len(time)} times for {n} requests")
        read = [read_moment(moment) for moment in time]
    else:
        read = [read_moment(time)]
    time_us = np.array([time_us for time_us, _ in read], np.int64)
    offsets = [offset for _, offset in read]
    utc_offset = np.array([offset or 0 for offset in offsets], np.int32)
    is_said = np.array([offset is not None for offset in offsets], bool)
    return Moments(*(np.broadcast_to(x, n) for x in (time_us, utc_offset, is_said)))


def read_contexts(run: Run, context: Mapping[str, str] | Sequence[Mapping[str, str]] | None, n: int) -> np.ndarray:
    """`[n, C]` codes: one context for all requests, or one for each; what nothing was learnt of is "unseen"."""
    dataset, edges = run.data.dataset, run.config.data.schema.edges
    if context is None or isinstance(context, Mapping):
        code_C = hide_unknown(run, encode_context(dataset, edges, context or NOTHING, "context"))
        return np.broadcast_to(code_C, (n, len(code_C)))
    if len(context) != n:
        raise InputError(f"context: {len(context)} contexts for {n} requests")
    rows = [encode_context(dataset, edges, own, f"context[{k}]") for k, own in enumerate(context)]
    return hide_unknown(run, np.array(rows, np.int64).reshape(n, len(dataset.context)))


def find_users(place: Mapping[str, int], users: Sequence[str]) -> np.ndarray:
    """`[n]` int64 numbers of users. Raises: InputError, where nobody is called so."""
    missing = [name for name in users if name not in place]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"users: no such user as {missing[0]!r}{more}; who is in no table is given as a history")
    return np.fromiter((place[name] for name in users), np.int64, len(users))


def ask_of_users(run: Run, at: np.ndarray, when: Moments, context: np.ndarray) -> Requests:
    """The requests of users of the data.

    Args: `[n]` their numbers; and `[n, C]` codes, as `Requests`.
    """
    data, dataset = run.data, run.data.dataset
    log = dataset.log
    before = _keep_before(log, make_histories(log.offsets[at], log.offsets[at + 1]), when.time_us)
    utc_offset = _last_offsets(log, before)
    if data.zones is not None:
        utc_offset = data.zones.find_utc_offsets(at, when.time_us, context)
    utc_offset = np.where(when.is_said, when.utc_offset, utc_offset)
    fields = dataset.profile_codes[0][at]
    return Requests(log, before, fields, when.time_us, utc_offset, context, dataset.users[at])


def ask_of_histories(
    run: Run,
    histories: Sequence[UserHistory],
    place: Mapping[tuple[str, str], int],
    when: Moments,
    context: np.ndarray,
) -> Requests:
    """The requests of people in no table.

    Args: of `place_items`; as `ask_of_users`.

    Raises:
      InputError: an event's item, action or context, or a field, is not known to the run.
    """
    log = make_log(run, histories, place)
    none_Y = np.zeros(run.data.dataset.profile_codes[0].shape[1], np.int32)
    fields = np.array(
        [encode_fields(run.data.dataset, own.fields, none_Y, f"histories[{n}]") for n, own in enumerate(histories)],
        np.int32,
    )
    before = _keep_before(log, Histories(log.offsets, np.arange(log.n_events)), when.time_us)
    utc_offset = _last_offsets(log, before)
    if run.data.zones is not None:
        for n, own in enumerate(histories):
            zones, one = run.data.zones.of_somebody(run.config.data.schema, own.fields), slice(n, n + 1)
            utc_offset[one] = zones.find_utc_offsets(np.zeros(1, np.int64), when.time_us[one], context[one])
    utc_offset = np.where(when.is_said, when.utc_offset, utc_offset)
    names = np.full(len(histories), "", object)
    return Requests(log, before, fields.reshape(len(histories), -1), when.time_us, utc_offset, context, names)


def make_log(run: Run, histories: Sequence[UserHistory], place: Mapping[tuple[str, str], int]) -> EventLog:
    """The events of people in no table. Args: as `ask_of_histories`.

    Raises:
      InputError: as `ask_of_histories`; or a history goes back in time.
    """
    dataset, edges = run.data.dataset, run.config.data.schema.edges
    events = [(n, event) for n, own in enumerate(histories) for event in own.events]
    item = [find_item(dataset, place, event.item, event.service, f"histories[{n}]") for n, event in events]
    action, context, times = [], [], []
    for n, event in events:
        if event.action and event.action not in dataset.actions:
            raise InputError(f"histories[{n}]: action {event.action!r} is none of {', '.join(dataset.actions)}")
        action.append(dataset.actions.index(event.action) if event.action else 0)
        context.append(encode_context(dataset, edges, event.context, f"histories[{n}]"))
        times.append(read_moment(event.time, f"histories[{n}]"))
    owner, time_us = np.array([n for n, _ in events], np.int64), np.array([time_us for time_us, _ in times], np.int64)
    _refuse_disorder(owner, time_us)
    code_NC = hide_unknown(run, np.array(context, np.int64).reshape(len(events), len(dataset.context)))
    return EventLog(
        np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(histories)))]).astype(np.int64),
        np.array(item, np.int32),
        np.array(action, np.int16),
        time_us,
        code_NC.astype(np.int16),
        np.array([offset or 0 for _, offset in times], np.int32),
    )


def _refuse_disorder(owner: np.ndarray, time_us: np.ndarray) -> None:
    """Raises InputError, where an event with a known time stands behind a later one of the same history."""
    known = np.flatnonzero(time_us != UNKNOWN_TIME)
    falls = (np.diff(time_us[known]) < 0) & (np.diff(owner[known]) == 0)
    if falls.any():
        raise InputError(f"histories[{owner[known][1:][falls][0]}]: events must be oldest first, and one is not")


def place_items(dataset: Dataset) -> dict[tuple[str, str], int]:
    """The number of each item, by service and id."""
    catalogue = dataset.catalogue
    services = (catalogue.services[z] for z in catalogue.service.tolist())
    return dict(zip(zip(services, catalogue.ids.tolist(), strict=True), range(catalogue.n_items), strict=True))


def find_item(dataset: Dataset, place: Mapping[tuple[str, str], int], item: str, service: str, where: str) -> int:
    """The number of an item. Raises: InputError, where there is none, or several services have it and none is named."""
    services = dataset.catalogue.services
    if service and service not in services:
        raise InputError(f"{where}: service {service!r} is none of {', '.join(services)}")
    found = [(place[name, item], name) for name in ((service,) if service else services) if (name, item) in place]
    if len(found) == 1:
        return found[0][0]
    if found:
        raise InputError(f"{where}: several services have an item {item!r}: {', '.join(name for _, name in found)}")
    raise InputError(f"{where}: no item {item!r}" + (f" of {service}" if service else ""))


def _keep_before(log: EventLog, histories: Histories, time_us: np.ndarray) -> Histories:
    """The events before each request; those without a time, and all of a request without one, count as before."""
    asked_us, event_us = time_us[histories.owner], log.time_us[histories.rows]
    return histories.keep((asked_us == UNKNOWN_TIME) | (event_us == UNKNOWN_TIME) | (event_us < asked_us))


def _last_offsets(log: EventLog, before: Histories) -> np.ndarray:
    """`[n]`, how far the clock at each user's last event is ahead; 0 without one."""
    out, has_event = np.zeros(len(before), np.int32), before.length > 0
    out[has_event] = log.utc_offset[before.rows[before.offsets[1:][has_event] - 1]]
    return out


def pack_requests(run: Run, requests: Requests, is_continued: bool = False) -> Iterator[PackedRequests]:
    """Batches of requests, each with those of about one length.

    Args: is_continued: whether the sequences go on from profiles, so that none begins with its control slot.

    Raises:
      InputError: a user has no event before the request, and the model was not trained to do without.
    """
    data = run.config.data
    # A sequence that leaves room for it, and goes on from nothing, begins with its control slot, as in training.
    has_control = (data.first_event and not is_continued) & (requests.before.length < data.history_len)
    n_slots = np.minimum(requests.before.length, data.history_len) + has_control
    if not n_slots.all():
        name = str(requests.names[np.argmin(n_slots)])
        whose = f"{name!r} has" if name else "somebody has"
        raise InputError(f"users: {whose} no events before the request, and the run has data.first_event=false")
    width = np.minimum(np.array(WIDTHS)[np.searchsorted(WIDTHS, n_slots)], data.seq_len)
    for w in np.unique(width).tolist():
        left = np.flatnonzero(width == w)
        while len(left):
            rows = next((n for n in ROW_COUNTS if n >= len(left)), ROW_COUNTS[-1])
            yield _pack(run, requests, has_control, left[:rows], (rows, w))
            left = left[rows:]


def _pack(
    run: Run, requests: Requests, has_control: np.ndarray, which: np.ndarray, shape: tuple[int, int]
) -> PackedRequests:
    n, w = len(which), shape[1]
    events = requests.before.take(which).last(run.config.data.history_len)
    sequences = Sequences(events, np.zeros(n, np.int64), has_control[which], requests.field_UY[which])
    placed = Placement(n, np.arange(n) * w, np.ones(n, np.int32))
    log = requests.log
    if not log.n_events:  # there is nothing to index, and nothing is read
        log = EventLog(np.array([0, 1]), *(np.zeros((1, *x.shape[1:]), x.dtype) for x in _columns(log)))
    batch = pack(log, run.data.dataset.catalogue, sequences, placed, shape).batch
    row, last = np.arange(n), sequences.n_slots - 1
    batch.request.time_BT[row, last] = device_time(requests.time_us[which])
    batch.request.utc_offset_BT[row, last] = requests.utc_offset[which]
    batch.request.context_BTC[row, last] = requests.context[which]
    slot = np.full(shape[0], -1, np.int32)
    slot[:n] = row * w + last
    return PackedRequests(which, batch, slot)


def _columns(log: EventLog) -> tuple[np.ndarray, ...]:
    return log.item, log.action, log.time_us, log.context, log.utc_offset
