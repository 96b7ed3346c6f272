"""A whole training step of a mixture through the real TPU compiler, for sixteen chips."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from moerec.config import (
    AskConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PersonalConfig,
    TrainConfig,
)
from moerec.nn.model import ModelSizes
from moerec.nn.sharding import MESH_AXES
from moerec.train.step import lower_train_step

# A TPU's program in the compilation cache cannot be loaded here; it is compiled anew.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
pytest.importorskip("libtpu", reason="the TPU compiler is not here: pip install -c requirements.lock -e '.[tpu]'")
ROWS, T = 32, 128
KERNELS = ("router_forward", "router_backward", "grouped_ffn_forward", "grouped_ffn_rows", "grouped_ffn_sides")
ATTENTION = ("attention_forward", "attention_bwd_dq", "attention_bwd_dkv")
SIZES = ModelSizes(
    n_items=1024, n_tokens=1024, n_services=3, n_actions=4, context_sizes=(8,), field_sizes=(8,), has_control=True
)


def make_config(strategy: str) -> Config:
    """A dense layer and one with 16 experts, in bfloat16."""
    moe = MoEConfig(layers=(1,), n_per_group=4, d_expert=256, n_active=2, tile=128, strategy=strategy, backend="auto")
    shape = {"n_layers": 2, "d_model": 256, "n_heads": 2, "n_kv_heads": 1, "d_head": 128, "d_ff": 512}
    return Config(
        data=DataConfig(seq_len=T, history_len=T, max_tokens=8, max_attributes=0),
        model=ModelConfig(**shape, moe=moe, pointer="services", compute_dtype="bfloat16", remat=True),
        loss=LossConfig(kind="sampled_softmax", n_negatives=256),
        optim=OptimConfig(warmup_steps=10),
        train=TrainConfig(steps=100, batch_size=ROWS),
    )


def compile_step(devices, config: Config):
    """The compiled step on a mesh of two by eight chips, from shapes alone."""
    mesh = Mesh(np.asarray(devices).reshape(2, 8, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return lower_train_step(config, SIZES, mesh).compile()


def test_a_step_with_a_profile_compiles_for_sixteen_chips():
    """Long rows, a window, all parts of a personal layer: blockwise attention with its biases, and the memory."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    config = make_config("all_gather")
    personal = PersonalConfig(layers=(0,), n_aspects=8, d_memory=32)
    moe = dataclasses.replace(config.model.moe, layers=(0,))  # beside a dense layer it stands in the steps below
    model = dataclasses.replace(
        config.model, n_layers=1, moe=moe, personal=personal, window=128, event_time=True, pointer="none"
    )
    data = dataclasses.replace(config.data, seq_len=512, history_len=512)
    compiled = compile_step(devices, dataclasses.replace(config, model=model, data=data))
    text = compiled.as_text()
    assert [name for name in (*KERNELS, *ATTENTION) if name not in text] == []
    assert compiled.memory_analysis().temp_size_in_bytes < 2e8


def ask_all_pointers(config: Config) -> Config:
    """Experts that hypotheses open, all pointers, and rows that are dropped."""
    near = {"text_pointer": True, "transition_pointer": True, "crossing_pointer": True, "row_dropout": 0.2}
    model = dataclasses.replace(config.model, ask=AskConfig(from_layer=1, d_analyser=128), repeat_bias=True, **near)
    data = dataclasses.replace(config.data, text_neighbors=32, transition_neighbors=32, crossing_neighbors=32)
    return dataclasses.replace(config, model=model, data=data)


# Each strategy and each topology once: a compile takes twenty seconds. The profile's step is of all_gather on v5e.
@pytest.mark.parametrize(
    ("strategy", "topology", "change"),
    [("all_gather", "v5p:2x2x4", ask_all_pointers), ("ragged_all_to_all", "v5e:4x4", lambda config: config)],
)
def test_a_training_step_compiles_for_sixteen_chips(topology, strategy, change):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(devices) == 16
    compiled = compile_step(devices, change(make_config(strategy)))
    text = compiled.as_text()
    assert [name for name in KERNELS if name not in text] == []
    assert ("ragged-all-to-all" in text) == (strategy == "ragged_all_to_all")
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2e8
