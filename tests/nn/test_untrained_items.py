"""Items without a training event: no row, no negatives; and rows that are dropped in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import Config
from moerec.errors import InputError
from moerec.tasks import Draws, NextEvent
from moerec.train.step import _drop_rows, sum_losses
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table, target_of, with_target

UNTRAINED = [2, 7, 12]
COUNT = np.asarray(make_table().count_I).copy()
COUNT[UNTRAINED] = 0
TABLE = make_table()._replace(count_I=COUNT)
TRAINED = np.flatnonzero(COUNT)
BATCH = make_batch(3, [[5, 4], [7]], 9)
BATCH = with_target(BATCH, label_BT=TRAINED[target_of(BATCH).label_BT % len(TRAINED)].astype(np.int32))


def total(model, table, config):
    return sum_losses(model, BATCH, table, [NextEvent()], {"next_event": Draws()}, config).tasks["next_event"].total


loss_and_gradient = jax.jit(jax.value_and_grad(total), static_argnums=2)


class Frozen(Config):
    """A config that is an argument of a compiled function."""

    __hash__ = object.__hash__


def test_vectors_of_untrained_items_are_their_texts_and_one_vector_and_biases_their_services():
    model = make_model(make_config())
    vector, bias = model.head.vectors(jnp.arange(SIZES.n_items), TABLE, model.item_encoder)
    w = oracle.read_weights(model)
    own = oracle.part(w, "item_encoder")
    for item in range(SIZES.n_items):
        row = own["no_row_D"] if item in UNTRAINED else own["row_ID"][item]
        text = oracle.text_vector(oracle.part(own, "text"), TABLE.token_IW[item], 1e-6)
        np.testing.assert_allclose(vector[item], row + text, atol=1e-5)
        other = w["head.no_row_bias_Z"][TABLE.service_I[item]]
        np.testing.assert_allclose(bias[item], other if item in UNTRAINED else w["head.bias_I"][item], rtol=1e-6)


def test_untrained_items_are_no_negatives_and_their_rows_learn_nothing():
    """The loss is that of a softmax over the trained items alone."""
    model, config = make_model(make_config()), Frozen(model=make_config())
    loss, gradient = loss_and_gradient(model, jax.tree.map(jnp.asarray, TABLE), config)
    outputs = model.encode(BATCH, TABLE)
    vector, bias = (np.asarray(x) for x in model.head.vectors(jnp.arange(SIZES.n_items), TABLE, model.item_encoder))
    label, weight = target_of(BATCH)
    expected = 0.0
    for place in zip(*np.nonzero(weight), strict=True):
        score = vector[TRAINED] @ np.asarray(outputs.state_BTD[place]) + bias[TRAINED]
        expected -= weight[place] * np.log(oracle.softmax(score)[label[place] == TRAINED][0])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert not np.any(np.asarray(gradient.item_encoder.row_ID[...])[UNTRAINED])
    assert not np.any(np.asarray(gradient.head.bias_I[...])[UNTRAINED])
    assert np.any(np.asarray(gradient.item_encoder.row_ID[...])[TRAINED])


def test_rows_of_untrained_items_may_be_kept_as_negatives():
    model, config = make_model(make_config(untrained_rows=True)), Frozen(model=make_config(untrained_rows=True))
    assert model.item_encoder.no_row_D is None
    _, gradient = loss_and_gradient(model, jax.tree.map(jnp.asarray, TABLE), config)
    assert np.all(np.any(np.asarray(gradient.item_encoder.row_ID[...]) != 0, axis=1))


def test_dropped_rows_are_drawn_anew_each_step_as_often_as_asked_and_learn_nothing():
    config = Frozen(model=make_config(row_dropout=0.4))
    catalog = jax.tree.map(jnp.asarray, TABLE)
    drawn = [_drop_rows(catalog, jax.random.key(step), config).has_row_I for step in range(400)]
    kept = np.mean(drawn, axis=0)
    assert not kept[UNTRAINED].any()
    np.testing.assert_allclose(kept[TRAINED], 0.6, atol=0.12)
    assert np.mean(kept[TRAINED]) == pytest.approx(0.6, abs=0.03)
    assert np.any(drawn[0] != drawn[1])
    dropped = catalog._replace(has_row_I=drawn[0])
    _, gradient = loss_and_gradient(make_model(config.model), dropped, config)
    lost = np.flatnonzero(~np.asarray(drawn[0]))
    assert not np.any(np.asarray(gradient.item_encoder.row_ID[...])[lost])
    assert not np.any(np.asarray(gradient.head.bias_I[...])[lost])
    assert np.any(np.asarray(gradient.item_encoder.no_row_D[...]))
    assert _drop_rows(catalog, jax.random.key(0), Config()) is catalog


def test_row_dropout_needs_texts_and_no_rows_of_untrained_items():
    for fields in ({"item_text": False}, {"untrained_rows": True}):
        with pytest.raises(InputError, match=r"model\.row_dropout"):
            Config(model=dataclasses.replace(make_config(), row_dropout=0.2, **fields))
    for name in ("text", "transition", "crossing"):
        with pytest.raises(InputError, match=rf"model\.{name}_pointer.*data\.{name}_neighbors"):
            Config(model=make_config(**{f"{name}_pointer": True}))
