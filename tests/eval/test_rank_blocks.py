"""Places and lists are those of a sort of all scores, however many queries' scores are in memory at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.eval.metrics import MISS, count_ranks
from moerec.eval.ranking import RankQueries
from moerec.eval.ranking.gates import read_gates
from moerec.eval.ranking.lists import best_items
from moerec.eval.ranking.rank import count_ranks_of_scores, rank_batch
from moerec.nn.model import Predictor
from tests.nn.test_asking import ASK, ASKED_SIZES, CATALOG, LAST, OFFSETS
from tests.nn.test_asking import BATCH as HOST_BATCH
from tests.small_model import make_config, make_model

N_ITEMS, BATCH = ASKED_SIZES.n_items, jax.tree.map(jnp.asarray, HOST_BATCH)
NEAR = {"text_pointer": True, "transition_pointer": True, "crossing_pointer": True}
KINDS = {
    "dense": {"repeat_bias": True},
    "copies": {"pointer": "services"},
    "mixture": {"pointer": "all", **NEAR},
    "asked": {"pointer": "services", **NEAR, "ask": ASK, "repeat_bias": True},
}


def draw_queries(seed: int, slot_Q: np.ndarray, n_seen: int = 6) -> RankQueries:
    rng, n = np.random.default_rng(seed), len(slot_Q)
    target_Q = rng.integers(0, N_ITEMS, n).astype(np.int32)
    service_Q = np.asarray(CATALOG.service_I)[target_Q]
    seen_QX = np.argsort(rng.random((n, N_ITEMS)), axis=1)[:, :n_seen].astype(np.int32)
    seen_QX[rng.random((n, n_seen)) < 0.4] = -1
    low, high = (np.asarray(OFFSETS, np.int32)[service_Q + k] for k in (0, 1))
    return RankQueries(slot_Q.astype(np.int32), target_Q, low, high, seen_QX)


def places_of_a_sort(score_QI: np.ndarray, queries: RankQueries) -> list[np.ndarray]:
    """Above and level with each target in its service and in the union, on the host."""
    seen = np.zeros(score_QI.shape, bool)
    row, column = np.nonzero(queries.seen >= 0)
    seen[row, queries.seen[row, column]] = True
    own = count_ranks(score_QI, queries.target, seen, (queries.low, queries.high))
    union = count_ranks(score_QI, queries.target, seen)
    return [own.greater, own.equal, union.greater, union.equal]


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_ties_are_counted(seed, n_levels):
    queries = draw_queries(seed, np.zeros(9))
    score_QI = np.random.default_rng(seed).integers(0, n_levels, (9, N_ITEMS)).astype(np.float32)
    found = jax.jit(count_ranks_of_scores, static_argnames="has_log_probs")(score_QI, queries, False)
    for got, wanted in zip(found, places_of_a_sort(score_QI, queries), strict=False):
        np.testing.assert_array_equal(got, wanted)
    log_p_QI = score_QI - np.logaddexp.reduce(score_QI.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(found.log_p, log_p_QI[np.arange(9), queries.target], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_the_same_in_blocks_of_any_size(kind):
    model = make_model(make_config(**KINDS[kind]), 1, ASKED_SIZES)
    predictor = Predictor(model, None, 1.3)
    slot_Q = np.concatenate([LAST, [-1], LAST[::-1], [-1]])
    queries = draw_queries(3, slot_Q)

    @jax.jit
    def score_and_rank(predictor, queries):
        bound = predictor.params.bind(CATALOG)
        ranks = [rank_batch(predictor, BATCH, queries, bound, None, k * N_ITEMS) for k in (1, 3, 4, len(slot_Q))]
        return predictor.score(BATCH, queries.slot, bound), ranks

    score_QI, ranks = score_and_rank(predictor, queries)
    wanted = places_of_a_sort(np.asarray(score_QI), queries)
    assert sum(greater.max() == MISS for greater in wanted) == 2
    log_p_QI = np.asarray(score_QI, np.float64)
    log_p_QI -= np.logaddexp.reduce(log_p_QI, axis=1, keepdims=True)
    for found in ranks:
        for got, places in zip(found, wanted, strict=False):
            np.testing.assert_array_equal(got, places)
        assert np.all(found.finite)
        np.testing.assert_allclose(found.log_p, log_p_QI[np.arange(len(slot_Q)), queries.target], atol=2e-5)


@pytest.mark.parametrize("kind", ["mixture", "asked"])
def test_gates_are_read_alike_in_blocks_of_any_size(kind):
    model = make_model(make_config(**KINDS[kind]), 1, ASKED_SIZES)
    queries = draw_queries(4, LAST)

    @jax.jit
    def read(model, queries):
        of = partial(read_gates, Predictor(model, None), BATCH, queries, model.bind(CATALOG), 5, 2)
        return of(most=1), of(most=10**6)

    (found, posterior), (whole, whole_posterior) = read(model, queries)
    for got, wanted in zip(found, whole, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert (posterior is None) == (whole_posterior is None) == (kind == "mixture")


@pytest.mark.parametrize("n", [1, 4, N_ITEMS + 3])
def test_lists_are_those_of_a_stable_sort(n):
    rng = np.random.default_rng(n)
    for row in rng.integers(0, 4, (40, N_ITEMS)).astype(np.float32):
        allowed = rng.random(N_ITEMS) < 0.7
        wanted = [i for i in np.argsort(-row, kind="stable").tolist() if allowed[i]][:n]
        np.testing.assert_array_equal(best_items(row, allowed, n), wanted)
