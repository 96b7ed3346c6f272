"""The layer on meshes of fake devices against all experts over all rows on one device: values and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moerec.config import MoEConfig
from moerec.errors import InputError
from moerec.nn.moe.all_to_all import AllToAll
from moerec.nn.moe.expert_parallel import size_buffers
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.router import RouterInputs
from moerec.nn.sharding import ROW_AXES, make_mesh, param_shardings
from pallas_kernels.dispatch import make_plan
from tests.small_model import fill, make_config

N_SERVICES, D, B, T = 3, 8, 8, 5
MESHES = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 1), (2, 2, 2)]
MOE = MoEConfig(layers=(0,), n_per_group=2, d_expert=4, n_active=2, tile=4)
STRATEGIES = ("all_gather", "all_to_all", "ragged_all_to_all")


@pytest.fixture(autouse=True)
def _ragged_all_to_all_on_a_cpu(monkeypatch):
    """What `lax.ragged_all_to_all` is documented to do, which a CPU lacks; sizes that do not agree give NaN."""

    def emulate(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        everything = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
        me, place = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
        for sender, (rows, start, size, target) in enumerate(zip(*everything, strict=True)):
            step = place - target[me]
            here = ((step >= 0) & (step < size[me])).reshape(-1, *[1] * (output.ndim - 1))
            found = rows[jnp.clip(start[me] + step, 0, len(rows) - 1)]
            wrong = size[me] != recv_sizes[sender]
            poison = jnp.nan if jnp.issubdtype(output.dtype, jnp.floating) else -9
            output = jnp.where(here, jnp.where(wrong, jnp.asarray(poison, output.dtype), found), output)
        return output

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulate)


def draw_layer(moe: MoEConfig = MOE, skew: float = 0.0):
    """A layer with random weights, its states, request and bias; `skew` sends the rows to few experts."""
    rng = np.random.default_rng(0)
    layer = fill(jax.eval_shape(lambda: DomainExperts(jax.random.key(0), make_config(moe=moe), N_SERVICES)))
    bias = -skew * jnp.arange(layer.router_ED.shape[0], dtype=jnp.float32)
    x = jnp.asarray(2 * rng.standard_normal((B, T, D)), jnp.float32)
    real = rng.random((B, T)) < 0.8
    domain = np.where(real, rng.integers(-1, N_SERVICES, (B, T)), -1).astype(np.int32)
    log_domain = jnp.asarray(np.log(rng.dirichlet(np.ones(N_SERVICES), (B, T))), jnp.float32)
    return layer, x, RouterInputs(log_domain, jnp.asarray(domain), jnp.asarray(real)), bias


def answer_densely(layer, x, request, bias_E):
    """All experts over all rows, in one einsum each; nothing of ours but the weights."""
    logit = jnp.einsum("btd,ed->bte", x, layer.router_ED[...])
    logit += jnp.einsum("btz,ez->bte", request.log_domain_BTZ, layer.w_domain_EZ[...])
    p = jnp.exp(logit) / jnp.sum(jnp.exp(logit), axis=-1, keepdims=True)
    score = jax.lax.stop_gradient(logit + bias_E)
    chosen = jnp.sum(score[..., None, :] > score[..., :, None], axis=-1) < layer.moe.n_active
    weight = jnp.where(chosen, p, 0)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    weight = jnp.where(request.real_BT[..., None], weight, 0)
    hidden = jnp.einsum("btd,edf->btef", x, layer.gate_EDF[...])
    hidden = hidden * jax.nn.sigmoid(hidden) * jnp.einsum("btd,edf->btef", x, layer.up_EDF[...])
    y = jnp.einsum("btef,efd,bte->btd", hidden, layer.down_EFD[...], weight)
    own = jax.nn.one_hot(request.domain_BT, N_SERVICES)
    sums = (jnp.einsum("btz,bte->ze", own, p), jnp.einsum("btz,bte->ze", own, chosen.astype(jnp.float32)))
    counted = request.domain_BT >= 0
    return y, (*sums, jnp.sum(counted * jnp.square(jax.nn.logsumexp(logit, axis=-1))))


@jax.jit
def dense_value_and_gradients(layer, x, request, bias):
    def total(layer, x, log_domain, bias):
        y, sums = answer_densely(layer, x, request._replace(log_domain_BTZ=log_domain), bias)
        return pull(y, sums), (y, sums)

    return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(layer, x, request.log_domain_BTZ, bias)


COTANGENT = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)


def pull(y, sums):
    """A scalar through which every output has a gradient."""
    return jnp.sum(y * COTANGENT) + jnp.sum(jnp.sin(sums[0])) + 0.1 * sums[2]


@functools.partial(jax.jit, static_argnames="training")
def value_and_gradients(layer, x, request, bias, training=False):
    def total(layer, x, log_domain, bias):
        key = jax.random.key(5) if training else None
        y, routing = layer(x, request._replace(log_domain_BTZ=log_domain), bias, key)
        return pull(y, routing[:3]), (y, routing)

    return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(layer, x, request.log_domain_BTZ, bias)


def on_mesh(shape, layer, x, request, bias, training=False):
    mesh = make_mesh(*shape)
    layer = jax.device_put(layer, param_shardings(layer, mesh))
    x, request = jax.device_put((x, request), NamedSharding(mesh, PartitionSpec(ROW_AXES)))
    with jax.set_mesh(mesh):
        return value_and_gradients(layer, x, request, bias, training)


def assert_equal(got, expected):
    def gap(a, b):
        return float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / (np.max(np.abs(b)) + 1e-3))

    gaps = jax.tree.map(gap, got, expected)
    assert max(jax.tree.leaves(gaps)) < 2e-5, gaps


@pytest.mark.parametrize(
    ("strategy", "mesh", "skew"),
    [
        *((name, mesh, 0.0) for name in STRATEGIES[:2] for mesh in MESHES),
        *((name, mesh, 3.0) for name in STRATEGIES for mesh in ((1, 4, 1), (2, 2, 2))),
    ],
)
def test_values_and_all_gradients_are_those_of_the_dense_oracle(strategy, mesh, skew):
    layer, x, request, bias = draw_layer(dataclasses.replace(MOE, strategy=strategy), skew)
    (got, (y, routing)), gradients = on_mesh(mesh, layer, x, request, bias)

    (expected, (dense_y, sums)), dense = dense_value_and_gradients(layer, x, request, bias)
    assert not np.any(gradients[3])
    assert_equal((got, y, routing[:3]), (expected, dense_y, sums))
    assert_equal(gradients, dense)
    assert np.asarray(routing.dropped_L3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
def test_a_shared_expert_and_closed_groups_on_a_mesh_are_those_of_one_device(strategy):
    layer, x, request, bias = draw_layer(dataclasses.replace(MOE, strategy=strategy, d_shared=6, n_open_groups=2))
    assert_equal(on_mesh((2, 2, 2), layer, x, request, bias), value_and_gradients(layer, x, request, bias))


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
def test_capacity_and_jitter_on_a_mesh_are_those_of_one_device(strategy):
    moe = dataclasses.replace(MOE, strategy=strategy, capacity_factor=0.8, jitter_rate=0.2)
    layer, x, request, bias = draw_layer(moe, skew=1.0)
    got, expected = (
        on_mesh((1, 4, 2), layer, x, request, bias, training=True),
        value_and_gradients(layer, x, request, bias, training=True),
    )
    assert_equal(got, expected)
    dropped, none, nor_there = np.asarray(got[0][1][1].dropped_L3)
    assert dropped > 5
    assert none == nor_there == 0


def test_a_batch_that_the_devices_do_not_divide_is_answered():
    layer, x, request, bias = draw_layer()
    few = [jax.tree.map(lambda a: a[:3], part) for part in (x, request)]
    expected = jax.jit(lambda *a: layer(*a, bias, None))(*few)
    with jax.set_mesh(make_mesh(2, 4, 1)):
        got = jax.jit(lambda *a: layer(*a, bias, None))(*few)
    assert_equal(got, expected)


@pytest.mark.parametrize(("mesh", "field"), [((1, 3, 1), "mesh_expert: 3 devices for 8"), ((1, 1, 8), "mesh_model: 8")])
def test_experts_and_widths_that_the_devices_do_not_divide_are_refused(mesh, field):
    layer, x, request, bias = draw_layer()
    with jax.set_mesh(make_mesh(*mesh)), pytest.raises(InputError, match=field):
        jax.eval_shape(lambda: layer(x, request, bias, None))


def exchange_on_mesh(expert_SA, n, n_send, n_receive, rows_SD, ragged):
    """There and back over `n` devices: `(arrived, returned, drops, transposes)`, each with a leading device axis."""

    def body(expert_SA, rows_SD):
        plan = make_plan(expert_SA, n, tile=1)
        transport = AllToAll("expert", n, n_send, n_receive, plan.row_R.shape[0], ragged)
        transfers = transport.plan(plan)
        rows_P = jnp.where(plan.used_R[:, None], rows_SD[plan.row_R], 0)
        arrived, pull_there = jax.vjp(lambda r: transport.dispatch(r, transfers), rows_P)
        returned, pull_back = jax.vjp(lambda r: transport.combine(r, transfers), arrived)
        pulled = (pull_back(rows_P)[0], pull_there(arrived)[0])
        combine = jnp.where(plan.kept_TA[..., None], returned[plan.row_slot_TA], 0)
        drops = jnp.stack([transfers.sender_drops, transfers.receiver_drops])
        return jax.tree.map(lambda a: a[None], (arrived, combine, drops, pulled))

    spec = PartitionSpec("expert")
    return jax.jit(
        jax.shard_map(body, mesh=make_mesh(1, n, 1), in_specs=(spec, spec), out_specs=spec),
    )(expert_SA, rows_SD)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("n_send", "n_receive"), [(10, 40), (3, 40), (10, 6), (3, 7), (1, 1)])
def test_what_arrives_and_what_is_dropped_is_counted_row_by_row(n_send, n_receive, ragged):
    n, n_rows = 4, 5
    rng = np.random.default_rng(n_send)
    expert_SA = rng.choice(n + 1, (n * n_rows, 2), p=[0.5, 0.2, 0, 0.2, 0.1]).astype(np.int32)  # n is nowhere
    rows_SD = rng.standard_normal((n * n_rows, 3)).astype(np.float32)
    arrived, combine, drops, (pulled_back, pulled_there) = exchange_on_mesh(
        expert_SA, n, n_send, n_receive, rows_SD, ragged
    )
    kept = np.zeros(expert_SA.shape, bool)
    sender_drops, receiver_drops = np.zeros(n, int), np.zeros(n, int)
    for receiver in range(n):
        expected = []
        for sender in range(n):
            at_hand = [(r, a) for r in range(sender * n_rows, (sender + 1) * n_rows) for a in range(2)]
            asked = [ra for ra in at_hand if expert_SA[ra] == receiver]
            sent = asked[:n_send]
            taken = sent[: n_receive - len(expected)]
            sender_drops[sender] += len(asked) - len(sent)
            receiver_drops[sender] += len(sent) - len(taken)
            expected += [rows_SD[r] for r, _ in taken]
            for ra in taken:
                kept[ra] = True
        padded = np.zeros((n_receive, 3), np.float32)
        padded[: len(expected)] = expected or padded[:0]
        np.testing.assert_array_equal(arrived[receiver], padded)
    np.testing.assert_array_equal(drops, np.stack([sender_drops, receiver_drops], axis=1))
    np.testing.assert_array_equal(
        np.reshape(combine, (n * n_rows, 2, 3)), np.where(kept[..., None], rows_SD[:, None], 0)
    )
    # The transposes: what is pulled back through one way is what the other way brings.
    np.testing.assert_array_equal(pulled_back, arrived)
    total = float(np.sum(np.square(pulled_there)))
    assert total == pytest.approx(float(np.sum(np.where(kept[..., None], rows_SD[:, None], 0) ** 2)), rel=1e-5)


def test_dropped_assignments_add_nothing_and_are_counted_in_the_layer():
    moe = dataclasses.replace(MOE, strategy="all_to_all", send_factor=0.75, receive_factor=0.75)
    layer, x, request, bias = draw_layer(moe, skew=2.0)
    ((_, (y, routing)), _), ((_, (whole, _)), _) = (
        on_mesh((1, 4, 1), layer, x, request, bias),
        value_and_gradients(layer, x, request, bias),
    )
    no_capacity, sender, receiver = np.asarray(routing.dropped_L3)
    assert no_capacity == 0
    assert sender > 0
    assert receiver > 0
    touched = np.any(np.abs(np.asarray(y) - np.asarray(whole)) > 1e-6, axis=-1)
    assert 0 < touched.sum() <= sender + receiver


def test_buffers_hold_everything_unless_they_are_bounded():
    assert size_buffers(100, 2, 4, 8, MOE) == (200, 1600)
    assert size_buffers(100, 2, 1, 8, MOE) == (100, 800)  # a row goes to one expert once
    bounded = dataclasses.replace(MOE, send_factor=2.0, receive_factor=1.5)
    assert size_buffers(100, 2, 4, 8, bounded) == (50, 300)
