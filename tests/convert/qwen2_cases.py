"""Small language models of the Qwen2 family as folders of Hugging Face hold them, and what they are asked."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.convert.qwen2_oracle import count_experts, count_key_heads, has_experts, read_head_width

PAD = 1  # a token like others, so that padding that is seen is noticed
LENGTHS = (11, 5)  # tokens of the two documents that every case is asked about
QUIET = 0.02  # the scale of every third token's embedding: there the norms' eps is felt


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model: `config` is what its config.json holds.

    The seeds are such that no choice of experts is near a tie, and that every expert is chosen by some slot.
    """

    name: str
    seed: int
    config: dict[str, Any]
    packed: bool = False  # all experts of a layer in two tensors
    head_stored: bool = False  # lm_head in the file although the embeddings are tied
    n_shards: int = 1


class Inputs(NamedTuple):
    """Arrays `[B, T]`: ids of tokens, the document of each slot (0 is padding), and its place there (0 in padding)."""

    token_BT: np.ndarray
    segment_BT: np.ndarray
    position_BT: np.ndarray


def _sizes(width: int, inner: int, heads: int, key_heads: int | None, vocab: int, **others: int) -> dict[str, int]:
    """Without `key_heads` the field is left out, as of models older than it."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "vocab_size": vocab}
    return sizes | ({} if key_heads is None else {"num_key_value_heads": key_heads}) | others


def _experts(
    n_experts: int, chosen: int, inner: int, shared: int, normalised: bool, field: str = "num_experts"
) -> dict[str, Any]:
    sizes = {field: n_experts, "num_experts_per_tok": chosen, "moe_intermediate_size": inner}
    return sizes | {"shared_expert_intermediate_size": shared, "norm_topk_prob": normalised}


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _old_theta(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": None}


COMMON = {"hidden_act": "silu", "max_position_embeddings": 64, "num_hidden_layers": 2, "attention_dropout": 0.0}
QWEN2 = COMMON | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}
MOE = COMMON | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "router_aux_loss_coef": 0.001}
# Fields as they were spelled before transformers 5, and since.
OLD = {"torch_dtype": "float32", "transformers_version": "4.43.1", "use_cache": True}
NEW = {"dtype": "float32", "transformers_version": "5.0.0", "use_cache": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
FINE, COARSE = {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}
# Of no effect, as in the published models; in use, it would change every answer here.
WINDOW = {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1}
THREE_LAYERS = {"num_hidden_layers": 3}
LOCAL = "num_local_experts"

CASES = (
    Case("qwen2_tied", 1, QWEN2 | OLD | TIED | FINE | WINDOW | _sizes(24, 40, 3, 3, 44) | _old_theta(1e6)),
    Case(
        "qwen2_tied_stored",
        2,
        QWEN2 | NEW | TIED | COARSE | _sizes(32, 20, 4, 2, 46) | _theta(1e4),
        head_stored=True,
    ),
    Case("qwen2_untied", 3, QWEN2 | OLD | UNTIED | FINE | _sizes(40, 28, 4, 1, 45) | _old_theta(1e4), n_shards=2),
    Case("qwen2_one_key_head", 4, QWEN2 | NEW | UNTIED | COARSE | _sizes(32, 36, 8, 1, 47) | _theta(1e6)),
    Case(
        "qwen2_wide_heads",
        5,
        QWEN2 | NEW | TIED | FINE | THREE_LAYERS | _sizes(20, 32, 2, 1, 41, head_dim=16) | _theta(1e6),
        n_shards=2,
    ),
    Case("qwen2_narrow_heads", 6, QWEN2 | OLD | UNTIED | FINE | _sizes(36, 22, 4, 4, 43, head_dim=6) | _old_theta(1e4)),
    # As in the first models: without heads for keys, and with the default of theta.
    Case("llama_without_fields", 7, LLAMA | OLD | UNTIED | COARSE | _sizes(28, 18, 2, None, 42)),
    Case("llama_tied", 8, LLAMA | NEW | TIED | FINE | _sizes(32, 44, 8, 2, 49, head_dim=6) | _theta(1e6)),
    Case(
        "moe_normalised",
        21,
        MOE | OLD | UNTIED | FINE | _sizes(24, 44, 4, 2, 40) | _experts(6, 2, 10, 18, True) | _old_theta(1e6),
        n_shards=2,
    ),
    Case(
        "moe_every_second",
        46,
        MOE | OLD | TIED | FINE | THREE_LAYERS | {"decoder_sparse_step": 2, "mlp_only_layers": []} | WINDOW
        | _sizes(20, 36, 2, 2, 43) | _experts(5, 3, 14, 16, False) | _old_theta(1e4),
    ),
    Case(
        "moe_packed_normalised",
        23,
        MOE | NEW | UNTIED | COARSE | THREE_LAYERS | {"decoder_sparse_step": 1, "mlp_only_layers": [1]}
        | _sizes(32, 26, 8, 1, 46) | _experts(7, 3, 12, 22, True, LOCAL) | _theta(1e6),
        packed=True,
    ),
    Case(
        "moe_packed",
        60,
        MOE | NEW | TIED | COARSE | _sizes(24, 38, 4, 1, 61, head_dim=8) | _experts(6, 2, 18, 10, False) | _theta(1e4),
        packed=True,
        n_shards=2,
    ),
)  # fmt: skip


def make_inputs(case: Case) -> dict[str, Inputs]:
    """The first document alone; both as rows padded on the right, and on the left; and both packed into one row."""
    rng = np.random.default_rng([case.seed, 1])
    first, second = (rng.integers(0, case.config["vocab_size"], length) for length in LENGTHS)
    gap = LENGTHS[0] - LENGTHS[1]
    padding, nothing = np.full(gap, PAD), np.zeros(gap, np.int64)
    ones, places = [np.ones(length, np.int64) for length in LENGTHS], [np.arange(length) for length in LENGTHS]
    forms = {
        "alone": ([first], [ones[0]], [places[0]]),
        "right": ([first, [*second, *padding]], [ones[0], [*ones[1], *nothing]], [places[0], [*places[1], *nothing]]),
        "left": ([first, [*padding, *second]], [ones[0], [*nothing, *ones[1]]], [places[0], [*nothing, *places[1]]]),
        "packed": ([[*first, *second]], [[*ones[0], *(2 * ones[1])]], [[*places[0], *places[1]]]),
    }
    return {form: Inputs(*(np.array(rows, np.int64) for rows in parts)) for form, parts in forms.items()}


@functools.cache
def make_tensors(case: Case) -> dict[str, np.ndarray]:
    """The weights by their name in the file, float32, in random numbers of the case's seed."""
    config, rng = case.config, np.random.default_rng([case.seed, 0])
    width, vocab = config["hidden_size"], config["vocab_size"]
    embedding = rng.normal(0.0, 3.0 / width**0.5, (vocab, width))
    embedding[::3] *= QUIET
    tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{name}": tensor for name, tensor in _draw_attention(config, rng).items()}
        draw = _draw_experts if has_experts(config, layer) else _draw_feed_forward
        mlp = draw(config, rng)
        mlp = _pack(mlp, count_experts(config)) if case.packed and has_experts(config, layer) else mlp
        tensors |= {f"{prefix}.mlp.{name}": tensor for name, tensor in mlp.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = rng.uniform(0.5, 1.5, width)
    tensors["model.norm.weight"] = rng.uniform(0.5, 1.5, width)
    if case.head_stored:
        tensors["lm_head.weight"] = embedding
    elif not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = rng.normal(0.0, 3.0 / width**0.5, (vocab, width))
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def _draw_matrix(rng: np.random.Generator, n_out: int, n_in: int, gain: float = 1.3) -> np.ndarray:
    return rng.normal(0.0, gain / n_in**0.5, (n_out, n_in))


def _draw_attention(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    width, head = config["hidden_size"], read_head_width(config)
    n_rows = {"q_proj": head * config["num_attention_heads"], "k_proj": head * count_key_heads(config)}
    tensors = {}
    for name, n_out in {**n_rows, "v_proj": n_rows["k_proj"]}.items():
        tensors[f"{name}.weight"] = _draw_matrix(rng, n_out, width)
        if config["model_type"] != "llama":
            tensors[f"{name}.bias"] = rng.normal(0.0, 0.5, n_out)
    return {**tensors, "o_proj.weight": _draw_matrix(rng, width, n_rows["q_proj"])}


def _draw_feed_forward(
    config: dict[str, Any], rng: np.random.Generator, field: str = "intermediate_size"
) -> dict[str, np.ndarray]:
    width, inner = config["hidden_size"], config[field]
    sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {f"{name}.weight": _draw_matrix(rng, *size) for name, size in sizes.items()}


def _draw_experts(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    n_experts, width = count_experts(config), config["hidden_size"]
    tensors = {"gate.weight": _draw_matrix(rng, n_experts, width, gain=2.0)}
    for expert in range(n_experts):
        drawn = _draw_feed_forward(config, rng, "moe_intermediate_size")
        tensors |= {f"experts.{expert}.{name}": tensor for name, tensor in drawn.items()}
    shared = _draw_feed_forward(config, rng, "shared_expert_intermediate_size")
    tensors |= {f"shared_expert.{name}": tensor for name, tensor in shared.items()}
    return {**tensors, "shared_expert_gate.weight": _draw_matrix(rng, 1, width)}


def _pack(mlp: dict[str, np.ndarray], n_experts: int) -> dict[str, np.ndarray]:
    """All experts in `gate_up_proj` `[E, 2F, D]`, each one's gate above its up, and `down_proj` `[E, D, F]`."""
    gate, up, down = (
        np.stack([mlp[f"experts.{expert}.{name}.weight"] for expert in range(n_experts)])
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    others = {name: tensor for name, tensor in mlp.items() if not name.startswith("experts.")}
    return {**others, "experts.gate_up_proj": np.concatenate([gate, up], axis=1), "experts.down_proj": down}


def write_folder(case: Case, path: Path) -> None:
    """Writes config.json and the weights: into one file, or tensor by tensor in turn into several, with their index."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(case.config, indent=2), encoding="utf-8")
    tensors = make_tensors(case)
    if case.n_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    file_of = {
        name: f"model-{i % case.n_shards + 1:05d}-of-{case.n_shards:05d}.safetensors" for i, name in enumerate(tensors)
    }
    for file in sorted(set(file_of.values())):
        held = {name: tensor for name, tensor in tensors.items() if file_of[name] == file}
        save_file(held, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
