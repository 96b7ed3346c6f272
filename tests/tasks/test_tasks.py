"""Tasks and losses of one's own: what the registries take and refuse, and a loss in a model with pointers."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import AskConfig, Config, LossConfig, ModelConfig, TrainConfig
from moerec.errors import InputError
from moerec.nn.attention import causal_segment_mask
from moerec.tasks import Draws, NextEvent, check_loss, draw_one_each, draw_shared, make_tasks, register_loss
from moerec.tasks.base import TASKS, find_domains, render_targets
from moerec.tasks.losses import LOSSES, DrawInputs, make_sampling_table
from moerec.train.state import start_state
from moerec.train.step import make_train_step, sum_losses
from moerec.types import EVENT
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table, target_of

TABLE = make_table()
ON_DEVICE = jax.tree.map(jnp.asarray, TABLE)
BATCH = make_batch(3, [[5, 3], [7]], 9, control=True)


@pytest.fixture
def losses(monkeypatch):
    """What is registered during a test is forgotten after it."""
    monkeypatch.setattr(LOSSES, "_found", dict(LOSSES._found))


def focal(targets, candidates, config):
    """Lin et al. (2017)."""
    log_p = targets.log_prob(candidates)
    return -jnp.sum(targets.weight_S * (1 - jnp.exp(log_p)) ** 2 * log_p)


def unbounded(targets, candidates, config):
    return -jnp.sum(targets.weight_S * targets.score(targets.target_S))


@pytest.mark.usefixtures("losses")
def test_a_name_that_is_taken_is_refused_to_another_function_and_given_to_the_same_one_again():
    register_loss("focal")(focal)
    with pytest.raises(InputError, match=r"loss 'focal': the name is taken by focal"):
        register_loss("focal")(unbounded)
    with pytest.raises(InputError, match=r"loss 'full_softmax': the name is taken"):
        register_loss("full_softmax")(focal)
    assert LOSSES["focal"].function is focal
    # A module that is read again makes the function anew.
    again = types.FunctionType(focal.__code__, focal.__globals__, "focal")
    again.__qualname__ = focal.__qualname__
    assert register_loss("focal", draw=draw_shared)(again) is again
    assert (LOSSES["focal"].function, LOSSES["focal"].draw) == (again, draw_shared)


@pytest.mark.parametrize(
    ("field", "look_up"),
    [
        ("loss.kind", lambda: check_loss(Config(loss=LossConfig(kind="nonesuch")))),
        ("tasks", lambda: make_tasks(Config(tasks=("next_event", "nonesuch")))),
    ],
)
def test_a_name_that_is_not_registered_gives_one_line_with_its_field_and_the_plugin_flag(field, look_up):
    with pytest.raises(InputError) as caught:
        look_up()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"config.{field}: 'nonesuch' is none of ")
    assert "--plugin=MODULE" in message
    for known in {"loss.kind": ("full_softmax", "sampled_softmax", "one_negative"), "tasks": ("next_event",)}[field]:
        assert re.search(rf"\b{known}\b", message)


@pytest.mark.usefixtures("losses")
def test_pointers_need_a_loss_that_is_a_function_of_the_probability_among_all_items():
    register_loss("focal")(focal)
    register_loss("unbounded", is_normalised=False)(unbounded)
    with_pointers, without = (ModelConfig(pointer=pointer) for pointer in ("services", "none"))
    for loss in (
        LossConfig(kind="unbounded"),
        LossConfig(kind="one_negative"),
        LossConfig(kind="focal", scope="service"),
        LossConfig(kind="sampled_softmax", scope="service"),
    ):
        with pytest.raises(InputError, match=r"^config\.model\.pointer: .*loss\.kind, loss\.scope"):
            check_loss(Config(model=with_pointers, loss=loss))
        check_loss(Config(model=without, loss=loss))
    for kind in ("focal", "full_softmax", "sampled_softmax"):
        check_loss(Config(model=with_pointers, loss=LossConfig(kind=kind)))


def dense_probability(model, outputs, vector_ID, bias_I) -> jax.Array:
    """`[B, T, I]`, p(item) of all items at once: the softmax, and the pointers' shares added where their events are."""
    softmax = jax.nn.softmax(outputs.state_BTD @ vector_ID.T + bias_I)
    log_weight_BTX, copy_BTS = outputs.pointers.log_weight_BTX, outputs.pointers.copy_BTS
    one_hot_BSI = jax.nn.one_hot(BATCH.item_BT, SIZES.n_items) * (BATCH.kind_BT == EVENT)[..., None]
    return jnp.exp(log_weight_BTX[..., :1]) * softmax + jnp.einsum("BTS,BSI->BTI", copy_BTS, one_hot_BSI)


WITH_POINTERS = make_config(n_layers=1, pointer="services", d_pointer=6)


@functools.cache
def dense_focal():
    """The loss and what each slot's probabilities add up to, and the gradients."""
    label_BT, weight_BT = target_of(BATCH)

    def dense(model):
        vector_ID, bias_I = model.head.vectors(jnp.arange(SIZES.n_items), ON_DEVICE, model.item_encoder)
        p_BTI = dense_probability(model, model.encode(BATCH, ON_DEVICE), vector_ID, bias_I)
        p_BT = jnp.take_along_axis(p_BTI, label_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(weight_BT * (1 - p_BT) ** 2 * -jnp.log(p_BT)), jnp.sum(p_BTI, axis=-1)

    return jax.jit(jax.value_and_grad(dense, has_aux=True))(make_model(WITH_POINTERS))


@pytest.mark.usefixtures("losses")
@pytest.mark.parametrize("chunk", [4, 18])
def test_a_loss_of_ones_own_has_the_value_and_gradients_of_a_dense_computation(chunk):
    """Of all the model's parameters, pointers included; S is 18."""
    register_loss("focal")(focal)
    config = Config(model=WITH_POINTERS, loss=LossConfig(kind="focal", chunk=chunk))
    model, weight_BT, task = make_model(config.model), target_of(BATCH).weight_BT, NextEvent()
    assert task.binds_catalog(config)
    draws = task.draw(jax.random.key(0), BATCH, ON_DEVICE, task.constants(TABLE, config), config)
    assert draws == Draws()

    def ours(model):
        bound = model.bind(ON_DEVICE)
        sums = task.loss(model, model.encode(BATCH, bound), BATCH, bound, draws, config)
        assert sums.parts.keys() == {"loss"}
        return sums.total, sums.weight

    (value, weight), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(model)
    (expected, mass), dense_gradients = dense_focal()
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(weight) == weight_BT.sum()
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(dense_gradients))
    for found, by_hand in zip(jax.tree.leaves(gradients), jax.tree.leaves(dense_gradients), strict=True):
        np.testing.assert_allclose(found, by_hand, atol=1e-5 * largest)
    assert np.abs(gradients.head.aggregator.query_DGH[...]).max() > 1e-4
    # And of a computation of the mixture in float64 NumPy.
    w = oracle.read_weights(model)
    states = oracle.encode(w, BATCH, TABLE, config.model, SIZES.context_sizes)
    assert float(value) == pytest.approx(focal_by_hand(w, states, config.model), rel=1e-4)


def focal_by_hand(w, states, config) -> float:
    """Slot by slot, from the states."""
    total, (label_BT, weight_BT) = 0.0, target_of(BATCH)
    items = [
        oracle.item_vector(oracle.part(w, "item_encoder"), i, TABLE, config.norm_eps) for i in range(SIZES.n_items)
    ]
    head, n_groups = oracle.part(w, "head.aggregator"), SIZES.n_services + 1
    mask = np.asarray(causal_segment_mask(BATCH.segment_BT))
    for b, t in zip(*np.nonzero(weight_BT), strict=True):
        h = states[b, t]
        seen = [s for s in range(t + 1) if mask[b, t, s] and BATCH.kind_BT[b, s] == EVENT]
        logits = head["gate_bias"] + h @ head["weight_DX"]
        hits = [0.0] * n_groups
        for g in range(n_groups):
            own = [s for s in seen if g == SIZES.n_services or TABLE.service_I[BATCH.item_BT[b, s]] == g]
            if not own:
                logits[g + 1] = -np.inf
                continue
            x = oracle.embed(w, BATCH, TABLE, config, SIZES.context_sizes, b)
            place, theta = BATCH.position_BT[b], config.rope_theta
            query = oracle.rope(h @ head["query_DGH"][:, g], place[t], theta)
            keys = [oracle.rope(x[s] @ head["key_DGH"][:, g], place[s], theta) for s in own]
            share = oracle.softmax(np.array([query @ key for key in keys]) / np.sqrt(len(query)))
            hits[g] = sum(p for p, s in zip(share, own, strict=True) if BATCH.item_BT[b, s] == label_BT[b, t])
        p_softmax = oracle.softmax(np.array([item @ h for item in items]) + w["head.bias_I"])[label_BT[b, t]]
        p = oracle.softmax(logits) @ [p_softmax, *hits]
        total += weight_BT[b, t] * (1 - p) ** 2 * -np.log(p)
    return float(total)


def test_what_is_drawn_goes_with_the_rows_or_is_shared_as_the_loss_says():
    key, task = jax.random.key(3), NextEvent()
    config = {kind: Config(loss=LossConfig(kind=kind, n_negatives=6)) for kind in LOSSES.names()}
    draws = {kind: task.draw(key, BATCH, ON_DEVICE, task.constants(TABLE, c), c) for kind, c in config.items()}
    assert draws["full_softmax"] == Draws()
    assert draws["sampled_softmax"].by_row is None
    assert draws["sampled_softmax"].shared.item_J.shape == (6,)
    assert draws["one_negative"].shared is None
    assert draws["one_negative"].by_row.item_J.shape == BATCH.item_BT.shape
    assert {kind for kind, c in config.items() if task.binds_catalog(c)} == {"full_softmax"}
    inputs = DrawInputs(target_of(BATCH).label_BT, ON_DEVICE, make_sampling_table(TABLE.count_I, 0.5, True), None)
    inputs = inputs._replace(config=LossConfig(kind="one_negative", scope="service"))
    drawn = draw_one_each(key, inputs)
    np.testing.assert_array_equal(TABLE.service_I[drawn.item_J], TABLE.service_I[inputs.target_BT])
    assert not np.any(drawn.correction_J)


def test_the_domain_of_a_slot_is_the_service_of_its_target_where_that_counts():
    tasks = make_tasks(Config())
    label_BT, weight_BT = target_of(BATCH)
    domain_BT = find_domains(tasks, BATCH, ON_DEVICE)
    np.testing.assert_array_equal(domain_BT, np.where(weight_BT > 0, TABLE.service_I[label_BT], -1))
    assert [task.name for task in tasks] == ["next_event"]


def test_the_targets_are_the_next_items_of_all_slots_but_padding():
    """Control slots have one, too."""
    packed = types.SimpleNamespace(batch=BATCH, next_item_BT=np.arange(18).reshape(2, 9))
    target = render_targets(make_tasks(Config()), packed)["next_event"]
    np.testing.assert_array_equal(target.label_BT, packed.next_item_BT)
    np.testing.assert_array_equal(target.weight_BT, BATCH.segment_BT > 0)
    assert target.weight_BT.dtype == np.float32


class Renamed(NextEvent):
    """A task under another name than its own."""


class Quiet(NextEvent):
    """Next items under another name, without a part that is called `loss`."""

    name = "quiet"

    def loss(self, *arguments):
        sums = super().loss(*arguments)
        return sums._replace(parts={"items": sums.parts["loss"]})


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(TASKS, "_found", {**TASKS._found, "renamed": Renamed, "quiet": Quiet})


@pytest.mark.usefixtures("tasks")
def test_tasks_have_their_own_names_and_each_stands_once():
    assert [task.name for task in make_tasks(Config(tasks=("next_event", "quiet")))] == ["next_event", "quiet"]
    with pytest.raises(InputError, match=r"config\.tasks: 'next_event' is given twice"):
        make_tasks(Config(tasks=("next_event", "quiet", "next_event")))
    with pytest.raises(InputError, match=r"config\.tasks: 'renamed' is a task that calls itself 'next_event'"):
        make_tasks(Config(tasks=("renamed",)))
    asked = ModelConfig(n_layers=2, ask=AskConfig(from_layer=1))
    with pytest.raises(InputError, match=r"config\.tasks: where services are asked"):
        make_tasks(Config(model=asked, tasks=("quiet",)))


@functools.cache
def draw_tasks():
    """A model, and a batch in which `quiet` has half of the weight in half of the rows."""
    model = make_config(n_layers=1, item_text=False, event_time=False, dropout=0.0)
    config = Config(model=model, loss=LossConfig(chunk=4), train=TrainConfig(batch_size=4))
    batch = make_batch(5, [[6, 2], [7], [3], [0]], 8, control=True)
    target = target_of(batch)
    less = target._replace(weight_BT=target.weight_BT * np.array([[0.5], [1], [0], [1]], np.float32))
    return config, make_model(model, seed=2), batch._replace(targets={"next_event": target, "quiet": less})


@functools.cache
def means_alone():
    """Of each task the mean of its loss and the gradient of that, as if there were no other, over the whole batch."""
    config, model, batch = draw_tasks()

    @jax.jit
    def pull(params, target):
        def mean(params):
            own = batch._replace(targets={"next_event": target})
            sums = sum_losses(params, own, ON_DEVICE, [NextEvent()], {"next_event": Draws()}, config)
            return sums.tasks["next_event"].total / sums.tasks["next_event"].weight

        return jax.value_and_grad(mean)(params)

    return {name: pull(model, target) for name, target in batch.targets.items()}


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("names", [("quiet",), ("next_event", "quiet"), ("quiet", "next_event")])
@pytest.mark.parametrize("n_microbatches", [1, 2])
def test_losses_of_tasks_are_added_each_over_its_own_weight_whatever_the_microbatches(names, n_microbatches):
    """The mean of `quiet` is another one than that of `next_event`."""
    config, model, batch = draw_tasks()
    config = dataclasses.replace(config, train=TrainConfig(batch_size=4, n_microbatches=n_microbatches), tasks=names)
    state = start_state(config, model)
    found = make_tasks(config)
    constants = {task.name: task.constants(TABLE, config) for task in found}
    _, metrics = jax.jit(make_train_step(config, found))(state, batch, ON_DEVICE, constants)

    alone = means_alone()
    assert float(metrics["loss"]) == pytest.approx(float(alone[names[0]][0]), rel=1e-5)
    if len(names) == 2:
        assert float(metrics[f"{names[1]}/loss"]) == pytest.approx(float(alone[names[1]][0]), rel=1e-5)
    # The norm of the gradient is that of the sum of the means.
    gradients = [jax.tree.leaves(alone[name][1]) for name in names]
    norm = np.sqrt(sum(np.sum(np.sum(parts, axis=0) ** 2) for parts in zip(*gradients, strict=True)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
