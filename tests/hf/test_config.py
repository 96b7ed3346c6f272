"""What config.json says, and what is taken for a field that it lacks, as transformers has it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from moerec.convert.hf_config import read_shape, write_config
from tests.convert.qwen2_cases import CASES, LLAMA, MOE, QWEN2

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
}
# Without them there is no model here, or in transformers none: its default of heads of keys does not divide the heads
# of such small ones, and it does not know the other name of the experts' number.
NEEDED = {"model_type", *SIZES, "num_key_value_heads", "num_local_experts"}
BARE = {f"bare_{fields['model_type']}": {"model_type": fields["model_type"]} | SIZES for fields in (QWEN2, LLAMA, MOE)}
WHOLE = BARE | {case.name: case.config for case in CASES if "num_local_experts" not in case.config}


def read_other(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sizes that transformers makes a model of."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return describe(transformers.AutoConfig.from_pretrained(folder))


def describe(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "family": config.model_type,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "d_head": d_head,
        "d_ff": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tied": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "moe": None,
    }
    if config.model_type != "qwen2_moe":
        return found | {"qkv_bias": config.model_type == "qwen2"}
    counted = range(config.decoder_sparse_step - 1, config.num_hidden_layers, config.decoder_sparse_step)
    found["moe"] = {
        "layers": tuple(layer for layer in counted if layer not in (config.mlp_only_layers or ())),
        "n_experts": config.num_experts,
        "n_active": config.num_experts_per_tok,
        "d_expert": config.moe_intermediate_size,
        "d_shared": config.shared_expert_intermediate_size,
        "renormalise": config.norm_topk_prob,
    }
    return found | {"qkv_bias": config.qkv_bias}


@pytest.mark.parametrize("name", WHOLE)
def test_a_field_and_its_absence_mean_what_they_mean_in_transformers(name, tmp_path):
    config = WHOLE[name]
    # Heads of an odd width have no rotary positions, here or there.
    odd = {"head_dim"} if config["hidden_size"] // config["num_attention_heads"] % 2 else set()
    for left_out in (None, *(config.keys() - NEEDED - odd)):
        told = {field: value for field, value in config.items() if field != left_out}
        shape = read_shape(told, tmp_path / "config.json")
        assert dataclasses.asdict(shape) == read_other(told, tmp_path), left_out


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_config_of_ours_means_the_same_in_transformers(case, dtype, tmp_path):
    shape = read_shape(case.config, tmp_path / "config.json")
    found = read_other(write_config(shape, dtype), tmp_path)
    assert found == dataclasses.asdict(dataclasses.replace(shape, dtype=dtype))
