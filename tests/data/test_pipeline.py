"""The training stream against a slow reading of its batches: every pair of events once an epoch, from any position."""

import functools
import itertools
import json
from collections import Counter

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import DataConfig
from moerec.data.dataset import UNKNOWN_TIME, EventLog, ItemTable, permute_items
from moerec.data.load import RunData, make_reader
from moerec.data.pipeline.events import MemoryReader, PackedStream, ShardReader, StreamOptions, plan_epoch
from moerec.data.prepare.shards import open_source, write_dataset
from moerec.data.splits import TRAIN
from moerec.data.text.item_tokens import ItemVocabulary
from moerec.errors import InputError
from moerec.tasks.base import render_targets
from moerec.tasks.next_event import NextEvent
from moerec.types import EPOCH_2000, NO_TIME
from tests.random_dataset import make_dataset
from tests.small_model import target_of

RENDER = functools.partial(render_targets, [NextEvent()])
EITHER = pytest.mark.parametrize("first_event", [False, True])


def make_log(lengths, seed=0, n_context=2) -> EventLog:
    """Every event has an item of its own, so that a batch names the events that it was made from."""
    rng = np.random.default_rng(seed)
    n = int(np.sum(lengths))
    time = EPOCH_2000 * 10**6 + rng.integers(-(2**50), 2**50, n)
    time[rng.random(n) < 0.1] = UNKNOWN_TIME
    return EventLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.permutation(n).astype(np.int32),
        rng.integers(0, 5, n).astype(np.int16),
        time,
        rng.integers(0, 9, (n, n_context)).astype(np.int16),
        900 * rng.integers(-40, 40, n).astype(np.int32),
    )


def items_of(log: EventLog) -> ItemTable:
    """Two services: the first third of the items, and the rest."""
    n = log.n_events
    return ItemTable(("few", "many"), np.array([0, n // 3, n]), *(np.full(n, "") for _ in range(3)))


def open_stream(log: EventLog, keep: np.ndarray, options: StreamOptions) -> PackedStream:
    return PackedStream(MemoryReader(log, keep, fields_of(log)), items_of(log), RENDER, options)


def training_rows(log: EventLog, keep: np.ndarray) -> list[list[int]]:
    """The rows of the log that each user trains on."""
    return [[row for row in range(log.offsets[p], log.offsets[p + 1]) if keep[row]] for p in range(log.n_users)]


def fields_of(log: EventLog) -> np.ndarray:
    """Profile codes that tell who somebody is."""
    return np.stack([np.arange(log.n_users), np.arange(log.n_users) % 3 + 1], axis=1).astype(np.int32)


def segments_of(batch) -> list[list[tuple[int, int]]]:
    """The slots of each segment, row by row; fails where one is torn, not numbered from 1, or not padded by zeros."""
    found = []
    for b, row in enumerate(np.asarray(batch.segment_BT).tolist()):
        numbers = [segment for segment in row if segment]
        assert row == numbers + [0] * (len(row) - len(numbers)), "a hole in a row"
        assert numbers == sorted(numbers)
        assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1))
        for number in sorted(set(numbers)):
            found.append([(b, t) for t, segment in enumerate(row) if segment == number])
        for t in range(len(numbers), len(row)):
            label, weight = target_of(batch)
            assert weight[b, t] == label[b, t] == batch.item_BT[b, t] == batch.kind_BT[b, t] == 0
            assert batch.service_BT[b, t] == 2
            assert batch.time_BT[b, t] == batch.request.time_BT[b, t] == NO_TIME
    return found


def shifted(time) -> int:
    return int(NO_TIME) if time == UNKNOWN_TIME else int(time) // 10**6 - EPOCH_2000


def decode(batch, log: EventLog, rows_of_users, first_event: bool) -> list[tuple[int, int, int]]:
    """`(user, first slot, slots)` of each segment, every field of every slot compared with the log.

    With `first_event` a user's slot 0 is the control slot, and slot k the k-th event; without it slot 0 is an event.
    """
    row_of_item = {int(item): row for row, item in enumerate(log.item)}
    user_of_row = {row: p for p, rows in enumerate(rows_of_users) for row in rows}
    windows, n_few = [], log.n_events // 3
    for slots in segments_of(batch):
        after_first = row_of_item[int(target_of(batch).label_BT[slots[0]])]
        user = user_of_row[after_first]
        rows = rows_of_users[user]
        start = rows.index(after_first) - (not first_event)
        laid = ["control", *rows] if first_event else rows
        for k, slot in enumerate(slots):
            event, following = laid[start + k], laid[start + k + 1]
            columns = [*batch[:8], *batch.request, *target_of(batch)]
            got = [np.asarray(x)[slot].tolist() for x in columns]
            own = [2, 0, 2, 0, int(NO_TIME), 0]
            if event != "control":
                item = log.item[event]
                own = [
                    1,
                    item,
                    int(item >= n_few),
                    log.action[event],
                    shifted(log.time_us[event]),
                    log.utc_offset[event],
                ]
            assert got == [
                *own,
                k,
                batch.segment_BT[slots[0]],
                shifted(log.time_us[following]),
                log.utc_offset[following],
                log.context[following].tolist(),
                [user, user % 3 + 1],
                log.item[following],
                1.0,
            ]
        windows.append((user, start, len(slots)))
    return windows


def take_epoch(stream, log, rows_of_users, history_len, first_event) -> list[tuple[int, int, int]]:
    """The windows of the first epoch, in order; the rest of its last batch is of the next epoch."""
    n_slots = sum(all_slots(rows_of_users, range(len(rows_of_users)), first_event).values())
    windows, covered = [], 0
    for batch in stream:
        for window in decode(batch, log, rows_of_users, first_event):
            assert window[2] <= history_len
            if covered < n_slots:
                windows.append(window)
                covered += window[2]
        if covered >= n_slots:
            assert covered == n_slots, "an epoch ends inside a window"
            return windows
    raise AssertionError("the stream ended")


def slots_of(windows) -> Counter:
    return Counter((user, first + k) for user, first, length in windows for k in range(length))


def all_slots(rows_of_users, users, first_event) -> Counter:
    """With the control slot as many as there are events to predict, else one less."""
    return Counter((p, k) for p in users for k in range(len(rows_of_users[p]) - (not first_event)))


def assert_same_batch(a, b):
    (named, structure), (others, other_structure) = (jax.tree_util.tree_flatten_with_path(x) for x in (a, b))
    assert structure == other_structure
    for (path, x), (_, y) in zip(named, others, strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)
        assert np.asarray(x).dtype == np.asarray(y).dtype, name


@given(
    st.lists(st.integers(0, 30), max_size=12), st.integers(1, 7), st.integers(0, 10_000), st.integers(1, 3), st.data()
)
def test_windows_cover_every_slot_once(lengths, history_len, seed, process_count, data):
    lengths = np.array(lengths, np.int64)
    users = np.arange(data.draw(st.integers(0, process_count - 1)), len(lengths), process_count)
    plan = plan_epoch(
        lengths - 1, users, history_len, np.random.default_rng(seed)
    )  # an event less than there are slots
    windows = list(zip(*(x.tolist() for x in plan), strict=True))
    assert all(1 <= length <= history_len for _, _, length in windows)
    assert slots_of(windows) == Counter((p, k) for p in users.tolist() for k in range(lengths[p] - 1))
    for p in users.tolist():
        if 2 <= lengths[p] <= history_len + 1:
            assert [w for w in windows if w[0] == p] == [(p, 0, lengths[p] - 1)], "a short one is cut"


def test_long_ones_start_at_every_offset():
    heads = set()
    for seed in range(200):
        plan = plan_epoch(np.array([11]), np.array([0]), 4, np.random.default_rng(seed))
        heads.add(int(plan.length[plan.first == 0][0]))
    assert heads == {1, 2, 3, 4}


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 14), min_size=1, max_size=9),
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_an_epoch_holds_every_pair_of_training_events_once(lengths, history_len, more, n_rows, seed, first_event):
    """And with `first_event` every user's first one, behind the control slot."""
    log = make_log(lengths, seed)
    keep = np.random.default_rng(seed).random(log.n_events) < 0.8
    rows_of_users = training_rows(log, keep)
    options = StreamOptions(n_rows, history_len + more, history_len, seed, first_event)
    reader = MemoryReader(log, keep, fields_of(log))
    assert reader.lengths.tolist() == [len(rows) for rows in rows_of_users]
    if max(map(len, rows_of_users)) < (1 if first_event else 2):
        with pytest.raises(InputError, match="one training event" if first_event else "two training events"):
            open_stream(log, keep, options)
        return
    windows = take_epoch(open_stream(log, keep, options), log, rows_of_users, history_len, first_event)
    assert slots_of(windows) == all_slots(rows_of_users, range(log.n_users), first_event)


def test_every_users_first_event_is_predicted_once_an_epoch_from_the_request_alone():
    log = make_log([3, 0, 1, 12, 5], seed=7)
    keep = np.ones(log.n_events, bool)
    keep[log.offsets[3]] = False  # who is not trained on it begins with the next one
    keep[log.offsets[4] : log.offsets[5]] = False
    first_rows = {0: log.offsets[0], 2: log.offsets[2], 3: log.offsets[3] + 1}
    stream = iter(open_stream(log, keep, StreamOptions(1, 4, 4, 0)))
    controls, n_slots, n_trained = [], 0, int(keep.sum())
    while n_slots < 3 * n_trained:  # a batch is a row, and a window never is in two: epochs end with windows
        batch = next(stream)
        label, weight = target_of(batch)
        assert weight.dtype == np.float32
        n_slots += int((batch.segment_BT > 0).sum())
        for slot in zip(*np.nonzero(batch.kind_BT == 2), strict=True):
            assert weight[slot] == 1
            asked = (x[slot].tolist() for x in batch.request)
            controls.append((int(label[slot]), int(batch.position_BT[slot]), *asked))
    expected = [
        (log.item[row], 0, shifted(log.time_us[row]), log.utc_offset[row], log.context[row].tolist(), [p, p % 3 + 1])
        for p, row in first_rows.items()
    ]
    for epoch in range(3):
        assert sorted(controls[3 * epoch : 3 * epoch + 3]) == sorted(expected)


def test_only_windows_that_begin_a_users_events_have_a_control_slot():
    log = make_log([30, 26], seed=8)
    stream = iter(open_stream(log, np.ones(log.n_events, bool), StreamOptions(2, 9, 4, 0)))
    first_items, n_without = set(log.item[log.offsets[:-1]].tolist()), 0
    for _ in range(20):
        batch = next(stream)
        for slots in segments_of(batch):
            begins = int(target_of(batch).label_BT[slots[0]]) in first_items
            assert [int(batch.kind_BT[slot]) for slot in slots] == [2 if begins else 1] + [1] * (len(slots) - 1)
            assert int(batch.position_BT[slots[0]]) == 0
            n_without += not begins
    assert n_without > 50


def stream_by_hand(lengths, seed, n_rows, row_len, history_len, first_event):
    """The `(user, first slot, slots)` of each row of each batch: what the seed draws, cut and laid by loops."""
    n_slots = [n - (not first_event) for n in lengths]
    epoch, batch, used = 0, [[] for _ in range(n_rows)], 0
    row = 0
    while True:
        rng = np.random.default_rng((seed, epoch, 0))
        users = [p for p, n in enumerate(n_slots) if n > 0]
        heads = rng.integers(1, history_len + 1, len(users)).tolist()
        windows = []
        for p, head in zip(users, heads, strict=True):
            end = head if n_slots[p] > history_len else n_slots[p]
            start = 0
            while start < n_slots[p]:
                windows.append((p, start, min(end, n_slots[p]) - start))
                start, end = end, end + history_len
        for k in rng.permutation(len(windows)):
            if used + windows[k][2] > row_len:
                row, used = row + 1, 0
            if row == n_rows:
                yield batch
                row, batch = 0, [[] for _ in range(n_rows)]
            batch[row].append(windows[k])
            used += windows[k][2]
        row, used, epoch = row + 1, 0, epoch + 1  # an epoch begins in a row of its own
        if row == n_rows:
            yield batch
            row, batch = 0, [[] for _ in range(n_rows)]


@EITHER
@pytest.mark.parametrize("n_rows", [1, 3])
def test_the_stream_is_a_function_of_seed_and_epoch(n_rows, first_event):
    """Which, without a control slot, is what it was before there was one."""
    log = make_log([7, 3, 20, 0, 2, 9, 1, 4], seed=4)
    keep = np.ones(log.n_events, bool)
    rows_of_users = training_rows(log, keep)
    stream = iter(open_stream(log, keep, StreamOptions(n_rows, 8, 6, 9, first_event)))
    by_hand = stream_by_hand(np.diff(log.offsets).tolist(), 9, n_rows, 8, 6, first_event)
    for expected in itertools.islice(by_hand, 40):
        batch = next(stream)
        assert decode(batch, log, rows_of_users, first_event) == [window for row in expected for window in row]
        assert (batch.segment_BT > 0).sum(axis=1).tolist() == [sum(n for _, _, n in row) for row in expected]


@EITHER
def test_batches_have_their_shape_and_never_name_a_held_out_event(first_event):
    log = make_log([9, 1, 12, 5, 2, 30], seed=3)
    keep = np.random.default_rng(3).random(log.n_events) < 0.6
    held_out = set(log.item[~keep].tolist())
    assert held_out
    stream = iter(open_stream(log, keep, StreamOptions(2, 8, 5, 0, first_event)))
    for _ in range(20):
        batch = next(stream)
        assert {x.shape[:2] for x in jax.tree.leaves(batch)} == {(2, 8)}
        event, real = np.asarray(batch.kind_BT) == 1, np.asarray(batch.segment_BT) > 0
        named = set(batch.item_BT[event].tolist()) | set(target_of(batch).label_BT[real].tolist())
        assert named
        assert not held_out & named


@EITHER
def test_epochs_differ_in_order_and_offsets_and_seeds_decide(first_event):
    log = make_log([12] * 30, seed=1)
    keep = np.ones(log.n_events, bool)
    rows_of_users = training_rows(log, keep)

    def windows(seed, n=44):
        stream = iter(open_stream(log, keep, StreamOptions(2, 10, 5, seed, first_event)))
        return [w for _ in range(n) for w in decode(next(stream), log, rows_of_users, first_event)]

    first, again, other = windows(7), windows(7), windows(8)
    assert first == again
    assert first != other
    epochs, done = [[]], 0
    for window in first:
        epochs[-1].append(window)
        done += window[2]
        if done == 30 * (11 + first_event):
            epochs.append([])
            done = 0
    assert len(epochs) >= 3
    assert sorted(slots_of(epochs[0])) == sorted(slots_of(epochs[1]))
    assert [w[0] for w in epochs[0]] != [w[0] for w in epochs[1]]
    assert sorted(epochs[0]) != sorted(epochs[1]), "the same offsets in both epochs"


@pytest.mark.parametrize("process_count", [1, 2, 3])
@EITHER
def test_processes_share_the_users_out(process_count, first_event):
    log = make_log(np.random.default_rng(0).integers(0, 15, 20), seed=2)
    keep = np.ones(log.n_events, bool)
    rows_of_users = training_rows(log, keep)
    together, users = Counter(), []
    for index in range(process_count):
        own = [rows if p % process_count == index else [] for p, rows in enumerate(rows_of_users)]
        stream = open_stream(log, keep, StreamOptions(2, 9, 6, 5, first_event, index, process_count))
        windows = take_epoch(stream, log, own, 6, first_event)
        together += slots_of(windows)
        users.append({w[0] for w in windows})
    assert together == all_slots(rows_of_users, range(20), first_event)
    assert sum(map(len, users)) == len(set.union(*users))


def test_a_process_without_anything_to_learn_from_says_so():
    log = make_log([5, 1, 4, 0])
    keep = np.ones(log.n_events, bool)
    open_stream(log, keep, StreamOptions(1, 8, 8, 0, False, 0, 2))
    with pytest.raises(InputError, match="two training events"):
        open_stream(log, keep, StreamOptions(1, 8, 8, 0, False, 1, 2))
    open_stream(log, keep, StreamOptions(1, 8, 8, 0, True, 1, 2))  # one event is enough for a control slot
    for first_event, words in ((False, "two training events"), (True, "one training event")):
        with pytest.raises(InputError, match=words):
            open_stream(log, ~keep, StreamOptions(1, 8, 8, 0, first_event))


def to_device(batch):
    return jax.tree.map(jax.numpy.asarray, batch)


def plain(stream: PackedStream) -> grain.IterDataset:
    return stream


def as_trained(stream: PackedStream) -> grain.IterDataset:
    return grain.experimental.ThreadPrefetchIterDataset(stream.map(to_device), prefetch_buffer_size=2)


@pytest.mark.parametrize("wrap", [plain, as_trained])
@pytest.mark.parametrize("n_before", [0, 1, 3, 11, 26])
@EITHER
def test_a_saved_position_goes_on_with_the_next_batch(wrap, n_before, first_event):
    log = make_log([7, 3, 20, 2, 9, 1, 4], seed=4)
    keep = np.ones(log.n_events, bool)

    def start():
        return iter(wrap(open_stream(log, keep, StreamOptions(1, 8, 6, 9, first_event))))

    whole = start()
    batches = [next(whole) for _ in range(n_before + 12)]
    first = start()
    for batch in batches[:n_before]:
        assert_same_batch(next(first), batch)
    state = json.loads(json.dumps(first.get_state()))
    if wrap is plain:
        assert {name: type(value) for name, value in state.items()} == {"epoch": int, "window": int}
    next(first)  # what is read ahead or later must not move the saved position
    resumed = start()
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for batch in batches[n_before:]:
        assert_same_batch(next(resumed), batch)
    first.set_state(state)
    assert_same_batch(next(first), batches[n_before])
    for stream in (whole, first, resumed):
        stream.close()


def test_the_position_behind_the_prefetch_is_that_of_the_consumed_batches():
    log = make_log([7, 3, 20, 2, 9], seed=5)
    stream = open_stream(log, np.ones(log.n_events, bool), StreamOptions(1, 8, 6, 1))
    ahead, alone = iter(as_trained(stream)), iter(stream)
    assert ahead.get_state() == alone.get_state()
    for _ in range(15):
        assert_same_batch(next(ahead), next(alone))
        assert ahead.get_state() == alone.get_state()
    ahead.close()


@pytest.mark.parametrize("n_shards", [1, 3])
@EITHER
def test_shards_give_the_batches_of_memory(tmp_path, n_shards, first_event):
    rng = np.random.default_rng(n_shards)
    stored = make_dataset(rng.integers(0, 14, 25), items_per_service=(7, 0, 9), seed=n_shards)
    write_dataset(stored, tmp_path / "prepared", n_shards)
    used, number = permute_items(stored, 11)
    split_ids = rng.choice([TRAIN, TRAIN, TRAIN, 1, 2, 3], used.log.n_events).astype(np.int8)
    tokens = ItemVocabulary("words", 1).encode_items([""] * 16)
    data = RunData(used, split_ids, tokens, None, tmp_path / "prepared", number)
    memory, shards = (make_reader(DataConfig(reader=reader), data) for reader in ("memory", "shards"))
    assert isinstance(memory, MemoryReader)
    assert isinstance(shards, ShardReader)
    assert memory.lengths.tolist() == shards.lengths.tolist()
    options = StreamOptions(2, 9, 6, 3, first_event)
    streams = [iter(PackedStream(reader, used.catalogue, RENDER, options)) for reader in (memory, shards)]
    for _ in range(25):  # over several epochs
        assert_same_batch(next(streams[0]), next(streams[1]))


def test_shard_reader_renumbers_the_items(tmp_path):
    stored = make_dataset([4, 6], items_per_service=(3, 2))
    write_dataset(stored, tmp_path / "prepared", 2)
    log, numbers = stored.log, np.array([2, 0, 1, 4, 3], np.int32)
    keep = np.array([1, 0, 1, 1, 0, 1, 1, 0, 0, 1], bool)
    reader = ShardReader(open_source(tmp_path / "prepared"), log.offsets, keep, numbers)
    fetched, start = reader.fetch(np.array([1, 0, 1]))
    assert start.tolist() == [3, 0, 3]  # who has several windows in a batch is read once
    rows = [0, 2, 3, 5, 6, 9]
    assert fetched.item.tolist() == [int(numbers[log.item[row]]) for row in rows]
    np.testing.assert_array_equal(fetched.time_us, log.time_us[rows])
    np.testing.assert_array_equal(fetched.action, log.action[rows])
    np.testing.assert_array_equal(fetched.context, log.context[rows])
