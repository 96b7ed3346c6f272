"""One training step: microbatches, the moving average, determinism, and what it reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import Config, LossConfig, MoEConfig, OptimConfig, TrainConfig
from moerec.convert.paths import flatten
from moerec.nn.moe.balance import target_load
from moerec.nn.sharding import batch_sharding, make_mesh, param_shardings
from moerec.tasks import make_tasks
from moerec.train.optim import make_schedule
from moerec.train.state import TrainState, init_state, make_predictor, pack_state, spread_state, start_state
from moerec.train.step import make_train_step
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table, target_of, with_target, worst_gap

TABLE = make_table()
# Rows of very different weight, one of them all padding: 14, 1, 0 and 9 slots.
BATCH = make_batch(3, [[8, 6], [1], [0], [4, 5]], 14, control=True)
LABEL_BT, WEIGHT_BT = target_of(BATCH)
SMALL = {"n_layers": 1, "item_text": False, "event_time": False, "request_context": False, "n_heads": 2}
EXPERTS = MoEConfig(layers=(0,), n_per_group=2, d_expert=4, n_active=2, tile=4, bias_rate=0.01, backend="xla_tiles")


def config_for(
    kind: str = "full_softmax",
    n_microbatches: int = 1,
    dropout: float = 0.0,
    ema: float = 0.0,
    scope: str = "union",
    experts: bool = False,
    groups: tuple[str, ...] = (),
) -> Config:
    weights = {"analyser_weight": 0.7, "balance_weight": 0.5, "domain_balance_weight": 0.3, "router_z_weight": 0.1}
    return Config(
        seed=5,
        model=make_config(dropout=dropout, moe=EXPERTS if experts else MoEConfig(), **SMALL),
        loss=LossConfig(kind=kind, n_negatives=9, sampling_power=0.5, scope=scope, chunk=4, **weights),
        optim=OptimConfig(learning_rate=0.02, warmup_steps=3, clip_norm=0.0, ema_decay=ema, groups=groups),
        train=TrainConfig(steps=20, batch_size=4, n_microbatches=n_microbatches),
    )


def start(config: Config) -> TrainState:
    """A state whose weights are random and far from zero."""
    return start_state(config, make_model(config.model, seed=1))


@functools.cache
def make_step(*options):
    """The compiled step, a function of state, batch and catalogue; `options` as of `config_for`."""
    config = config_for(*options)
    tasks = make_tasks(config)
    step, constants = jax.jit(make_train_step(config, tasks)), {t.name: t.constants(TABLE, config) for t in tasks}
    return lambda state, batch, catalog: step(state, batch, catalog, constants)


@functools.cache
def run(n_steps: int, *options) -> list[tuple[TrainState, dict]]:
    """States and metrics after each step on the same batch."""
    states, state = [], start(config_for(*options))
    for _ in range(n_steps):
        state, metrics = make_step(*options)(state, BATCH, TABLE)
        states.append((state, {name: float(x) for name, x in metrics.items()}))
    return states


def first_moment(state: TrainState):
    """Adam's: after one step it is the gradient times 1 - b1."""
    (moments,) = (s.mu for s in state.opt_state if hasattr(s, "mu"))
    return moments


@pytest.mark.parametrize(
    ("kind", "scope", "n_microbatches"),
    [
        ("full_softmax", "union", 2),
        ("full_softmax", "service", 4),
        ("sampled_softmax", "union", 4),
        ("sampled_softmax", "service", 2),
        ("one_negative", "union", 2),
        ("one_negative", "service", 4),
    ],
)
def test_microbatches_give_the_step_of_the_whole_batch(kind, scope, n_microbatches):
    ((whole, metrics),) = run(1, kind, 1, 0.0, 0.0, scope)
    ((parts, parts_metrics),) = run(1, kind, n_microbatches, 0.0, 0.0, scope)
    assert parts_metrics == pytest.approx(metrics, rel=1e-5)
    assert worst_gap(first_moment(parts), first_moment(whole)) < 1e-6
    assert worst_gap(parts.params, whole.params) < 1e-5
    assert worst_gap(whole.params, start(config_for()).params) > 1e-3  # a step that does something


def test_microbatches_balance_over_the_global_batch():
    """Gradients, losses and biases of a mixture are those of the whole batch, though balance is no sum over slots.

    Each row is a microbatch, the one that is all padding, too.
    """
    ((whole, metrics),) = run(1, "full_softmax", 1, 0.0, 0.0, "union", True)
    ((parts, parts_metrics),) = run(1, "full_softmax", 4, 0.0, 0.0, "union", True)
    assert parts_metrics == pytest.approx(metrics, rel=1e-5)
    assert worst_gap(first_moment(parts), first_moment(whole)) < 1e-6
    assert worst_gap(parts.params, whole.params) < 1e-5
    moved = whole.router_bias_LE - start(config_for(experts=True)).router_bias_LE
    np.testing.assert_allclose(np.abs(moved), 0.01, rtol=1e-3)
    np.testing.assert_array_equal(parts.router_bias_LE, whole.router_bias_LE)


def test_a_mixture_is_trained_on_the_weighted_sum_of_its_losses():
    config = config_for(experts=True)
    ((state, metrics),) = run(1, "full_softmax", 1, 0.0, 0.0, "union", True)
    weights = oracle.read_weights(start(config).params)
    frozen, arguments = dict(weights), (BATCH, TABLE, config.model, SIZES.context_sizes)
    own = np.where(WEIGHT_BT > 0, TABLE.service_I[LABEL_BT], -1)
    asked = target_load(EXPERTS, SIZES.n_services)

    def total(weights):
        states = oracle.encode(weights, *arguments, frozen=frozen)
        scores = states @ weights["item_encoder.row_ID"].T + weights["head.bias_I"]
        posterior = np.array(oracle.posterior(weights, *arguments))
        log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        item, domain = (
            -np.sum(WEIGHT_BT * np.take_along_axis(p, answer[..., None], axis=-1)[..., 0]) / WEIGHT_BT.sum()
            for p, answer in ((log_p, LABEL_BT), (posterior, TABLE.service_I[LABEL_BT]))
        )
        p, count, square = oracle.route_sums(weights, *arguments, own, frozen)
        n = p.sum(axis=1)
        by_load = np.sum(count.sum(axis=0) * p.sum(axis=0) / (n @ asked)) * n.sum() / count.sum() / n.sum()
        within = np.sum(count * p / asked, axis=1) / np.maximum(count.sum(axis=1), 1)
        parts = {
            "loss": item,
            "analyser": domain,
            "balance": by_load,
            "domain_balance": within.sum() / n.sum(),
            "router_z": square / n.sum(),
        }
        return parts["loss"] + 0.7 * domain + 0.5 * by_load + 0.3 * parts[
            "domain_balance"
        ] + 0.1 * square / n.sum(), parts

    for name, value in total(weights)[1].items():
        assert metrics[name] == pytest.approx(value, rel=2e-5), name
    assert metrics["dropped"] == 0
    gradients = {name: 10 * g for name, g in oracle.read_weights(first_moment(state)).items()}  # 1 - b1 is 0.1
    oracle.assert_slopes(lambda w: total(w)[0], weights, gradients, 2e-4)


@pytest.mark.parametrize("kind", ["full_softmax", "sampled_softmax", "one_negative"])
def test_in_the_scope_of_the_service_only_its_items_move(kind):
    """Item rows of a service without a target stay where they are: neither positives nor competitors."""
    service = np.asarray(TABLE.service_I)
    target = np.where(service[LABEL_BT] == 0, LABEL_BT, np.flatnonzero(service == 0)[0])
    batch = with_target(BATCH, label_BT=target.astype(np.int32))
    for scope in ("service", "union"):
        state, _ = make_step(kind, 1, 0.0, 0.0, scope)(start(config_for(kind)), batch, TABLE)
        moved = np.asarray(first_moment(state).head.bias_I[...])[service != 0]
        assert moved.any() == (scope == "union")


def test_metrics_are_those_of_the_loss_by_hand():
    config = config_for()
    ((state, metrics),) = run(1, "full_softmax")
    model = start(config).params
    weights = oracle.read_weights(model)

    def mean_loss(weights):
        states = oracle.encode(weights, BATCH, TABLE, config.model, SIZES.context_sizes)
        scores = states @ weights["item_encoder.row_ID"].T + weights["head.bias_I"]
        log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        taken = np.take_along_axis(log_p, LABEL_BT[..., None], axis=-1)[..., 0]
        return -np.sum(WEIGHT_BT * taken) / WEIGHT_BT.sum()

    gradients = {name: 10 * g for name, g in oracle.read_weights(first_moment(state)).items()}  # 1 - b1 is 0.1
    assert metrics["loss"] == pytest.approx(mean_loss(weights), rel=1e-5)
    assert metrics["slots"] == WEIGHT_BT.sum()
    oracle.assert_slopes(mean_loss, weights, gradients, 1e-4)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert int(state.step) == 1


def test_the_learning_rate_reported_is_the_one_used():
    schedule = make_schedule(config_for().optim, 20)
    rates = [metrics["learning_rate"] for _, metrics in run(3, "full_softmax", 1, 0.3, 0.6)]
    np.testing.assert_allclose(rates, [schedule(step) for step in range(3)], rtol=1e-6)


def test_the_average_is_a_plain_mean_at_first_and_exponential_then():
    states = [state for state, _ in run(5, "full_softmax", 1, 0.3, 0.6)]
    expected = None
    for n, state in enumerate(states, 1):
        weights = oracle.read_weights(state.params)
        rate = max(1 / n, 0.4)
        expected = {
            name: w if expected is None else (1 - rate) * expected[name] + rate * w for name, w in weights.items()
        }
        assert worst_gap(oracle.read_weights(state.average), expected) < 1e-6
    assert make_predictor(states[-1]).params is states[-1].average
    assert worst_gap(states[-1].average, states[-1].params) > 1e-4


def test_frozen_parameters_stay_in_microbatches_with_an_average_and_on_a_mesh():
    """And everything else moves as without it, at its own rate; the norm that is told is that of what is trained."""
    groups = ("groups/0/attention=frozen", "head=0.5")
    before = flatten(start(config_for()).params)
    options = ("full_softmax", 1, 0.0, 0.6, "union", False)
    ((plain, plain_metrics),) = run(1, "full_softmax")
    ((whole, metrics),) = run(1, *options, groups)
    ((parts, _),) = run(1, "full_softmax", 2, 0.0, 0.6, "union", False, groups)
    config, mesh = config_for(*options, groups), make_mesh(2, 1, 1)
    tasks = make_tasks(config)
    state = jax.device_put(start(config), param_shardings(start(config), mesh))
    constants = {task.name: task.constants(TABLE, config) for task in tasks}
    batch = jax.device_put(BATCH, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        placed, _ = jax.jit(make_train_step(config, tasks))(state, batch, TABLE, constants)
    frozen = [path for path in before if path.startswith("groups/0/attention/")]
    assert frozen
    moved = flatten(plain.params)
    for state in (whole, parts, placed):
        params, average = flatten(state.params), flatten(state.average)
        assert worst_gap(state.average, state.params) == 0  # after one step
        for path, leaf in params.items():
            if path in frozen:
                np.testing.assert_array_equal(leaf, before[path], err_msg=path)
                np.testing.assert_array_equal(average[path], before[path], err_msg=path)
            else:
                share = 0.5 if path.startswith("head/") else 1.0
                expected = before[path] + share * (moved[path] - before[path])
                np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=path)
        assert not [path for path in flatten(state.opt_state) if "attention/" in path]
    gradients = {path: 10 * np.asarray(leaf) for path, leaf in flatten(first_moment(plain)).items()}  # 1 - b1 is 0.1
    norms = [np.sqrt(sum(np.sum(g**2) for path, g in gradients.items() if path not in out)) for out in ([], frozen)]
    assert [plain_metrics["grad_norm"], metrics["grad_norm"]] == pytest.approx(norms, rel=1e-5)
    assert norms[1] < norms[0]


def test_without_average_the_model_itself_is_evaluated():
    ((state, _),) = run(1, "full_softmax")
    assert state.average is None
    assert make_predictor(state).params is state.params


def test_moments_and_average_as_vectors_change_no_number():
    """But for the order of sums; and leaf by leaf they are to the bit what was packed."""
    options = "full_softmax", 1, 0.0, 0.6
    config = config_for(*options)
    (first, _), (second, _) = run(2, *options)
    packed = pack_state(first, config, first.step.sharding)
    assert len(jax.tree.leaves(packed.opt_state)) < 10
    for a, b in zip(jax.tree.leaves(spread_state(packed)), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)
    after, _ = make_step(*options)(packed, BATCH, TABLE)
    held = [np.array(x) for x in jax.tree.leaves(spread_state(after))]
    assert jax.tree.structure(spread_state(after)) == jax.tree.structure(second)
    for a, b in zip(held, jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert worst_gap(second.params, first.params) > 1e-3
    assert worst_gap(make_predictor(after).params, second.average) < 1e-6


def test_groups_of_parameters_are_not_packed():
    config = config_for(groups=("head=0",))
    state = start(config)
    assert pack_state(state, config, state.step.sharding) is state
    assert spread_state(state) is state


@pytest.mark.parametrize(
    "options", [("sampled_softmax",), ("full_softmax", 1, 0.3, 0.6)], ids=["random negatives", "dropout"]
)
def test_steps_are_deterministic_and_differ_in_their_randomness(options):
    train_step, state = make_step(*options), start(config_for(*options))
    once, again = train_step(state, BATCH, TABLE), train_step(state, BATCH, TABLE)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    later = train_step(state._replace(step=jnp.ones((), jnp.int32)), BATCH, TABLE)
    assert abs(float(later[1]["loss"] - once[1]["loss"])) > 1e-4


def test_a_batch_of_padding_changes_nothing_but_the_decay():
    before = start(config_for())
    nothing = with_target(BATCH, weight_BT=np.zeros_like(WEIGHT_BT))
    state, metrics = make_step("full_softmax")(before, nothing, TABLE)
    assert float(metrics["loss"]) == float(metrics["slots"]) == float(metrics["grad_norm"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert worst_gap(state.params.item_encoder, before.params.item_encoder) == 0
    assert worst_gap(state.params.groups, before.params.groups) < 0.02 * 0.01 * 2  # at most the rate times the decay


def test_a_fresh_state_has_finite_weights_of_the_declared_shapes_and_its_own_average():
    config = config_for(ema=0.9)
    state = jax.jit(lambda: init_state(config, SIZES))()
    assert int(state.step) == 0
    shapes = [w.shape for w in jax.tree.leaves(make_model(config.model))]
    assert [w.shape for w in jax.tree.leaves(state.params)] == shapes
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(state.params))
    assert worst_gap(state.average, state.params) == 0
