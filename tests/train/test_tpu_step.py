"""A whole training step of a mixture through the real TPU compiler, for sixteen chips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from moerec.config import Config, LossConfig, ModelConfig, MoEConfig, OptimConfig, PersonalConfig, TrainConfig
from moerec.nn.model import ModelSizes
from moerec.nn.sharding import MESH_AXES, batch_sharding, param_shardings, replicated
from moerec.tasks.losses import sampling_cdf
from moerec.train.step import init_state, make_train_step
from moerec.types import Batch, Catalog

# A TPU's program in the compilation cache cannot be loaded here; it is compiled anew.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
pytest.importorskip("libtpu", reason="the TPU compiler is not here: pip install -c requirements.lock -e '.[tpu]'")
N_ITEMS, N_SERVICES, ROWS, T = 1024, 3, 32, 128
KERNELS = ("router_forward", "router_backward", "grouped_ffn_forward", "grouped_ffn_rows", "grouped_ffn_sides")
ATTENTION = ("attention_forward", "attention_pull_queries", "attention_pull_keys")
SIZES = ModelSizes(n_items=N_ITEMS, n_tokens=1024, n_services=N_SERVICES, n_actions=4, context_sizes=(8,))


def make_config(strategy: str) -> Config:
    """A dense layer and one with 16 experts, in bfloat16."""
    moe = MoEConfig(layers=(1,), n_per_group=4, d_expert=256, n_active=2, tile=128, strategy=strategy, backend="auto")
    shape = {"n_layers": 2, "d_model": 256, "n_heads": 2, "n_kv_heads": 1, "d_head": 128, "d_ff": 512}
    return Config(
        model=ModelConfig(**shape, moe=moe, pointer="services", compute_dtype="bfloat16", remat=True),
        loss=LossConfig(kind="sampled_softmax", n_negatives=256),
        optim=OptimConfig(warmup_steps=10),
        train=TrainConfig(steps=100, batch_size=ROWS),
    )


def shaped(tree, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def compile_step(devices, shape: tuple[int, int, int], config: Config, t: int = T):
    """The compiled step on a mesh of that shape, from shapes alone."""
    mesh = Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    state = jax.eval_shape(lambda: init_state(config, SIZES))
    placed = param_shardings(state, mesh)
    ids, real = jax.ShapeDtypeStruct((ROWS, t), jnp.int32), jax.ShapeDtypeStruct((ROWS, t), jnp.float32)
    context = jax.ShapeDtypeStruct((ROWS, t, 1), jnp.int32)
    batch = Batch(**dict.fromkeys(Batch._fields, ids))
    batch = batch._replace(weight_BT=real, request_context_BTC=context, field_BTY=context)
    table = Catalog(
        jax.ShapeDtypeStruct((N_ITEMS,), jnp.int32),
        jax.ShapeDtypeStruct((N_ITEMS, 8), jnp.int32),
        jax.ShapeDtypeStruct((N_ITEMS,), jnp.float32),
    )
    step = make_train_step(config, jnp.asarray(sampling_cdf(np.ones(N_ITEMS), 0.0)))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(mesh)))
    with jax.set_mesh(mesh):
        arguments = (
            shaped(state, placed),
            *(
                shaped(x, jax.tree.map(lambda _, s=s: s, x))
                for x, s in ((batch, batch_sharding(mesh)), (table, replicated(mesh)))
            ),
        )
        return compiled.lower(*arguments).compile()


def test_a_step_with_a_profile_compiles_for_sixteen_chips():
    """Long rows, a window, all parts of a personal layer: blockwise attention with its biases, and the memory."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    config = make_config("all_gather")
    personal = PersonalConfig(layers=(1,), n_aspects=8, d_memory=32)
    model = dataclasses.replace(config.model, personal=personal, window=128, event_time=True, pointer="none")
    compiled = compile_step(devices, (2, 8, 1), dataclasses.replace(config, model=model), t=512)
    text = compiled.as_text()
    assert [name for name in (*KERNELS, *ATTENTION) if name not in text] == []
    assert compiled.memory_analysis().temp_size_in_bytes < 2e8


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
@pytest.mark.parametrize("strategy", ["all_gather", "ragged_all_to_all"])
def test_a_training_step_compiles_for_sixteen_chips(topology, strategy):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(devices) == 16
    compiled = compile_step(devices, (2, 8, 1), make_config(strategy))
    text = compiled.as_text()
    assert [name for name in KERNELS if name not in text] == []
    assert ("ragged-all-to-all" in text) == (strategy == "ragged_all_to_all")
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2e8
