"""Ties at the split points, events from the future, and times that are far off."""

from collections.abc import Iterator

import numpy as np

from moerec.config import AuditConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.prepare.far_times import count_times, describe_far_times, describe_times, find_far_times
from moerec.data.splits import TEST, VALID
from moerec.eval.audit.report import AuditRow, make_row
from moerec.eval.audit.subject import Subject


def check_far_times(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Events, and test events, whose time is hardly meant: before 1990, later than now, or far from all others."""
    time_us = subject.dataset.log.time_us
    times = count_times(time_us)
    if not len(times.hour):
        return
    far = find_far_times(times)
    is_far = far.holds(time_us)
    text = "; ".join(filter(None, (describe_times(times), describe_far_times(times, far))))
    yield make_row("far_times", "all", is_far.sum() / times.n, limits.max_far_times, text)
    own = is_far[subject.targets]
    text = f"of {len(own)} test events, those at such a time"
    yield make_row("far_times_test", "all", own.mean(), limits.max_far_times_test, text)


def check_ties(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Test and validation events at the very time of the event before them: their order is the file's, not time's."""
    for split_id, name, limit in (
        (TEST, "tied_test", limits.max_tied_test),
        (VALID, "tied_valid", limits.max_tied_valid),
    ):
        rows = np.flatnonzero((subject.split_ids == split_id) & (subject.previous >= 0))
        for service, own in subject.split_by_service(rows):
            text = f"of {len(own)} events with another before, those at its very time"
            yield make_row(name, service, subject.tied[own].mean(), limit, text, n=len(own))


def check_future_in_history(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Histories that hold an event later than their target."""
    time, n_later = subject.dataset.log.time_us, 0
    has_later = np.zeros(len(subject.targets), bool)
    for which, part in subject.histories.blocks():
        asked = time[subject.targets[which]][part.owner]
        later = (time[part.rows] > asked) & (asked != UNKNOWN_TIME)
        has_later[which.start + part.owner[later]] = True
        n_later += int(later.sum())
    value = np.count_nonzero(has_later) / len(subject.targets)
    text = f"{n_later} events in the histories of {len(subject.targets)} test events are later than these"
    yield make_row("future_in_history", "all", value, limits.max_future_in_history, text)


def check_training_after_test(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Training events later than test events: anybody's, and the same user's."""
    time = subject.dataset.log.time_us
    train = subject.train[time[subject.train] != UNKNOWN_TIME]
    targets = subject.targets[time[subject.targets] != UNKNOWN_TIME]
    if not len(train) or not len(targets):
        return
    ordered = np.sort(time[train])
    later = 1 - np.searchsorted(ordered, time[targets], side="right") / len(ordered)
    text = f"training events later than a test event, mean; {(later > 0).mean():.4f} of the test events have any"
    yield make_row("train_after_test", "all", later.mean(), limits.max_train_after_test, text)
    last = np.full(subject.dataset.log.n_users, UNKNOWN_TIME)
    np.maximum.at(last, subject.user[train], time[train])
    own = last[subject.user[targets]] > time[targets]
    text = f"of {len(targets)} test events, those with a later training event of the same user"
    yield make_row("train_after_own_test", "all", own.mean(), limits.max_train_after_own_test, text)
