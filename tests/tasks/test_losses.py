"""The losses against formulas in float64, by enumeration of all draws, and by the statistics of many."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import Config, LossConfig
from moerec.nn.heads.xent import Mixture, XentCandidates, XentSlots, chunked_log_prob, chunked_softmax_xent
from moerec.tasks import Candidates, Draws, NextEvent
from moerec.tasks.losses import (
    LOSSES,
    SamplingTable,
    make_sampling_table,
    sample_in_service,
    sample_negatives,
    sampling_cdf,
)
from moerec.types import Batch, Catalog, Outputs, Request, Target

N_SLOTS, N_ITEMS, D = 7, 11, 4
RNG = np.random.default_rng(0)
H, VECTOR, BIAS = (RNG.standard_normal(shape) for shape in ((N_SLOTS, D), (N_ITEMS, D), (N_ITEMS,)))
TARGET = np.array([0, 3, 3, 10, 5, 1, 7])
WEIGHT = np.array([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 1.0])
SERVICE = np.arange(N_ITEMS) % 3
COUNT = np.array([0, 1, 2, 50, 9, 0, 3, 7, 1, 20, 4])


class Stub(NamedTuple):
    """Stands for the model: states, vectors and biases are its parameters."""

    h_BTD: jax.Array
    vector_ID: jax.Array
    bias_I: jax.Array

    @property
    def head(self) -> "Stub":
        return self

    item_encoder = object()  # never asked: the vectors are the head's
    untrained_rows = True

    def vectors(self, item_X, catalog, tied):
        return self.vector_ID[item_X], self.bias_I[item_X]


STUB = Stub(*(jnp.asarray(x, jnp.float32) for x in (H[None], VECTOR, BIAS)))
EMPTY = np.zeros((1, N_SLOTS), np.int32)
BATCH = Batch(
    *[EMPTY] * (len(Batch._fields) - 3),
    request=Request(EMPTY, EMPTY, EMPTY[..., None], EMPTY[..., None]),
    targets={"next_event": Target(TARGET[None].astype(np.int32), WEIGHT[None].astype(np.float32))},
)
TABLE = Catalog(jnp.asarray(SERVICE), jnp.zeros((N_ITEMS, 1), int), jnp.asarray(COUNT, jnp.float32))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _loss_and_gradients(candidates, kind, scope, chunk):
    config = Config(loss=LossConfig(kind=kind, scope=scope, chunk=chunk))
    draws = Draws(by_row=candidates) if LOSSES[kind].by_row else Draws(shared=candidates)

    def total(stub):
        bound = TABLE._replace(vector_ID=stub.vector_ID, bias_I=stub.bias_I)
        sums = NextEvent().loss(stub, Outputs(stub.h_BTD, None, None), BATCH, bound, draws, config)
        return sums.parts["loss"], sums.weight

    return jax.value_and_grad(total, has_aux=True)(STUB)


def loss_and_gradients(candidates: Candidates | None, kind: str, scope: str = "union", chunk: int = 3):
    """Loss, weight, and the gradients of states, vectors and biases in float64; candidates None: the catalogue."""
    (loss, weight), gradients = _loss_and_gradients(candidates, kind, scope, chunk)
    return float(loss), float(weight), [np.asarray(g, np.float64) for g in gradients]


def softmax_by_hand(items, corrections, scope="union"):
    """Sampled (or full) softmax slot by slot: loss and the gradients that follow from `p - 1` and `p`."""
    loss, d_h, d_vector, d_bias = 0.0, np.zeros_like(H), np.zeros_like(VECTOR), np.zeros_like(BIAS)
    for h, target, weight, d_h_s in zip(H, TARGET, WEIGHT, d_h, strict=True):
        rivals = [
            (j, c)
            for j, c in zip(items, corrections, strict=True)
            if j != target and (scope == "union" or SERVICE[j] == SERVICE[target])
        ]
        terms = [(target, 0.0), *rivals]
        mass = np.exp([h @ VECTOR[j] + BIAS[j] + c for j, c in terms])
        p = mass / mass.sum()
        loss -= weight * np.log(p[0])
        p[0] -= 1
        for (j, _), p_j in zip(terms, p, strict=True):
            d_h_s += weight * p_j * VECTOR[j]
            d_vector[j] += weight * p_j * h
            d_bias[j] += weight * p_j
    return loss, [d_h[None], d_vector, d_bias]


def assert_same(found, expected, tolerance=1e-5):
    loss, weight, gradients = found
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert weight == WEIGHT.sum()
    for gradient, by_hand in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(gradient, by_hand, atol=tolerance, rtol=1e-5)


# Chunks of one slot, of no divisor of the number of slots, of all, and of more.
@pytest.mark.parametrize(
    ("scope", "chunk"), [("union", 1), ("union", 3), ("union", 7), ("union", 100), ("service", 2), ("service", 7)]
)
def test_full_softmax_is_cross_entropy_over_the_catalogue_or_the_service(scope, chunk):
    found = loss_and_gradients(None, "full_softmax", scope, chunk)
    assert_same(found, softmax_by_hand(range(N_ITEMS), np.zeros(N_ITEMS), scope))


@pytest.mark.parametrize("scope", ["union", "service"])
def test_sampled_softmax_of_given_draws_is_the_formula(scope):
    # A draw that comes twice, targets of several slots among the draws, and none of service 2 but item 5.
    drawn = np.array([3, 3, 10, 6, 0, 5, 9], np.int32)
    correction = np.linspace(-1, 2, 7).astype(np.float32)
    found = loss_and_gradients(Candidates(jnp.asarray(drawn), jnp.asarray(correction)), "sampled_softmax", scope)
    assert_same(found, softmax_by_hand(drawn, correction, scope))


def logsumexp_loss(h, positive, vector, offset, weight, allowed):
    scores = jnp.where(allowed, h @ vector.T + offset, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([positive[:, None], scores], axis=1), axis=1)
    return jnp.sum(weight * (total - positive))


@pytest.mark.parametrize("chunk", [2, 5])
def test_contrast_has_the_gradients_of_logsumexp_under_any_cotangent(chunk):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((N_SLOTS, D), (N_SLOTS,), (N_ITEMS, D), (N_ITEMS,))]
    scope_s, item = SERVICE[TARGET], np.arange(N_ITEMS)
    weight = WEIGHT.astype(np.float32)
    allowed = (item != TARGET[:, None]) & (scope_s[:, None] == SERVICE)

    def ours(*x):
        h, positive, vector, offset = x
        slots = XentSlots(h, positive, jnp.asarray(TARGET), jnp.asarray(scope_s), None)
        rivals = XentCandidates(vector, offset, jnp.asarray(item), jnp.asarray(SERVICE))
        return jnp.sin(0.1 * chunked_softmax_xent(slots, weight, rivals, chunk))

    def plain(*x):
        return jnp.sin(0.1 * logsumexp_loss(*x, weight, allowed))

    every = (0, 1, 2, 3)
    for found, expected in zip(
        *(jax.tree.leaves(jax.jit(jax.value_and_grad(f, every))(*arrays)) for f in (ours, plain)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


def test_contrast_is_finite_at_huge_scores_and_zero_without_rivals():
    h = jnp.asarray([[1e4], [-1e4], [1.0]])
    vector, offset = jnp.asarray([[1.0], [-1.0]]), jnp.zeros(2)
    # The last slot's scope holds no candidate.
    target, scope, item = jnp.asarray([0, 0, 5]), jnp.asarray([0, 0, 1]), jnp.asarray([0, 1])

    def total(h, vector, offset):
        positive = h[:, 0] * vector[target % 2, 0]
        rivals = XentCandidates(vector, offset, item, jnp.zeros(2, int))
        return chunked_softmax_xent(XentSlots(h, positive, target, scope, None), jnp.ones(3), rivals, 2)

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(h, vector, offset)
    assert float(value) == pytest.approx(2e4)  # only the second slot prefers its rival, by 20,000
    assert all(np.isfinite(g).all() for g in gradients)
    assert float(gradients[0][2, 0]) == 0


MIXED_SLOTS = 7


def draw_xent(mixed: bool):
    """Random operands: float32 leaves to differentiate, and the rest. Targets among the candidates, two scopes."""
    rng = np.random.default_rng(9)
    shapes = ((MIXED_SLOTS, D), (MIXED_SLOTS,), (N_ITEMS, D), (N_ITEMS,))
    h, positive, vector, offset = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    mixture = None
    if mixed:
        share = rng.uniform(0.2, 0.9, MIXED_SLOTS)
        rest = (1 - share) * rng.uniform(0.1, 1, MIXED_SLOTS) * (np.arange(MIXED_SLOTS) != 2)  # one has no other source
        with np.errstate(divide="ignore"):
            mixture = Mixture(*(jnp.asarray(np.log(x), jnp.float32) for x in (share, rest)))
    target, item = jnp.asarray(TARGET), jnp.asarray(rng.permutation(N_ITEMS))
    scopes = jnp.arange(MIXED_SLOTS) % 2, jnp.arange(N_ITEMS) % 2
    had = jnp.asarray(rng.integers(-1, N_ITEMS, (MIXED_SLOTS, 4)))  # the same one twice, too
    repeat = jnp.asarray(rng.standard_normal(N_ITEMS), jnp.float32)
    return (h, positive, vector, offset, mixture, repeat), (target, item, scopes, had)


def dense_log_prob(floats, rest):
    """Log-softmax over the target and all candidates of its scope that are other items, then the mixture."""
    (h, positive, vector, offset, mixture, repeat), (target, item, scopes, had) = floats, rest
    allowed = (item != target[:, None]) & (scopes[0][:, None] == scopes[1])
    scores = h @ vector.T + offset + jnp.any(had[:, :, None] == item, axis=1) * repeat[item]
    logits = jnp.concatenate([positive[:, None], jnp.where(allowed, scores, -1e30)], axis=1)
    log_p = jax.nn.log_softmax(logits)[:, 0]
    if mixture is None:
        return log_p
    return jnp.log(jnp.exp(mixture.log_share_S + log_p) + jnp.exp(mixture.log_rest_S))


def operands_of(floats, rest):
    (h, positive, vector, offset, mixture, repeat), (target, item, scopes, had) = floats, rest
    slots = XentSlots(h, positive, target, scopes[0], mixture, had)
    return slots, XentCandidates(vector, offset, item, scopes[1], repeat)


def assert_trees_close(found, expected, tolerance: float = 2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["softmax", "mixture"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_log_probs_by_chunks_are_those_of_a_dense_log_softmax_in_value_and_gradient(chunk, mixed):
    """Under a cotangent for each slot, as losses have that are no weighted sum of them."""
    floats, rest = draw_xent(mixed)

    def pull(log_prob):
        def total(floats):
            log_p = log_prob(floats)
            return jnp.sum(jnp.sin(log_p) * jnp.arange(1.0, MIXED_SLOTS + 1)), log_p

        return jax.jit(jax.value_and_grad(total, has_aux=True))(floats)

    found = pull(lambda floats: chunked_log_prob(*operands_of(floats, rest), chunk))
    expected = pull(lambda floats: dense_log_prob(floats, rest))
    assert np.all(np.asarray(expected[0][1]) < 0)
    assert_trees_close(found, expected, 5e-6)
    # In float64 NumPy, too.
    h, positive, vector, offset, mixture, repeat = jax.tree.map(lambda x: np.asarray(x, np.float64), floats)
    target, item, scopes, had = jax.tree.map(np.asarray, rest)
    for s, log_p in enumerate(found[0][1]):
        rivals = [j for j in range(N_ITEMS) if item[j] != target[s] and scopes[1][j] == scopes[0][s]]
        known = [vector[j] @ h[s] + offset[j] + (repeat[item[j]] if item[j] in had[s] else 0) for j in rivals]
        scores = np.exp([positive[s], *known])
        p = scores[0] / scores.sum()
        if mixture is not None:
            p = np.exp(mixture.log_share_S[s]) * p + np.exp(mixture.log_rest_S[s])
        assert float(log_p) == pytest.approx(np.log(p), abs=2e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["softmax", "mixture"])
@pytest.mark.parametrize("chunk", [3, 7])
def test_weighted_log_probs_are_the_sum_that_is_formed_in_one_pass(chunk, mixed):
    floats, rest = draw_xent(mixed)
    weight = jnp.asarray(WEIGHT, jnp.float32)

    def by_slot(floats):
        return -jnp.sum(weight * chunked_log_prob(*operands_of(floats, rest), chunk))

    def at_once(floats):
        slots, rivals = operands_of(floats, rest)
        return chunked_softmax_xent(slots, weight, rivals, chunk)

    assert_trees_close(*(jax.jit(jax.value_and_grad(f))(floats) for f in (by_slot, at_once)))


def test_log_probs_are_finite_at_huge_scores_in_value_and_gradient():
    slots = XentSlots(
        jnp.asarray([[1e4], [-1e4]]), jnp.asarray([1e4, -1e4]), jnp.asarray([0, 0]), jnp.asarray([0, 0]), None
    )
    rivals = XentCandidates(jnp.asarray([[1.0], [-1.0]]), jnp.zeros(2), jnp.asarray([0, 1]), jnp.asarray([0, 0]))

    def total(h):
        return jnp.sum(chunked_log_prob(slots._replace(h_SD=h), rivals, 2) * jnp.asarray([1.0, 2.0]))

    value, gradient = jax.value_and_grad(total)(slots.h_SD)
    assert float(value) == pytest.approx(-4e4)
    np.testing.assert_allclose(gradient, [[0.0], [2.0]])


@pytest.mark.parametrize("n_draws", [1, 2])
def test_expectation_over_all_possible_draws_is_the_full_sum(n_draws):
    cdf = sampling_cdf(np.array([0, 2, 5, 1]), 0.7)
    q = np.diff(cdf.astype(np.float64), prepend=-1) / 2**32
    scores = np.array([0.5, -1.0, 1.5, 0.2], np.float32)
    draws = np.array(list(itertools.product(range(4), repeat=n_draws)))
    target, positive = 2, 0.3

    def total_of(items, corrections):
        slots = XentSlots(jnp.zeros((1, 1)), jnp.full(1, positive), jnp.full(1, target), jnp.zeros(1, int), None)
        offset_J = jnp.asarray(scores)[items] + corrections
        rivals = XentCandidates(jnp.zeros((n_draws, 1)), offset_J, items, jnp.zeros(n_draws, int))
        loss = chunked_softmax_xent(slots, jnp.ones(1), rivals, 1)
        return jnp.exp(loss + positive)

    totals = jax.jit(jax.vmap(total_of))(jnp.asarray(draws), jnp.asarray(-np.log(n_draws * q[draws]), jnp.float32))
    expectation = np.sum(np.prod(q[draws], axis=1) * np.asarray(totals))
    exact = np.exp(positive) + np.exp(np.delete(scores.astype(np.float64), target)).sum()
    assert expectation == pytest.approx(exact, rel=1e-5)


def make_whole_table(counts: np.ndarray, power: float) -> SamplingTable:
    return jax.tree.map(jnp.asarray, make_sampling_table(counts, power, untrained=True))


@functools.partial(jax.jit, static_argnums=2)
def draw_sets(keys, table, n_draws):
    return jax.vmap(lambda key: sample_negatives(key, table, (n_draws,)))(keys)


@functools.cache
def draw_many(power: float, n_draws: int = 20, n_sets: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(4), n_sets)
    candidates = draw_sets(keys, make_whole_table(COUNT, power), n_draws)
    return np.asarray(candidates.item_J), np.asarray(candidates.correction_J, np.float64)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_draws_follow_q_and_carry_its_correction(power):
    items, corrections = draw_many(power)
    weights = np.array([(1 + c) ** power for c in COUNT])
    q = weights / weights.sum()
    np.testing.assert_allclose(corrections, -np.log(20 * q[items]), atol=1e-4)
    share = np.bincount(items.ravel(), minlength=N_ITEMS) / items.size
    assert np.all(np.abs(share - q) < 5 * np.sqrt(q * (1 - q) / items.size))


def test_sums_over_draws_estimate_the_sum_over_the_catalogue():
    items, corrections = draw_many(0.75)
    scores = BIAS + VECTOR @ H[0]
    estimates = np.exp(scores[items] + corrections).sum(axis=1)
    exact = np.exp(scores).sum()
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / np.sqrt(len(estimates))
    assert estimates.std() > 0.05 * exact  # an estimate, so that the test could fail


def test_gradients_of_the_sampled_softmax_converge_to_the_full_one():
    _, exact = softmax_by_hand(range(N_ITEMS), np.zeros(N_ITEMS))
    table = make_whole_table(COUNT, 0.5)

    def error(n_draws):
        *_, gradients = loss_and_gradients(sample_negatives(jax.random.key(8), table, (n_draws,)), "sampled_softmax")
        return np.sqrt(sum(np.sum((g - e) ** 2) for g, e in zip(gradients, exact, strict=True)))

    size = np.sqrt(sum(np.sum(e**2) for e in exact))
    few, many, most = (error(m) / size for m in (30, 1000, 30_000))
    assert few > 0.05
    assert many < few / 2
    assert most < many / 2
    assert most < 0.02


def test_cdf_ends_at_one_and_rises_with_every_item():
    counts = np.random.default_rng(2).integers(0, 1000, 20_000)
    for power in (0.0, 0.5, 0.75):
        cdf = sampling_cdf(counts, power)
        assert cdf.dtype == np.uint32
        assert cdf[-1] == 2**32 - 1
        assert np.all(np.diff(cdf.astype(np.int64), prepend=-1) > 0)


def test_corrections_of_a_large_skewed_catalogue_are_those_of_the_draw():
    """Fifty thousand items with counts of a power law: every share of the random words is what the correction says."""
    counts = 1e6 / np.arange(1, 50_001)
    cdf = sampling_cdf(counts, 1.0)
    width = np.diff(cdf.astype(np.int64), prepend=-1)
    wanted = (1 + counts) / (1 + counts).sum()
    np.testing.assert_allclose(width / 2**32, wanted, rtol=1e-3)
    drawn = sample_negatives(jax.random.key(0), make_whole_table(counts, 1.0), (20_000,))
    np.testing.assert_allclose(drawn.correction_J, -np.log(20_000 * width[drawn.item_J] / 2**32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("power", "sizes"), [(0.0, (3, 1, 7)), (1.0, (3, 1, 7)), (1.0, (11,))])
def test_a_draw_in_the_service_follows_q_within_it(power, sizes):
    service = np.repeat(np.arange(len(sizes)), sizes)
    table, n = make_whole_table(COUNT, power), 20_000
    for target in (0, 3, 10):
        own = service == service[target]
        items = sample_in_service(jax.random.key(target), table, jnp.asarray(service), jnp.full(n, target))
        q = np.where(own, (1.0 + COUNT) ** power, 0)
        q /= q.sum()
        share = np.bincount(items, minlength=N_ITEMS) / n
        assert not share[~own].any()
        assert np.all(np.abs(share - q) <= 5 * np.sqrt(q * (1 - q) / n))


def test_items_without_a_training_event_are_never_drawn():
    """Wherever in the catalogue they stand; the others' shares and corrections are those without them."""
    counts = np.array([0, 0, 3, 0, 1, 0, 4, 0])
    trained = np.flatnonzero(counts)
    table = make_sampling_table(counts, 0.8, untrained=False)
    drawn = sample_negatives(jax.random.key(1), jax.tree.map(jnp.asarray, table), (4000,))
    alone = sample_negatives(jax.random.key(1), make_whole_table(counts[trained], 0.8), (4000,))
    np.testing.assert_array_equal(drawn.item_J, trained[alone.item_J])
    np.testing.assert_array_equal(drawn.correction_J, alone.correction_J)
    service = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    own = sample_in_service(jax.random.key(2), table, jnp.asarray(service), jnp.array([0, 3, 4, 7] * 50))
    assert set(np.asarray(own).tolist()) == set(trained.tolist())
    np.testing.assert_array_equal(service[own], service[[0, 3, 4, 7] * 50])
    np.testing.assert_array_equal(make_sampling_table(np.zeros(3), 1.0, untrained=False).item_J, np.arange(3))


def test_a_single_item_is_always_drawn():
    drawn = sample_negatives(jax.random.key(0), make_whole_table(np.array([3]), 1.0), (5,))
    np.testing.assert_array_equal(drawn.item_J, 0)
    np.testing.assert_allclose(drawn.correction_J, -np.log(5), rtol=1e-6)


def test_one_negative_is_binary_cross_entropy_of_two_scores():
    negative = np.array([4, 0, 3, 2, 9, 9, 1], np.int32)  # slot 2 drew its own target
    loss, d_h, d_vector, d_bias = 0.0, np.zeros_like(H), np.zeros_like(VECTOR), np.zeros_like(BIAS)
    for s, (h, weight) in enumerate(zip(H, WEIGHT, strict=True)):
        for item, wanted in ((TARGET[s], 1.0), (negative[s], 0.0)):
            if not wanted and item == TARGET[s]:
                continue
            p = 1 / (1 + np.exp(-(h @ VECTOR[item] + BIAS[item])))
            loss -= weight * np.log(p if wanted else 1 - p)
            d_h[s] += weight * (p - wanted) * VECTOR[item]
            d_vector[item] += weight * (p - wanted) * h
            d_bias[item] += weight * (p - wanted)
    candidates = Candidates(
        jnp.asarray(negative[None]), jnp.full((1, N_SLOTS), 3.0)
    )  # the correction has no place here
    assert_same(loss_and_gradients(candidates, "one_negative"), (loss, [d_h[None], d_vector, d_bias]))
