"""Balance over the global batch: what is asked of the experts, the losses by hand, and where the bias goes."""

import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import LossConfig, MoEConfig
from moerec.nn.moe.balance import balance_losses, describe_load, target_load, update_bias, weigh_losses
from moerec.types import Routing

MOE = MoEConfig(layers=(0,), n_per_group=2, n_active=2, own_group_fraction=0.6, cross_group_fraction=0.3, bias_rate=0.1)


def draw_routing(n_layers: int = 2, slots=(30, 10, 0), seed: int = 0) -> Routing:
    """Sums of slots with random probabilities, of which each takes its two best experts."""
    rng = np.random.default_rng(seed)
    probability, count = np.zeros((2, n_layers, 3, 8))
    for layer in range(n_layers):
        for z, n in enumerate(slots):
            p = rng.dirichlet(np.ones(8), n)
            probability[layer, z] = p.sum(axis=0)
            count[layer, z] = np.bincount(np.argsort(-p, axis=1)[:, :2].reshape(-1), minlength=8)
    columns = (probability, count, rng.uniform(1, 9, n_layers), np.arange(3 * n_layers).reshape(n_layers, 3))
    return Routing(*(jnp.asarray(c, jnp.float32) for c in columns))


def test_a_domain_asks_for_its_own_group_for_the_cross_group_and_for_a_little_of_the_others():
    share = target_load(MOE, 3)
    np.testing.assert_allclose(share[1], [0.025, 0.025, 0.3, 0.3, 0.025, 0.025, 0.15, 0.15], rtol=1e-6)
    np.testing.assert_allclose(target_load(MOE, 1), [[1 / 3, 1 / 3, 1 / 6, 1 / 6]], rtol=1e-6)


def test_losses_by_hand():
    routing = draw_routing()
    losses = balance_losses(routing, MOE)
    q = target_load(MOE, 3)
    n = np.array([30, 10, 0])
    overall, within = [], []
    for p, c in zip(np.asarray(routing.probability_LZE), np.asarray(routing.count_LZE), strict=True):
        asked = n @ q / 40
        overall.append(sum(c[:, e].sum() / 80 * p[:, e].sum() / 40 / asked[e] for e in range(8)))
        by_domain = [sum(c[z, e] / (2 * n[z]) * p[z, e] / n[z] / q[z, e] for e in range(8)) for z in (0, 1)]
        within.append(0.75 * by_domain[0] + 0.25 * by_domain[1])
    assert float(losses["balance"]) == pytest.approx(np.mean(overall), rel=1e-5)
    assert float(losses["domain_balance"]) == pytest.approx(np.mean(within), rel=1e-5)
    assert float(losses["router_z"]) == pytest.approx(np.mean(np.asarray(routing.square_lse_L)) / 40, rel=1e-5)
    weighted = weigh_losses(losses, LossConfig(balance_weight=2, domain_balance_weight=3, router_z_weight=5))
    parts = 2 * losses["balance"] + 3 * losses["domain_balance"] + 5 * losses["router_z"]
    assert float(weighted) == pytest.approx(float(parts), rel=1e-6)


def as_asked(n: np.ndarray) -> Routing:
    load = (n[:, None] * target_load(MOE, 3))[None]
    return Routing(jnp.asarray(load), jnp.asarray(2 * load), jnp.zeros(1), jnp.zeros((1, 3)))


@pytest.mark.parametrize("slots", [(40, 0, 0), (10, 20, 30)], ids=str)
def test_load_as_asked_costs_one_and_leaves_the_bias(slots):
    """A batch of one domain alone is to load its group: that is balance, not its absence."""
    routing = as_asked(np.array(slots, np.float32))
    losses = balance_losses(routing, MOE)
    assert float(losses["balance"]) == pytest.approx(1, rel=1e-5)
    assert float(losses["domain_balance"]) == pytest.approx(1, rel=1e-5)
    even = MoEConfig(
        layers=(0,), n_per_group=2, n_active=2, own_group_fraction=0.5, cross_group_fraction=0.25, bias_rate=0.1
    )
    count = routing.count_LZE[:, :, :1] * 0 + 8 * jnp.asarray(target_load(even, 3))  # powers of two: nothing is rounded
    np.testing.assert_array_equal(update_bias(jnp.ones((1, 8)), routing._replace(count_LZE=count), even), 1)


def test_even_load_of_a_batch_of_one_domain_costs_more():
    even = jnp.full((1, 3, 8), 5.0) * jnp.array([1.0, 0, 0])[:, None]
    losses = balance_losses(Routing(even, 2 * even, jnp.zeros(1), jnp.zeros((1, 3))), MOE)
    assert float(losses["balance"]) > 2
    assert float(losses["domain_balance"]) > 2


def test_balance_of_parts_is_not_that_of_the_whole():
    """Which is why sums are added up over microbatches and devices, and losses are not."""
    parts = [draw_routing(slots=slots, seed=seed) for seed, slots in enumerate([(30, 0, 0), (0, 10, 0), (1, 1, 8)])]
    whole = Routing(*(sum(column) for column in zip(*parts, strict=True)))
    joint = float(balance_losses(whole, MOE)["balance"])
    assert abs(np.mean([float(balance_losses(part, MOE)["balance"]) for part in parts]) - joint) > 0.01


def test_the_bias_rises_where_load_is_short_and_falls_where_it_is_over():
    routing = as_asked(np.array([10, 20, 30], np.float32))
    count = routing.count_LZE.at[0, 0, 3].add(7.0).at[0, 0, 0].add(-1.0)
    moved = np.asarray(update_bias(jnp.zeros((1, 8)), routing._replace(count_LZE=count), MOE))[0]
    assert moved[3] == pytest.approx(-0.1)
    assert moved[0] == pytest.approx(0.1)


def test_without_slots_nothing_is_lost_and_all_is_finite():
    empty = draw_routing(slots=(0, 0, 0))
    losses = balance_losses(empty, MOE)
    assert all(np.isfinite(float(x)) for x in losses.values())
    assert np.all(np.asarray(update_bias(jnp.ones((2, 8)), empty, MOE)) == 1)


def test_load_is_a_share_for_each_service():
    told = describe_load(draw_routing())
    load = np.array(told["load"])
    np.testing.assert_allclose(load[:2].sum(axis=1), 1, rtol=1e-6)
    assert (told["dropped"], told["dropped_by"]) == (15, {"capacity": 3, "sender": 5, "receiver": 7})
    count = np.asarray(draw_routing().count_LZE).sum(axis=1)
    assert told["max_over_mean"] == pytest.approx(np.max(count.max(axis=1) / count.mean(axis=1)))
