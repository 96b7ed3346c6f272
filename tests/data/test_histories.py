"""Histories against lists of lists."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.histories import Histories, make_histories

LISTS = st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=8)


def of_lists(lists: list[list[int]]) -> Histories:
    offsets = [sum(len(own) for own in lists[:k]) for k in range(len(lists) + 1)]
    return Histories(np.array(offsets, np.int64), np.array([row for own in lists for row in own], np.int64))


def to_lists(histories: Histories) -> list[list[int]]:
    assert histories.offsets[0] == 0
    assert histories.offsets[-1] == len(histories.rows)
    return [histories.rows[lo:hi].tolist() for lo, hi in itertools.pairwise(histories.offsets)]


@given(LISTS)
def test_number_lengths_and_owners(lists):
    histories = of_lists(lists)
    assert len(histories) == len(lists)
    assert histories.length.tolist() == [len(own) for own in lists]
    assert histories.owner.tolist() == [k for k, own in enumerate(lists) for _ in own]


@given(LISTS, st.data())
def test_a_slice_is_that_of_the_list(lists, data):
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    part = of_lists(lists).slice(start, stop)
    assert to_lists(part) == lists[start:stop]
    assert part.owner.tolist() == [k for k, own in enumerate(lists[start:stop]) for _ in own]
    assert to_lists(part.slice(0, len(part))) == lists[start:stop]


@given(LISTS, st.data())
def test_what_is_kept_keeps_its_owner_and_order(lists, data):
    kept = [[data.draw(st.booleans()) for _ in own] for own in lists]
    found = of_lists(lists).keep(np.array([k for own in kept for k in own], bool))
    assert to_lists(found) == [
        [row for row, k in zip(own, flags, strict=True) if k] for own, flags in zip(lists, kept, strict=True)
    ]


@given(LISTS, st.integers(0, 9))
def test_the_last_ones(lists, n):
    assert to_lists(of_lists(lists).last(n)) == [own[max(len(own) - n, 0) :] for own in lists]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_ranges_of_rows(ranges):
    start = np.array([lo for lo, _ in ranges], np.int64)
    stop = np.array([lo + n for lo, n in ranges], np.int64)
    assert to_lists(make_histories(start, stop)) == [list(range(lo, lo + n)) for lo, n in ranges]
