"""Which events are trained on, validated on and tested on, and what a prediction of each may see."""

import dataclasses
import datetime
from typing import NamedTuple

import numpy as np

from moerec.config import SplitConfig
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog
from moerec.data.histories import Histories, make_histories
from moerec.errors import InputError

TRAIN, VALID, TEST, UNUSED = 0, 1, 2, 3


def assign_split_ids(dataset: Dataset, split: SplitConfig, seed: int) -> np.ndarray:
    """`[events]` int8: TRAIN, VALID, TEST, or UNUSED (seen as history only, never learnt from and never a target).

    leave_one_out: the last event of each user (with `per_service` of each user and service) is TEST, the one
    before it VALID, the rest TRAIN; groups of fewer than three events are TRAIN. With `per_service` a model can learn
    from a user's other services what follows on the very history that it is tested on; with `past_only` TRAIN events
    are UNUSED that do not stand in the histories of all that other services hold out (`gather_histories`).
    time: TRAIN before `valid_from`, VALID before `test_from`, then TEST. A user with an unknown time is UNUSED
    altogether, since nothing shows on which side of the split their events lie.
    user: `user_fraction` of the users with two events or more are held out for VALID and as many for TEST; their
    last event has that id and the ones before it are UNUSED. Everybody else is TRAIN.

    Raises:
      InputError: a date that is no ISO date, or dates out of order.
    """
    if split.kind == "leave_one_out":
        split_ids = _leave_one_out(dataset, split.per_service)
        return _forget_future(dataset, split_ids) if split.past_only else split_ids
    if split.kind == "time":
        return _split_by_time(dataset.log, split)
    return _split_by_user(dataset.log, split.user_fraction, seed)


def _leave_one_out(dataset: Dataset, per_service: bool) -> np.ndarray:
    log = dataset.log
    group = log.user
    if per_service:
        group = group * dataset.catalogue.n_services + dataset.event_service
    order = np.argsort(group, kind="stable")
    _, start, size = np.unique(group[order], return_index=True, return_counts=True)
    end = (start + size)[size >= 3]
    split_ids = np.full(log.n_events, TRAIN, np.int8)
    split_ids[order[end - 1]] = TEST
    split_ids[order[end - 2]] = VALID
    return split_ids


def _forget_future(dataset: Dataset, split_ids: np.ndarray) -> np.ndarray:
    """The split ids, UNUSED for TRAIN events that stand not before all that their user's other services hold out."""
    log, n_services = dataset.log, dataset.catalogue.n_services
    never = np.iinfo(np.int64).max
    first_UZ = np.full((log.n_users, n_services), never)
    held_out = np.flatnonzero(split_ids != TRAIN)
    np.minimum.at(first_UZ, (log.user[held_out], dataset.event_service[held_out]), log.time_us[held_out])
    earliest_U2 = np.sort(np.column_stack([first_UZ, np.full(log.n_users, never)]), axis=1)[:, :2]
    own = first_UZ[log.user, dataset.event_service]
    # Of the others': the earliest of all, or, where that is the own service's, the next.
    of_others = np.where(own == earliest_U2[log.user, 0], earliest_U2[log.user, 1], earliest_U2[log.user, 0])
    is_past = (of_others == never) | ((log.time_us != UNKNOWN_TIME) & (log.time_us < of_others))
    return np.where((split_ids == TRAIN) & ~is_past, UNUSED, split_ids).astype(np.int8)


def _split_by_time(log: EventLog, split: SplitConfig) -> np.ndarray:
    fields = ("valid_from", "test_from")
    valid_from, test_from = (parse_date(getattr(split, name), f"config.data.split.{name}").time_us for name in fields)
    if valid_from >= test_from:
        raise InputError(f"config.data.split.test_from: {split.test_from} must be later than {split.valid_from}")
    split_ids = np.searchsorted(np.array([valid_from, test_from]), log.time_us, side="right").astype(np.int8)
    undated = np.zeros(log.n_users, bool)
    undated[log.user[log.time_us == UNKNOWN_TIME]] = True
    split_ids[undated[log.user]] = UNUSED
    return split_ids


class Moment(NamedTuple):
    """Attributes:
    time_us: microseconds since 1970 UTC.
    utc_offset: seconds ahead of UTC; None where none is named, or by "Z", which says nothing of the clock at the place.
    """

    time_us: int
    utc_offset: int | None


def parse_date(text: str, field: str) -> Moment:
    """An ISO date or date-time, UTC unless it names an offset; `field` is named where it is none."""
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{field}: {text!r} is no ISO date, such as 2024-05-01 or 2024-05-01T09:00") from None
    named, offset = date.utcoffset(), date.utcoffset() or datetime.timedelta(0)
    micros = (date.replace(tzinfo=None) - datetime.datetime(1970, 1, 1) - offset) // datetime.timedelta(microseconds=1)
    return Moment(micros, None if named is None or text.upper().endswith("Z") else round(named.total_seconds()))


def _split_by_user(log: EventLog, fraction: float, seed: int) -> np.ndarray:
    eligible = np.flatnonzero(np.diff(log.offsets) >= 2)
    n = round(fraction * len(eligible))
    if n == 0:
        raise InputError(f"config.data.split.user_fraction: {fraction} of {len(eligible)} users is nobody")
    chosen = np.random.default_rng(seed).permutation(eligible)[: 2 * n]
    held_out = np.zeros(log.n_users, bool)
    held_out[chosen] = True
    split_ids = np.where(held_out[log.user], UNUSED, TRAIN).astype(np.int8)
    split_ids[log.offsets[chosen[:n] + 1] - 1] = VALID
    split_ids[log.offsets[chosen[n:] + 1] - 1] = TEST
    return split_ids


def shuffle_ties(dataset: Dataset, seed: int) -> Dataset:
    """The same data set with each run of a user's events of one known time in random order."""
    log = dataset.log
    if not log.n_events:
        return dataset
    user = log.user
    tied = (user[1:] == user[:-1]) & (log.time_us[1:] == log.time_us[:-1]) & (log.time_us[1:] != UNKNOWN_TIME)
    run = np.concatenate([[0], np.cumsum(~tied)])
    order = np.lexsort((np.random.default_rng(seed).random(log.n_events), run))
    return dataclasses.replace(dataset, log=log.take(order, log.offsets))


def select_targets(dataset: Dataset, split_ids: np.ndarray, split_id: int) -> np.ndarray:
    """`[n]` int64, the rows of the log that have the split id, ascending."""
    if len(split_ids) != dataset.log.n_events:
        raise InputError(f"split ids: {len(split_ids)} entries for {dataset.log.n_events} events")
    return np.flatnonzero(split_ids == split_id)


def gather_histories(dataset: Dataset, targets: np.ndarray, per_service: bool) -> Histories:
    """What a prediction of each target may see.

    That is every earlier row of the same user. With `per_service`, rows of other services count only when their
    time is known and strictly before the target's: inside a tie the order of two services means nothing.
    """
    log = dataset.log
    first = log.offsets[log.users_of(targets)]
    if not per_service:
        return make_histories(first, targets)
    service = dataset.event_service
    lengths, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    candidates = make_histories(first, targets)
    for chunk, part in candidates.blocks():
        n_kept, kept = _visible_rows(log.time_us, service, part, targets[chunk])
        lengths.append(n_kept)
        rows.append(kept)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return Histories(offsets.astype(np.int64), np.concatenate(rows))


def _visible_rows(
    time_us: np.ndarray, service: np.ndarray, candidates: Histories, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    row, owner = candidates.rows, candidates.owner
    target = targets[owner]
    visible = (service[row] == service[target]) | ((time_us[row] < time_us[target]) & (time_us[row] != UNKNOWN_TIME))
    return np.bincount(owner[visible], minlength=len(targets)), row[visible]
