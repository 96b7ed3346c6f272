"""Histories against lists of lists."""

import itertools

import numpy as np
import pytest
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
def test_histories_in_another_order(lists, data):
    which = data.draw(st.permutations(range(len(lists))))[: data.draw(st.integers(0, len(lists)))]
    part = of_lists(lists).take(np.array(which, np.int64))
    assert to_lists(part) == [lists[k] for k in which]


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


@st.composite
def nested(draw):
    """Ranges as predictions have them: those of a user begin at one row, and users follow one another."""
    ranges, base = [], 0
    for size in draw(st.lists(st.integers(0, 9), max_size=5)):
        ranges += [(base, base + stop) for stop in draw(st.lists(st.integers(0, size), max_size=4))]
        base += size
    return ranges, base


@st.composite
def any_ranges(draw):
    n = draw(st.integers(0, 12))
    place = st.integers(0, n)
    return [tuple(sorted(pair)) for pair in draw(st.lists(st.tuples(place, place), max_size=6))], n


@given(st.one_of(nested(), any_ranges()), st.randoms(use_true_random=False))
def test_ranges_do_what_their_rows_written_out_do(case, random):
    ranges, n = case
    start, stop = (np.array([pair[k] for pair in ranges], np.int64) for k in (0, 1))
    item, group = (np.array([random.randrange(4) for _ in range(n)], np.int32) for _ in range(2))
    wanted = np.array([random.randrange(4) for _ in ranges], np.int32)
    found, lists = make_histories(start, stop), [list(range(lo, hi)) for lo, hi in ranges]
    for step in random.sample(["events", "own", "others", "last", "slice", "take", "distinct", "nothing"], 3):
        plain = of_lists(lists)
        if step == "events":
            kept = np.array([random.random() < 0.7 for _ in range(n)], bool)
            found, plain = found.keep_events(kept), plain.keep_events(kept)
            lists = [[row for row in own if kept[row]] for own in lists]
        elif step in ("own", "others"):
            same = step == "own"
            found, plain = found.keep_group(group, wanted, same), plain.keep_group(group, wanted, same)
            lists = [[r for r in own if (group[r] == code) == same] for own, code in zip(lists, wanted, strict=True)]
        elif step == "last":
            found, plain, lists = found.last(2), plain.last(2), [own[-2:] for own in lists]
        elif step == "slice":
            lo = random.randrange(len(lists) + 1)
            found, plain, lists, wanted = found.slice(lo, 99), plain.slice(lo, 99), lists[lo:], wanted[lo:]
        elif step == "take":
            which = random.sample(range(len(lists)), len(lists) // 2)
            found, plain = found.take(np.array(which, int)), plain.take(np.array(which, int))
            lists, wanted = [lists[k] for k in which], wanted[which]
        elif step == "distinct":
            found, plain = found.distinct(item), plain.distinct(item)
            lists = [[r for k, r in enumerate(own) if item[r] not in item[own[:k]]] for own in lists]
        for histories in (found, plain):
            assert to_lists(histories) == lists
            assert histories.length.tolist() == [len(own) for own in lists]


@given(LISTS, st.integers(1, 4), st.integers(1, 20))
def test_blocks_hold_every_history_once_and_few_rows(lists, most, most_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moerec.data.histories.MOST_ROWS", most_rows)
        blocks = list(of_lists(lists).blocks(most))
    assert [own for _, part in blocks for own in to_lists(part)] == lists
    assert [k for which, _ in blocks for k in range(which.start, which.stop)] == list(range(len(lists)))
    for _, part in blocks:
        assert 1 <= len(part) <= most
        assert len(part) == 1 or len(part.rows) <= most_rows


def test_a_crawler_s_histories_are_not_written_out():
    """A billion rows, of which only what is asked for is there."""
    n = 60_000
    found = make_histories(np.zeros(n, np.int64), np.arange(n))
    item = np.arange(n) % 7000
    seen = found.distinct(item)
    assert found.length.sum() == n * (n - 1) // 2
    assert seen.length.tolist() == np.minimum(np.arange(n), 7000).tolist()
    assert item[seen.slice(n - 1, n).rows].tolist() == list(range(7000))
    assert found.last(3).slice(n - 1, n).rows.tolist() == [n - 4, n - 3, n - 2]
    others = found.keep_group(item % 2, np.ones(n, np.int64), same=False)
    assert others.length[-1] == np.count_nonzero(item[: n - 1] % 2 == 0)
    assert not any("rows" in vars(histories) for histories in (found, seen, others))
