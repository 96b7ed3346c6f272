"""What is written out of a pass: weights that make what the layers give, experts that the routing counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import MoEConfig, PersonalConfig
from moerec.nn.block import LayerContext
from moerec.nn.model import Predictor
from moerec.nn.model.inspect import _list_layers, trace_slots
from tests.small_model import make_batch, make_config, make_model, make_table

MOE = MoEConfig(layers=(1, 2), n_per_group=2, d_expert=6, n_active=3, tile=4)
PERSONAL = PersonalConfig(layers=(2,), n_aspects=2, n_scales=2, d_memory=4)


@pytest.fixture(scope="module")
def traced():
    model = make_model(make_config(n_layers=3, moe=MOE, personal=PERSONAL, window=4))
    batch, table = make_batch(1, [[5, 6], [9], [4, 3]], 12), make_table()
    catalog = model.bind(jax.tree.map(jnp.asarray, table))
    bias_LE = jnp.asarray(np.random.default_rng(3).normal(0, 0.3, (2, 8)), jnp.float32)
    predictor = Predictor(model, bias_LE)
    return predictor, batch, catalog, jax.jit(trace_slots)(predictor, batch, catalog)


def test_weights_of_slots_make_what_attention_gives(traced):
    """In the first layer, whose states are the slots' own: weights times values are what the heads put out."""
    predictor, batch, catalog, trace = traced
    model = predictor.params
    (block,) = _list_layers(model.groups[0])
    _, x_BTD = model._embed(batch, catalog, None)
    context = LayerContext(jnp.asarray(batch.position_BT), jnp.asarray(batch.segment_BT))
    y = block.attention_norm(x_BTD)
    *_, v_BTKH = block.attention.project(y, context.position_BT)
    v_BTNH = jnp.repeat(v_BTKH, 2, axis=2)
    by_hand = block.attention.project_out(jnp.einsum("BNTS,BSNH->BTNH", trace.attention_BLNTS[:, 0], v_BTNH))
    real = np.asarray(batch.segment_BT) > 0
    expected = block.attention(y, context.position_BT, context.segment_BT)
    np.testing.assert_allclose(np.asarray(by_hand)[real], np.asarray(expected)[real], atol=1e-5)


def test_a_layer_that_reads_the_profile_shares_its_weights_with_it(traced):
    *_, trace = traced
    assert trace.memory_BLNTM.shape[1] == 3
    np.testing.assert_array_equal(trace.memory_BLNTM[:, :2], 0)
    assert (np.abs(trace.memory_BLNTM[:, 2]) > 0).any()
    total = trace.attention_BLNTS.sum(-1) + trace.memory_BLNTM.sum(-1)
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_chosen_experts_are_those_that_the_routing_counts(traced):
    predictor, batch, catalog, trace = traced
    real = np.asarray(batch.segment_BT) > 0
    domain_BT = jnp.where(real, 0, -1)
    routing = predictor.encode(batch, catalog, domain_BT=domain_BT).routing
    for layer in range(2):
        counted = np.bincount(np.asarray(trace.expert_BLTA[:, layer])[real].ravel(), minlength=8)
        np.testing.assert_array_equal(counted, np.asarray(routing.count_LZE[layer, 0]))
    np.testing.assert_allclose(np.asarray(trace.weight_BLTA).sum(axis=-1), 1, atol=1e-5)
