"""Sequences laid into rows: every place is that of a next-fit done by hand, and every column lands where it belongs."""

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.data.dataset import UNKNOWN_TIME, EventLog, ItemTable
from moerec.data.histories import Histories
from moerec.data.packing import Sequences, Words, device_time, pack, place_sequences
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


def micros(seconds: int, rest: int = 0) -> int:
    return seconds * 10**6 + rest


def test_device_time_counts_from_2000_and_refuses_what_does_not_fit():
    first, last = -(2**31) + 1, 2**31 - 1
    zero = seconds(2000, 1, 1)
    times = {
        micros(zero): 0,
        micros(zero, 999_999): 0,
        micros(seconds(2000, 1, 2, 0, 0, 5)): 86_405,
        micros(seconds(1999, 12, 31, 23, 59, 59)): -1,
        micros(zero, -1): -1,  # downwards, on both sides of 2000
        micros(zero + first): first,
        micros(zero + first, -1): NO_TIME,  # the code itself
        micros(zero + last, 999_999): last,
        micros(zero + last + 1): NO_TIME,
        int(UNKNOWN_TIME): NO_TIME,
        int(UNKNOWN_TIME) + 1: NO_TIME,
        2**63 - 1: NO_TIME,
    }
    shifted = device_time(np.array(list(times), np.int64))
    assert shifted.dtype == np.int32
    assert shifted.tolist() == list(times.values())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_device_time_of_any_time(times):
    zero = seconds(2000, 1, 1)
    shifted = [t // 10**6 - zero for t in times]
    expected = [s if -(2**31) < s < 2**31 else int(NO_TIME) for s in shifted]
    assert device_time(np.array(times, np.int64)).tolist() == expected


@st.composite
def sequence_sets(draw):
    """A log, an item table, and sequences of rows in any order, each with what comes after it."""
    n_events, sizes = draw(st.integers(1, 20)), draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    n_context, n_fields, row_len = draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    time = rng.integers(0, 2**50, n_events) + micros(seconds(2001, 1, 1))
    time[rng.random(n_events) < 0.2] = UNKNOWN_TIME
    log = EventLog(
        np.array([0, n_events]),
        rng.integers(0, sum(sizes), n_events).astype(np.int32),
        rng.integers(0, 9, n_events).astype(np.int16),
        time,
        rng.integers(0, 5, (n_events, n_context)).astype(np.int16),
        rng.integers(-9, 9, n_events).astype(np.int32) * 900,
    )
    blank = np.full(sum(sizes), "")
    items = ItemTable(
        tuple(f"service {z}" for z in range(len(sizes))), np.concatenate([[0], np.cumsum(sizes)]), blank, blank, blank
    )
    rows, controls, following, fields = [], [], [], []
    for _ in range(draw(st.integers(0, 8))):
        controls.append(draw(st.booleans()))
        rows.append(draw(st.lists(st.integers(0, n_events - 1), max_size=row_len - controls[-1])))
        following.append(draw(st.integers(0, n_events - 1)))
        fields.append(rng.integers(0, 9, n_fields).tolist())
    sequences = Sequences(
        Histories(
            np.concatenate([[0], np.cumsum([len(own) for own in rows])]).astype(np.int64),
            np.array([row for own in rows for row in own], np.int64),
        ),
        np.array(following, np.int64),
        np.array(controls, bool),
        np.array(fields, np.int32).reshape(len(rows), n_fields),
    )
    return log, items, rows, sequences, draw(st.integers(1, 4)), row_len


def read_slot(packed, row: int, column: int) -> dict:
    """Every column of one slot."""
    batch = packed.batch
    columns = {**batch._asdict(), **{f"request.{k}": x for k, x in batch.request._asdict().items()}}
    columns |= {"next_item": packed.next_item_BT, "next_token": packed.next_token_BT}
    left_out = ("request", "targets")
    return {name: x[row, column].tolist() for name, x in columns.items() if name not in left_out and x is not None}


def take_words(words_of: list[list[int]]) -> Words:
    offsets = np.concatenate([[0], np.cumsum([len(own) for own in words_of])]).astype(np.int64)
    return Words(offsets, np.array([token for own in words_of for token in own], np.int32))


@given(sequence_sets(), st.booleans(), st.integers(0, 10_000))
def test_control_slots_events_and_words_stand_where_a_loop_lays_them(drawn, has_words, seed):
    log, items, rows_of, sequences, n_rows, row_len = drawn
    rng = np.random.default_rng(seed)
    n_slots = [len(rows) + bool(c) for rows, c in zip(rows_of, sequences.has_control, strict=True)]
    assert sequences.n_slots.tolist() == n_slots
    room = [max(row_len - n - 1, 0) for n in n_slots]
    words_of = [rng.integers(1, 90, rng.integers(0, n + 1) if has_words else 0).tolist() for n in room]
    n_slots = [n + len(own) + bool(own) for n, own in zip(n_slots, words_of, strict=True)]
    placed = place_sequences(np.array(n_slots, np.int64), n_rows, row_len)
    n = placed.n
    part = Sequences(sequences.events.slice(0, n), *(x[:n] for x in sequences[1:]))
    words = take_words(words_of[:n]) if has_words and n else None
    packed = pack(log, items, part, placed, (n_rows, row_len), words)
    assert packed.batch.targets == {}
    n_services, n_context, n_fields = len(items.services), log.context.shape[1], sequences.field_UY.shape[1]
    service_of = [z for z in range(n_services) for _ in range(items.offsets[z], items.offsets[z + 1])]

    def seen_time(row):
        time_us = int(log.time_us[row])
        return int(NO_TIME) if time_us == UNKNOWN_TIME else time_us // 10**6 - seconds(2000, 1, 1)

    def nothing(kind):
        empty = {"kind_BT": kind, "item_BT": 0, "service_BT": n_services, "action_BT": 0, "time_BT": int(NO_TIME)}
        return {**empty, "utc_offset_BT": 0}

    padding = {
        **nothing(0),
        "position_BT": 0,
        "segment_BT": 0,
        "request.time_BT": int(NO_TIME),
        "request.utc_offset_BT": 0,
        "request.context_BTC": [0] * n_context,
        "request.field_BTY": [0] * n_fields,
        "next_item": 0,
        **({} if words is None else {"token_BT": 0, "next_token": -1}),
    }
    expected = [[padding] * row_len for _ in range(n_rows)]
    for k, (b, column, number) in enumerate(place_by_hand(n_slots, n_rows, row_len)):
        laid = ["control"] * bool(sequences.has_control[k]) + rows_of[k]
        n_before, said = len(laid), words_of[k] if words is not None else []
        laid += [f"word {token}" for token in said] + ["control"] * bool(said)
        for t, event in enumerate(laid):
            after = laid[t + 1] if t + 1 < n_before else int(sequences.next_row[k])
            own, is_word = nothing(2), str(event).startswith("word")
            if t >= n_before and rows_of[k]:
                own["time_BT"] = seen_time(rows_of[k][-1])
            if is_word:
                own["kind_BT"] = 3
            elif event != "control":
                own = {
                    "kind_BT": 1,
                    "item_BT": int(log.item[event]),
                    "service_BT": service_of[log.item[event]],
                    "action_BT": int(log.action[event]),
                    "time_BT": seen_time(event),
                    "utc_offset_BT": int(log.utc_offset[event]),
                }
            expected[b][column + t] = {
                **own,
                "position_BT": t,
                "segment_BT": number,
                "request.time_BT": seen_time(after),
                "request.utc_offset_BT": int(log.utc_offset[after]),
                "request.context_BTC": log.context[after].tolist(),
                "request.field_BTY": sequences.field_UY[k].tolist(),
                "next_item": -1 if is_word else int(log.item[after]),
            }
            slot = expected[b][column + t]
            if said and (is_word or t == n_before - 1):  # the request is answered behind the words
                slot |= {"request.time_BT": int(NO_TIME), "request.utc_offset_BT": 0, "next_item": -1}
                slot["request.context_BTC"] = [0] * n_context
            if words is not None:
                slot["token_BT"] = said[t - n_before] if is_word else 0
                slot["next_token"] = said[t - n_before + 1] if is_word and t - n_before + 1 < len(said) else -1
    assert [[read_slot(packed, b, t) for t in range(row_len)] for b in range(n_rows)] == expected


@given(sequence_sets())
def test_packed_columns_are_int32_of_the_asked_shape(drawn):
    log, items, _, sequences, n_rows, row_len = drawn
    placed = place_sequences(sequences.n_slots, n_rows, row_len)
    part = Sequences(sequences.events.slice(0, placed.n), *(x[: placed.n] for x in sequences[1:]))
    packed = pack(log, items, part, placed, (n_rows, row_len))
    columns = [*packed.batch[:8], *packed.batch.request, packed.next_item_BT]
    assert {x.dtype for x in columns} == {np.dtype(np.int32)}
    assert {x.shape[:2] for x in columns} == {(n_rows, row_len)}
    assert packed.batch.request.context_BTC.shape == (n_rows, row_len, log.context.shape[1])
    assert packed.batch.request.field_BTY.shape == (n_rows, row_len, sequences.field_UY.shape[1])
