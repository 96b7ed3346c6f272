"""The mixed answers against float64 loops: weights, pointers, loss with all gradients, and the scores of all items."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import Config, LossConfig, ModelConfig
from moerec.errors import InputError
from moerec.nn.attention import causal_segment_mask
from moerec.nn.heads.answers import drop_component
from moerec.nn.heads.item import Candidates, score_items
from moerec.nn.heads.pointer import AnswerAggregator, weigh_events
from moerec.tasks import Draws, NextEvent, check_loss
from moerec.types import EVENT, RECOMMEND, Catalog, Outputs
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, fill, make_batch, make_config, make_model, make_table, target_of, with_target

TABLE = make_table()
ON_DEVICE = jax.tree.map(jnp.asarray, TABLE)
BATCH, CONTROL = (make_batch(3, [[5, 3], [7]], 9, control=control) for control in (False, True))
STATE, EVENT_VECTOR = (np.random.default_rng(s).normal(size=(2, 9, 8)) for s in (1, 2))
VECTOR, BIAS = np.random.default_rng(3).normal(size=(13, 8)), np.random.default_rng(4).normal(size=13)


def make_aggregator(copy: str) -> AnswerAggregator:
    config = make_config(pointer=copy, d_pointer=6)
    return fill(jax.eval_shape(lambda: AnswerAggregator(jax.random.key(0), config, SIZES.n_services)))


class Stub(NamedTuple):
    """Stands for the model: its states, the events' vectors and the items' are parameters beside the aggregator's."""

    aggregator: AnswerAggregator
    state: jax.Array
    event: jax.Array
    vector: jax.Array
    bias: jax.Array

    @property
    def head(self) -> "Stub":
        return self

    item_encoder = object()  # never asked: the vectors are the head's
    untrained_rows = True

    def vectors(self, item_X, catalog, tied):
        return self.vector[item_X], self.bias[item_X]

    def bind(self, catalog: Catalog) -> Catalog:
        return catalog._replace(vector_ID=self.vector, bias_I=self.bias)

    def encode(self, batch) -> Outputs:
        mask_BTS = causal_segment_mask(batch.segment_BT)
        return Outputs(
            self.state, None, None, None, self.aggregator(self.state, self.event, batch, mask_BTS, ON_DEVICE)
        )

    def loss(self, batch, config: LossConfig, draws: Draws = Draws()) -> jax.Array:  # noqa: B008 - it has no state
        batch = jax.tree.map(jnp.asarray, batch)
        sums = NextEvent().loss(self, self.encode(batch), batch, self.bind(ON_DEVICE), draws, Config(loss=config))
        return sums.parts["loss"]


def make_stub(copy: str) -> Stub:
    return Stub(make_aggregator(copy), *(jnp.asarray(x, jnp.float32) for x in (STATE, EVENT_VECTOR, VECTOR, BIAS)))


@jax.jit
def point(stub, batch):
    return stub.encode(batch).pointers


@jax.jit
def score(stub, batch, slot_Q):
    return score_items(stub.encode(batch), batch, slot_Q, stub.bind(ON_DEVICE))


@functools.partial(jax.jit, static_argnames="chunk")
def pull_loss(stub, batch, chunk: int = 100):
    return jax.value_and_grad(lambda stub: stub.loss(batch, LossConfig(chunk=chunk)))(stub)


def read(stub: Stub) -> dict[str, np.ndarray]:
    return {name.lstrip("."): w for name, w in oracle.read_weights(stub).items()}


def answer_by_hand(w, batch, b: int, t: int, n_services: int):
    """Weights of the answers to slot t of row b, and the share of each event, over the events that it may see."""
    own = [s for s in range(t + 1) if batch.segment_BT[b, s] == batch.segment_BT[b, t] and batch.kind_BT[b, s] == EVENT]
    logits, pointers = w["aggregator.gate_bias"] + w["state"][b, t] @ w["aggregator.weight_DX"], []
    for g in range(n_services + 1):
        seen = [s for s in own if g == n_services or TABLE.service_I[batch.item_BT[b, s]] == g]
        query = w["state"][b, t] @ w["aggregator.query_DGH"][:, g]
        query = oracle.rope(query, batch.position_BT[b, t], 10_000.0)
        keys = [w["event"][b, s] @ w["aggregator.key_DGH"][:, g] for s in seen]
        keys = [oracle.rope(k, batch.position_BT[b, s], 10_000.0) for k, s in zip(keys, seen, strict=True)]
        exps = [math.exp(query @ k / math.sqrt(6)) for k in keys]
        pointers.append({s: e / sum(exps) for s, e in zip(seen, exps, strict=True)})
    weight = np.exp(logits) * np.array([1, *(bool(p) for p in pointers)])
    return weight / weight.sum(), pointers


def distribution_by_hand(w, batch, b: int, t: int, n_services: int) -> np.ndarray:
    weight, pointers = answer_by_hand(w, batch, b, t, n_services)
    p = weight[0] * oracle.softmax(w["vector"] @ w["state"][b, t] + w["bias"])
    for share, pointer in zip(weight[1:], pointers, strict=True):
        for s, mass in pointer.items():
            p[batch.item_BT[b, s]] += share * mass
    return p


BATCHES = pytest.mark.parametrize("batch", [BATCH, CONTROL], ids=["events", "control slots"])
COPIES = pytest.mark.parametrize(("copy", "n_services"), [("all", 0), ("services", SIZES.n_services)])


@BATCHES
@COPIES
def test_weights_and_pointers_are_those_of_loops(copy, n_services, batch):
    stub = make_stub(copy)
    answers, w = point(stub, batch), read(stub)
    n_closed = 0
    for b, t in zip(*np.nonzero(batch.segment_BT), strict=True):
        weight, pointers = answer_by_hand(w, batch, b, t, n_services)
        np.testing.assert_allclose(np.exp(answers.log_weight_BTX[b, t]), weight, atol=1e-6)
        expected = np.zeros(9)
        for share, pointer in zip(weight[1:], pointers, strict=True):
            expected[list(pointer)] += share * np.array(list(pointer.values()))
        np.testing.assert_allclose(answers.copy_BTS[b, t], expected, atol=1e-6)
        if batch.kind_BT[b, t] == EVENT:
            n_closed += np.sum(weight == 0)
    assert (n_closed > 5) == (copy == "services")


def test_a_sampled_softmax_is_mixed_like_the_full_one():
    """With the target and every other item drawn once, uncorrected, it is the full one."""
    stub = make_stub("services")
    drawn = Candidates(jnp.asarray(np.random.default_rng(1).permutation(13)), jnp.zeros(13))

    def sampled(stub):
        return stub.loss(BATCH, LossConfig(kind="sampled_softmax"), Draws(shared=drawn))

    totals = jax.jit(jax.value_and_grad(sampled))(stub), pull_loss(stub, BATCH)
    for found, expected in zip(*map(jax.tree.leaves, totals), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@BATCHES
@COPIES
@pytest.mark.parametrize("chunk", [4, 100])
def test_loss_and_all_gradients_are_those_of_the_mixture(copy, n_services, chunk, batch):
    stub, (label_BT, weight_BT) = make_stub(copy), target_of(batch)
    slots = list(zip(*np.nonzero(weight_BT), strict=True))
    # The item whose number stands in slots that are no event: pointers must not take them for it.
    label_BT = np.where(batch.position_BT == 1, 0, label_BT)
    batch = with_target(batch, label_BT=label_BT)

    def by_hand(w):
        p = [distribution_by_hand(w, batch, b, t, n_services)[label_BT[b, t]] for b, t in slots]
        return -sum(float(weight_BT[b, t]) * math.log(p_s) for (b, t), p_s in zip(slots, p, strict=True))

    loss, gradients = pull_loss(stub, batch, chunk)
    assert float(loss) == pytest.approx(by_hand(read(stub)), rel=1e-5)
    oracle.assert_slopes(by_hand, read(stub), read(gradients), 1e-4)
    hits = [label_BT[b, t] in batch.item_BT[b, : t + 1] for b, t in slots]
    assert 0 < sum(hits) < len(hits)


@BATCHES
@COPIES
def test_scores_are_logarithms_of_a_distribution_over_all_items(copy, n_services, batch):
    stub = make_stub(copy)
    asked = np.array([4, 7, 0, 15, -1, 9])
    for slot, found in zip(asked, np.asarray(score(stub, batch, asked), np.float64), strict=True):
        expected = oracle.softmax(BIAS)  # without a history only the biases speak
        if slot >= 0:
            expected = distribution_by_hand(read(stub), batch, int(slot) // 9, int(slot) % 9, n_services)
        np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)
        assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)


@COPIES
def test_no_pointer_points_at_a_control_slot_and_at_it_the_softmax_alone_has_weight(copy, n_services):
    """Exactly; and its scores are those of the softmax."""
    stub = make_stub(copy)
    pointers = point(stub, CONTROL)
    is_control = CONTROL.kind_BT == RECOMMEND
    weight_BTX = np.exp(pointers.log_weight_BTX)
    np.testing.assert_array_equal(weight_BTX[is_control], np.eye(n_services + 2)[np.zeros(is_control.sum(), int)])
    assert not np.any(np.asarray(pointers.copy_BTS)[is_control])
    assert not np.any(np.where(is_control[:, None], pointers.copy_BTS, 0))  # nor does anything later point there
    later = (CONTROL.kind_BT == EVENT) & (CONTROL.position_BT > 0)
    np.testing.assert_allclose(np.sum(pointers.copy_BTS, axis=-1)[later], 1 - weight_BTX[later][:, 0], atol=1e-6)
    slot_Q = np.flatnonzero(is_control)
    found = score(stub, CONTROL, np.resize(slot_Q, 6))[: len(slot_Q)]  # as many as are asked above: one program
    states = STATE.reshape(-1, 8)[slot_Q]
    np.testing.assert_allclose(np.exp(found), [oracle.softmax(VECTOR @ h + BIAS) for h in states], rtol=1e-4)


def test_a_window_bounds_what_pointers_see():
    model = make_model(make_config(pointer="services", d_pointer=6, window=3))
    copy_BTS = np.asarray(answer(model, BATCH))
    t, s = np.indices((9, 9))
    outside = (s > t) | (s <= t - 3)
    assert not copy_BTS[:, outside].any()
    assert np.all(copy_BTS.sum(axis=-1)[BATCH.segment_BT > 0] > 0.01)


def test_an_item_that_nothing_but_a_pointer_speaks_for_keeps_its_gradients():
    """Its softmax underflows; so does the pointers' share of what was never ordered."""
    stub = make_stub("all")._replace(bias=jnp.where(jnp.arange(13) == BATCH.item_BT[0, 0], -200.0, 0.0))
    label_BT = np.full((2, 9), BATCH.item_BT[0, 0])
    batch = with_target(BATCH, label_BT=label_BT, weight_BT=np.float32(BATCH.segment_BT > 0))
    loss, gradients = pull_loss(stub, batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.abs(gradients.aggregator.query_DGH[...]).max() > 1e-3


@jax.jit
def answer(model, batch):
    return model.encode(batch, ON_DEVICE).pointers.copy_BTS


def test_an_event_reaches_only_later_answers_of_its_sequence():
    model = make_model(make_config(pointer="services", d_pointer=6))
    before, b, t = np.asarray(answer(model, BATCH)), 0, 2
    reached = np.zeros(BATCH.item_BT.shape, bool)
    reached[b, t:5] = True
    item_BT = BATCH.item_BT.copy()
    item_BT[b, t] = (item_BT[b, t] + 5) % 13
    after = np.asarray(answer(model, BATCH._replace(item_BT=item_BT)))
    np.testing.assert_array_equal(after[~reached], before[~reached])
    assert np.all(np.abs(after - before)[reached].max(axis=-1) > 1e-6)


@pytest.mark.parametrize("loss", [LossConfig(kind="one_negative"), LossConfig(scope="service")])
def test_a_loss_that_is_no_softmax_over_the_union_is_refused(loss):
    with pytest.raises(InputError, match=r"model\.pointer: needs a softmax over the union"):
        check_loss(Config(model=ModelConfig(pointer="all"), loss=loss))
    check_loss(Config(loss=loss))  # without pointers it is a loss like any other


def share_by_hand(logit_S, seen_S, group_S, given_G, pull_S):
    """What events of one slot are given, in float64; and the slopes of its product with `pull` by logits and gifts."""
    part_S, d_logit_S, d_given_G = np.zeros(len(logit_S)), np.zeros(len(logit_S)), np.zeros(len(given_G))
    for g, given in enumerate(given_G):
        own = [s for s in range(len(logit_S)) if seen_S[s] and group_S[s] == g]
        if not own:
            continue
        p = oracle.softmax(logit_S[own])
        part_S[own], d_given_G[g] = given * p, p @ pull_S[own]
        d_logit_S[own] = given * p * (pull_S[own] - p @ pull_S[own])
    return part_S, d_logit_S, d_given_G


def test_groups_far_below_others_keep_their_shares_and_gradients():
    """Logits of one group stand 400 above those of another; slots see some groups, or none."""
    rng, n_groups = np.random.default_rng(5), 3
    group_BS = rng.integers(0, n_groups + 1, (2, 11))  # the last is of no group
    level_BTG = rng.choice([-200.0, 0.0, 200.0], (2, 5, n_groups + 1))
    logit_BTS = rng.normal(size=(2, 5, 11)) + np.take_along_axis(level_BTG, group_BS[:, None], axis=2)
    seen_BTS = (rng.random((2, 5, 11)) < 0.7) & (group_BS < n_groups)[:, None]
    seen_BTS[0, 1] = False
    given_BTG, pull_BTS = rng.random((2, 5, n_groups)), rng.normal(size=(2, 5, 11))
    of_BSG = jax.nn.one_hot(group_BS, n_groups)
    logit_BTS = logit_BTS.astype(np.float32)  # the differences within a group are those that are seen

    @jax.jit
    def pull(logit_BTS, given_BTG):
        def total(logit_BTS, given_BTG):
            part_BTS = weigh_events(logit_BTS, seen_BTS, of_BSG).share(given_BTG)
            return jnp.sum(part_BTS * pull_BTS), part_BTS

        return jax.grad(total, argnums=(0, 1), has_aux=True)(logit_BTS, given_BTG)

    (d_logit_BTS, d_given_BTG), part_BTS = pull(logit_BTS, given_BTG.astype(np.float32))
    for b, t in np.ndindex(2, 5):
        rows = np.float64(logit_BTS[b, t]), seen_BTS[b, t], group_BS[b], given_BTG[b, t], pull_BTS[b, t]
        for found, expected in zip((part_BTS, d_logit_BTS, d_given_BTG), share_by_hand(*rows), strict=True):
            np.testing.assert_allclose(found[b, t], expected, rtol=1e-5, atol=1e-6)
    can_BTG = np.asarray(weigh_events(logit_BTS, seen_BTS, of_BSG).log_can_BTG) == 0
    np.testing.assert_array_equal(can_BTG, np.einsum("BTS,BSG->BTG", seen_BTS, of_BSG) > 0)


def test_a_component_that_is_dropped_gives_nothing_and_the_others_take_its_weight():
    stub = make_stub("services")
    whole, (b, t) = point(stub, BATCH), (0, 4)  # which sees events of all services but one
    weight, shares = answer_by_hand(read(stub), BATCH, b, t, SIZES.n_services)
    assert np.sum(weight > 0) == len(weight) - 1
    for place in range(len(weight)):
        left = np.where(np.arange(len(weight)) == place, 0, weight)
        left /= left.sum()
        expected = np.zeros(9)
        for share, pointer in zip(left[1:], shares, strict=True):
            expected[list(pointer)] += share * np.array(list(pointer.values()))
        found = drop_component(whole, place)
        np.testing.assert_allclose(np.exp(found.log_weight_BTX[b, t]), left, atol=1e-6)
        np.testing.assert_allclose(found.copy_BTS[b, t], expected, atol=1e-6)
