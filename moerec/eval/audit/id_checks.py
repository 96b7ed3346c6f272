"""Ids that give the answer away: their order against time, and a canary that only counts upwards."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moerec.config import AuditConfig
from moerec.data.dataset import ItemTable, encode_strings
from moerec.eval.audit.chance import bound_agreement, bound_hits, bound_order
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
    item = subject.dataset.log.item
    number = number_ids(subject.dataset.catalogue)[item]
    for name, rows, limit in (
        ("id_order", subject.targets, limits.max_id_order),
        ("id_order_in_ties", np.flatnonzero(subject.tied), limits.max_id_order_in_ties),
    ):
        for service, own in subject.split_by_service(_with_other_item_before(subject, rows)):
            before = subject.previous[own]
            larger = float(np.mean(number[own] > number[before]))
            text = f"larger part of {len(own)} pairs by order of ids; the later id is the larger in {larger:.4f}"
            chance = bound_order(item[before], item[own])
            yield make_row(name, service, max(larger, 1 - larger), limit, text, chance=chance)


def check_tie_order(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Whether two items always stand in the same order where they are tied: then some key, seen or not, sorts ties.

    Neighbors of one time are compared with the same two items in other sequences; one half agrees without a key.
    """
    item, n_items = subject.dataset.log.item.astype(np.int64), subject.dataset.catalogue.n_items
    for service, own in subject.split_by_service(_with_other_item_before(subject, np.flatnonzero(subject.tied))):
        before, after = item[subject.previous[own]], item[own]
        pair = np.minimum(before, after) * n_items + np.maximum(before, after)
        _, which, count = np.unique(pair, return_inverse=True, return_counts=True)
        rising = np.bincount(which, weights=after > before)
        comparisons = float(np.sum(count * (count - 1) / 2))
        if not comparisons:
            text = f"no two items stand tied twice among {len(own)} tied neighbors"
            yield make_row("tie_order", service, None, limits.max_tie_order, text)
            continue
        falling = count - rising
        agree = float(np.sum(rising * (rising - 1) + falling * (falling - 1)) / 2) / comparisons
        text = f"of {comparisons:.0f} comparisons of tied neighbors with the same two items elsewhere, same order"
        chance = bound_agreement(count[count > 1])
        yield make_row("tie_order", service, agree, limits.max_tie_order, text, chance=chance)


def _with_other_item_before(subject: Subject, rows: np.ndarray) -> np.ndarray:
    rows = rows[subject.previous[rows] >= 0]
    before, item = subject.previous[rows], subject.dataset.log.item
    return rows[(subject.service[rows] == subject.service[before]) & (item[rows] != item[before])]


def check_id_canary(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Recall of guessing the largest id so far + 1, the last id + 1, the largest + 2, … among unseen items."""
    for code, service in enumerate(subject.dataset.catalogue.services):
        rank, chance, repeats = guess_by_arithmetic(subject, code)
        n = len(rank)
        if not n:
            continue
        hit5, hit10 = (float(np.mean(rank <= k)) for k in (5, 10))
        by_chance, possible = float(chance.mean()), np.count_nonzero(chance) / n
        text = (
            f"recall@5 above chance ({by_chance:.4f}) of arithmetic on ids: recall@5 {hit5:.4f}, recall@10 {hit10:.4f}"
        )
        bound = bound_hits(*repeats) / n - by_chance
        value, most = max(hit5 - by_chance, 0.0), possible - by_chance
        yield make_row("id_canary", service, value, limits.max_id_canary, text, chance=bound, most=most)


class Guesses(NamedTuple):
    """What the canary makes of the test events of a service.

    Attributes:
      rank: `[n]`, 1-based place of each item among the guesses; a huge number if it is none.
      chance: `[n]`, of a hit among the first five by ids that mean nothing: the guesses, of all unseen items.
      repeats: `([groups], [groups])`, how many events have the same item before them and the same one as their own, and
        their chance. They are hit or missed together.
    """

    rank: np.ndarray
    chance: np.ndarray
    repeats: tuple[np.ndarray, np.ndarray]


def guess_by_arithmetic(subject: Subject, code: int) -> Guesses:
    """The guesses at the test events of the service.

    Guesses that are no item, are in the history or were made before take no place.
    """
    catalogue, item = subject.dataset.catalogue, subject.dataset.log.item
    numbers = number_ids(catalogue)
    existing = np.sort(numbers[catalogue.offsets[code] : catalogue.offsets[code + 1]])
    asked = subject.service[subject.targets] == code
    own = subject.histories.keep_group(subject.service, np.full(len(asked), code))
    last, largest = np.zeros((2, len(asked)), np.int64)
    last[own.length > 0] = numbers[item[own.last(1).rows]]
    answer = numbers[item[subject.targets]]
    rank, chance = np.full(len(asked), _NO_GUESS), np.zeros(len(asked))
    for which, part in own.distinct(item).blocks():
        answered = np.flatnonzero(asked[which] & (part.length > 0))
        at = which.start + answered
        seen = (numbers[item[part.rows]], part.offsets[:-1][answered], part.length[answered])
        if len(at):
            rank[at], chance[at], largest[at] = _rank_guesses(existing, *seen, last[at], answer[at])
    groups = [_group(before[chance > 0], answer[chance > 0], chance[chance > 0]) for before in (largest, last)]
    count, half = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    return Guesses(rank[asked], chance[asked], (count, half))


def _rank_guesses(
    existing: np.ndarray, seen: np.ndarray, start: np.ndarray, length: np.ndarray, last: np.ndarray, answer: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[n]` places of `answer` [n] among the guesses from the numbers `seen[start[i] : start[i] + length[i]]`, of which
    `last` [n] is the newest; the chance of a hit among five, and the largest number seen. Args: `existing`, the numbers
    of all items, ascending; `length` is at least 1.
    """
    places = np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
    seen, owner = seen[places], np.repeat(np.arange(len(length)), length)
    rank = np.full(len(answer), _NO_GUESS)
    largest = np.maximum.reduceat(seen, np.cumsum(length) - length)[:, None]
    step = np.arange(1, _REACH + 1)
    guess = np.stack([largest + step, last[:, None] + step], axis=2).reshape(len(answer), 2 * _REACH)
    counts = np.isin(guess, existing)
    counts[:, 1::2] &= guess[:, 1::2] <= largest  # above it the first rule has guessed already
    row = np.arange(len(answer)) * len(existing)
    seen_key = np.unique(owner * len(existing) + np.searchsorted(existing, seen))
    counts &= ~np.isin(row[:, None] + np.searchsorted(existing, guess), seen_key)
    hit = counts & (guess == answer[:, None])
    found = hit.any(axis=1)
    rank[found] = np.cumsum(counts, axis=1)[found, hit.argmax(axis=1)[found]]
    n_unseen = len(existing) - np.bincount(seen_key // len(existing), minlength=len(answer))
    is_new = ~np.isin(row + np.searchsorted(existing, answer), seen_key)  # what is in the history is never guessed
    chance = np.where(is_new, np.minimum(counts.sum(axis=1), 5) / np.maximum(n_unseen, 1), 0)
    return rank, chance, largest[:, 0]


def _group(before: np.ndarray, answer: np.ndarray, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair occurs, and half its mean chance: of two rules each makes half the guesses."""
    known, code = np.unique(np.concatenate([before, answer]), return_inverse=True)
    key = code[: len(before)] * len(known) + code[len(before) :]
    _, which, count = np.unique(key, return_inverse=True, return_counts=True)
    return count, np.bincount(which.ravel(), chance) / (2 * count)
