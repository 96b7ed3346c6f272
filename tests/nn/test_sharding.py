"""On fake devices: sharded equals unsharded, weights really are in shards, and the rules refuse what cannot be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moerec.config import Config, LossConfig, MoEConfig, OptimConfig, PersonalConfig, TrainConfig
from moerec.errors import InputError
from moerec.nn.heads.item import score_items
from moerec.nn.heads.xent import XentCandidates, XentSlots, chunked_softmax_xent
from moerec.nn.model import SequenceModel
from moerec.nn.sharding import batch_sharding, make_mesh, mesh_of, param_shardings, param_spec, replicated
from moerec.tasks import make_tasks
from moerec.train.state import TrainState, start_state
from moerec.train.step import make_train_step
from moerec.types import Catalog
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table, worst_gap

TABLE = make_table()
BATCHES = [make_batch(seed, [[5, 3], [8], [2, 2], [7], [1], [4, 4], [6], [3, 2]], 8) for seed in (1, 2)]
MESHES = [(2, 1, 1), (1, 1, 2), (2, 2, 2)]  # a mesh of one device is what every other test trains on


def make_run_config(
    n_data: int,
    n_expert: int,
    n_model: int,
    kind: str = "sampled_softmax",
    scope: str = "union",
    strategy: str = "",
    memory: str = "",
) -> Config:
    """Dense, or with experts under a strategy, personal or not; the one with both has pointers, too.

    Each has what is split nowhere else and little more, for a step takes long to compile: a mixture or a profile of one
    layer is trained in microbatches, a mixture that is personal is the upper one of two layers.
    """
    whole = bool(strategy and memory)
    layer = int(whole)
    small = {"n_per_group": 2, "d_expert": 4, "tile": 4, "backend": "xla_tiles"}
    moe = MoEConfig(layers=(layer,), strategy=strategy, **small) if strategy else MoEConfig()
    slots = {"n_aspects": 3, "n_scales": 2, "d_memory": 4, "chunk": 4}
    personal = PersonalConfig(layers=(layer,), memory=memory, **slots) if memory else PersonalConfig()
    return Config(
        model=make_config(
            n_layers=2 if whole or not (strategy or memory) else 1,
            event_time=False,
            request_time=False,
            request_context=False,
            pointer="services" if whole else "none",
            moe=moe,
            personal=personal,
        ),
        loss=LossConfig(kind=kind, n_negatives=20, scope=scope, chunk=16),
        optim=OptimConfig(warmup_steps=2, ema_decay=0.5),
        train=TrainConfig(
            steps=10,
            batch_size=8,
            n_microbatches=1 if whole else 2,
            mesh_data=n_data,
            mesh_expert=n_expert,
            mesh_model=n_model,
        ),
    )


def fresh_state(config: Config) -> TrainState:
    """Random weights without compiling their initialisers."""
    # By this seed no gradient is all but zero, of which Adam would make a whole step either way.
    return start_state(config, make_model(config.model, seed=1))


def train_batches(config: Config, state: TrainState, catalog: Catalog, mesh: Mesh | None):
    """The state at first and after a step on each of `BATCHES`, the last loss, and how often the step was compiled."""
    (task,) = tasks = make_tasks(config)
    # The constants of a catalogue of which nothing is counted, as if its items were all as popular.
    constants = {task.name: task.constants(catalog._replace(count_I=0 * catalog.count_I), config)}
    batches, train_step = BATCHES, make_train_step(config, tasks)
    if mesh is None:
        train_step = jax.jit(train_step)
    else:
        placed = param_shardings(state, mesh)
        state, (catalog, constants) = (
            jax.device_put(state, placed),
            jax.device_put((catalog, constants), replicated(mesh)),
        )
        batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in BATCHES]
        train_step = jax.jit(train_step, out_shardings=(placed, replicated(mesh)))
    first = state
    with mesh_of(state):
        for batch in batches:
            state, metrics = train_step(state, batch, catalog, constants)
    return first, state, float(metrics["loss"]), train_step._cache_size()


@functools.cache
def train(n_data: int, n_expert: int, n_model: int, *kind: str):
    """`train_batches` with a fresh state; zeros are without a mesh."""
    config = make_run_config(max(n_data, 1), max(n_expert, 1), max(n_model, 1), *kind)
    mesh = make_mesh(n_data, n_expert, n_model) if n_data else None
    return train_batches(config, fresh_state(config), TABLE, mesh)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        *((mesh, ("sampled_softmax", "union")) for mesh in MESHES),
        ((4, 1, 2), ("one_negative", "service")),
        ((1, 4, 1), ("full_softmax", "union", "all_to_all")),
        ((2, 2, 2), ("full_softmax", "union", "all_gather")),
        ((2, 1, 2), ("full_softmax", "union", "", "delta")),
        ((2, 2, 2), ("full_softmax", "union", "all_to_all", "ema")),
    ],
)
def test_sharded_training_is_unsharded_training(mesh, kind):
    _, state, loss, _ = train(*mesh, *kind)
    alone_first, alone_state, alone_loss, _ = train(0, 0, 0, *kind)
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert worst_gap(state.params, alone_state.params) < 1e-5
    (adam,), (alone_adam,) = ([part for part in x.opt_state if hasattr(part, "mu")] for x in (state, alone_state))
    assert worst_gap(adam.mu, alone_adam.mu) < 1e-6
    if state.router_bias_LE is not None:
        assert worst_gap(state.router_bias_LE, alone_state.router_bias_LE) < 1e-5
    assert worst_gap(state.average, alone_state.average) < 1e-5
    assert worst_gap(alone_state.params, alone_first.params) > 1e-4


def test_sharded_scores_are_unsharded_scores():
    """Experts, profile and pointers: what a model that was trained on a mesh is evaluated by."""
    model = make_model(make_run_config(2, 2, 2, "full_softmax", "union", "all_to_all", "ema").model)
    slot_Q = np.array([-1, 0, 3, 7], np.int32)

    @jax.jit
    def score_placed(model, batch, table):
        bound = model.bind(table)
        return score_items(model.encode(batch, bound), batch, slot_Q, bound)

    def score(model, batch, table):
        with mesh_of(model):
            return score_placed(model, batch, table)

    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(model, param_shardings(model, mesh))
    sharded = score(placed, BATCHES[0], jax.device_put(TABLE, replicated(mesh)))
    np.testing.assert_allclose(sharded, score(model, BATCHES[0], TABLE), atol=2e-5)


def local_shape(param) -> tuple[int, ...]:
    (shape,) = {shard.data.shape for shard in param[...].addressable_shards}
    return shape


@pytest.mark.parametrize("when", ["at the start", "after two steps"])
@pytest.mark.parametrize("mesh", MESHES)
def test_weights_their_moments_and_averages_are_in_shards_where_the_axis_divides(mesh, when):
    first, after, *_ = train(*mesh)
    n_data, _, n = mesh
    d = 8 // n_data  # the model width is split over `data`
    state = first if when == "at the start" else after
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    for model in (state.params, state.average, adam.mu, adam.nu):
        attention, ffn = model.groups[0].attention, model.groups[0].ffn
        assert local_shape(attention.q_DNH) == (2, d, 4 // n, 4)
        assert local_shape(attention.k_DKH) == (2, d, 2 // n, 4)
        assert local_shape(attention.o_NHD) == (2, 4 // n, 4, d)
        assert local_shape(attention.v_bias_KH) == (2, 2 // n, 4)
        assert local_shape(ffn.gate_DF) == (2, d, 16 // n)
        assert local_shape(ffn.down_FD) == (2, 16 // n, d)
        assert local_shape(model.item_encoder.text.table_VD) == (12 // n, 6)
        assert local_shape(model.item_encoder.row_ID) == (13, d)  # 13 items are not to be halved
        assert local_shape(model.groups[0].attention_norm.scale) == (2, 8)


@pytest.mark.parametrize("kind", [("all_gather",), ("all_to_all", "ema")], ids=str)
def test_experts_and_their_moments_are_in_shards(kind):
    _, state, *_ = train(2, 2, 2, "full_softmax", "union", *kind)
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    for model in (state.params, state.average, adam.mu, adam.nu):
        ffn = model.groups[-1].ffn
        assert local_shape(ffn.gate_EDF) == (1, 4, 4, 2)  # of 8 experts, width 8 and 4
        assert local_shape(ffn.down_EFD) == (1, 4, 2, 4)
    # The routers' biases are on every device.
    assert {shard.data.shape for shard in state.router_bias_LE.addressable_shards} == {(1, 8)}
    assert state.router_bias_LE.is_fully_replicated


def test_weights_made_in_their_shards_are_the_weights_made_whole():
    def init():
        return SequenceModel(jax.random.key(3), make_run_config(1, 1, 1).model, SIZES)

    placed = param_shardings(jax.eval_shape(init), make_mesh(2, 1, 2))
    model = jax.jit(init, out_shardings=placed)()
    assert local_shape(model.groups[0].ffn.up_DF) == (2, 4, 8)
    assert worst_gap(model, jax.jit(init)()) < 1e-6


def test_batches_are_split_over_data():
    rows = jax.device_put(BATCHES[0].item_BT, batch_sharding(make_mesh(4, 1, 2)))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 8)}


def test_param_spec_by_hand():
    mesh = make_mesh(2, 1, 2)
    assert param_spec(("embed", "mlp"), (8, 16), mesh) == PartitionSpec("data", "model")
    assert param_spec(("embed", "mlp"), (3, 8, 16), mesh) == PartitionSpec(None, "data", "model")  # stacked layers
    assert param_spec(("items", "embed"), (13, 8), mesh) == PartitionSpec(None, "data")
    assert param_spec((None,), (8,), mesh) == PartitionSpec(None)


def test_two_axes_of_a_weight_on_one_mesh_axis_are_refused():
    mesh = make_mesh(1, 1, 2)
    with pytest.raises(InputError, match="twice onto one mesh axis"):
        param_spec(("heads", "mlp"), (4, 16), mesh)
    with pytest.raises(InputError, match="twice"):
        param_shardings(nnx.Param(jnp.zeros((4, 16)), axes=("vocab", "items"), decay="matrix"), mesh)


def test_more_devices_than_there_are_are_refused():
    n = len(jax.devices())
    with pytest.raises(InputError, match=rf"{n + 1} x 1 x 1 devices asked for, {n} are there"):
        make_mesh(n + 1, 1, 1)
    assert make_mesh(n, 1, 1).shape == {"data": n, "expert": 1, "model": 1}


def test_the_second_step_compiles_nothing_anew():
    assert [train(*mesh)[-1] for mesh in MESHES] == [1] * len(MESHES)


def test_every_device_scores_its_own_rows():
    """The largest product of a step, states against candidates, is split over `data` and not done by every device."""
    mesh = make_mesh(4, 1, 1)
    n_slots, chunk, n_candidates, d = 32, 8, 20, 3
    shapes = [(n_slots, d), (n_slots,), (n_candidates, d), (n_candidates,)]

    def total(h, positive, vector, offset, slots):
        zeros = jnp.zeros(n_candidates, int)
        rivals = XentCandidates(vector, offset, zeros - 1, zeros)
        return chunked_softmax_xent(XentSlots(h, positive, slots, slots * 0, None), positive, rivals, chunk)

    rows, whole = batch_sharding(mesh), replicated(mesh)
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows if s[0] == n_slots else whole) for s in shapes]
    slots = jax.ShapeDtypeStruct((n_slots,), jnp.int32, sharding=rows)
    text = jax.jit(jax.grad(total)).lower(*arrays, slots).compile().as_text()
    products = set(re.findall(rf"f32\[(\d+),{n_candidates}\]\S* dot\(", text))
    assert products == {str(chunk // 4)}
