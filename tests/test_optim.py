"""Schedules by value, the decay mask by name, and updates against AdamW written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import OptimConfig
from moerec.optim import decay_mask, make_optimizer, make_schedule
from tests.small_model import make_config, make_model, random_like

PEAK, STEPS, WARMUP = 0.01, 50, 10


def learning_rate(step: int, warmup: int = WARMUP, **fields) -> float:
    config = OptimConfig(learning_rate=PEAK, warmup_steps=warmup, **{"final_rate": 0.2, **fields})
    return float(make_schedule(config, STEPS)(step))


def test_warm_up_rises_by_equal_steps_from_one_step_s_worth_to_the_peak():
    rates = [learning_rate(step) for step in range(WARMUP + 1)]
    assert rates[0] == pytest.approx(PEAK / WARMUP)
    assert rates[WARMUP] == pytest.approx(PEAK)
    np.testing.assert_allclose(np.diff(rates), np.diff(rates)[0], rtol=1e-3)
    assert learning_rate(0, warmup=0) == pytest.approx(PEAK)
    assert learning_rate(0, warmup=1) == pytest.approx(PEAK)


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(
    ("schedule", "halfway", "end"),
    [("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("constant", 1.0, 1.0)],
)
def test_schedule_falls_to_its_end(schedule, halfway, end, warmup):
    middle = (warmup + STEPS) // 2
    assert learning_rate(middle, warmup, schedule=schedule) == pytest.approx(halfway * PEAK, rel=1e-5)
    for step in (STEPS, STEPS + 7):
        assert learning_rate(step, warmup, schedule=schedule) == pytest.approx(end * PEAK, rel=1e-5)
    # The last step done is the one before: within one step's fall of the end.
    assert learning_rate(STEPS - 1, warmup, schedule=schedule) == pytest.approx(end * PEAK, rel=0.12)
    quarter = learning_rate(warmup + (STEPS - warmup) // 4, warmup, schedule=schedule)
    part = ((STEPS - warmup) // 4) / (STEPS - warmup)
    by_hand = {"cosine": 0.2 + 0.8 * (1 + np.cos(np.pi * part)) / 2, "linear": 1 - 0.8 * part, "constant": 1.0}
    assert quarter == pytest.approx(PEAK * by_hand[schedule], rel=1e-5)


def test_a_warm_up_longer_than_the_training_only_rises():
    rates = [learning_rate(step, warmup=2 * STEPS) for step in range(STEPS)]
    assert np.all(np.diff(rates) > 0)
    assert rates[-1] < PEAK


def decays(name: str, embeddings: bool) -> bool:
    """What should decay, by the last part of a weight's name."""
    kind = name.removesuffix(".value").rsplit(".", 1)[-1]
    if kind in {"scale", "item_bias_I", "q_bias_NH", "k_bias_KH", "v_bias_KH"}:
        return False
    if kind in {"q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD", "gate_DD", "out_DD"}:
        return True
    assert kind in {"row_ID", "table_VD", "service", "action", "context", "hour", "weekday", "season", "gap"}, name
    return embeddings


@pytest.mark.parametrize("embeddings", [False, True])
def test_decay_touches_matrices_and_embeddings_only_if_asked(embeddings):
    model = make_model(make_config(tie_items=False))
    flags = jax.tree_util.tree_flatten_with_path(decay_mask(model, embeddings))[0]
    assert len(flags) == len(jax.tree.leaves(model))
    for path, flag in flags:
        name = jax.tree_util.keystr(path)
        assert flag == decays(name, embeddings), name
    # And so do the updates: without gradients a step is the decay alone.
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, decay_embeddings=embeddings)
    optimizer = make_optimizer(config, STEPS)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = optimizer.update(zeros, optimizer.init(model), model)
    for (path, update), weight in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(model), strict=True
    ):
        factor = -0.05 if decays(jax.tree_util.keystr(path), embeddings) else 0.0
        np.testing.assert_allclose(update, factor * weight, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e6])
def test_updates_are_those_of_adamw_written_out(clip_norm):
    config = OptimConfig(
        learning_rate=PEAK, warmup_steps=2, schedule="linear", weight_decay=0.3, clip_norm=clip_norm, b1=0.8, b2=0.95
    )
    switches = {"item_text": False, "request_context": False, "event_time": False}
    model = make_model(make_config(n_layers=1, **switches))
    optimizer, schedule = make_optimizer(config, STEPS), make_schedule(config, STEPS)
    update = jax.jit(optimizer.update)
    state = optimizer.init(model)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]]
    weights = [np.asarray(w, np.float64) for w in jax.tree.leaves(model)]
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    for step in range(4):
        raw = random_like(model, seed=step)
        gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), raw)
        updates, state = update(gradients, state, model)
        model = jax.tree.map(jnp.add, model, updates)
        flat = jax.tree.leaves(raw)
        norm = np.sqrt(sum(np.sum(g**2) for g in flat))
        assert norm > 1
        scale = 1 / norm * clip_norm if 0 < clip_norm < norm else 1.0
        rate = float(schedule(step))
        for i, gradient in enumerate(flat):
            first[i] = 0.8 * first[i] + 0.2 * scale * gradient
            second[i] = 0.95 * second[i] + 0.05 * (scale * gradient) ** 2
            direction = first[i] / (1 - 0.8 ** (step + 1)) / (np.sqrt(second[i] / (1 - 0.95 ** (step + 1))) + 1e-8)
            decay = 0.3 * weights[i] if decays(names[i], False) else 0.0
            weights[i] = weights[i] - rate * (direction + decay)
    for name, found, expected in zip(names, jax.tree.leaves(model), weights, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5, err_msg=name)
