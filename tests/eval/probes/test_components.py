"""A component taken away is one whose gate is shut; what targets lose, and which have no more than a guess then."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moerec.eval.metrics import RankCounts, Ranks, ScoredRanks
from moerec.eval.probes import components
from moerec.eval.probes.components import evaluate_components
from moerec.nn.heads.service_answers import component_names
from moerec.nn.model import Predictor
from tests.nn.test_asking import ASK, ASKED_SIZES, BATCH, CATALOG, KINDS, LAST
from tests.small_model import make_config, make_model

SERVICES = ("a", "b", "c")
MODELS = {
    "dense": {"pointer": "services", "text_pointer": True, "transition_pointer": True, "crossing_pointer": True},
    "asked": {"pointer": "services", "ask": ASK, **KINDS["near"]},
    "copies alone": {"pointer": "services", "ask": ASK},
}


@jax.jit
def score(predictor: Predictor):
    slot_Q = jnp.asarray([-1, *LAST], jnp.int32)
    batch = jax.tree.map(jnp.asarray, BATCH)
    return jax.nn.log_softmax(predictor.score(batch, slot_Q, predictor.params.bind(CATALOG)))


def shut(model, place: int):
    """The model without a component: its gate gets no weight, and the softmax of the gates is over the others."""
    graph, params = nnx.split(model)
    params = jax.tree.map(lambda x: x, params)
    head = params.head.get("aggregator", params.head)
    head.gate_bias = head.gate_bias.replace(head.gate_bias[...].at[..., place].set(-1e5))
    return nnx.merge(graph, params)


@pytest.mark.parametrize("kind", MODELS)
def test_a_component_taken_away_is_one_whose_gate_is_shut(kind):
    model = make_model(make_config(n_layers=3, **MODELS[kind]), 1, ASKED_SIZES)
    own = score(Predictor(model, None, 1.3))
    names = component_names(model.config, SERVICES)
    for place, name in enumerate(names):
        found = score(Predictor(model, None, 1.3, jnp.asarray(place)))
        expected = score(Predictor(shut(model, place), None, 1.3))
        np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=2e-6, err_msg=name)
        assert np.abs(found[0] - own[0]).max() == 0  # where nothing is known no pointer points
        assert np.abs(np.exp(found[1:]) - np.exp(own[1:])).max() > 1e-3, name


def test_targets_that_fall_to_the_floor_are_counted(monkeypatch):
    """Eight items: a guess has 1/8. Of three targets the first is as likely as before, the second falls, and the third
    had less than a guess all along.
    """
    log_p = {None: [-0.5, -1.0, -5.0], 0: [-0.5, -90.0, -7.0], 1: [-0.5, -2.0, -1.0]}

    def rank_by_hand(predictor, examples, catalog):
        counts = RankCounts(np.zeros(3, int), np.ones(3, int))
        place = None if predictor.without is None else int(predictor.without)
        return ScoredRanks(Ranks(counts, counts), np.array(log_p[place]))

    monkeypatch.setattr(components, "rank_targets", rank_by_hand)
    monkeypatch.setattr(components, "component_names", lambda *_: ["softmax", "own"])
    last = types.SimpleNamespace(owner=np.arange(3), rows=np.arange(3))
    examples = types.SimpleNamespace(
        dataset=types.SimpleNamespace(
            log=types.SimpleNamespace(item=np.arange(3)), catalogue=types.SimpleNamespace(n_items=8, services=("a",))
        ),
        histories=types.SimpleNamespace(last=lambda _: last),
        targets=np.arange(3),
        target_item=np.arange(3),
    )
    predictor = Predictor(make_model(make_config()), None)
    found = evaluate_components(predictor, examples, None, np.ones(8))
    assert found["softmax"]["all"]["fell"] == pytest.approx(1 / 3)
    assert found["softmax"]["all"]["log_p"] == pytest.approx((np.log(8) - 1.0) / 3)
    assert found["own"]["all"]["fell"] == 0
    assert found["own"]["all"]["log_p"] == pytest.approx((1.0 + 1.0 - np.log(8)) / 3)
