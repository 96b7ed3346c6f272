"""Ids that give the answer away: their order against time, and a canary that only counts upwards."""

from collections.abc import Iterator

import numpy as np

from moerec.config import AuditConfig
from moerec.data.dataset import ItemTable, encode_strings
from moerec.eval.audit.report import AuditRow, make_row
from moerec.eval.audit.subject import Subject

_REACH = 10  # guesses of each kind that the canary makes
_NO_GUESS = np.iinfo(np.int64).max


def number_ids(catalogue: ItemTable) -> np.ndarray:
    """`[I]` int64: the numbers in the raw ids of a service where all have one behind the same letters (or behind none),
    else their alphabetical order.

    The catalogue's own numbering is no help: it is permuted when a data set is loaded.
    """
    numbers = np.zeros(catalogue.n_items, np.int64)
    for lo, hi in zip(catalogue.offsets[:-1], catalogue.offsets[1:], strict=True):
        ids = _drop_common_stem(catalogue.ids[lo:hi].tolist())
        if ids and all(map(str.isdecimal, ids)) and max(map(len, ids)) < 19:
            numbers[lo:hi] = list(map(int, ids))
        else:
            numbers[lo:hi] = encode_strings(np.array(ids, object))[1]
    return numbers


def _drop_common_stem(ids: list[str]) -> list[str]:
    """`i1, i2, i10` as `1, 2, 10`; ids that differ in what is before their last digits stay as they are."""
    stems = {name.rstrip("0123456789") for name in ids}
    stem = len(stems.pop()) if len(stems) == 1 else 0
    return [name[stem:] for name in ids] if 0 < stem < max(map(len, ids)) else ids


def check_id_order(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Whether the id of a test item tends to lie on one side of the id before it; and so within ties."""
    number = number_ids(subject.dataset.catalogue)[subject.dataset.log.item]
    for name, rows, limit in (
        ("id_order", subject.targets, limits.max_id_order),
        ("id_order_in_ties", np.flatnonzero(subject.tied), limits.max_id_order_in_ties),
    ):
        for service, own in subject.split_by_service(_with_other_item_before(subject, rows)):
            larger = float(np.mean(number[own] > number[subject.previous[own]]))
            text = f"larger part of {len(own)} pairs by order of ids; the later id is the larger in {larger:.4f}"
            yield make_row(name, service, max(larger, 1 - larger), limit, text, 1.5 / np.sqrt(len(own)))


def check_tie_order(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Whether two items always stand in the same order where they are tied: then some key, seen or not, sorts ties.

    Neighbours of one time are compared with the same two items in other sequences; one half agrees without a key.
    """
    item, n_items = subject.dataset.log.item.astype(np.int64), subject.dataset.catalogue.n_items
    for service, own in subject.split_by_service(_with_other_item_before(subject, np.flatnonzero(subject.tied))):
        before, after = item[subject.previous[own]], item[own]
        pair = np.minimum(before, after) * n_items + np.maximum(before, after)
        _, which, count = np.unique(pair, return_inverse=True, return_counts=True)
        rising = np.bincount(which, weights=after > before)
        comparisons = float(np.sum(count * (count - 1) / 2))
        if not comparisons:
            continue
        falling = count - rising
        agree = float(np.sum(rising * (rising - 1) + falling * (falling - 1)) / 2) / comparisons
        text = f"of {comparisons:.0f} comparisons of tied neighbours with the same two items elsewhere, same order"
        margin = 1.5 / np.sqrt(np.count_nonzero(count > 1))
        yield make_row("tie_order", service, agree, limits.max_tie_order, text, margin)


def _with_other_item_before(subject: Subject, rows: np.ndarray) -> np.ndarray:
    rows = rows[subject.previous[rows] >= 0]
    before, item = subject.previous[rows], subject.dataset.log.item
    return rows[(subject.service[rows] == subject.service[before]) & (item[rows] != item[before])]


def check_id_canary(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Recall of guessing the largest id so far + 1, the last id + 1, the largest + 2, … among unseen items."""
    catalogue = subject.dataset.catalogue
    for code, service in enumerate(catalogue.services):
        rank = rank_by_arithmetic(subject, code)
        if not len(rank):
            continue
        hit5, hit10 = (float(np.mean(rank <= k)) for k in (5, 10))
        chance = min(5 / int(catalogue.offsets[code + 1] - catalogue.offsets[code]), 1.0)
        text = f"recall@5 above chance ({chance:.4f}) of arithmetic on ids: recall@5 {hit5:.4f}, recall@10 {hit10:.4f}"
        margin = 3 * np.sqrt(chance * (1 - chance) / len(rank))
        yield make_row("id_canary", service, max(hit5 - chance, 0.0), limits.max_id_canary, text, margin)


def rank_by_arithmetic(subject: Subject, code: int) -> np.ndarray:
    """1-based place of each test item of the service among the canary's guesses; a huge number if it is none.

    Guesses that are no item, are in the history or were made before take no place.
    """
    catalogue, item = subject.dataset.catalogue, subject.dataset.log.item
    numbers = number_ids(catalogue)
    existing = np.sort(numbers[catalogue.offsets[code] : catalogue.offsets[code + 1]])
    rows, owner = subject.histories.rows, subject.histories.owner
    asked = subject.service[subject.targets] == code
    own = asked[owner] & (subject.service[rows] == code)
    seen = numbers[item[rows[own]]]
    with_history, start, place = np.unique(owner[own], return_index=True, return_inverse=True)
    rank = np.full(len(asked), _NO_GUESS)
    if not len(seen):
        return rank[asked]
    largest = np.maximum.reduceat(seen, start)[:, None]
    last = seen[np.append(start[1:], len(seen)) - 1][:, None]
    step = np.arange(1, _REACH + 1)
    guess = np.stack([largest + step, last + step], axis=2).reshape(len(start), 2 * _REACH)
    counts = np.isin(guess, existing)
    counts[:, 1::2] &= guess[:, 1::2] <= largest  # above it the first rule has guessed already
    key = np.arange(len(start))[:, None] * len(existing) + np.searchsorted(existing, guess)
    counts &= ~np.isin(key, place * len(existing) + np.searchsorted(existing, seen))
    hit = counts & (guess == numbers[item[subject.targets[with_history]]][:, None])
    found = hit.any(axis=1)
    rank[with_history[found]] = np.cumsum(counts, axis=1)[found, hit.argmax(axis=1)[found]]
    return rank[asked]
