"""Schedules by value, the decay mask by name, and updates against AdamW written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moerec.config import OptimConfig
from moerec.convert.paths import flatten, matches
from moerec.errors import InputError
from moerec.train.optim import decay_mask, make_optimizer, make_schedule
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
    if kind in {"scale", "bias_I", "no_row_bias_Z", "q_bias_NH", "k_bias_KH", "v_bias_KH"}:
        return False
    if kind in {"q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD", "gate_DD", "out_DD"}:
        return True
    embedded = {
        "row_ID",
        "table_VD",
        "control_D",
        "no_row_D",
        "service",
        "action",
        "context",
        "field",
        "hour",
        "weekday",
        "season",
        "gap",
    }
    assert kind in embedded, name
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
    zeros = jax.tree.map(lambda w: np.zeros(w.shape, np.float32), model)
    updates, _ = jax.jit(lambda g, w: optimizer.update(g, optimizer.init(w), w))(zeros, model)
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
    rng = np.random.default_rng(9)
    kinds = {"kernel": ((3, 4), "matrix"), "rows": ((5, 2), "embedding"), "scale": ((6,), "none")}
    weights = {name: rng.standard_normal(shape) for name, (shape, _) in kinds.items()}
    tree = {
        name: nnx.Param(jnp.asarray(w, jnp.float32), axes=(None,) * w.ndim, decay=kinds[name][1])
        for name, w in weights.items()
    }
    optimizer, schedule = make_optimizer(config, STEPS), make_schedule(config, STEPS)
    update, state = jax.jit(optimizer.update), optimizer.init(tree)
    first, second = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)
    for step in range(4):
        raw = {name: rng.standard_normal(w.shape) for name, w in weights.items()}
        gradients = {name: tree[name].replace(jnp.asarray(g, jnp.float32)) for name, g in raw.items()}
        updates, state = update(gradients, state, tree)
        tree = jax.tree.map(jnp.add, tree, updates)
        norm = np.sqrt(sum(np.sum(g**2) for g in raw.values()))
        assert norm > 1
        scale = clip_norm / norm if 0 < clip_norm < norm else 1.0
        rate = float(schedule(step))
        for name, gradient in raw.items():
            first[name] = 0.8 * first[name] + 0.2 * scale * gradient
            second[name] = 0.95 * second[name] + 0.05 * (scale * gradient) ** 2
            direction = first[name] / (1 - 0.8 ** (step + 1))
            direction = direction / (np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            decay = 0.3 * weights[name] if name == "kernel" else 0.0
            weights[name] = weights[name] - rate * (direction + decay)
    for name, expected in weights.items():
        np.testing.assert_allclose(tree[name][...], expected, atol=2e-6, rtol=1e-5, err_msg=name)


def update_by(groups: tuple[str, ...], clip_norm: float = 0.0, silent: tuple[str, ...] = ()):
    """The updates by path of a second step of the same gradients, and the state; `silent` paths have none."""
    model = make_model(make_config(n_layers=1))
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=clip_norm, groups=groups)
    optimizer = make_optimizer(config, STEPS)
    gradients = jax.tree.map(jnp.float32, random_like(model))
    gradients = jax.tree_util.tree_map_with_path(
        lambda path, g: g * (not any(part in jax.tree_util.keystr(path) for part in silent)), gradients
    )
    state = optimizer.init(model)
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(gradients, state, model)
    return {path: np.asarray(leaf) for path, leaf in flatten(updates).items()}, state


def test_frozen_parameters_stay_and_the_others_move_as_without_it():
    plain, _ = update_by(())
    updates, state = update_by(("groups/*/attention=frozen", "item_encoder/row_ID=frozen"))
    for path, update in updates.items():
        frozen = path.startswith("groups/0/attention/") or path == "item_encoder/row_ID"
        assert np.any(plain[path]), path
        np.testing.assert_array_equal(update, np.zeros_like(update) if frozen else plain[path], err_msg=path)
    kept = flatten(state)
    for moment in ("mu", "nu"):  # none of what is frozen, and all of the rest
        paths = [path.partition(f"/{moment}/")[2] for path in kept if f"/{moment}/" in path]
        assert paths == [p for p in updates if not p.startswith("groups/0/attention/") and p != "item_encoder/row_ID"]


def test_a_rate_is_a_multiple_and_the_first_match_wins():
    plain, _ = update_by(())
    updates, _ = update_by(("head=0.5", "groups/0/ffn/gate_DF=0.25", "groups/*=2", "*norm*=frozen"))
    rates = {"head/": 0.5, "groups/0/ffn/gate_DF": 0.25, "groups/": 2.0}  # norms within groups are named before
    for path, update in updates.items():
        rate = next((rate for start, rate in rates.items() if path.startswith(start)), 0.0 if "norm" in path else 1.0)
        np.testing.assert_array_equal(update, rate * plain[path], err_msg=path)


def test_frozen_gradients_have_no_part_in_the_norm_that_is_clipped():
    updates, _ = update_by(("groups/0/attention=frozen",), clip_norm=1.0)
    expected, _ = update_by((), clip_norm=1.0, silent=("attention.",))
    for path, update in updates.items():
        if not path.startswith("groups/0/attention/"):
            np.testing.assert_allclose(update, expected[path], rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("groups", [("nobody=frozen",), ("head=0.5", "heads=0.5"), ("*=0.5", "head=frozen")])
def test_a_pattern_that_names_nothing_is_refused_with_what_there_is(groups):
    """So is one that others have left nothing to."""
    with pytest.raises(
        InputError, match=r"^config\.optim\.groups: '.*' is no parameter's; there are .*groups, head, "
    ) as error:
        update_by(groups)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["head", "=0.5", "head=-1", "head=nan", "head=slow", "head=inf"])
def test_a_group_of_another_form_is_refused(entry):
    with pytest.raises(InputError, match=r"config\.optim\.groups: .* is not of the form"):
        OptimConfig(groups=(entry,))
    with pytest.raises(InputError, match="there twice"):
        OptimConfig(groups=("head=0.5", "head=frozen"))


def test_a_pattern_names_a_path_or_a_part_of_the_tree():
    path = "groups/0/attention/q_DNH"
    for pattern in (path, "groups", "groups/", "groups/0/attention", "*/q_DNH", "groups/?/attention", "groups/[01]"):
        assert matches(path, pattern), pattern
    for pattern in ("group", "attention", "groups/1", "q_DNH", "groups/0/attention/q", "Groups"):
        assert not matches(path, pattern), pattern
