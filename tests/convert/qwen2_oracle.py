"""Language models of the Qwen2 family as loops in float64 NumPy, from their definitions: the oracle of these tests.

Shapes by letters: B rows, T slots, D width, F width within a feed-forward network, E experts, V tokens.

Sources: Qwen2 technical report (arXiv 2407.10671, section 2.2), RMSNorm (arXiv 1910.07467), rotary positions
(arXiv 2104.09864, in the layout in which the halves of a head are the pairs), SwiGLU (arXiv 2002.05202), grouped
queries (arXiv 2305.13245), and for experts the report of Qwen1.5-MoE.
"""

import math
from typing import Any

import numpy as np

Config = dict[str, Any]
Weights = dict[str, np.ndarray]
DEFAULT_THETA = 10_000.0


def run(
    config: Config, tensors: Weights, token_BT: np.ndarray, segment_BT: np.ndarray, position_BT: np.ndarray
) -> dict[str, Any]:
    """Logits and states of every slot; those of padding, which is segment 0, mean nothing.

    Args:
      config: what config.json holds.
      tensors: what the files of weights hold, by its name there.
      token_BT: ids of tokens.
      segment_BT: a slot sees those slots at or before it that are of its segment.
      position_BT: what the rotary embedding turns by.

    Returns:
      `logits` `[B, T, V]`; `hidden`, n_layers + 1 arrays `[B, T, D]`: the residual stream after the embedding and after
      each layer, before the last norm; `router`, the routers' logits `[B, T, E]` by the number of the layer.
    """
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    rows = [_run_row(config, weights, *row) for row in zip(token_BT, segment_BT, position_BT, strict=True)]
    return {
        "logits": np.stack([row["logits"] for row in rows]),
        "hidden": [np.stack(states) for states in zip(*(row["hidden"] for row in rows), strict=True)],
        "router": {layer: np.stack([row["router"][layer] for row in rows]) for layer in rows[0]["router"]},
    }


def _run_row(
    config: Config, weights: Weights, token_T: np.ndarray, segment_T: np.ndarray, position_T: np.ndarray
) -> dict[str, Any]:
    eps = config["rms_norm_eps"]
    x_TD = np.stack([weights["model.embed_tokens.weight"][token] for token in token_T])
    hidden, router = [x_TD], {}
    for layer in range(config["num_hidden_layers"]):
        w = take(weights, f"model.layers.{layer}.")
        normed_TD = rms_norm(x_TD, w["input_layernorm.weight"], eps)
        x_TD = x_TD + attend(config, take(w, "self_attn."), normed_TD, segment_T, position_T)
        normed_TD = rms_norm(x_TD, w["post_attention_layernorm.weight"], eps)
        mlp = take(w, "mlp.")
        if has_experts(config, layer):
            router[layer] = np.stack([mlp["gate.weight"] @ x_D for x_D in normed_TD])
            x_TD = x_TD + np.stack([mix_experts(config, mlp, x_D) for x_D in normed_TD])
        else:
            x_TD = x_TD + np.stack([feed_forward(mlp, x_D) for x_D in normed_TD])
        hidden.append(x_TD)
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings", False) else "lm_head.weight"
    last_TD = rms_norm(x_TD, weights["model.norm.weight"], eps)
    return {"logits": np.stack([weights[head] @ x_D for x_D in last_TD]), "hidden": hidden, "router": router}


def take(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def read_theta(config: Config) -> float:
    """Of the group of the newer spelling, or of the field of the older one."""
    parameters = config.get("rope_parameters") or config
    return parameters.get("rope_theta", DEFAULT_THETA)


def count_experts(config: Config) -> int:
    return config["num_local_experts"] if "num_local_experts" in config else config.get("num_experts", 0)


def count_key_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def read_head_width(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def has_experts(config: Config, layer: int) -> bool:
    """Every `decoder_sparse_step`-th layer has experts, beginning with that number, except the listed ones."""
    if count_experts(config) == 0 or layer in (config.get("mlp_only_layers") or []):
        return False
    return (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def rms_norm(x_TD: np.ndarray, scale_D: np.ndarray, eps: float) -> np.ndarray:
    return np.stack([x_D / math.sqrt(np.mean(x_D * x_D) + eps) * scale_D for x_D in x_TD])


def rotate(x_H: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Turns the pair of entries i and i + half by `position / theta ** (2 i / width)`."""
    half = len(x_H) // 2
    turned_H = np.zeros_like(x_H)
    for i in range(half):
        angle = position / theta ** (2 * i / len(x_H))
        turned_H[i] = x_H[i] * math.cos(angle) - x_H[i + half] * math.sin(angle)
        turned_H[i + half] = x_H[i + half] * math.cos(angle) + x_H[i] * math.sin(angle)
    return turned_H


def softmax(x: np.ndarray) -> np.ndarray:
    exps = np.exp(x - np.max(x))
    return exps / np.sum(exps)


def project(w: Weights, name: str, x_TD: np.ndarray, n_heads: int) -> np.ndarray:
    """`[heads, T, width of a head]`: the heads are rows of the matrix one after the other, and so in its bias."""
    bias = w.get(f"{name}.bias", np.zeros(len(w[f"{name}.weight"])))
    return np.stack([(w[f"{name}.weight"] @ x_D + bias).reshape(n_heads, -1) for x_D in x_TD], axis=1)


def attend(config: Config, w: Weights, x_TD: np.ndarray, segment_T: np.ndarray, position_T: np.ndarray) -> np.ndarray:
    """Head by head and slot by slot; head n reads the key head n // (heads to a key head)."""
    n_heads, n_key_heads, width = config["num_attention_heads"], count_key_heads(config), read_head_width(config)
    query_NTH = project(w, "q_proj", x_TD, n_heads)
    key_KTH, value_KTH = project(w, "k_proj", x_TD, n_key_heads), project(w, "v_proj", x_TD, n_key_heads)
    theta, n_slots = read_theta(config), len(x_TD)
    for head_TH in (*query_NTH, *key_KTH):
        for t in range(n_slots):
            head_TH[t] = rotate(head_TH[t], position_T[t], theta)
    mixed_TNH = np.zeros((n_slots, n_heads, width))
    for n in range(n_heads):
        k = n // (n_heads // n_key_heads)
        for t in range(n_slots):
            seen = [s for s in range(t + 1) if segment_T[s] == segment_T[t]]
            share = softmax(np.array([query_NTH[n, t] @ key_KTH[k, s] for s in seen]) / math.sqrt(width))
            for s, weight in zip(seen, share, strict=True):
                mixed_TNH[t, n] += weight * value_KTH[k, s]
    return np.stack([w["o_proj.weight"] @ mixed_NH.reshape(-1) for mixed_NH in mixed_TNH])


def feed_forward(w: Weights, x_D: np.ndarray) -> np.ndarray:
    gate_F, up_F = w["gate_proj.weight"] @ x_D, w["up_proj.weight"] @ x_D
    return w["down_proj.weight"] @ (gate_F / (1 + np.exp(-gate_F)) * up_F)


def take_expert(w: Weights, expert: int) -> Weights:
    """One expert's three matrices; stored in one tensor for all experts, its gate is above its up."""
    if "experts.gate_up_proj" not in w:
        return take(w, f"experts.{expert}.")
    gate_up, down = w["experts.gate_up_proj"][expert], w["experts.down_proj"][expert]
    inner = len(gate_up) // 2
    return {"gate_proj.weight": gate_up[:inner], "up_proj.weight": gate_up[inner:], "down_proj.weight": down}


def mix_experts(config: Config, w: Weights, x_D: np.ndarray) -> np.ndarray:
    """The most probable experts, weighted by their probability among all, and the expert that all tokens share."""
    probability_E = softmax(w["gate.weight"] @ x_D)
    ranked = sorted(range(len(probability_E)), key=lambda expert: -probability_E[expert])
    chosen = ranked[: config["num_experts_per_tok"]]
    total = sum(probability_E[expert] for expert in chosen) if config["norm_topk_prob"] else 1.0
    out_D = np.zeros_like(x_D)
    for expert in chosen:
        out_D += probability_E[expert] / total * feed_forward(take_expert(w, expert), x_D)
    openness = 1 / (1 + math.exp(-(w["shared_expert_gate.weight"] @ x_D).item()))
    return out_D + openness * feed_forward(take(w, "shared_expert."), x_D)
