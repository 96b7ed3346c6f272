"""Items' texts behind users' events: laid as they are written down, of training events, never of held-out items."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

from moerec.config import MixConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.load import load_data
from moerec.data.packing import Placement
from moerec.data.pipeline.behind_events import TextsBehindEvents
from moerec.data.pipeline.events import MemoryReader, StreamOptions
from moerec.data.pipeline.item_texts import TO_ITEM, TO_TEXT, ItemTextStream
from moerec.data.pipeline.mixture import add_words, make_mixed_stream
from moerec.errors import InputError
from moerec.types import EVENT, NO_TIME, PADDING, RECOMMEND, TOKEN
from tests.data.test_mixture import DATASET, END, ITEMS, LENGTHS, TEXTS, make_texts, render_for
from tests.data.text.test_stream import assert_same_batch
from tests.mixed import make_mixed_config

ROW_LEN, HISTORY = 14, 4
HELD_OUT = (1, 5, 6)
PLACED = Placement(1, np.zeros(1, np.int64), np.ones(1, np.int32))


def is_trained_on(n_events: int) -> np.ndarray:
    """All but each user's last event."""
    keep = np.ones(n_events, bool)
    keep[DATASET.log.offsets[1:] - 1] = False
    return keep


def open_stream(n_rows=2, ways=(TO_ITEM, TO_TEXT), history=HISTORY, first_event=True, seed=0, texts=TEXTS, **process):
    log = DATASET.log
    fields = np.arange(3 * log.n_users, dtype=np.int32).reshape(-1, 3)
    reader = MemoryReader(log, is_trained_on(log.n_events), fields)
    options = StreamOptions(n_rows, ROW_LEN, ROW_LEN, seed, first_event, **process)
    behind = TextsBehindEvents(reader, texts, ITEMS, ways, history, options)
    return ItemTextStream(texts, ITEMS, ways, render_for("item_texts"), options, behind)


def list_sequences(stream):
    """The slots of each sequence with events before its words: arrays of the batch by name, and targets."""
    for batch in stream:
        for b in range(batch.kind_BT.shape[0]):
            for number in sorted({*batch.segment_BT[b].tolist()} - {0}):
                (place,) = np.nonzero(batch.segment_BT[b] == number)
                kinds = batch.kind_BT[b, place].tolist()
                # Of an item alone the text stands behind its event, or before the control token.
                if kinds[-1] == RECOMMEND and kinds[0] != TOKEN:
                    yield batch, b, place


def find_user(row: int) -> int:
    return int(np.searchsorted(DATASET.log.offsets, row, side="right") - 1)


@pytest.mark.parametrize("first_event", [True, False])
def test_sequences_are_what_a_user_did_and_then_a_text(first_event):
    """Each against the log: which events they are is found by the item, time and action of each."""
    log, seen = DATASET.log, set()
    n_whole = 0
    for batch, b, place in itertools.islice(list_sequences(open_stream(3, first_event=first_event)), 150):
        kinds = batch.kind_BT[b, place].tolist()
        n_control, n_events = int(kinds[0] == RECOMMEND), kinds.count(EVENT)
        n_words = kinds.count(TOKEN)
        assert kinds == [RECOMMEND] * n_control + [EVENT] * n_events + [TOKEN] * n_words + [RECOMMEND]
        assert n_events <= HISTORY
        assert batch.position_BT[b, place].tolist() == list(range(len(place)))
        events = place[n_control : n_control + n_events]
        targets = {name: (x.label_BT[b, place], x.weight_BT[b, place]) for name, x in batch.targets.items()}
        told_label, told_weight = targets[TO_TEXT]
        found_label, found_weight = targets[TO_ITEM]
        is_told = bool(told_weight.any())
        assert is_told != bool(found_weight.any())
        tokens = batch.token_BT[b, place[n_control + n_events : -1]].tolist()
        item = tokens[0] // 100 - 1
        assert item not in HELD_OUT
        assert tokens == [100 * (item + 1) + k for k in range(LENGTHS[item])]
        rows = [r for r in range(log.n_events) if _is_here(batch, b, events, r, log)] if n_events else [-1]
        assert rows, "the events stand in the log, one after another"
        user = int(batch.request.field_BTY[b, place[0], 0]) // 3
        assert batch.request.field_BTY[b, place].tolist() == [[3 * user + k for k in range(3)]] * len(place)
        begin, end = log.offsets[user], log.offsets[user + 1] - 1  # without the last one, which is not trained on
        starts = [r for r in rows if find_user(r) == user] if n_events else [begin]
        if is_told:
            last = [r + n_events - 1 for r in starts]
            assert any(log.item[r] == item and r < end for r in last)
            whole = [*tokens, END] if TEXTS.is_whole[item] else tokens
            assert told_label[told_weight > 0].tolist() == whole
            assert np.flatnonzero(told_weight)[0] == n_control + n_events - 1
        else:
            follows = [r + n_events for r in starts]
            assert any(log.item[r] == item and r < end for r in follows)
            assert np.flatnonzero(found_weight).tolist() == [len(place) - 1]
            assert found_label[-1] == item
        assert n_control == (first_event and begin in starts) or len(starts) > 1
        check_request(batch, b, place, item, is_told, [r for r in range(begin, end) if log.item[r] == item])
        n_whole += n_control
        seen.add((user, item, is_told))
    assert (n_whole > 10) == first_event
    assert len({told for *_, told in seen}) == 2
    assert len(seen) > 15


def check_request(batch, b, place, item, is_told, rows):
    """The control token knows the request that the event to be found has answered; words know of none."""
    request, log = batch.request, DATASET.log
    spoken = place[batch.kind_BT[b, place] == TOKEN]
    assert np.all(request.time_BT[b, spoken] == NO_TIME)
    assert not request.context_BTC[b, spoken].any()
    if not is_told:
        known = request.time_BT[b, place[-1]], request.utc_offset_BT[b, place[-1]], *request.context_BTC[b, place[-1]]
        seconds = np.where(log.time_us == UNKNOWN_TIME, NO_TIME, log.time_us // 10**6 - 946_684_800)
        assert known in [(seconds[r], log.utc_offset[r], *log.context[r]) for r in rows]


def _is_here(batch, b, events, row, log) -> bool:
    rows = np.arange(row, row + len(events))
    if rows[-1] >= log.n_events or find_user(int(rows[0])) != find_user(int(rows[-1])):
        return False
    same = batch.item_BT[b, events] == log.item[rows]
    return bool(same.all() and (batch.action_BT[b, events] == log.action[rows]).all())


def test_held_out_items_are_not_laid():
    reader = MemoryReader(DATASET.log, is_trained_on(DATASET.log.n_events))
    source = TextsBehindEvents(reader, TEXTS, ITEMS, (TO_ITEM, TO_TEXT), 3, StreamOptions(1, 9, 9, 0))
    drawn = source.draw(np.arange(200))
    is_out = np.isin(drawn.item, HELD_OUT) | (TEXTS.length[drawn.item] == 0)
    assert is_out.any()
    np.testing.assert_array_equal(drawn.length == 0, is_out)
    with pytest.raises(AssertionError):
        source.pack(drawn.take(np.flatnonzero(np.isin(drawn.item, HELD_OUT))[:1]), PLACED, (1, 14))


@pytest.mark.parametrize("pointer", ["transition", "crossing"])
def test_tables_that_know_the_answers_are_refused(pointer):
    base = make_mixed_config(mix=MixConfig(events=2, documents=1, item_texts=1, max_tokens=9, history=5))
    data = dataclasses.replace(base.data, **{f"{pointer}_neighbors": 4})
    model = dataclasses.replace(base.model, pointer="services", **{f"{pointer}_pointer": True})
    with pytest.raises(InputError, match=rf"data\.mix\.history.*model\.{pointer}_pointer"):
        dataclasses.replace(base, data=data, model=model)


@pytest.mark.parametrize("ways", [(TO_ITEM,), (TO_TEXT,), (TO_ITEM, TO_TEXT)])
def test_every_second_sequence_has_events_and_rows_do_not_depend_on_how_many_are_taken(ways):
    alone, whole = iter(open_stream(1, ways)), next(iter(open_stream(6, ways)))
    for row in range(6):
        one = next(alone)
        for a, b in zip(_leaves(one), _leaves(whole), strict=True):
            np.testing.assert_array_equal(a[0], b[row])
    with_events = sum(1 for _ in itertools.takewhile(lambda x: x[0] is whole, list_sequences([whole, one])))
    assert with_events >= 4
    assert (whole.kind_BT == PADDING).sum() < 0.5 * whole.kind_BT.size


def _leaves(batch):
    return [x for part in (batch[:8], batch.request, [batch.token_BT], *batch.targets.values()) for x in part]


@pytest.mark.parametrize("n_seen", [0, 1, 5])
def test_it_goes_on_from_its_position(n_seen):
    stream = iter(open_stream())
    for _ in range(n_seen):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    other = iter(open_stream())
    other.set_state(state)
    for _ in range(6):
        assert_same_batch(next(stream), next(other))


def test_users_take_part_in_turn_each_with_another_event():
    """Over epochs the texts behind a user's events are those of many of them."""
    log = DATASET.log
    reader = MemoryReader(log, is_trained_on(log.n_events))
    source = TextsBehindEvents(reader, make_texts([2] * 13), ITEMS, (TO_TEXT,), 3, StreamOptions(1, 9, 9, 0))
    n = int(sum(reader.lengths > 0))
    drawn = [source.draw(np.arange(e * n, (e + 1) * n)) for e in range(40)]
    for one in drawn:
        assert sorted(one.user.tolist()) == sorted(np.flatnonzero(reader.lengths).tolist())
        assert np.all(one.place < reader.lengths[one.user])
    longest = int(np.argmax(reader.lengths))
    places = {int(one.place[one.user == longest][0]) for one in drawn}
    assert len(places) > 0.5 * reader.lengths[longest]


def test_processes_share_the_users():
    users = []
    for index in range(2):
        options = StreamOptions(1, 9, 9, 0, process_index=index, process_count=2)
        reader = MemoryReader(DATASET.log, is_trained_on(DATASET.log.n_events))
        source = TextsBehindEvents(reader, TEXTS, ITEMS, (TO_ITEM, TO_TEXT), 3, options)
        users.append(set(source.draw(np.arange(2 * sum(reader.lengths[index::2] > 0))).user.tolist()))
    assert not users[0] & users[1]


def test_a_config_asks_for_them(tmp_path):
    config = make_mixed_config(
        mix=MixConfig(events=2, documents=1, item_texts=1, held_out=0.2, max_tokens=9, history=5)
    )
    data = add_words(config, load_data(config.data, tmp_path), tmp_path)
    options = StreamOptions(4, config.data.seq_len, config.data.history_len, 0, config.data.first_event)
    renders = {name: functools.partial(_render, name) for name in ("events", "documents", "item_texts")}
    batch = next(iter(make_mixed_stream(config, data, renders, options)))
    kinds = batch.kind_BT[2]  # rows of events, of items' texts, of documents
    assert {EVENT, TOKEN, RECOMMEND} <= set(kinds.tolist())
    runs = [len([*group]) for kind, group in itertools.groupby(kinds.tolist()) if kind == EVENT]
    assert 1 < max(runs) <= 5


def _render(name, packed):
    return render_for(name)(packed)


@pytest.mark.parametrize(
    ("mix", "line"),
    [
        ({"history": -1}, "must not be negative"),
        ({"history": 3, "item_texts": 0.0}, r"needs data\.mix\.item_texts"),
        ({"history": 999}, "leaves no room for the words"),
    ],
)
def test_a_history_that_does_not_fit_is_refused(mix, line):
    with pytest.raises(InputError, match=rf"data\.mix\.history.*{line}"):
        make_mixed_config(mix=MixConfig(**{"events": 2, "documents": 1, "item_texts": 1, "max_tokens": 9, **mix}))
