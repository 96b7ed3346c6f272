"""Several streams in one: the rows of each are those it gives alone, in the shares asked for, from any position."""

import functools
import itertools
import json
import math
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import MixConfig
from moerec.data.dataset import ItemTable
from moerec.data.packing import place_sequences
from moerec.data.pipeline.events import MemoryReader, PackedStream, StreamOptions
from moerec.data.pipeline.item_texts import (
    TO_ITEM,
    TO_TEXT,
    ItemTexts,
    ItemTextStream,
    make_item_texts,
    pack_item_texts,
)
from moerec.data.pipeline.mixture import MixedStream, Widths
from moerec.data.pipeline.shares import RowShares
from moerec.data.text.stream import TextStream
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.tasks import make_tasks
from moerec.tasks.base import render_targets
from moerec.types import EVENT, NO_TIME, RECOMMEND, TOKEN
from tests.data.text.test_stream import assert_same_batch, make_corpus
from tests.mixed import TASKS, make_mixed_config
from tests.random_dataset import make_dataset

ROW_LEN, END = 9, 99
DATASET = make_dataset([7, 3, 20, 2, 9, 1, 4])
ITEMS = DATASET.catalogue
STREAM_TASKS = {"events": ("next_event",), "item_texts": (TO_ITEM, TO_TEXT), "documents": ("lm",)}


@given(
    st.lists(st.integers(1, 1000).map(lambda n: n / 100), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 4]),
)
def test_streams_have_had_their_shares_to_within_a_row_at_every_step(shares, n_rows, first, n_parts):
    named = dict(zip("abc", shares, strict=False))
    if min(shares) / sum(shares) * n_rows < 1:
        n_rows = math.ceil(sum(shares) / min(shares))
    n_rows *= n_parts
    rows, total = RowShares.of(named, n_rows), Counter()
    for step in range(40):
        count = rows.split(step)
        assert sum(count.values()) == n_rows
        total.update(count)
        for name, share in named.items():
            assert abs(total[name] - share / sum(shares) * n_rows * (step + 1)) < 1 + 1e-9
    for step in (first, first + 1, first + 2):
        begin = 0
        for name, n in rows.split(step).items():
            assert n >= 0
            allowed = rows.span(name, n_parts)
            for r in range(begin, begin + n):
                assert allowed.start <= r // n_parts < allowed.stop <= n_rows // n_parts
            begin += n


def test_shares_that_come_to_whole_rows_are_the_same_in_each_batch():
    rows = RowShares.of({"a": 0.3, "b": 0.1, "c": 0.6}, 10)
    assert {tuple(rows.split(step).values()) for step in range(1000)} == {(3, 1, 6)}
    assert [rows.span(name) for name in "abc"] == [slice(0, 3), slice(3, 4), slice(4, 10)]


def make_texts(lengths, held=(), whole=None) -> ItemTexts:
    """Every token is another one: its item's number times 100, and its place."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([100 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32)
    is_whole = np.ones(len(lengths), bool) if whole is None else np.isin(np.arange(len(lengths)), whole)
    return ItemTexts(offsets, ids, np.array(lengths), is_whole, np.isin(np.arange(len(lengths)), held), END)


LENGTHS = [3, 1, 5, 2, 0, 4, 3, 3, 2, 1, 5, 4, 2]
TEXTS = make_texts(LENGTHS, held=(1, 5, 6), whole=[*range(10), 12])


@functools.cache
def render_for(name):
    tasks = [task for task in make_tasks(make_mixed_config()) if task.name in STREAM_TASKS[name]]
    return functools.partial(render_targets, tasks)


def open_item_texts(n_rows=2, ways=(TO_ITEM, TO_TEXT), texts=TEXTS, seed=0, **process):
    options = StreamOptions(n_rows, ROW_LEN, ROW_LEN, seed, **process)
    return ItemTextStream(texts, ITEMS, ways, render_for("item_texts"), options)


def read_slots(batch) -> list[list[dict]]:
    """The slots of each segment, as they are."""
    found = []
    for b, row in enumerate(np.asarray(batch.segment_BT).tolist()):
        for number in sorted({*row} - {0}):
            slots = []
            for t in (t for t, segment in enumerate(row) if segment == number):
                slot = {name: int(getattr(batch, f"{name}_BT")[b, t]) for name in ("kind", "item", "service", "token")}
                slot |= {"position": int(batch.position_BT[b, t])}
                for name, target in batch.targets.items():
                    slot[name] = int(target.label_BT[b, t]) if target.weight_BT[b, t] else None
                slots.append(slot)
            found.append(slots)
        for t in (t for t, segment in enumerate(row) if not segment):
            assert all(target.weight_BT[b, t] == 0 for target in batch.targets.values())
            assert batch.kind_BT[b, t] == 0
    return found


def expect_slots(item: int, to_item: bool) -> list[dict]:
    """One sequence, written down slot by slot."""
    tokens = [100 * (item + 1) + k for k in range(LENGTHS[item])]
    service = int(item >= ITEMS.offsets[1])
    words = [{"kind": TOKEN, "item": 0, "service": 2, "token": token} for token in tokens]
    if to_item:
        asked = {"kind": RECOMMEND, "item": 0, "service": 2, "token": 0}
        slots = [*words, asked]
        targets = [(None, None)] * len(words) + [(item, None)]
    else:
        slots = [{"kind": EVENT, "item": item, "service": service, "token": 0}, *words]
        following = [*tokens, END if TEXTS.is_whole[item] else None]
        targets = [(None, token) for token in following]
    return [
        {**slot, "position": k, TO_ITEM: a, TO_TEXT: b}
        for k, (slot, (a, b)) in enumerate(zip(slots, targets, strict=True))
    ]


def test_items_and_their_texts_are_laid_as_they_are_written_down():
    item = np.array([0, 3, 0, 10, 9, 2])
    to_item = np.array([True, False, False, True, False, False])
    placed = place_sequences(TEXTS.length[item] + 1, 4, ROW_LEN)
    assert placed.n == len(item)
    packed = pack_item_texts(TEXTS, ITEMS, item, to_item, placed, (4, ROW_LEN))
    batch = packed.batch._replace(targets=render_for("item_texts")(packed))
    assert read_slots(batch) == [expect_slots(*each) for each in zip(item.tolist(), to_item.tolist(), strict=True)]
    real_BT = batch.segment_BT > 0
    assert np.all(batch.time_BT == NO_TIME)
    assert np.all(batch.request.time_BT == NO_TIME)
    assert np.all(batch.service_BT[~real_BT] == 2)


def whose(slots: list[dict]) -> tuple[int, bool]:
    """The item of a sequence, and whether its text came first."""
    return (slots[-1][TO_ITEM], True) if slots[0]["kind"] == TOKEN else (slots[0]["item"], False)


@pytest.mark.parametrize("ways", [(TO_ITEM,), (TO_TEXT,), (TO_ITEM, TO_TEXT)])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_each_trained_item_comes_once_an_epoch_in_each_way_and_a_held_out_one_never(ways, n_rows):
    trained = [i for i, n in enumerate(LENGTHS) if n and i not in (1, 5, 6)]
    slots = itertools.chain.from_iterable(map(read_slots, open_item_texts(n_rows, ways)))
    n = len(trained) * len(ways)
    epochs = [list(itertools.islice(slots, n)) for _ in range(4)]
    for sequences in epochs:
        seen = [whose(sequence) for sequence in sequences]
        assert sequences == [expect_slots(*each) for each in seen]
        assert sorted(seen) == sorted((i, way == TO_ITEM) for i in trained for way in ways)
    assert epochs[0] != epochs[1]


def test_tokens_of_held_out_items_are_in_no_batch_and_nor_are_they_themselves():
    held = {100 * (i + 1) + k for i in (1, 5, 6) for k in range(LENGTHS[i])}
    for batch in itertools.islice(open_item_texts(3), 40):
        assert not held & set(batch.token_BT.ravel().tolist())
        for target in batch.targets.values():
            assert not held & set(target.label_BT.ravel().tolist())
        assert not {1, 5, 6} & set(batch.targets[TO_ITEM].label_BT[batch.targets[TO_ITEM].weight_BT > 0].tolist())
        assert not {1, 5, 6} & set(batch.item_BT[batch.kind_BT == EVENT].tolist())


def test_processes_share_the_items():
    seen = []
    for index in range(2):
        slots = itertools.chain.from_iterable(map(read_slots, open_item_texts(process_index=index, process_count=2)))
        seen.append({whose(sequence)[0] for sequence in itertools.islice(slots, 60)})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(TEXTS.list_items(held_out=False).tolist())


def test_texts_are_those_of_the_tokenizer_cut_and_items_of_one_text_are_on_one_side():
    texts = [f"blue tea no. {k % 40}" for k in range(200)] + ["", "жёлтый чай"]
    items = ItemTable(
        ("one",), np.array([0, 202]), np.arange(202).astype(str).astype(object), np.array(texts, object),
        np.full(202, "", object),
    )  # fmt: skip
    tokenizer = TextTokenizer.train(texts, 300)
    found = make_item_texts(items, tokenizer, 0, 9, 0.3)
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text).tolist()
        own = found.ids[found.offsets[i] : found.offsets[i + 1]].tolist()
        assert own == ids[:9]
        assert found.is_whole[i] == (len(ids) <= 9)
        spelled = tokenizer.decode(own)
        assert found.n_bytes[i] == len(spelled.removesuffix("\ufffd").encode())
    assert not found.is_whole.all()
    assert np.array_equal(found.is_held_out[:40], found.is_held_out[40:80])
    assert 0.1 < found.is_held_out[:40].mean() < 0.5
    assert 200 not in {*found.list_items(True).tolist(), *found.list_items(False).tolist()}
    more = make_item_texts(items, tokenizer, 0, 9, 0.6)
    assert np.all(more.is_held_out >= found.is_held_out), "who is held out of less is held out of more"
    assert not make_item_texts(items, tokenizer, 0, 9, 0.0).is_held_out.any()


def test_without_an_item_to_train_on_there_is_no_stream():
    with pytest.raises(InputError, match=r"^config\.data\.mix\.item_texts: no item"):
        open_item_texts(texts=make_texts([2] * 13, held=range(13)))


def open_alone(name: str, n_rows: int, seed: int = 0):
    options = StreamOptions(n_rows, ROW_LEN, ROW_LEN, seed)
    if name == "events":
        log = DATASET.log
        reader = MemoryReader(log, np.ones(log.n_events, bool), np.zeros((log.n_users, 3), np.int32))
        return PackedStream(reader, ITEMS, render_for(name), options)
    if name == "documents":
        corpus = make_corpus([9, 2, 30, 4, 1, 6, 12, 5], (3,), [0, 0, 0, 0, 1, 1, 2, 2])
        return TextStream(corpus, render_for(name), options)
    return open_item_texts(n_rows, seed=seed)


SHARES = MixConfig(events=2.5, documents=1.5, item_texts=1).shares


def open_mixed(shares=SHARES, n_rows=5) -> MixedStream:
    streams = {name: open_alone(name, 1) for name in shares}
    tasks = tuple(task for task in TASKS if any(task in STREAM_TASKS[name] for name in shares))
    return MixedStream(streams, tasks, RowShares.of(shares, n_rows), Widths(2, 2, 3))


@pytest.mark.parametrize("left_out", ["", "documents", "item_texts"])
def test_the_rows_of_a_stream_are_those_that_it_gives_alone(left_out):
    shares = {name: share for name, share in MixConfig(events=2.4, documents=1.3, item_texts=1.3).shares.items()
              if name != left_out}  # fmt: skip
    rows, widths = RowShares.of(shares, 5), Widths(2, 2, 3)
    alone = {name: iter(open_alone(name, 1)) for name in shares}
    shapes = set()
    for step, batch in enumerate(itertools.islice(open_mixed(shares), 30)):
        shapes.add(str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), batch)))
        row = 0
        for name, n in rows.split(step).items():
            for _ in range(n):
                expected = widths.widen(next(alone[name]))
                got = jax.tree.map(lambda x, r=row: x[r : r + 1], batch)
                for task, target in got.targets.items():
                    if task not in STREAM_TASKS[name]:
                        assert not target.weight_BT.any(), f"{name} have a target of {task}"
                own = {task: got.targets[task] for task in STREAM_TASKS[name]}
                assert_same_batch(got._replace(targets=own), expected)
                row += 1
        assert row == 5
    assert len(shapes) == 1, "a batch of another shape is compiled anew"


def test_words_are_widened_as_rows_that_know_nothing_of_a_request():
    batch = next(iter(open_mixed()))
    assert batch.request.context_BTC.shape == (5, ROW_LEN, 2)
    assert batch.request.field_BTY.shape == (5, ROW_LEN, 3)
    words = batch.kind_BT == TOKEN
    assert words.any()
    assert not batch.request.context_BTC[words].any()
    assert np.all(batch.service_BT[batch.kind_BT != EVENT] == 2)
    assert np.all(batch.token_BT[~words] == 0)


@pytest.mark.parametrize("n_seen", [0, 1, 2, 7, 33])
def test_a_mixture_goes_on_from_its_position_to_the_bit(n_seen):
    stream = iter(open_mixed())
    for _ in range(n_seen):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(9)]
    other = iter(open_mixed())
    next(other)
    other.set_state(state)
    assert other.get_state() == state
    for batch in expected:
        assert_same_batch(batch, next(other))


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"step": 3, "streams": {"events": {"epoch": 0, "window": 0}}}])
def test_the_position_of_another_mixture_is_refused(state):
    with pytest.raises((LookupError, TypeError, ValueError)):
        iter(open_mixed()).set_state(state)


@settings(max_examples=20)
@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from(list(STREAM_TASKS)))
def test_rows_do_not_depend_on_how_many_are_taken_at_a_time(seed, counts, name):
    one, several = iter(open_alone(name, 1, seed)), iter(open_alone(name, 1, seed))
    for n in counts:
        batch = several.take(n)
        for r in range(n):
            assert_same_batch(jax.tree.map(lambda x, r=r: x[r : r + 1], batch), next(one))
