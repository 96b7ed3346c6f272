"""Ranks on the device against a sort of the scores that each history alone gets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.config import Config, DataConfig, EvalConfig, ModelConfig, SplitConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.errors import WorkError
from moerec.eval.metrics import per_target_metrics
from moerec.eval.ranking import EvalDataset, pad_seen, rank_batch, rank_targets
from moerec.nn.model import ModelSizes, SequenceModel
from moerec.types import EPOCH_2000, NO_TIME, Batch, Catalog
from tests.random_dataset import make_dataset

HISTORY_LEN = 3
SIZES = ModelSizes(n_items=36, n_tokens=9, n_services=2, n_actions=3, context_sizes=(4, 4))


def make_config(mask_seen=True, per_service=False) -> Config:
    return Config(
        data=DataConfig(seq_len=8, history_len=HISTORY_LEN, split=SplitConfig(per_service=per_service)),
        model=ModelConfig(n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_ff=12, d_text=4, event_time=True),
        eval=EvalConfig(mask_seen=mask_seen, batch_size=8),
    )


@pytest.fixture(scope="module")
def dataset():
    """Some users repeat items, some have equal times in both services, some have very long histories."""
    made = make_dataset([0, 1, 2, 3, 1, 2, 12, 5, 9, 1, 4, 14], (14, 22), seed=5)
    log, rng = made.log, np.random.default_rng(6)
    time, item = log.time.copy(), log.item.copy()
    for row in range(1, log.n_events):
        if log.user[row] == log.user[row - 1] and rng.random() < 0.5:
            time[row] = time[row - 1]
        if row > log.offsets[log.user[row]] and rng.random() < 0.2:
            item[row] = item[rng.integers(log.offsets[log.user[row]], row)]
    return dataclasses.replace(made, log=dataclasses.replace(log, time=time, item=item))


@pytest.fixture(scope="module")
def table(dataset):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, SIZES.n_tokens, (SIZES.n_items, 3)).astype(np.int32)
    return Catalog(dataset.catalogue.service, tokens, np.ones(SIZES.n_items, np.float32))


@pytest.fixture(scope="module")
def model():
    """Every parameter is random, the biases too, and large enough to spread the scores."""
    shapes = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), make_config().model, SIZES))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray((0.5 * rng.standard_normal(x.shape)).astype(x.dtype)), shapes)


def history_by_hand(dataset, target: int, per_service: bool) -> list[int]:
    log, service = dataset.log, dataset.event_service
    rows = [row for row in range(target) if log.user[row] == log.user[target]]
    if not per_service:
        return rows
    earlier = [log.time[row] != UNKNOWN_TIME and log.time[row] < log.time[target] for row in range(target)]
    return [row for row in rows if service[row] == service[target] or earlier[row]]


@pytest.fixture(scope="module")
def vectors(model, table):
    both = jax.jit(lambda model, table: model.item_vectors(jnp.arange(SIZES.n_items), table))(model, table)
    return [np.asarray(x, np.float64) for x in both]


encode = jax.jit(lambda model, batch, table: model.encode(batch, table).state_BTD[0, -1])


def scores_by_hand(model, vectors, dataset, table, rows: list[int], target: int) -> np.ndarray:
    """Scores of all items from one unpadded sequence that ends before the target."""
    log, (vector, biases) = dataset.log, vectors
    if not rows:
        return biases
    following = [*rows[1:], target]

    def row(values):
        return np.array(values, np.int32)[None]

    def times(events):
        return row([NO_TIME if log.time[e] == UNKNOWN_TIME else log.time[e] - EPOCH_2000 for e in events])

    batch = Batch(
        item_BT=row(log.item[rows]),
        action_BT=row(log.action[rows]),
        time_BT=times(rows),
        utc_offset_BT=row([0] * len(rows)),
        position_BT=row(range(len(rows))),
        segment_BT=row([1] * len(rows)),
        request_time_BT=times(following),
        request_utc_offset_BT=row([0] * len(rows)),
        request_context_BTC=row(log.context[following]),
        field_BTY=np.repeat(dataset.profile_codes[0][[log.user[target]]], len(rows), axis=0)[None],
        target_BT=row([0] * len(rows)),
        weight_BT=np.zeros((1, len(rows)), np.float32),
    )
    return vector @ np.asarray(encode(model, batch, table), np.float64) + biases


def rank_by_hand(scores, target: int, candidates: list[int]) -> tuple[int, int]:
    """Lowest and highest place of the target in the sorted candidates that rounding allows, or past every cutoff."""
    if target not in candidates:
        return SIZES.n_items + 20, 1 << 31
    order = sorted(candidates, key=lambda item: -scores[item])
    places = [place for place, item in enumerate(order) if abs(scores[item] - scores[target]) < 1e-4]
    return min(places), max(places)


@pytest.fixture(scope="module")
def rank_all(model, dataset, table):
    """Ranks of every event as a target."""

    @functools.cache
    def rank(mask_seen, per_service=False):
        return rank_targets(model, evaluation_set(dataset, mask_seen, per_service), table)

    return rank


def evaluation_set(dataset, mask_seen=True, per_service=False) -> EvalDataset:
    return EvalDataset(dataset, np.arange(dataset.log.n_events), make_config(mask_seen, per_service))


@pytest.mark.parametrize(("mask_seen", "per_service"), [(True, False), (False, False), (True, True)])
def test_ranks_are_those_of_a_sort(model, vectors, dataset, table, rank_all, mask_seen, per_service):
    in_service, union = rank_all(mask_seen, per_service)
    history_len = evaluation_set(dataset, mask_seen, per_service).history_len
    targets = range(dataset.log.n_events)
    assert len(in_service) == len(union) == len(history_len) == len(targets)
    edges = dataset.catalogue.offsets
    n_sure = n_missed = n_cut = n_hidden = 0
    for t in targets:
        rows = history_by_hand(dataset, t, per_service)
        assert history_len[t] == len(rows)
        scores = scores_by_hand(model, vectors, dataset, table, rows[-HISTORY_LEN:], t)
        item, service = int(dataset.log.item[t]), dataset.event_service[t]
        seen = set(dataset.log.item[rows].tolist()) if mask_seen else set()
        for counts, lo, hi in ((in_service, edges[service], edges[service + 1]), (union, 0, SIZES.n_items)):
            first, last = rank_by_hand(scores, item, [i for i in range(lo, hi) if i not in seen])
            assert first <= counts.greater[t] <= last
            assert counts.equal[t] == 1 or first < last
            n_sure += first == last
        n_missed += item in seen
        n_cut += bool(seen - set(dataset.log.item[rows[-HISTORY_LEN:]].tolist()))
        n_hidden += rows != history_by_hand(dataset, t, False)
    # the cases that this is about did occur
    assert n_sure > len(targets) * 1.5
    assert (min(n_missed, n_cut) > 3) == mask_seen
    assert (n_hidden > 3) == per_service


def test_a_seen_target_stands_below_every_candidate(dataset, rank_all):
    log = dataset.log
    missed = [t for t in range(log.n_events) if log.item[t] in log.item[history_by_hand(dataset, t, False)]]
    in_service, union = rank_all(True)
    sizes = np.diff(dataset.catalogue.offsets)[dataset.event_service]
    assert np.all(in_service.greater[missed] >= sizes[missed])
    assert np.all(union.greater[missed] >= SIZES.n_items)
    assert np.all(per_target_metrics(union)["recall@20"][missed] == 0)
    assert np.any(rank_all(False)[1].greater[missed] < 20)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_a_constant_model_scores_the_share_of_the_candidates(model, dataset, table, mask_seen):
    zero = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), model)
    counts = rank_targets(zero, evaluation_set(dataset, mask_seen), table)
    recall = [per_target_metrics(x) for x in counts]
    edges = dataset.catalogue.offsets
    n_fresh = 0
    for t in range(dataset.log.n_events):
        service, item = dataset.event_service[t], dataset.log.item[t]
        seen = set(dataset.log.item[history_by_hand(dataset, t, False)].tolist()) if mask_seen else set()
        if item in seen:
            continue
        n_fresh += 1
        for metrics, lo, hi in ((recall[0], edges[service], edges[service + 1]), (recall[1], 0, SIZES.n_items)):
            n = len(set(range(lo, hi)) - seen)
            for k in (5, 10, 20):
                assert metrics[f"recall@{k}"][t] == min(k, n) / n
    assert n_fresh > 10


def test_without_a_history_the_biases_rank(model, dataset, rank_all):
    log = dataset.log
    first = log.offsets[:-1][np.diff(log.offsets) > 0]
    union, bias = rank_all(True)[1], np.asarray(model.item_bias_I[...])
    assert union.greater[first].tolist() == [int((bias > bias[item]).sum()) for item in log.item[first]]
    assert union.equal[first].tolist() == [int((bias == bias[item]).sum()) for item in log.item[first]]


def spoil(model, name, row, value):
    def change(path, leaf):
        if name not in jax.tree_util.keystr(path):
            return leaf
        spoilt = np.array(leaf)
        spoilt[row] = value
        return jnp.asarray(spoilt)

    return jax.tree.map_with_path(change, model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(model, dataset, table, value):
    broken = spoil(model, "item_bias_I", 7, value)
    with pytest.raises(WorkError, match="target 0 got a score that is not finite"):
        rank_targets(broken, evaluation_set(dataset), table)


def test_batches_ask_every_target_once_in_one_shape(model, dataset, table):
    config = make_config()
    log = dataset.log
    by_length = np.argsort(np.arange(log.n_events) - log.offsets[log.user], kind="stable")  # the shortest first
    examples = EvalDataset(dataset, by_length, config)
    asked, shapes, sizes = [], set(), []
    for which, batch, queries in examples.batches():
        n = which.stop - which.start
        asked += range(which.start, which.stop)
        sizes.append(n)
        shapes.add(tuple((x.shape, x.dtype) for x in (*batch, *queries)))
        assert queries.target[:n].tolist() == dataset.log.item[by_length[which]].tolist()
        assert np.all(queries.target[n:] == -1)
        assert np.all(queries.slot[n:] == -1)
        assert np.all(queries.seen[n:] == -1)
        assert queries.target.shape == (config.eval.batch_size,)
        segments = np.asarray(batch.segment_BT).ravel()
        for slot, row in zip(queries.slot[:n], by_length[which], strict=True):
            depth = len(history_by_hand(dataset, row, False))
            assert (slot == -1) == (depth == 0)
            if depth:
                assert batch.position_BT.ravel()[slot] == min(depth, HISTORY_LEN) - 1
                assert slot + 1 == len(segments) or batch.position_BT.ravel()[slot + 1] == 0, "not its last slot"
    assert asked == list(range(len(by_length)))
    assert len(shapes) == 1
    assert min(sizes[:-1]) < config.eval.batch_size == max(sizes), "no batch of long histories"
    before = rank_batch._cache_size()
    rank_targets(model, examples, table)
    assert rank_batch._cache_size() - before <= 1


def test_ranks_do_not_depend_on_the_batch_or_the_order(model, dataset, table, rank_all):
    order = np.random.default_rng(0).permutation(dataset.log.n_events)
    shuffled = rank_targets(model, EvalDataset(dataset, order, make_config()), table)
    for one, other in zip(rank_all(True), shuffled, strict=True):
        same = (one.greater[order] == other.greater) & (one.equal[order] == other.equal)
        assert same.mean() > 0.95  # scores within rounding of each other may change places


def test_nothing_to_rank(model, dataset, table):
    in_service, union = rank_targets(model, EvalDataset(dataset, np.zeros(0, np.int64), make_config()), table)
    assert len(in_service) == len(union) == 0


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=6), st.integers(0, 3))
def test_pad_seen(rows, more):
    width = max([len(set(row)) for row in rows] + [1]) + more
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    padded = pad_seen(offsets, np.array([item for row in rows for item in row], np.int32), width)
    assert padded.shape == (len(rows), width)
    assert padded.dtype == np.int32
    for row, got in zip(rows, padded.tolist(), strict=True):
        items = set(row)
        assert set(got[: len(items)]) == items
        assert got[len(items) :] == [-1] * (width - len(items))
