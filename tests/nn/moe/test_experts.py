"""The mixture layer and models with it, against loops over slots and experts; and its symmetries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import ModelConfig, MoEConfig, PersonalConfig
from moerec.errors import InputError
from moerec.nn.block import split_layers
from moerec.nn.layers import SwiGLU
from moerec.nn.moe.experts import DomainExperts, count_experts
from moerec.nn.moe.router import RouterInputs, route_slots
from tests.nn import numpy_model as oracle
from tests.small_model import (
    SIZES,
    fill,
    make_batch,
    make_config,
    make_model,
    make_table,
    random_like,
    target_of,
    with_target,
    worst_gap,
)

N_SERVICES, D = 3, 8
TABLE = make_table()
BATCH, CONTROL = (make_batch(4, [[4, 2]], 7, control=control) for control in (False, True))
BIAS = 0.4 * np.random.default_rng(7).standard_normal(8).astype(np.float32)  # what steers the choice
SMALL = {"n_per_group": 2, "d_expert": 4, "tile": 4, "backend": "xla_tiles"}
CASES = {
    "plain": MoEConfig(layers=(0,), n_active=2, **SMALL),
    "shared": MoEConfig(layers=(0,), n_active=1, d_shared=5, **SMALL),
    "open groups": MoEConfig(layers=(0,), n_active=3, n_open_groups=1, **SMALL),
    "all experts": MoEConfig(layers=(0,), n_active=8, **SMALL),
}


def draw_layer(moe: MoEConfig, n_slots: int = 11, seed: int = 0):
    """A layer with random weights, states and a request; the last two slots are padding."""
    rng = np.random.default_rng(seed)
    config = make_config(moe=moe)
    layer = fill(jax.eval_shape(lambda: DomainExperts(jax.random.key(0), config, N_SERVICES)))
    x = 2 * rng.standard_normal((1, n_slots, D)).astype(np.float32)
    real = np.arange(n_slots)[None] < n_slots - 2
    domain = np.where(real, rng.integers(-1, N_SERVICES, (1, n_slots)), -1).astype(np.int32)
    log_domain = np.log(rng.dirichlet(np.ones(N_SERVICES), (1, n_slots))).astype(np.float32)
    return layer, x, RouterInputs(log_domain, domain, real)


@jax.jit
def apply(layer, x, request, bias=BIAS):
    return layer(x, request, bias, None)


@pytest.mark.parametrize("name", CASES)
def test_layer_and_gradients_are_those_of_a_loop_over_experts(name):
    layer, x, request = draw_layer(CASES[name])
    cotangent = np.random.default_rng(3).standard_normal(x.shape)

    def weighted(layer, x, log_domain, bias):
        y, _ = layer(x, request._replace(log_domain_BTZ=log_domain), bias, None)
        return jnp.sum(y * cotangent), y

    gradient_of = jax.jit(jax.grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))
    (d_layer, d_x, d_prior, d_bias), y = gradient_of(layer, x, request.log_domain_BTZ, BIAS)

    def expected(w):
        segment = request.real_BT[0].astype(int)
        return oracle.mixture(w, w["x"], w["prior"], segment, CASES[name], BIAS)

    inputs = {"x": x[0].astype(np.float64), "prior": request.log_domain_BTZ[0].astype(np.float64)}
    weights = {**oracle.read_weights(layer), **inputs}
    np.testing.assert_allclose(y[0], expected(weights), atol=2e-5)
    found = {**oracle.read_weights(d_layer), "x": np.asarray(d_x[0]), "prior": np.asarray(d_prior[0])}
    assert not np.any(d_bias)
    oracle.assert_slopes(lambda w: np.sum(expected(w) * cotangent[0]), weights, found, 1e-4)


def test_the_sums_are_those_of_the_slots_that_have_a_domain():
    layer, x, request = draw_layer(CASES["plain"])
    _, routing = apply(layer, x, request)
    w = oracle.read_weights(layer)
    probability, count, square = np.zeros((N_SERVICES, 8)), np.zeros((N_SERVICES, 8)), 0.0
    for t, z in enumerate(request.domain_BT[0]):
        if z >= 0:
            logits = w["router_ED"] @ x[0, t] + w["w_domain_EZ"] @ request.log_domain_BTZ[0, t]
            probability[z] += oracle.softmax(logits)
            count[z, np.argsort(-(logits + BIAS))[:2]] += 1
            square += np.log(np.sum(np.exp(logits))) ** 2
    np.testing.assert_allclose(routing.probability_LZE, probability, atol=1e-5)
    np.testing.assert_array_equal(routing.count_LZE, count)
    assert float(routing.square_lse_L) == pytest.approx(square, rel=1e-5)
    assert float(routing.dropped_L3.sum()) == 0


def permute(layer: DomainExperts, order: np.ndarray) -> DomainExperts:
    layer = jax.tree.map(lambda leaf: leaf, layer)
    for name in ("router_ED", "w_domain_EZ", "gate_EDF", "up_EDF", "down_EFD"):
        weight = getattr(layer, name)
        weight[...] = weight[...][order]
    return layer


def test_permuting_experts_permutes_the_sums_and_nothing_else():
    layer, x, request = draw_layer(CASES["plain"])
    order = np.random.default_rng(1).permutation(8)
    (y, sums), (other_y, other_sums) = apply(layer, x, request), apply(permute(layer, order), x, request, BIAS[order])
    np.testing.assert_allclose(other_y, y, atol=1e-5)
    np.testing.assert_array_equal(other_sums.count_LZE, np.asarray(sums.count_LZE)[:, order])
    np.testing.assert_allclose(other_sums.probability_LZE, np.asarray(sums.probability_LZE)[:, order], atol=1e-5)


@pytest.mark.parametrize("n_active", [1, 3])
def test_equal_experts_are_the_dense_layer(n_active):
    layer, x, request = draw_layer(MoEConfig(layers=(0,), n_active=n_active, **SMALL))
    dense = fill(jax.eval_shape(lambda: SwiGLU(jax.random.key(0), D, 4)), seed=5)
    for name, source in (("gate_EDF", dense.gate_DF), ("up_EDF", dense.up_DF), ("down_EFD", dense.down_FD)):
        getattr(layer, name)[...] = jnp.broadcast_to(source[...], (8, *source.shape))
    y, _ = apply(layer, x, request)
    np.testing.assert_allclose(y, np.where(request.real_BT[..., None], dense(x), 0), atol=1e-5)


def test_a_slot_uses_the_groups_of_its_most_probable_services_and_the_cross_group():
    moe = MoEConfig(layers=(0,), n_active=2, n_open_groups=2, **SMALL)
    layer, x, request = draw_layer(moe, n_slots=40)
    _, sums = apply(layer, x, request._replace(domain_BT=np.argmin(request.log_domain_BTZ, axis=-1).astype(np.int32)))
    by_group = np.asarray(sums.count_LZE).reshape(N_SERVICES, N_SERVICES + 1, 2).sum(axis=-1)
    assert not np.any(np.diagonal(by_group))  # slots counted under the least probable service: its group is closed
    assert np.all(by_group[:, -1] > 0)
    closed = np.asarray(sums.probability_LZE).reshape(N_SERVICES, N_SERVICES + 1, 2)
    assert not np.any(closed[np.arange(N_SERVICES), np.arange(N_SERVICES)])


def test_what_exceeds_the_capacity_is_dropped_and_counted():
    moe = MoEConfig(layers=(0,), n_active=2, capacity_factor=1.0, **SMALL)
    layer, x, request = draw_layer(moe, n_slots=34)
    bias = jnp.where(jnp.arange(8) < 2, 100.0, 0.0)  # all to the first two
    y, sums = jax.jit(lambda key: layer(x, request, bias, key))(jax.random.key(0))
    capacity = round(32 * 2 / 8)  # two of the slots are padding
    assert int(sums.dropped_L3.sum()) == 2 * (32 - capacity)
    norms = np.linalg.norm(y[0], axis=-1)
    np.testing.assert_array_equal(norms > 0, np.arange(34) < capacity)
    assert int(apply(layer, x, request, bias)[1].dropped_L3.sum()) == 0  # answers do not depend on who else asks


def test_jitter_is_a_function_of_its_key_and_off_without_one():
    layer, x, request = draw_layer(MoEConfig(layers=(0,), n_active=2, jitter_rate=0.3, **SMALL))
    jittered = jax.jit(lambda k: layer(x, request, BIAS, k)[0])
    once, again, other = (np.asarray(jittered(jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 1e-3
    plain, _, _ = draw_layer(MoEConfig(layers=(0,), n_active=2, **SMALL))
    np.testing.assert_array_equal(apply(layer, x, request)[0], apply(plain, x, request)[0])


def test_more_experts_than_a_slot_can_have_are_refused():
    with pytest.raises(InputError, match=r"n_active.*2 groups of 2"):
        count_experts(MoEConfig(layers=(0,), n_active=5, n_open_groups=1), 3)
    with pytest.raises(InputError, match="n_open_groups"):
        count_experts(MoEConfig(layers=(0,), n_open_groups=4), 3)
    with pytest.raises(InputError, match=r"layers.*\[2\]"):
        ModelConfig(n_layers=2, moe=MoEConfig(layers=(2,)))


def mixture_config(layers: tuple[int, ...], n_layers: int = 3) -> ModelConfig:
    moe = MoEConfig(layers=layers, n_active=2, n_per_group=1, d_expert=4, tile=4)
    return make_config(n_layers=n_layers, tie_items=False, moe=moe)


def test_runs_of_layers():
    def runs(*layers):
        return split_layers(mixture_config(layers))

    assert runs() == [(False, False, 0, 3)]
    assert runs(1, 2) == [(False, False, 0, 1), (True, False, 1, 3)]
    plain, mixed = (False, False), (True, False)
    assert runs(0, 2) == [(*mixed, 0, 1), (*plain, 1, 2), (*mixed, 2, 3)]


def test_a_group_starts_where_it_is_asked_to_and_once_where_the_kind_changes_anyway():
    config = dataclasses.replace(mixture_config((2, 3), n_layers=4), group_starts=(1, 2))
    plain, mixed = (False, False), (True, False)
    assert split_layers(config) == [(*plain, 0, 1), (*plain, 1, 2), (*mixed, 2, 4)]
    with pytest.raises(InputError, match=r"group_starts.*\[0, 4\]"):
        dataclasses.replace(config, group_starts=(0, 4))


@jax.jit
def pull_model(model, batch, table, bias_LE, cotangents, domain_BT):
    """Gradients under cotangents of states and posterior, and all outputs: one program for all that is asked below."""

    def weighted(model):
        out = model.encode(batch, table, router_bias_LE=bias_LE, domain_BT=domain_BT)
        return jnp.sum(out.state_BTD * cotangents[0]) + jnp.sum(out.log_domain_BTZ * cotangents[1]), out

    return jax.grad(weighted, has_aux=True)(model)


BIAS_LE = 4 * np.random.default_rng(5).standard_normal((2, 4)).astype(np.float32)  # enough to change the choice
COTANGENTS = tuple(random_like([np.zeros((1, 7, 8)), np.zeros((1, 7, N_SERVICES))]))
NO_DOMAIN = np.full((1, 7), -1, np.int32)


def pull(model, batch=BATCH, domain_BT=NO_DOMAIN):
    return pull_model(model, batch, TABLE, BIAS_LE, COTANGENTS, domain_BT)


@pytest.mark.parametrize("batch", [BATCH, CONTROL], ids=["events", "control slots"])
@pytest.mark.parametrize("layers", [(1, 2), (0, 2)], ids=str)
def test_the_model_and_its_gradients_are_those_of_the_numpy_model(layers, batch):
    config = mixture_config(layers)
    model = make_model(config)
    gradients, out = pull(model, batch)
    weights = oracle.read_weights(model)
    arguments = (batch, TABLE, config, SIZES.context_sizes)
    np.testing.assert_allclose(out.state_BTD, oracle.encode(weights, *arguments, bias_LE=BIAS_LE), atol=5e-5)
    assert np.abs(out.state_BTD - oracle.encode(weights, *arguments)).max() > 1e-2  # another choice
    np.testing.assert_allclose(out.log_domain_BTZ, oracle.posterior(weights, *arguments), atol=5e-5)
    assert out.routing.count_LZE.shape == (len(layers), N_SERVICES, N_SERVICES + 1)

    def total(w):
        states = oracle.encode(w, *arguments, frozen=weights, bias_LE=BIAS_LE)  # what the routers read has no gradient
        return np.sum(states * COTANGENTS[0]) + np.sum(oracle.posterior(w, *arguments) * COTANGENTS[1])

    oracle.assert_slopes(total, weights, oracle.read_weights(gradients), 2e-4)


def test_remat_changes_nothing():
    config = mixture_config((1, 2))
    found, expected = (pull(make_model(c)) for c in (dataclasses.replace(config, remat=True), config))
    assert worst_gap(jax.tree.leaves(found), jax.tree.leaves(expected)) < 1e-3


def test_states_posterior_and_routing_know_nothing_of_the_answer_or_of_later_slots():
    model = make_model(mixture_config((1, 2)))
    _, before = pull(model)
    label_BT, weight_BT = target_of(BATCH)
    domain_BT = np.where(weight_BT > 0, TABLE.service_I[label_BT], -1)
    _, other = pull(model, with_target(BATCH, label_BT=(label_BT + 1) % SIZES.n_items))
    np.testing.assert_array_equal(other.state_BTD, before.state_BTD)
    np.testing.assert_array_equal(other.log_domain_BTZ, before.log_domain_BTZ)
    counts = [
        np.sum(pull(model, domain_BT=domain)[1].routing.count_LZE, axis=1)
        for domain in (domain_BT, np.where(domain_BT >= 0, (domain_BT + 1) % N_SERVICES, -1))
    ]
    np.testing.assert_array_equal(*counts)  # counted under other domains, but routed alike
    assert np.all(counts[0].sum(axis=1) == 2 * np.sum(weight_BT > 0))
    item = BATCH.item_BT.copy()
    item[0, 2] = (item[0, 2] + 1) % SIZES.n_items
    _, after = pull(model, BATCH._replace(item_BT=item))
    changed = np.abs(np.asarray(after.log_domain_BTZ - before.log_domain_BTZ)).max(axis=-1)[0] > 0
    np.testing.assert_array_equal(changed, [False, False, True, True, False, False, False])


def test_repeats_are_identical_to_the_bit():
    model = make_model(mixture_config((1, 2)))
    once, again = pull(model), pull(model)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def draw_route(n_open_groups: int, n_slots: int = 25):
    """Operands of `route_slots` for slots of three services with seven memory slots, and the config."""
    rng, moe = np.random.default_rng(11), MoEConfig(layers=(0,), n_active=2, n_open_groups=n_open_groups, **SMALL)
    shapes = {"seen": (n_slots, D), "router": (8, D), "w_domain": (8, N_SERVICES), "w_profile": (8, 7), "bias": (8,)}
    operands = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    operands["log_domain"] = np.log(rng.dirichlet(np.ones(N_SERVICES), n_slots)).astype(np.float32)
    operands["relevance"] = rng.dirichlet(np.ones(7), n_slots).astype(np.float32)
    return operands, rng.integers(-1, N_SERVICES, n_slots).astype(np.int32), moe


def route(operands, domain_S, moe, profile: bool):
    o = operands
    relevance, w_profile = (o["relevance"], o["w_profile"]) if profile else (None, None)
    weights = (o["router"], o["w_domain"], w_profile, o["bias"])
    inputs = RouterInputs(o["log_domain"], domain_S, jnp.ones(len(domain_S), bool), relevance)
    return route_slots(o["seen"], inputs, *weights, moe, N_SERVICES)


def route_by_hand(operands, domain_S, moe, profile: bool):
    """Slot by slot in float64: shares of the chosen experts `[S, E]`, and the statistics by domain."""
    o = {name: np.asarray(x, np.float64) for name, x in operands.items()}
    share, probability, count = np.zeros((len(domain_S), 8)), *np.zeros((2, N_SERVICES, 8))
    for s, z in enumerate(domain_S):
        logits = o["router"] @ o["seen"][s] + o["w_domain"] @ o["log_domain"][s]
        if profile:
            logits = logits + o["w_profile"] @ o["relevance"][s]
        groups = {*np.argsort(-o["log_domain"][s])[: moe.n_open_groups or N_SERVICES], N_SERVICES}
        allowed = np.array([e // moe.n_per_group in groups for e in range(8)])
        p = np.where(allowed, np.exp(logits - logits.max()), 0)
        p /= p.sum()
        chosen = np.argsort(-np.where(allowed, logits + o["bias"], -np.inf))[: moe.n_active]
        share[s, chosen] = p[chosen] / p[chosen].sum()
        if z >= 0:
            probability[z] += p
            count[z, chosen] += 1
    return share, probability, count


@pytest.mark.parametrize("profile", [False, True], ids=["no profile", "profile"])
@pytest.mark.parametrize("n_open_groups", [0, 1, 2])
def test_routing_has_a_row_for_each_service_whatever_the_router_reads(n_open_groups, profile):
    """Values of what is chosen and of the statistics, and the gradients of all that the router reads."""
    operands, domain_S, moe = draw_route(n_open_groups)
    cotangents = np.random.default_rng(12).standard_normal((25, 8)), *random_like(np.zeros((1, N_SERVICES, 8)))

    def total(operands):
        routed = route(operands, jnp.asarray(domain_S), moe, profile)
        share = jnp.zeros((25, 8)).at[jnp.arange(25)[:, None], routed.expert_TA].add(routed.weight_TA)
        pulled = jnp.sum(share * cotangents[0]) + jnp.sum(routed.probability_ZE * cotangents[1])
        return pulled, (share, routed.probability_ZE, routed.count_ZE)

    gradients, found = jax.jit(jax.grad(total, has_aux=True))(operands)
    assert found[1].shape == found[2].shape == (N_SERVICES, 8)
    for value, expected in zip(found, route_by_hand(operands, domain_S, moe, profile), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)

    def by_hand(w):
        share, probability, _ = route_by_hand(w, domain_S, moe, profile)
        return np.sum(share * cotangents[0]) + np.sum(probability * cotangents[1])

    assert not np.any(gradients["bias"])
    assert profile == bool(np.any(gradients["w_profile"])) == bool(np.any(gradients["relevance"]))
    weights, slopes = ({name: np.asarray(x, np.float64) for name, x in tree.items()} for tree in (operands, gradients))
    oracle.assert_slopes(by_hand, weights, slopes, 1e-4)


def test_a_bias_steers_the_choice_and_leaves_the_probabilities():
    """Bit by bit the same probabilities; with a great bias everybody goes where it points."""
    operands, domain_S, moe = draw_route(0)
    plain, steered = (
        route(
            {**operands, "bias": jnp.where(jnp.isin(jnp.arange(8), jnp.asarray([2, 5])), b, 0.0)}, domain_S, moe, True
        )
        for b in (0.0, 100.0)
    )
    np.testing.assert_array_equal(steered.probability_ZE, plain.probability_ZE)
    np.testing.assert_array_equal(steered.lse_T, plain.lse_T)
    np.testing.assert_array_equal(np.sort(steered.expert_TA, axis=1), np.broadcast_to([2, 5], (25, 2)))
    assert np.any(np.sort(plain.expert_TA, axis=1) != [2, 5])
    np.testing.assert_allclose(np.sum(steered.weight_TA, axis=1), 1, rtol=1e-6)


def test_no_bias_is_among_the_parameters():
    config = make_config(moe=CASES["plain"], personal=PersonalConfig(layers=(0,), n_aspects=3, d_memory=4))
    names = oracle.read_weights(make_model(config))
    assert {name for name in names if ".ffn." in name and "_E" in name and name.startswith("groups[0]")} == {
        f"groups[0].ffn.{name}"
        for name in ("router_ED", "w_domain_EZ", "w_profile_EM", "gate_EDF", "up_EDF", "down_EFD")
    }
