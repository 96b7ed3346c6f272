"""Events that are there twice, and users who are somebody else's copy."""

from collections.abc import Iterator

import numpy as np

from moerec.config import AuditConfig
from moerec.data.dataset import UNKNOWN_TIME, Dataset
from moerec.eval.audit.chance import bound_shared, expect_shared, fit_popularity
from moerec.eval.audit.report import AuditRow, make_row
from moerec.eval.audit.subject import Subject


def check_duplicates(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Events that repeat another in user, item, action and known time."""
    log = subject.dataset.log
    columns = (log.time_us, log.action, log.item, subject.user)
    order = np.lexsort(columns)
    same = np.logical_and.reduce([column[order[1:]] == column[order[:-1]] for column in columns])
    same &= log.time_us[order[1:]] != UNKNOWN_TIME
    text = f"{int(same.sum())} of {log.n_events} events repeat another in user, item, action and time"
    yield make_row("duplicates", "all", same.sum() / max(log.n_events, 1), limits.max_duplicates, text)


def check_identical_users(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Users whose whole sequence of items in a service is also somebody else's.

    Who has one item alone, once or again and again, is left out. Few and popular items are shared by chance: that of a
    sequence is that of its different items, among the users of as many items and as many events.
    """
    dataset = subject.dataset
    for code, service in enumerate(dataset.catalogue.services):
        digest, n_events = digest_sequences(dataset, code)
        n_items, popularity = _count_items(dataset, code)
        is_asked = n_items >= 2
        n = int(is_asked.sum())
        if not n:
            continue
        _, which, count = np.unique(digest[is_asked], axis=0, return_inverse=True, return_counts=True)
        n_copied = int(np.sum(count[which.ravel()] > 1))
        groups, size = np.unique(np.stack([n_items, n_events])[:, is_asked], axis=1, return_counts=True)
        mean, variance = expect_shared(popularity, {int(k): size[groups[0] == k] for k in np.unique(groups[0])})
        text = (
            f"{n_copied} of {n} users share their sequence with somebody ({int(np.sum(count - 1))} beyond the first);"
            f" {mean:.1f} by chance"
        )
        chance, most = bound_shared(mean, variance) / n, float(n > 1)
        limit = limits.max_identical_users
        yield make_row("identical_users", service, n_copied / n, limit, text, chance=chance, most=most)


def _count_items(dataset: Dataset, service: int) -> tuple[np.ndarray, np.ndarray]:
    """`([users], [I])`: how many different items of a service a user has, and how popular these are."""
    log, n_items = dataset.log, dataset.catalogue.n_items
    rows = np.flatnonzero(dataset.event_service == service)
    _, first = np.unique(log.user[rows].astype(np.int64) * n_items + log.item[rows], return_index=True)
    rows = rows[np.sort(first)]
    popularity = fit_popularity(log.user[rows], log.item[rows], n_items)
    return np.bincount(log.user[rows], minlength=log.n_users), popularity


def digest_sequences(dataset: Dataset, service: int) -> tuple[np.ndarray, np.ndarray]:
    """`([users, 2] uint64, [users])`: 128 random bits that depend on a user's item sequence, and its length.

    A sum over places of a random word of the item times a random odd word of the place, modulo 2^64, twice.
    """
    log = dataset.log
    rows = np.flatnonzero(dataset.event_service == service)
    user = log.user[rows]
    length = np.bincount(user, minlength=log.n_users)
    place = np.arange(len(rows)) - (np.cumsum(length) - length)[user]
    rng = np.random.default_rng(0)
    digest = np.zeros((log.n_users, 2), np.uint64)
    for k in range(2):
        word = rng.integers(0, 2**64, dataset.catalogue.n_items, np.uint64, endpoint=False)
        odd = rng.integers(0, 2**64, length.max(initial=1), np.uint64, endpoint=False) | np.uint64(1)
        np.add.at(digest[:, k], user, word[log.item[rows]] * odd[place])
    return digest, length
