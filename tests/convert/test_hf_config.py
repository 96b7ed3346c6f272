"""Configs of base models: what they mean, what is refused by its name; and which tensors belong to a shape."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.convert.hf_config import HFShape, MoEShape, check_tensors, expected_tensors, read_shape, write_config
from moerec.convert.hf_folder import HFFolder, TensorInfo
from moerec.errors import InputError

PATH = Path("model/config.json")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
QWEN2, LLAMA, MOE = ({"model_type": family, **SIZES} for family in ("qwen2", "llama", "qwen2_moe"))

# What the family's class in transformers 5.24 takes for what is absent.
QWEN2_SHAPE = HFShape(
    family="qwen2",
    n_layers=4,
    d_model=32,
    n_heads=4,
    n_kv_heads=4,
    d_head=8,
    d_ff=48,
    vocab_size=64,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    tied=False,
    qkv_bias=True,
    max_positions=32768,
    dtype=None,
    moe=None,
)
LLAMA_SHAPE = dataclasses.replace(QWEN2_SHAPE, family="llama", qkv_bias=False, max_positions=2048)
MIXTURE = MoEShape((0, 1, 2, 3), n_experts=60, n_active=4, d_expert=1408, d_shared=5632, renormalise=False)
MOE_SHAPE = dataclasses.replace(QWEN2_SHAPE, family="qwen2_moe", moe=MIXTURE)
BASES = {"qwen2": (QWEN2, QWEN2_SHAPE), "llama": (LLAMA, LLAMA_SHAPE), "qwen2_moe": (MOE, MOE_SHAPE)}
ALL = tuple(BASES)

# Fields in a config, and what they change in the shape of each family.
FIELDS = [
    ({}, {}, ALL),
    ({"num_key_value_heads": None}, {"n_kv_heads": 4}, ALL),
    ({"num_key_value_heads": 2}, {"n_kv_heads": 2}, ALL),
    (
        {"hidden_size": 256, "num_attention_heads": 64},
        {"d_model": 256, "n_heads": 64, "n_kv_heads": 32, "d_head": 4},
        ["qwen2"],
    ),
    (
        {"hidden_size": 256, "num_attention_heads": 64},
        {"d_model": 256, "n_heads": 64, "n_kv_heads": 64, "d_head": 4},
        ["llama"],
    ),
    (
        {"hidden_size": 256, "num_attention_heads": 32},
        {"d_model": 256, "n_heads": 32, "n_kv_heads": 16, "d_head": 8},
        ["qwen2_moe"],
    ),
    ({"head_dim": None}, {"d_head": 8}, ALL),
    ({"head_dim": 16}, {"d_head": 16}, ALL),
    ({"head_dim": 16, "hidden_size": 30}, {"d_head": 16, "d_model": 30}, ALL),
    ({"rms_norm_eps": 1e-5}, {"norm_eps": 1e-5}, ALL),
    ({"rope_theta": 1_000_000}, {"rope_theta": 1e6}, ALL),
    ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}, ALL),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}, ALL),
    ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 7}, {"rope_theta": 7.0}, ALL),
    ({"rope_parameters": None}, {}, ALL),
    ({"rope_scaling": {"type": "default", "partial_rotary_factor": 1.0}}, {}, ALL),
    ({"partial_rotary_factor": 1.0}, {}, ALL),
    ({"tie_word_embeddings": True}, {"tied": True}, ALL),
    ({"max_position_embeddings": 99}, {"max_positions": 99}, ALL),
    ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, ALL),
    ({"dtype": "float16", "torch_dtype": None}, {"dtype": "float16"}, ALL),
    ({"dtype": None, "torch_dtype": None}, {}, ALL),
    ({"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2}, {}, ALL),
    ({"sliding_window": 4096, "use_sliding_window": None}, {}, ALL),
    ({"layer_types": ["full_attention"] * 4}, {}, ALL),
    ({"layer_types": None, "quantization_config": None, "hidden_act": "silu", "is_causal": True}, {}, ALL),
    ({"transformers_version": "4.40", "bos_token_id": 1, "anything": {"else": []}}, {}, ALL),
    ({"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}, {}, ALL),
    ({"pretraining_tp": None}, {}, ["llama"]),
    ({"model_type": None, "architectures": ["Qwen2ForCausalLM"]}, {}, ["qwen2"]),
    ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, {}, ["llama"]),
    ({"model_type": None, "architectures": ["Qwen2MoeForCausalLM"]}, {}, ["qwen2_moe"]),
    ({"qkv_bias": False}, {"qkv_bias": False}, ["qwen2_moe"]),
]


@pytest.mark.parametrize(("fields", "changes", "family"), [(a, b, f) for a, b, families in FIELDS for f in families])
def test_fields_mean_what_they_mean_in_the_family(fields, changes, family):
    config, shape = BASES[family]
    assert read_shape(config | fields, PATH) == dataclasses.replace(shape, **changes)


MIXTURES = [
    ({"num_experts": 8}, {"n_experts": 8}),
    ({"num_local_experts": 8}, {"n_experts": 8}),
    ({"num_local_experts": 8, "num_experts": 8}, {"n_experts": 8}),
    ({"num_experts_per_tok": 60}, {"n_active": 60}),
    ({"moe_intermediate_size": 5, "shared_expert_intermediate_size": 6}, {"d_expert": 5, "d_shared": 6}),
    ({"norm_topk_prob": True}, {"renormalise": True}),
    ({"decoder_sparse_step": 2}, {"layers": (1, 3)}),
    ({"decoder_sparse_step": 3}, {"layers": (2,)}),
    ({"mlp_only_layers": []}, {}),
    ({"mlp_only_layers": None}, {}),
    ({"mlp_only_layers": [3, 0, 3]}, {"layers": (1, 2)}),
    ({"mlp_only_layers": [0, 1], "decoder_sparse_step": 2}, {"layers": (3,)}),
]


@pytest.mark.parametrize(("fields", "changes"), MIXTURES)
def test_fields_of_mixtures(fields, changes):
    assert read_shape(MOE | fields, PATH).moe == dataclasses.replace(MIXTURE, **changes)


@pytest.mark.parametrize("fields", [{"num_experts": 0}, {"decoder_sparse_step": 5}, {"mlp_only_layers": [0, 1, 2, 3]}])
def test_a_moe_may_have_no_mixtures(fields):
    assert read_shape(MOE | fields, PATH) == dataclasses.replace(MOE_SHAPE, moe=None)


def test_the_width_of_dense_layers_must_be_there_where_there_are_any():
    config = {name: value for name, value in MOE.items() if name != "intermediate_size"}
    assert read_shape(config, PATH).moe == MIXTURE
    with pytest.raises(InputError, match="intermediate_size is missing"):
        read_shape(config | {"mlp_only_layers": [2]}, PATH)


def told(config: dict) -> str:
    with pytest.raises(InputError) as error:
        read_shape(config, PATH)
    assert str(error.value).isprintable()
    assert str(error.value).startswith(f"{PATH}: ")
    return str(error.value).removeprefix(f"{PATH}: ")


# What is refused: fields, and the field that is told with the reason.
REFUSED = [
    ({"model_type": "mistral"}, 'model_type is "mistral": known are qwen2, llama, qwen2_moe', ALL),
    ({"model_type": 3}, "model_type is 3", ALL),
    ({"model_type": ["qwen2"]}, r'model_type is \["qwen2"\]', ALL),
    ({"model_type": None}, "model_type is missing; known are qwen2, llama, qwen2_moe", ALL),
    ({"model_type": None, "architectures": ["MistralForCausalLM"]}, "architectures is .*LlamaForCausalLM", ALL),
    ({"model_type": None, "architectures": "Qwen2ForCausalLM"}, "architectures is", ALL),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type is "linear"', ALL),
    ({"rope_scaling": {"rope_type": "llama3", "type": "default"}}, 'rope_scaling.rope_type is "llama3"', ALL),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, 'rope_parameters.rope_type is "yarn"', ALL),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention is", ALL),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5", ALL),
    ({"rope_parameters": {"rope_theta": "1e6"}}, 'rope_parameters.rope_theta is "1e6"', ALL),
    (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4},
        "rope_parameters.rope_theta is .*rope_theta is 1",
        ALL,
    ),
    ({"rope_parameters": "default"}, 'rope_parameters is "default"', ALL),
    ({"rope_scaling": [2.0]}, r"rope_scaling is \[2.0\]", ALL),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25", ALL),
    ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is true", ALL),
    ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types is", ALL),
    ({"layer_types": ["full_attention"] * 3}, "layer_types is", ALL),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq", ALL),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"', ALL),
    ({"hidden_act": None}, "hidden_act is null", ALL),
    ({"is_causal": False}, "is_causal is false", ALL),
    ({"hidden_size": 30}, "hidden_size is 30: without head_dim it must be a multiple of the 4", ALL),
    ({"hidden_size": 36}, "hidden_size is 36: it makes heads of the odd width 9", ALL),
    ({"head_dim": 7}, "head_dim is 7: it makes heads of the odd width 7", ALL),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3: it must divide the 4", ALL),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000", ALL),
    ({"dtype": 16}, "dtype is 16", ALL),
    ({"torch_dtype": ["float16"]}, "torch_dtype is", ALL),
    ({"attention_bias": True}, "attention_bias is true", ["llama"]),
    ({"mlp_bias": True}, "mlp_bias is true", ["llama"]),
    ({"mlp_bias": "no"}, 'mlp_bias is "no"', ["llama"]),
    ({"pretraining_tp": 2}, "pretraining_tp is 2", ["llama"]),
    ({"num_experts": 8, "num_local_experts": 4}, "num_local_experts is 4: but num_experts is 8", ["qwen2_moe"]),
    ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok is 9", ["qwen2_moe"]),
    ({"num_experts": 3}, "num_experts is 3: 4 experts of 3", ["qwen2_moe"]),
    ({"num_experts": -1}, "num_experts is -1", ["qwen2_moe"]),
    ({"mlp_only_layers": [4]}, r"mlp_only_layers is \[4\]: .* from 0 to 3", ["qwen2_moe"]),
    ({"mlp_only_layers": [-1]}, r"mlp_only_layers is \[-1\]", ["qwen2_moe"]),
    ({"mlp_only_layers": [True]}, r"mlp_only_layers is \[true\]", ["qwen2_moe"]),
    ({"mlp_only_layers": 1}, "mlp_only_layers is 1", ["qwen2_moe"]),
]


@pytest.mark.parametrize(("fields", "pattern", "family"), [(a, b, f) for a, b, families in REFUSED for f in families])
def test_other_models_are_refused_by_the_name_of_the_field(fields, pattern, family):
    assert re.match(pattern, told(BASES[family][0] | fields))


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_must_be_there(family, name):
    config = {key: value for key, value in BASES[family][0].items() if key != name}
    if (family, name) != ("qwen2_moe", "intermediate_size"):
        assert told(config) == f"{name} is missing"


COUNTS = [*SIZES, "max_position_embeddings"]
MOE_COUNTS = "num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step".split()
WRONG = {
    "count": [True, False, "4", 4.0, 0, -4, [4], {}, float("nan")],
    "number": [True, "1e-6", 0, 0.0, -1.0, [], float("nan"), float("inf")],
    "switch": [0, 1, "true", [], {}],
}
TYPED = [
    *(("count", name, ALL) for name in COUNTS),
    *(("count", name, ["qwen2_moe"]) for name in MOE_COUNTS),
    ("count", "num_key_value_heads", ALL),
    ("count", "head_dim", ALL),
    ("count", "pretraining_tp", ["llama"]),
    ("number", "rms_norm_eps", ALL),
    ("number", "rope_theta", ALL),
    ("switch", "tie_word_embeddings", ALL),
    ("switch", "use_sliding_window", ALL),
    ("switch", "attention_bias", ["llama"]),
    ("switch", "norm_topk_prob", ["qwen2_moe"]),
    ("switch", "qkv_bias", ["qwen2_moe"]),
]


@pytest.mark.parametrize(("kind", "name", "families"), TYPED, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_types_are_refused_by_the_name_of_the_field(kind, name, families):
    for family in families:
        for value in WRONG[kind]:
            assert told(BASES[family][0] | {name: value}).startswith(f"{name} is {json.dumps(value)}: ")


def test_a_long_value_is_cut():
    assert len(told(QWEN2 | {"model_type": "x\n" * 10_000})) < 250


COUNT = st.integers(1, 6)


@st.composite
def shapes(draw):
    family = draw(st.sampled_from(ALL))
    n_layers, n_heads = draw(COUNT), draw(st.sampled_from([1, 2, 4]))
    moe = None
    layers = tuple(sorted(draw(st.sets(st.integers(0, n_layers - 1)))))
    if family == "qwen2_moe" and layers:
        n_active = draw(COUNT)
        moe = MoEShape(layers, n_active + draw(COUNT), n_active, draw(COUNT), draw(COUNT), draw(st.booleans()))
    return HFShape(
        family,
        n_layers,
        draw(COUNT),
        n_heads,
        draw(st.sampled_from([k for k in (1, 2, 4) if k <= n_heads])),
        2 * draw(COUNT),
        draw(COUNT),
        draw(COUNT),
        draw(st.floats(1e-9, 1)),
        draw(st.floats(1, 1e9)),
        draw(st.booleans()),
        draw(st.booleans()) if family == "qwen2_moe" else family == "qwen2",
        draw(COUNT),
        draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        moe,
    )


@given(shapes())
def test_a_config_that_is_written_reads_as_the_same_shape(shape):
    config = json.loads(json.dumps(write_config(shape, shape.dtype), allow_nan=False))
    assert read_shape(config, PATH) == shape
    assert config["dtype"] == config["torch_dtype"] == shape.dtype


@pytest.mark.parametrize(
    ("shape", "dtype", "pattern"),
    [
        (dataclasses.replace(QWEN2_SHAPE, family="mistral"), "float32", "mistral is no family"),
        (dataclasses.replace(QWEN2_SHAPE, qkv_bias=False), "float32", "qwen2 has no choice of qkv_bias"),
        (dataclasses.replace(LLAMA_SHAPE, qkv_bias=True), "float32", "llama has no choice of qkv_bias"),
        (dataclasses.replace(LLAMA_SHAPE, moe=MIXTURE), "float32", "llama has no mixtures"),
        (QWEN2_SHAPE, "int8", "int8 is no dtype of weights"),
    ],
)
def test_shapes_that_a_family_lacks_have_no_config(shape, dtype, pattern):
    with pytest.raises(InputError, match=pattern):
        write_config(shape, dtype)


SMALL = HFShape("qwen2", 1, 6, 3, 1, 4, 5, 7, 1e-6, 1e4, False, True, 9)
SMALL_MOE = dataclasses.replace(SMALL, family="qwen2_moe", n_layers=2, moe=MoEShape((1,), 2, 1, 8, 10, False))
OUTER = {"model.embed_tokens.weight": (7, 6), "model.norm.weight": (6,), "lm_head.weight": (7, 6)}
LAYER = {
    "input_layernorm.weight": (6,),
    "post_attention_layernorm.weight": (6,),
    "self_attn.q_proj.weight": (12, 6),
    "self_attn.k_proj.weight": (4, 6),
    "self_attn.v_proj.weight": (4, 6),
    "self_attn.o_proj.weight": (6, 12),
}
BIASES = {"self_attn.q_proj.bias": (12,), "self_attn.k_proj.bias": (4,), "self_attn.v_proj.bias": (4,)}
DENSE = {"mlp.gate_proj.weight": (5, 6), "mlp.up_proj.weight": (5, 6), "mlp.down_proj.weight": (6, 5)}
SHARED = {
    "mlp.gate.weight": (2, 6),
    "mlp.shared_expert.gate_proj.weight": (10, 6),
    "mlp.shared_expert.up_proj.weight": (10, 6),
    "mlp.shared_expert.down_proj.weight": (6, 10),
    "mlp.shared_expert_gate.weight": (1, 6),
}
SINGLES = {
    f"mlp.experts.{e}.{part}_proj.weight": (6, 8) if part == "down" else (8, 6)
    for e in range(2)
    for part in ("gate", "up", "down")
}
PACKED = {"mlp.experts.gate_up_proj": (2, 16, 6), "mlp.experts.down_proj": (2, 6, 8)}


def in_layers(*layers: dict) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{n}.{name}": size for n, layer in enumerate(layers) for name, size in layer.items()}


LLAMA_NAMES = OUTER | in_layers(LAYER | DENSE)
QWEN2_NAMES = OUTER | in_layers(LAYER | BIASES | DENSE)
SINGLE_NAMES = OUTER | in_layers(LAYER | BIASES | DENSE, LAYER | BIASES | SHARED | SINGLES)
PACKED_NAMES = OUTER | in_layers(LAYER | BIASES | DENSE, LAYER | BIASES | SHARED | PACKED)
UNTIED = {name: size for name, size in QWEN2_NAMES.items() if name != "lm_head.weight"}
MODELS = {
    "llama": (dataclasses.replace(SMALL, family="llama", qkv_bias=False), LLAMA_NAMES),
    "qwen2": (SMALL, QWEN2_NAMES),
    "tied": (dataclasses.replace(SMALL, tied=True), UNTIED),
    "tied, output stored": (dataclasses.replace(SMALL, tied=True), QWEN2_NAMES),
    "experts one by one": (SMALL_MOE, SINGLE_NAMES),
    "experts packed": (SMALL_MOE, PACKED_NAMES),
    "no biases": (dataclasses.replace(SMALL, family="qwen2_moe", qkv_bias=False), LLAMA_NAMES),
}


def make_folder(tensors: dict[str, tuple[int, ...]]) -> HFFolder:
    file = Path("model/model.safetensors")
    infos = {name: TensorInfo(name, np.dtype(np.float32), size, file, 0, 4) for name, size in tensors.items()}
    return HFFolder(Path("model"), {}, infos)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_a_shape(name):
    shape, tensors = MODELS[name]
    assert expected_tensors(shape, tensors) == tensors
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (2,) for n in range(shape.n_layers)}
    check_tensors(make_folder(tensors | old), shape)


def refusal(shape: HFShape, tensors: dict[str, tuple[int, ...]]) -> str:
    with pytest.raises(InputError) as error:
        check_tensors(make_folder(tensors), shape)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_must_be_there_and_of_its_shape(name):
    shape, tensors = MODELS[name]
    for lost in tensors:
        if name == "tied, output stored" and lost == "lm_head.weight":
            continue
        left = {key: size for key, size in tensors.items() if key != lost}
        assert refusal(shape, left).startswith("model: lacks tensor ")
        assert json.dumps(lost) in refusal(shape, left)
        for wrong in ((*tensors[lost], 1), tensors[lost][1:], (tensors[lost][0] + 1, *tensors[lost][1:])):
            wanted = json.dumps(tensors[lost])
            line = f'"{lost}" has the shape {json.dumps(wrong)}, but by config.json it is {wanted}'
            assert refusal(shape, tensors | {lost: wrong}) == f"model/model.safetensors: tensor {line}"


UNEXPECTED = [
    "model.layers.2.input_layernorm.weight",
    "model.layers.2.self_attn.rotary_emb.inv_freq",
    "model.layers.0.mlp.gate_proj.bias",
    "model.layers.0.self_attn.o_proj.bias",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.1.mlp.experts.2.up_proj.weight",
    "model.layers.00.self_attn.q_proj.weight",
    "model.layers." + "9" * 5000 + ".self_attn.rotary_emb.inv_freq",
    "score.weight",
    "",
]


@pytest.mark.parametrize("name", UNEXPECTED, ids=lambda name: name[:40])
def test_tensors_that_do_not_belong_are_told(name):
    line = refusal(SMALL_MOE, SINGLE_NAMES | {name: (6,)})
    assert line.startswith(f"model/model.safetensors: tensor {json.dumps(name)[:120]}")
    assert line.endswith("belongs to no model such as config.json describes")


def test_biases_of_a_llama_do_not_belong():
    shape = MODELS["llama"][0]
    assert '"model.layers.0.self_attn.q_proj.bias" belongs to no model' in refusal(shape, QWEN2_NAMES)


def test_experts_stored_both_ways_are_told():
    line = refusal(SMALL_MOE, SINGLE_NAMES | PACKED_NAMES)
    assert line == (
        'model: has experts both packed ("model.layers.1.mlp.experts.gate_up_proj")'
        ' and one by one ("model.layers.1.mlp.experts.0.gate_proj.weight")'
    )


def test_a_config_of_many_experts_is_answered_at_once():
    huge = dataclasses.replace(SMALL_MOE, moe=MoEShape((1,), 10**15, 1, 8, 10, False))
    assert 'lacks tensor "model.layers.1.mlp.experts.2.gate_proj.weight"' in refusal(huge, SINGLE_NAMES)
