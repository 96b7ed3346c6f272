"""The layers of a text model over a prompt, whose keys and values are kept, and over one slot a sequence after it."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moerec.config import ModelConfig
from moerec.nn.attention import attend_plain, rotate
from moerec.nn.sharding import ROW_AXES
from moerec.serve.generate.behind import Behind
from moerec.serve.generate.cache import SLOT_AXIS, KVCache, attend_cached, find_seen, keep_prompt, write
from moerec.serve.generate.experts import feed_forward, mix_experts
from moerec.serve.generate.matmul import pick_rows, product
from moerec.serve.generate.weights import LayerWeights, TextWeights


def run_prompt(
    weights: TextWeights, config: ModelConfig, token_BT: jax.Array, n_padded_B: jax.Array, n_slots: int
) -> tuple[KVCache, jax.Array]:
    """The cache of S slots, and the states `[B, T, D]` of the last layer.

    Args: int32 tokens, padded on the left; how many slots of each row are padding; S.
    """
    place_T = jnp.arange(token_BT.shape[1], dtype=jnp.int32)
    position_BT = place_T - n_padded_B[:, None]
    segment_BT = (position_BT >= 0).astype(jnp.int32)
    position_BT = jnp.maximum(position_BT, 0)
    x_BTD = _embed(weights, config, token_BT)
    keys, values = [], []
    for layer in weights.layers:
        q, k, v = _project(layer, config, x_BTD)
        q, k = (rotate(x, position_BT, config.rope_theta) for x in (q, k))
        out = attend_plain(q, k, v, segment_BT, config.window, config.attention)
        x_BTD = _finish(layer, config, x_BTD, out, segment_BT > 0)
        keys.append(place_rows(keep_prompt(k, n_slots, SLOT_AXIS.k)))
        values.append(place_rows(keep_prompt(v, n_slots, SLOT_AXIS.v)))
    return KVCache(tuple(keys), tuple(values)), x_BTD


def start_recent(cache: KVCache, n_recent: int, behind: Behind | None = None) -> KVCache:
    """Room for X slots a sequence, beside the cache; words have the time of the last event, and no service."""

    def make(axis: int, old: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(place_rows(jnp.zeros((*x.shape[:axis], n_recent, *x.shape[axis + 1 :]), x.dtype)) for x in old)

    recent = KVCache(*map(make, SLOT_AXIS, cache))
    if behind is None:
        return recent
    known = behind.context.time_BT, behind.context.service_BT
    about = tuple(
        jnp.broadcast_to(x[:, :, None, None], room.shape) for x, room in zip(known, recent.about, strict=True)
    )
    return recent._replace(about=about)


def run_slot(
    weights: TextWeights,
    config: ModelConfig,
    cache: KVCache,
    recent: KVCache,
    token_B: jax.Array,
    start: jax.Array,
    place: jax.Array,
    n_padded_B: jax.Array,
    behind: Behind | None = None,
) -> tuple[KVCache, jax.Array]:
    """What is recent with one more token a sequence, and its states `[B, 1, D]`.

    Args: int32 tokens; int32 scalars, the place of the first recent slot and that of the tokens; how many slots of each
      row are padding; what text behind events is given.
    """
    position_B1 = jnp.maximum(place - n_padded_B, 0)[:, None]
    x_BTD = _embed(weights, config, token_B[:, None])
    sizes = cache.n_slots, recent.n_slots
    seen_BS = find_seen(*sizes, start, place, n_padded_B, config.window)
    about = tuple(jnp.concatenate(pair, axis=2) for pair in zip(cache.about, recent.about, strict=True))
    keys, values = [], []
    of_layers = zip(weights.layers, cache.k, cache.v, recent.k, recent.v, strict=True)
    for n, (layer, k_BKHS, v_BKSH, k_BKHX, v_BKXH) in enumerate(of_layers):
        if behind is not None and n == config.n_trunk:
            x_BTD, behind = behind.route(x_BTD)
        personal = None if behind is None else behind.personal[n]
        plain, k, v = _project(layer, config, x_BTD)
        if behind is not None and personal is not None:
            plain = personal.scale(plain, behind.context)
        q, k = (rotate(x, position_B1, config.rope_theta) for x in (plain, k))
        keys.append(place_rows(write(k_BKHX, k, place - start, SLOT_AXIS.k)))
        values.append(place_rows(write(v_BKXH, v, place - start, SLOT_AXIS.v)))
        bias = behind.bias(personal, about) if behind is not None and personal is not None else None
        out, lse_BTN = attend_cached(q, (k_BKHS, keys[-1]), (v_BKSH, values[-1]), seen_BS, bias)
        if behind is not None and personal is not None:
            out = personal.join_prefix(plain, out, lse_BTN, behind.context)
        x_BTD = _finish(layer, config, x_BTD, out, jnp.ones(x_BTD.shape[:2], bool))
    return KVCache(tuple(keys), tuple(values), recent.about), x_BTD


def score_tokens(weights: TextWeights, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """`[B, T, V]` float32 logits of all tokens. Args: states of the last layer."""
    state_BTD = weights.final_norm(x_BTD.astype(jnp.float32)).astype(config.compute_dtype)
    rows = weights.embedding if weights.head is None else weights.head
    return product(state_BTD, rows, jnp.float32)


def place_rows(cached: jax.Array) -> jax.Array:
    """Keys `[B, K, H, S]` or values `[B, K, S, H]`; on a mesh they are where their row is, and split by heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cached
    rows = ROW_AXES if cached.shape[0] % math.prod(mesh.shape[axis] for axis in ROW_AXES) == 0 else None
    heads = None if cached.shape[1] % mesh.shape["model"] else "model"
    return jax.lax.with_sharding_constraint(cached, PartitionSpec(rows, heads))


def _embed(weights: TextWeights, config: ModelConfig, token_BT: jax.Array) -> jax.Array:
    return pick_rows(weights.embedding, token_BT, config.compute_dtype)


def _project(layer: LayerWeights, config: ModelConfig, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys before rotation, and values, `[B, T, N or K, H]`."""
    y_BTD = layer.attention_norm(x_BTD)
    found = [product(y_BTD, matrix) for matrix in layer.qkv]
    if layer.qkv_bias:
        found = [y + bias.astype(y.dtype) for y, bias in zip(found, layer.qkv_bias, strict=True)]
    h, n_heads, n_keys = config.d_head, config.n_heads, config.n_kv_heads
    if len(found) == 1:
        found = jnp.split(found[0], (n_heads * h, (n_heads + n_keys) * h), axis=-1)
    q, k, v = (y.reshape(*y.shape[:2], -1, h) for y in found)
    return q, k, v


def _finish(
    layer: LayerWeights, config: ModelConfig, x_BTD: jax.Array, out_BTNH: jax.Array, real_BT: jax.Array
) -> jax.Array:
    """What follows attention in a layer."""
    x_BTD = x_BTD + product(out_BTNH.reshape(*x_BTD.shape[:2], -1), layer.out)
    y_BTD = layer.ffn_norm(x_BTD)
    if layer.experts is not None:
        return x_BTD + mix_experts(y_BTD, real_BT, layer.experts, config.moe)
    assert layer.dense is not None
    return x_BTD + feed_forward(y_BTD, layer.dense)
