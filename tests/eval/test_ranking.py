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
from moerec.data.histories import Histories
from moerec.errors import WorkError
from moerec.eval.metrics import per_target_metrics
from moerec.eval.ranking import EvalDataset, rank_batch, rank_targets
from moerec.eval.ranking.dataset import pad_seen
from moerec.nn.model import ModelSizes, Predictor, SequenceModel
from moerec.train.run_dir import bind_catalog
from moerec.types import EPOCH_2000, NO_TIME, Batch, Catalog, Request
from tests.random_dataset import make_dataset

HISTORY_LEN = 3
N_ITEMS, N_TOKENS = 36, 9


def make_config(first_event, mask_seen=True, per_service=False) -> Config:
    split = SplitConfig(per_service=per_service)
    return Config(
        data=DataConfig(seq_len=8, history_len=HISTORY_LEN, split=split, first_event=first_event),
        model=ModelConfig(n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_ff=12, d_text=4, event_time=True),
        eval=EvalConfig(mask_seen=mask_seen, batch_size=8),
    )


@pytest.fixture(scope="module", params=[True, False], ids=["first_event", "no_first_event"])
def first_event(request):
    """Whether sequences that are not cut begin with the control slot."""
    return request.param


@pytest.fixture(scope="module")
def dataset():
    """Some users repeat items, some have equal times in both services, some have very long histories."""
    made = make_dataset([0, 1, 2, 3, 1, 2, 12, 5, 9, 1, 4, 14], (14, 22), seed=5)
    log, rng = made.log, np.random.default_rng(6)
    time, item = log.time_us.copy(), log.item.copy()
    for row in range(1, log.n_events):
        if log.user[row] == log.user[row - 1] and rng.random() < 0.5:
            time[row] = time[row - 1]
        if row > log.offsets[log.user[row]] and rng.random() < 0.2:
            item[row] = item[rng.integers(log.offsets[log.user[row]], row)]
    return dataclasses.replace(made, log=dataclasses.replace(log, time_us=time, item=item))


@pytest.fixture(scope="module")
def table(dataset):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, N_TOKENS, (N_ITEMS, 3)).astype(np.int32)
    return Catalog(dataset.catalogue.service, tokens, np.ones(N_ITEMS, np.float32))


@pytest.fixture(scope="module")
def model(first_event):
    """Every parameter is random, the biases too, and large enough to spread the scores."""
    sizes = ModelSizes(N_ITEMS, N_TOKENS, 2, 3, context_sizes=(4, 4), has_control=first_event)
    shapes = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), make_config(first_event).model, sizes))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray((0.5 * rng.standard_normal(x.shape)).astype(x.dtype)), shapes)


def rank_with(model, examples, table):
    """The ranks of a dense model."""
    predictor = Predictor(model, None)
    return rank_targets(predictor, examples, bind_catalog(predictor, table))


def history_by_hand(dataset, target: int, per_service: bool) -> list[int]:
    log, service = dataset.log, dataset.event_service
    rows = [row for row in range(target) if log.user[row] == log.user[target]]
    if not per_service:
        return rows
    earlier = [log.time_us[row] != UNKNOWN_TIME and log.time_us[row] < log.time_us[target] for row in range(target)]
    return [row for row in rows if service[row] == service[target] or earlier[row]]


@pytest.fixture(scope="module")
def vectors(model, table):
    both = jax.jit(lambda model, table: model.head.vectors(jnp.arange(N_ITEMS), table, model.item_encoder))(
        model, table
    )
    return [np.asarray(x, np.float64) for x in both]


encode = jax.jit(lambda model, batch, table: model.encode(batch, table).state_BTD[0, -1])


def scores_by_hand(model, vectors, dataset, table, history: list[int], target: int, first_event: bool) -> np.ndarray:
    """Scores of all items from one unpadded sequence that ends before the target."""
    log, (vector, biases) = dataset.log, vectors
    events = history[-HISTORY_LEN:]
    is_whole = len(history) < HISTORY_LEN  # with the control slot before it, too
    laid = ([None] if first_event and is_whole else []) + events
    if not laid:
        return biases
    following = [*laid[1:], target]

    def row(values):
        return np.array(values, np.int32)[None]

    def times(rows):
        return row(
            [
                NO_TIME if e is None or log.time_us[e] == UNKNOWN_TIME else log.time_us[e] // 10**6 - EPOCH_2000
                for e in rows
            ]
        )

    def of_events(values, empty):
        return row([empty if e is None else values[e] for e in laid])

    batch = Batch(
        kind_BT=row([2 if e is None else 1 for e in laid]),
        item_BT=of_events(log.item, 0),
        service_BT=of_events(dataset.event_service, 2),
        action_BT=of_events(log.action, 0),
        time_BT=times(laid),
        utc_offset_BT=row([0] * len(laid)),
        position_BT=row(range(len(laid))),
        segment_BT=row([1] * len(laid)),
        request=Request(
            time_BT=times(following),
            utc_offset_BT=row([0] * len(laid)),
            context_BTC=row(log.context[following]),
            field_BTY=np.zeros((1, len(laid), 0), np.int32),
        ),
        targets={},
    )
    return vector @ np.asarray(encode(model, batch, table), np.float64) + biases


def rank_by_hand(scores, target: int, candidates: list[int]) -> tuple[int, int]:
    """Lowest and highest place of the target in the sorted candidates that rounding allows, or past every cutoff."""
    if target not in candidates:
        return N_ITEMS + 20, 1 << 31
    order = sorted(candidates, key=lambda item: -scores[item])
    places = [place for place, item in enumerate(order) if abs(scores[item] - scores[target]) < 1e-4]
    return min(places), max(places)


@pytest.fixture(scope="module")
def rank_all(model, dataset, table, first_event):
    """Ranks of every event as a target."""

    @functools.cache
    def rank(mask_seen, per_service=False):
        return rank_with(model, evaluation_set(dataset, first_event, mask_seen, per_service), table)

    return rank


def evaluation_set(dataset, first_event, mask_seen=True, per_service=False) -> EvalDataset:
    return EvalDataset(dataset, np.arange(dataset.log.n_events), make_config(first_event, mask_seen, per_service))


@pytest.mark.parametrize(("mask_seen", "per_service"), [(True, False), (False, False), (True, True)])
def test_ranks_are_those_of_a_sort(model, vectors, dataset, table, rank_all, mask_seen, per_service, first_event):
    in_service, union = rank_all(mask_seen, per_service)
    history_len = evaluation_set(dataset, first_event, mask_seen, per_service).history_len
    targets = range(dataset.log.n_events)
    assert len(in_service) == len(union) == len(history_len) == len(targets)
    edges = dataset.catalogue.offsets
    n_sure = n_missed = n_cut = n_hidden = 0
    for t in targets:
        rows = history_by_hand(dataset, t, per_service)
        assert history_len[t] == len(rows)
        scores = scores_by_hand(model, vectors, dataset, table, rows, t, first_event)
        item, service = int(dataset.log.item[t]), dataset.event_service[t]
        seen = set(dataset.log.item[rows].tolist()) if mask_seen else set()
        for counts, lo, hi in ((in_service, edges[service], edges[service + 1]), (union, 0, N_ITEMS)):
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
    assert np.all(union.greater[missed] >= N_ITEMS)
    assert np.all(per_target_metrics(union)["recall@20"][missed] == 0)
    assert np.any(rank_all(False)[1].greater[missed] < 20)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_a_constant_model_scores_the_share_of_the_candidates(model, dataset, table, mask_seen, first_event):
    zero = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), model)
    counts = rank_with(zero, evaluation_set(dataset, first_event, mask_seen), table)
    recall = [per_target_metrics(x) for x in counts]
    edges = dataset.catalogue.offsets
    n_fresh = 0
    for t in range(dataset.log.n_events):
        service, item = dataset.event_service[t], dataset.log.item[t]
        seen = set(dataset.log.item[history_by_hand(dataset, t, False)].tolist()) if mask_seen else set()
        if item in seen:
            continue
        n_fresh += 1
        for metrics, lo, hi in ((recall[0], edges[service], edges[service + 1]), (recall[1], 0, N_ITEMS)):
            n = len(set(range(lo, hi)) - seen)
            for k in (5, 10, 20):
                assert metrics[f"recall@{k}"][t] == min(k, n) / n
    assert n_fresh > 10


def test_without_a_slot_the_biases_rank(model, dataset, rank_all, first_event):
    """With the control slot they do not: it knows the request (and gives what it gives alone, see above)."""
    log = dataset.log
    first = log.offsets[:-1][np.diff(log.offsets) > 0]
    union, bias = rank_all(True).union, np.asarray(model.head.bias_I[...])
    of_biases = [int((bias > bias[item]).sum()) for item in log.item[first]]
    assert (union.greater[first].tolist() == of_biases) != first_event
    if not first_event:
        assert union.equal[first].tolist() == [int((bias == bias[item]).sum()) for item in log.item[first]]


@pytest.mark.parametrize("per_service", [False, True])
def test_a_target_without_a_history_has_a_slot_with_the_control_slot_alone(dataset, first_event, per_service):
    examples = evaluation_set(dataset, first_event, True, per_service)
    histories = [history_by_hand(dataset, t, per_service) for t in range(dataset.log.n_events)]
    assert examples.has_slot.tolist() == [bool(rows) or first_event for rows in histories]
    assert 0 < sum(not rows for rows in histories) < len(histories)
    for which, _, queries in examples.batches():
        n = which.stop - which.start
        assert ((queries.slot[:n] >= 0) == examples.has_slot[which]).all()
        assert examples.users_of(which).tolist() == dataset.log.user[which][examples.has_slot[which]].tolist()


@pytest.mark.parametrize("per_service", [False, True])
def test_sequences_that_are_not_cut_begin_with_the_control_slot(dataset, first_event, per_service):
    log, n_cut, n_whole = dataset.log, 0, 0
    for which, batch, queries in evaluation_set(dataset, first_event, True, per_service).batches():
        flat = {name: x.reshape(-1) for name, x in zip(Batch._fields[:8], batch[:8], strict=True)}
        context = batch.request.context_BTC.reshape(-1, 2)
        for slot, target in zip(queries.slot, range(which.start, which.stop), strict=False):
            history = history_by_hand(dataset, target, per_service)
            is_whole = first_event and len(history) < HISTORY_LEN
            laid = [None] * is_whole + history[-HISTORY_LEN:]
            if not laid:
                continue
            slots = range(slot - len(laid) + 1, slot + 1)
            assert flat["position_BT"][slots].tolist() == list(range(len(laid)))
            assert flat["kind_BT"][slots].tolist() == [2 if row is None else 1 for row in laid]
            assert flat["item_BT"][slots].tolist() == [0 if row is None else log.item[row] for row in laid]
            service = [2 if row is None else dataset.event_service[row] for row in laid]
            assert flat["service_BT"][slots].tolist() == service
            assert context[slots].tolist() == log.context[[*laid[1:], target]].tolist()
            n_whole, n_cut = n_whole + is_whole, n_cut + (len(history) > HISTORY_LEN)
    assert n_cut > 10
    assert (n_whole > 10) == first_event


def spoil(model, name, row, value):
    def change(path, leaf):
        if name not in jax.tree_util.keystr(path):
            return leaf
        spoilt = np.array(leaf)
        spoilt[row] = value
        return jnp.asarray(spoilt)

    return jax.tree.map_with_path(change, model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(model, dataset, table, value, first_event):
    broken = spoil(model, "bias_I", 7, value)
    with pytest.raises(WorkError, match="target 0 got a score that is not finite"):
        rank_with(broken, evaluation_set(dataset, first_event), table)


def test_batches_ask_every_target_once_in_one_shape(model, dataset, table, first_event):
    config = make_config(first_event)
    log = dataset.log
    by_length = np.argsort(np.arange(log.n_events) - log.offsets[log.user], kind="stable")  # the shortest first
    examples = EvalDataset(dataset, by_length, config)
    asked, shapes, sizes = [], set(), []
    for which, batch, queries in examples.batches():
        n = which.stop - which.start
        asked += range(which.start, which.stop)
        sizes.append(n)
        shapes.add(tuple((x.shape, x.dtype) for x in jax.tree.leaves((batch, queries))))
        assert queries.target[:n].tolist() == dataset.log.item[by_length[which]].tolist()
        assert np.all(queries.target[n:] == -1)
        assert np.all(queries.slot[n:] == -1)
        assert np.all(queries.seen[n:] == -1)
        assert queries.target.shape == (config.eval.batch_size,)
        segments = np.asarray(batch.segment_BT).ravel()
        for slot, row in zip(queries.slot[:n], by_length[which], strict=True):
            depth = len(history_by_hand(dataset, row, False))
            n_slots = min(depth + first_event, HISTORY_LEN)
            assert (slot == -1) == (n_slots == 0)
            if n_slots:
                assert batch.position_BT.ravel()[slot] == n_slots - 1
                assert slot + 1 == len(segments) or batch.position_BT.ravel()[slot + 1] == 0, "not its last slot"
    assert asked == list(range(len(by_length)))
    assert len(shapes) == 1
    assert min(sizes[:-1]) < config.eval.batch_size == max(sizes), "no batch of long histories"
    before = rank_batch._cache_size()
    rank_with(model, examples, table)
    assert rank_batch._cache_size() - before <= 1


def test_ranks_do_not_depend_on_the_batch_or_the_order(model, dataset, table, rank_all, first_event):
    order = np.random.default_rng(0).permutation(dataset.log.n_events)
    shuffled = rank_with(model, EvalDataset(dataset, order, make_config(first_event)), table)
    for one, other in zip(rank_all(True), shuffled, strict=True):
        same = (one.greater[order] == other.greater) & (one.equal[order] == other.equal)
        assert same.mean() > 0.95  # scores within rounding of each other may change places


def test_nothing_to_rank(model, dataset, table, first_event):
    nothing = EvalDataset(dataset, np.zeros(0, np.int64), make_config(first_event))
    in_service, union = rank_with(model, nothing, table)
    assert len(in_service) == len(union) == 0


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=6), st.integers(0, 3))
def test_pad_seen(rows, more):
    width = max([len(set(row)) for row in rows] + [1]) + more
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    item = np.array([item for row in rows for item in row], np.int32)
    seen = Histories(offsets, np.arange(offsets[-1])).distinct(item)
    padded = pad_seen(seen, item[seen.rows], width)
    assert padded.shape == (len(rows), width)
    assert padded.dtype == np.int32
    for row, got in zip(rows, padded.tolist(), strict=True):
        items = set(row)
        assert set(got[: len(items)]) == items
        assert got[len(items) :] == [-1] * (width - len(items))
