"""Sequences laid into rows: every place is that of a next-fit done by hand, and every column lands where it belongs."""

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.dataset import UNKNOWN_TIME, EventLog
from moerec.data.packing import device_time, fill_batch, place_sequences
from moerec.types import NO_TIME


def place_by_hand(lengths, n_rows, row_len):
    """Row, first column and number in its row of every sequence that next-fit places."""
    placed, row, used, count = [], 0, 0, 0
    for length in lengths:
        if used + length > row_len:
            row, used, count = row + 1, 0, 0
        if row == n_rows:
            break
        count += 1
        placed.append((row, used, count))
        used += length
    return placed


@st.composite
def packings(draw):
    row_len = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, row_len), max_size=40))
    return np.array(lengths, np.int64), draw(st.integers(1, 8)), row_len


@given(packings())
def test_places_are_those_of_next_fit(packing):
    lengths, n_rows, row_len = packing
    placed = place_sequences(lengths, n_rows, row_len)
    expected = place_by_hand(lengths.tolist(), n_rows, row_len)
    assert placed.n == len(expected) == len(placed.start) == len(placed.segment)
    for k, (row, column, number) in enumerate(expected):
        assert placed.segment[k] == number
        if lengths[k]:
            assert divmod(placed.start[k], row_len) == (row, column)


@given(packings())
def test_no_two_sequences_share_a_slot_or_a_segment(packing):
    lengths, n_rows, row_len = packing
    placed = place_sequences(lengths, n_rows, row_len)
    taken = {}
    for k in range(placed.n):
        for slot in range(placed.start[k], placed.start[k] + lengths[k]):
            assert slot not in taken
            assert slot // row_len == placed.start[k] // row_len < n_rows, "runs out of its row"
            taken[slot] = k
    owners = [taken[slot] for slot in sorted(taken)]
    assert owners == sorted(owners), "out of order"
    pairs = {(int(slot // row_len), int(placed.segment[k]), k) for slot, k in taken.items()}
    assert len({pair[:2] for pair in pairs}) == len(pairs), "two sequences with one segment id in one row"
    assert np.all(placed.segment >= 1)


@pytest.mark.parametrize(
    ("lengths", "n_rows", "n"),
    [
        ([], 3, 0),
        ([4, 4, 4], 3, 3),  # exactly enough rows
        ([4, 4, 4], 2, 2),  # too few
        ([1, 1], 9, 2),  # more than enough
        ([3, 2, 2, 2, 3], 2, 3),  # next-fit leaves the slot behind the 3
        ([4, 0, 0], 1, 3),  # no slot is needed where none is left
        ([0, 0, 4, 1], 1, 3),
        ([0], 1, 1),
    ],
)
def test_number_of_placed_sequences(lengths, n_rows, n):
    assert place_sequences(np.array(lengths, np.int64), n_rows, 4).n == n


def seconds(*date) -> int:
    return int(datetime.datetime(*date, tzinfo=datetime.UTC).timestamp())


def test_device_time_counts_from_2000_and_refuses_what_does_not_fit():
    first, last = -(2**31) + 1, 2**31 - 1
    zero = seconds(2000, 1, 1)
    times = {
        seconds(2000, 1, 1): 0,
        seconds(2000, 1, 2, 0, 0, 5): 86_405,
        seconds(1999, 12, 31, 23, 59, 59): -1,
        zero + first: first,
        zero + first - 1: NO_TIME,  # the code itself
        zero + last: last,
        zero + last + 1: NO_TIME,
        int(UNKNOWN_TIME): NO_TIME,
        int(UNKNOWN_TIME) + 1: NO_TIME,  # wraps around when shifted
        2**63 - 1: NO_TIME,
    }
    shifted = device_time(np.array(list(times), np.int64))
    assert shifted.dtype == np.int32
    assert shifted.tolist() == list(times.values())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_device_time_of_any_time(times):
    zero = seconds(2000, 1, 1)
    expected = [t - zero if -(2**31) < t - zero < 2**31 else int(NO_TIME) for t in times]
    assert device_time(np.array(times, np.int64)).tolist() == expected


@given(st.integers(0, 12), st.integers(0, 3), st.integers(0, 10_000))
def test_columns_land_in_their_slots_and_the_rest_is_padding(n, n_context, seed):
    rng = np.random.default_rng(seed)
    events = 20
    log = EventLog(
        np.array([0, events]),
        rng.integers(0, 1000, events).astype(np.int32),
        rng.integers(0, 9, events).astype(np.int16),
        rng.integers(0, 2**30, events) + seconds(2001, 1, 1),
        rng.integers(0, 5, (events, n_context)).astype(np.int16),
        rng.integers(-9, 9, events).astype(np.int32) * 900,
    )
    shape = (3, 4)
    slot = rng.permutation(12)[:n]
    source, following = rng.integers(0, events, (2, n))
    position, segment = rng.integers(0, 9, n), rng.integers(1, 9, n)
    weight, fields = rng.random(n), rng.integers(0, 9, (n, 2))
    batch = fill_batch(log, slot, source, following, position, segment, weight, shape, fields)
    assert batch.request_context_BTC.shape == (*shape, n_context)
    assert {x.dtype for x in batch[:-1]} == {np.dtype(np.int32)}
    assert batch.weight_BT.dtype == np.float32
    place = {int(s): k for k, s in enumerate(slot)}
    zero = seconds(2000, 1, 1)
    for flat in range(12):
        got = [np.asarray(x)[divmod(flat, 4)].tolist() for x in batch]
        if flat not in place:
            assert got == [0, 0, NO_TIME, 0, 0, 0, NO_TIME, 0, [0] * n_context, [0, 0], 0, 0]
            continue
        k = place[flat]
        s, f = source[k], following[k]
        assert got == [
            log.item[s],
            log.action[s],
            log.time[s] - zero,
            log.utc_offset[s],
            position[k],
            segment[k],
            log.time[f] - zero,
            log.utc_offset[f],
            log.context[f].tolist(),
            fields[k].tolist(),
            log.item[f],
            np.float32(weight[k]),
        ]
