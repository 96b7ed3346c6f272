"""The mixture layer and models with it, against loops over slots and experts; and its symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import ModelConfig, MoEConfig
from moerec.errors import InputError
from moerec.nn.block import split_layers
from moerec.nn.layers import SwiGLU
from moerec.nn.moe.experts import DomainExperts, RouterInputs, count_experts
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, fill, make_batch, make_config, make_model, make_table, worst_gap

N_SERVICES, D = 3, 8
TABLE = make_table()
BATCH = make_batch(4, [[4, 2]], 7)
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
def apply(layer, x, request):
    return layer(x, request, None)


@pytest.mark.parametrize("name", CASES)
def test_layer_and_gradients_are_those_of_a_loop_over_experts(name):
    layer, x, request = draw_layer(CASES[name])
    cotangent = np.random.default_rng(3).standard_normal(x.shape)

    def weighted(layer, x, log_domain):
        y, _ = layer(x, request._replace(log_domain_BTZ=log_domain), None)
        return jnp.sum(y * cotangent), y

    gradient_of = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (d_layer, d_x, d_prior), y = gradient_of(layer, x, request.log_domain_BTZ)

    def expected(w):
        segment = request.real_BT[0].astype(int)
        return oracle.mixture(w, w["x"], w["prior"], segment, CASES[name])

    inputs = {"x": x[0].astype(np.float64), "prior": request.log_domain_BTZ[0].astype(np.float64)}
    weights = {**oracle.read_weights(layer), **inputs}
    np.testing.assert_allclose(y[0], expected(weights), atol=2e-5)
    found = {**oracle.read_weights(d_layer), "x": np.asarray(d_x[0]), "prior": np.asarray(d_prior[0])}
    assert not np.any(found["bias_E"])
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
            count[z, np.argsort(-(logits + w["bias_E"]))[:2]] += 1
            square += np.log(np.sum(np.exp(logits))) ** 2
    np.testing.assert_allclose(routing.probability_LZE, probability, atol=1e-5)
    np.testing.assert_array_equal(routing.count_LZE, count)
    assert float(routing.square_lse_L) == pytest.approx(square, rel=1e-5)
    assert float(routing.dropped_L3.sum()) == 0


def permute(layer: DomainExperts, order: np.ndarray) -> DomainExperts:
    layer = jax.tree.map(lambda leaf: leaf, layer)
    for name in ("router_ED", "w_domain_EZ", "bias_E", "gate_EDF", "up_EDF", "down_EFD"):
        weight = getattr(layer, name)
        weight[...] = weight[...][order]
    return layer


def test_permuting_experts_permutes_the_sums_and_nothing_else():
    layer, x, request = draw_layer(CASES["plain"])
    order = np.random.default_rng(1).permutation(8)
    (y, sums), (other_y, other_sums) = apply(layer, x, request), apply(permute(layer, order), x, request)
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
    layer.bias_E[...] = jnp.where(jnp.arange(8) < 2, 100.0, 0.0)  # all to the first two
    y, sums = jax.jit(lambda key: layer(x, request, key))(jax.random.key(0))
    capacity = round(32 * 2 / 8)  # two of the slots are padding
    assert int(sums.dropped_L3.sum()) == 2 * (32 - capacity)
    norms = np.linalg.norm(y[0], axis=-1)
    np.testing.assert_array_equal(norms > 0, np.arange(34) < capacity)
    assert int(apply(layer, x, request)[1].dropped_L3.sum()) == 0  # answers do not depend on who else asks


def test_jitter_is_a_function_of_its_key_and_off_without_one():
    layer, x, request = draw_layer(MoEConfig(layers=(0,), n_active=2, jitter_rate=0.3, **SMALL))
    jittered = jax.jit(lambda k: layer(x, request, k)[0])
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
    assert runs(0, 2) == [(*plain, 0, 0), (*mixed, 0, 1), (*plain, 1, 2), (*mixed, 2, 3)]


@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
def test_the_model_and_its_gradients_are_those_of_the_numpy_model(layers):
    config = mixture_config(layers)
    model = make_model(config)
    rng = np.random.default_rng(5)
    shapes = ((1, 7, 8), (1, 7, N_SERVICES))
    cotangent, domain_cotangent = (rng.standard_normal(shape) for shape in shapes)

    def weighted(model):
        out = model.encode(BATCH, TABLE)
        return jnp.sum(out.state_BTD * cotangent) + jnp.sum(out.log_domain_BTZ * domain_cotangent), out

    gradients, out = jax.jit(jax.grad(weighted, has_aux=True))(model)
    weights = oracle.read_weights(model)
    arguments = (BATCH, TABLE, config, SIZES.context_sizes)
    np.testing.assert_allclose(out.state_BTD, oracle.encode(weights, *arguments), atol=5e-5)
    np.testing.assert_allclose(out.log_domain_BTZ, oracle.posterior(weights, *arguments), atol=5e-5)
    assert out.routing.count_LZE.shape == (len(layers), N_SERVICES, N_SERVICES + 1)

    def total(w):
        states = oracle.encode(w, *arguments, frozen=weights)  # what the routers read has no gradient
        return np.sum(states * cotangent) + np.sum(oracle.posterior(w, *arguments) * domain_cotangent)

    oracle.assert_slopes(total, weights, oracle.read_weights(gradients), 2e-4)


def test_remat_changes_nothing():
    def value_and_gradients(remat):
        config = make_config(n_layers=2, remat=remat, moe=mixture_config((1,)).moe)
        model = make_model(config)
        total = jax.jit(jax.value_and_grad(lambda m: jnp.sum(m.encode(BATCH, TABLE).state_BTD ** 2)))
        value, gradients = total(model)
        return value, jax.tree.leaves(gradients)

    assert worst_gap(value_and_gradients(True), value_and_gradients(False)) < 1e-3


def test_states_posterior_and_routing_know_nothing_of_the_answer_or_of_later_slots():
    model = make_model(mixture_config((1, 2)))
    encode = jax.jit(lambda batch, table: model.encode(batch, table))
    before = encode(BATCH, TABLE)
    other = encode(BATCH._replace(target_BT=(BATCH.target_BT + 1) % SIZES.n_items), TABLE)
    np.testing.assert_array_equal(other.state_BTD, before.state_BTD)
    np.testing.assert_array_equal(other.log_domain_BTZ, before.log_domain_BTZ)
    np.testing.assert_allclose(
        np.sum(other.routing.count_LZE, axis=1), np.sum(before.routing.count_LZE, axis=1)
    )  # counted under other domains, but routed alike
    item = BATCH.item_BT.copy()
    item[0, 2] = (item[0, 2] + 1) % SIZES.n_items
    after = encode(BATCH._replace(item_BT=item), TABLE)
    changed = np.abs(np.asarray(after.log_domain_BTZ - before.log_domain_BTZ)).max(axis=-1)[0] > 0
    np.testing.assert_array_equal(changed, [False, False, True, True, False, False, False])


def test_repeats_are_identical_to_the_bit():
    model = make_model(mixture_config((1,)))
    step = jax.jit(jax.value_and_grad(lambda m: jnp.sum(m.encode(BATCH, TABLE).state_BTD ** 2)))
    once, again = step(model), step(model)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
