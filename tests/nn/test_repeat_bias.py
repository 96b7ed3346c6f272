"""The softmax knows the items of the history: what it adds to their scores, and that training minimises the same."""

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config, LossConfig
from moerec.nn.model import Predictor
from moerec.tasks import Draws, NextEvent
from moerec.train.step import sum_losses
from moerec.types import EVENT
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table, target_of

TABLE = jax.tree.map(jnp.asarray, make_table())
BATCH = make_batch(3, [[5, 4], [7], [1, 2, 3]], 9, control=True)
SLOTS = np.flatnonzero(BATCH.segment_BT > 0)


def with_bias(model, bias_Z):
    model = jax.tree.map(lambda x: x, model)
    model.head.repeat_Z[...] = jnp.asarray(bias_Z)
    return model


@jax.jit
def score(model, slot_Q):
    batch = jax.tree.map(jnp.asarray, BATCH)
    return Predictor(model, None).score(batch, slot_Q, model.bind(TABLE))


def test_items_of_the_history_have_the_bias_of_their_service():
    """Those of the same sequence, up to the slot's own event, once however often it is there; and none at slot -1."""
    model = make_model(make_config(repeat_bias=True), 1)
    bias_Z = np.array([-1.5, 0.25, 2.0], np.float32)
    slot_Q = np.array([-1, *SLOTS], np.int32)
    plain, found = (np.asarray(score(with_bias(model, x), slot_Q)) for x in (0 * bias_Z, bias_Z))
    n_slots = BATCH.item_BT.shape[1]
    expected = np.zeros_like(plain)
    for q, flat in enumerate(slot_Q[1:].tolist(), start=1):
        b, t = divmod(flat, n_slots)
        for s in range(t + 1):
            if BATCH.segment_BT[b, s] == BATCH.segment_BT[b, t] and BATCH.kind_BT[b, s] == EVENT:
                expected[q, BATCH.item_BT[b, s]] = bias_Z[TABLE.service_I[BATCH.item_BT[b, s]]]
    assert (expected != 0).any()
    np.testing.assert_allclose(found - plain, expected, atol=1e-5)


def test_training_minimises_what_is_scored_in_value_and_gradient():
    config = Config(model=make_config(repeat_bias=True, pointer="none"), loss=LossConfig(kind="full_softmax", chunk=4))
    model = with_bias(make_model(config.model, 1), [-1.5, 0.25, 2.0])
    label_BT, weight_BT = target_of(BATCH)

    def by_loss(model):
        draws = {"next_event": Draws()}
        return sum_losses(model, BATCH, TABLE, [NextEvent()], draws, config).tasks["next_event"].parts["loss"]

    def by_score(model):
        log_p = jax.nn.log_softmax(score(model, SLOTS))
        return -jnp.sum(weight_BT.reshape(-1)[SLOTS] * log_p[jnp.arange(len(SLOTS)), label_BT.reshape(-1)[SLOTS]])

    found, expected = (jax.jit(jax.value_and_grad(f))(model) for f in (by_loss, by_score))
    assert SIZES.n_services == 3
    assert np.abs(found[1].head.repeat_Z[...]).min() > 1e-3
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(x[1]) for x in (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
