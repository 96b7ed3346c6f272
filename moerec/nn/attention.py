"""Grouped-query attention with rotary positions, causal within packed segments: plain, or given the profile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moerec.config import ModelConfig
from moerec.nn.layers import MASK_VALUE, declare, fan_in, fan_in_heads, project
from moerec.nn.profile import ProfileMemory, count_profile_slots
from moerec.nn.sharding import ROW_AXES
from moerec.nn.temporal import N_GAPS
from pallas_kernels import attention as kernels
from pallas_kernels.attention import attend, attend_few, merge

# Slots of a row from which on attention in blocks is faster than all at once, on two CPU cores; elsewhere it is not
# measured, and taken for what it does not hold in memory.
BLOCKED_FROM = 512


def rotate(x_BTNH: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Qwen2, computed in float32.

    Args:
      x_BTNH: queries or keys; H is even.
      position_BT: places within the own sequence.
      theta: base of the geometric series of wavelengths.
    """
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def causal_segment_mask(segment_BT: jax.Array, window: int = 0) -> jax.Array:
    """The causal mask `[B, T, S]`, true where slot t may attend to slot s: of its segment, not later, in the window."""
    t = segment_BT.shape[1]
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    mask = same & jnp.tril(jnp.ones((t, t), bool))
    return mask & jnp.triu(jnp.ones((t, t), bool), 1 - window) if window else mask


class ProfileContext(NamedTuple):
    """What the personal layers see beside the states.

    Attributes:
      time_BT: int32 times of the events. service_BT: int32, their services; Z where a slot is no event.
      slots: the memory slots of the profile before each event. log_relevance_BTM: logs of what they matter.
      summary_BTD: the profile as one vector.
      known_BT: bool, the slots that have a profile, if not all: what is text alone has none, and goes as through Qwen2.
    """

    time_BT: jax.Array
    service_BT: jax.Array
    slots: ProfileMemory
    log_relevance_BTM: jax.Array
    summary_BTD: jax.Array
    known_BT: jax.Array | None = None


class ProfileAttention(nnx.Module):
    """What a personal layer adds to attention. All of it is neutral at first, so that an imported model is unchanged.

    The memory slots are extra keys and values, joined by a gate a head that starts at zero (Alayrac et al. 2022); what
    is projected to heads is what all users' slots are made of, and no slot (DeepSeek-AI 2024). Biases by time are a
    table over log buckets, as in Raffel et al. (2020); those of pairs of services one over (own, other).

    A profile has no place in the sequence: queries are scaled, and read the slots, before they are rotated, so that a
    prediction depends on distances alone.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        d, n, h = config.d_model, config.n_heads, config.d_head
        personal = config.personal
        k_key, k_value = jax.random.split(key)
        zeros = jax.nn.initializers.zeros

        def table(on: bool, shape: tuple[int, ...], axes: tuple[str | None, ...], decay: str = "none"):
            return declare(key, shape, axes, zeros, decay=decay) if on else None

        has_slots = personal.prefix and bool(count_profile_slots(config))
        self.key_DNH = declare(k_key, (d, n, h), ("embed", "heads", None), fan_in) if has_slots else None
        self.value_DNH = declare(k_value, (d, n, h), ("embed", "heads", None), fan_in) if has_slots else None
        self.gate_N = table(has_slots, (n,), ("heads",))
        self.query_scale_DNH = table(personal.query_scale, (d, n, h), ("embed", "heads", None), "matrix")
        self.time_bias_NX = table(personal.time_bias, (n, N_GAPS + 1), ("heads", None))
        self.pair_NZZ = table(personal.pair_bias, (n, n_services, n_services), ("heads", None, None))
        self.pair_gate_DN = table(personal.pair_bias, (d, n), ("embed", "heads"), "matrix")
        self.other_services, self.n_services = personal.other_services, n_services
        # What the libraries' kernels have no biases for goes through our own.
        self.window = config.window
        self.backend = "auto" if config.attention in kernels.LIBRARIES else config.attention

    def scale(self, q_BTNH: jax.Array, context: ProfileContext) -> jax.Array:
        """The queries, scaled by the profile."""
        if self.query_scale_DNH is None:
            return q_BTNH
        scale = project(context.summary_BTD, self.query_scale_DNH[...])
        if context.known_BT is not None:
            scale = jnp.where(context.known_BT[..., None, None], scale, 0)
        return (q_BTNH * (1 + scale)).astype(q_BTNH.dtype)

    def group_bias(self, context: ProfileContext) -> jax.Array | None:
        """`[B, T, N or 1, Z + 1]`, what each query adds to the logits of the events of each service; of others 0."""
        if self.pair_NZZ is None and self.other_services:
            return None
        b, t = context.service_BT.shape
        bias = jnp.zeros((b, t, 1, self.n_services + 1))
        if not self.other_services:
            own = jax.nn.one_hot(context.service_BT, self.n_services)
            bias = jnp.pad(MASK_VALUE * (1 - own)[:, :, None], ((0, 0), (0, 0), (0, 0), (0, 1)))
        if self.pair_NZZ is not None:
            assert self.pair_gate_DN is not None
            gate_BTN = 1 + project(context.summary_BTD, self.pair_gate_DN[...])
            pair_NZZ = jnp.pad(self.pair_NZZ[...], ((0, 0), (0, 1), (0, 1)))  # nothing for what is no event
            bias = bias + gate_BTN[..., None] * jnp.moveaxis(pair_NZZ, 0, 1)[context.service_BT]
        return bias

    def __call__(
        self,
        q_BTNH: jax.Array,
        rotated_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        segment_BT: jax.Array,
        context: ProfileContext,
    ) -> jax.Array:
        """`[B, T, N, H]`, attention over the events and, as far as the gates are open, the memory slots.

        Args: queries after `scale`, for the slots, and those after rotation, for the events; keys after rotation; int32
          segments, 0 is padding.
        """
        group_bias_BTNG = self.group_bias(context)
        time = (None, None) if self.time_bias_NX is None else (context.time_BT, self.time_bias_NX[...])
        group = (None, None) if group_bias_BTNG is None else (context.service_BT, group_bias_BTNG)
        out, lse = _attend(rotated_BTNH, k_BTKH, v_BTKH, segment_BT, self.window, self.backend, time, group)
        return self.join_prefix(q_BTNH, out, lse, context)

    def join_prefix(
        self, q_BTNH: jax.Array, out_BTNH: jax.Array, lse_BTN: jax.Array, context: ProfileContext
    ) -> jax.Array:
        """What was attended to, `[B, T, N, H]`, with the memory slots beside it as far as the gates are open."""
        if self.key_DNH is None:
            return out_BTNH
        assert self.value_DNH is not None
        assert self.gate_N is not None
        keys, values = (context.slots.project(w[...], q_BTNH.dtype) for w in (self.key_DNH, self.value_DNH))
        logit_BTNM = keys.score(q_BTNH) * q_BTNH.shape[-1] ** -0.5 + context.log_relevance_BTM[:, :, None]
        prefix = attend_few(logit_BTNM, values.read)
        joined, _ = merge([(out_BTNH, lse_BTN), prefix])
        change = jnp.tanh(self.gate_N[...])[:, None] * (joined - out_BTNH)
        if context.known_BT is not None:
            change = jnp.where(context.known_BT[..., None, None], change, 0)
        return out_BTNH + change.astype(out_BTNH.dtype)


def attend_plain(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array, window: int = 0, backend="auto"
) -> jax.Array:
    """`[B, T, N, H]`, attention without biases: all weights at once where rows are short, else in blocks.

    Args: queries and keys after rotation; segments and window as in `causal_segment_mask`; backend: `model.attention`.
    """
    is_long = q_BTNH.shape[1] >= BLOCKED_FROM and backend == "auto"
    if is_long or backend not in ("auto", "reference"):

        def run(rows, _):
            return kernels.attend_plain(*rows, window=window or None, backend=backend)

        # JAX's check of what varies over a mesh refuses kernels that do not say it of their outputs.
        return _share(run, (q_BTNH, k_BTKH, v_BTKH, segment_BT), is_checked=backend != "splash")
    # Padding attends to padding (segment 0), so that no row of the softmax is empty.
    return attend_masked(q_BTNH, k_BTKH, v_BTKH, causal_segment_mask(segment_BT, window))


@jax.custom_vjp
def attend_masked(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """`[B, T, N, H]`, softmax attention with all weights at once; `jax.nn.dot_product_attention` in half of its time.

    The exponentials are kept and never divided: what they are summed by divides the outputs, and backward the
    cotangents, which are a head wide and not a row long. Sums over keys of gradients are sums over the head, too, as in
    Dao et al. (2022). Weights are computed in float32.

    Args: the mask has a true value in each row.
    """
    return _attend_forward(q_BTNH, k_BTKH, v_BTKH, mask_BTS)[0]


def _to_key_heads(x_BTNH: jax.Array, n_keys: int) -> jax.Array:
    """`[B, K, X T, H]`: the X query heads of a key head one after another."""
    b, t, n, h = x_BTNH.shape
    return jnp.moveaxis(x_BTNH.reshape(b, t, n_keys, n // n_keys, h), 1, 3).reshape(b, n_keys, -1, h)


def _from_key_heads(x_BKRH: jax.Array, t: int) -> jax.Array:
    b, k, r, h = x_BKRH.shape
    return jnp.moveaxis(x_BKRH.reshape(b, k, r // t, t, h), 3, 1).reshape(b, t, -1, h)


def _attend_forward(q_BTNH, k_BTKH, v_BTKH, mask_BTS):
    t, n_keys = k_BTKH.shape[1:3]
    q = _to_key_heads(q_BTNH, n_keys) * jnp.asarray(q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype)
    k, v = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    logit_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32)
    mask_B1RS = jnp.tile(mask_BTS, (1, q.shape[2] // t, 1))[:, None]
    logit_BKRS = jnp.where(mask_B1RS, logit_BKRS, -jnp.inf)
    exp_BKRS = jnp.exp(logit_BKRS - jnp.max(logit_BKRS, axis=-1, keepdims=True))
    total_BKR1 = jnp.sum(exp_BKRS, axis=-1, keepdims=True)
    exp_BKRS = exp_BKRS.astype(v.dtype)
    out = jnp.einsum("BKRS,BKSH->BKRH", exp_BKRS, v, preferred_element_type=jnp.float32) / total_BKR1
    return _from_key_heads(out.astype(v.dtype), t), (q, k, v, exp_BKRS, total_BKR1, out)


def _attend_backward(kept, g_BTNH):
    q, k, v, exp_BKRS, total_BKR1, out = kept
    t, n_keys, dtype = k.shape[2], k.shape[1], v.dtype
    g = _to_key_heads(g_BTNH, n_keys).astype(jnp.float32) / total_BKR1
    own_BKR1, g = jnp.sum(g * out, axis=-1, keepdims=True), g.astype(dtype)
    d_v = jnp.einsum("BKRS,BKRH->BKSH", exp_BKRS, g)
    d_weight = jnp.einsum("BKRH,BKSH->BKRS", g, v, preferred_element_type=jnp.float32)
    d_logit = (exp_BKRS * (d_weight - own_BKR1)).astype(dtype)
    d_q = jnp.einsum("BKRS,BKSH->BKRH", d_logit, k) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    d_k = jnp.einsum("BKRS,BKRH->BKSH", d_logit, q)
    return _from_key_heads(d_q, t), jnp.moveaxis(d_k, 2, 1), jnp.moveaxis(d_v, 2, 1), None


attend_masked.defvjp(_attend_forward, _attend_backward)


def _attend(q_BTNH, k_BTKH, v_BTKH, segment_BT, window: int, backend: str, time=(None, None), group=(None, None)):
    """`pallas_kernels.attention.attend`, shared over the mesh.

    Args: `time` and `group` are pairs of codes `[B, T]` and biases, `[N, X]` and `[B, T, N or 1, G]`.
    """
    group_BT, group_bias_BTNG = group
    if group_bias_BTNG is not None:
        group_bias_BTNG = jnp.broadcast_to(group_bias_BTNG, (*q_BTNH.shape[:3], group_bias_BTNG.shape[-1]))

    def run(rows, time_bias_NX):
        q, k, v, segment, time, group, group_bias = rows
        return attend(
            q,
            k,
            v,
            segment,
            time_BT=time,
            time_bias_NJ=time_bias_NX,
            group_BT=group,
            group_bias_BTNG=group_bias,
            window=window or None,
            backend=backend,
        )

    return _share(run, (q_BTNH, k_BTKH, v_BTKH, segment_BT, time[0], group_BT, group_bias_BTNG), time[1])


def _share(run: Callable[..., Any], rows: tuple[Any, ...], bias_NX: jax.Array | None = None, is_checked=True) -> Any:
    """`run(rows, bias)`; on a mesh each device has its own rows, and own heads where they divide.

    Args: rows are `[B, T]`, or `[B, T, N or K, …]` as are all results; queries and keys come first; `is_checked`:
      whether JAX checks what varies over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(rows, bias_NX)
    n_batch = rows[0].shape[0]
    spare = -n_batch % (mesh.shape["data"] * mesh.shape["expert"])
    rows = jax.tree.map(lambda a: jnp.pad(a, ((0, spare), *((0, 0),) * (a.ndim - 1))), rows)
    heads = None if rows[1].shape[2] % mesh.shape["model"] else "model"
    by_head = PartitionSpec(ROW_AXES, None, heads)
    specs = jax.tree.map(lambda a: by_head if a.ndim > 2 else PartitionSpec(ROW_AXES), rows), PartitionSpec(heads)
    results = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=is_checked)(rows, bias_NX)
    return jax.tree.map(lambda a: a[:n_batch], results)


def _project(x_BTD: jax.Array, w_DNH: nnx.Param, bias_NH: nnx.Param | None) -> jax.Array:
    y_BTNH = project(x_BTD, w_DNH[...])
    return y_BTNH if bias_NH is None else y_BTNH + bias_NH[...].astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with biases on query, key and value, as in Qwen2, or without."""

    def __init__(self, key: jax.Array, config: ModelConfig, personal: ProfileAttention | None = None):
        d, n, k, h = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
        kq, kk, kv, ko = jax.random.split(key, 4)
        zeros = jax.nn.initializers.zeros
        self.q_DNH = declare(kq, (d, n, h), ("embed", "heads", None), fan_in)
        self.k_DKH = declare(kk, (d, k, h), ("embed", "kv_heads", None), fan_in)
        self.v_DKH = declare(kv, (d, k, h), ("embed", "kv_heads", None), fan_in)
        self.o_NHD = declare(ko, (n, h, d), ("heads", None, "embed"), fan_in_heads)
        has_bias = config.qkv_bias
        self.q_bias_NH = declare(kq, (n, h), ("heads", None), zeros, decay="none") if has_bias else None
        self.k_bias_KH = declare(kk, (k, h), ("kv_heads", None), zeros, decay="none") if has_bias else None
        self.v_bias_KH = declare(kv, (k, h), ("kv_heads", None), zeros, decay="none") if has_bias else None
        self.rope_theta, self.window, self.backend = config.rope_theta, config.window, config.attention
        self.personal = personal

    def project(
        self, x_BTD: jax.Array, position_BT: jax.Array, context: ProfileContext | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries (scaled by the profile, where it is read) before and after rotation, rotated keys, and values."""
        q = _project(x_BTD, self.q_DNH, self.q_bias_NH)
        k = _project(x_BTD, self.k_DKH, self.k_bias_KH)
        v = _project(x_BTD, self.v_DKH, self.v_bias_KH)
        if self.personal is not None:
            assert context is not None
            q = self.personal.scale(q, context)
        rotated, k = rotate(q, position_BT, self.rope_theta), rotate(k, position_BT, self.rope_theta)
        return q, rotated, k, v

    def project_out(self, out_BTNH: jax.Array) -> jax.Array:
        """`[B, T, D]`, what the heads attended to, brought together."""
        return project(out_BTNH, self.o_NHD[...], n_summed=2)

    def __call__(
        self, x_BTD: jax.Array, position_BT: jax.Array, segment_BT: jax.Array, context: ProfileContext | None = None
    ) -> jax.Array:
        return self.attend(x_BTD, position_BT, segment_BT, context)[0]

    def attend(
        self, x_BTD: jax.Array, position_BT: jax.Array, segment_BT: jax.Array, context: ProfileContext | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """What the layer puts out, `[B, T, D]`; and the rotated keys and the values, `[B, T, K, H]` each."""
        q, rotated, k, v = self.project(x_BTD, position_BT, context)
        if self.personal is not None:
            assert context is not None
            out = self.personal(q, rotated, k, v, segment_BT, context)
        else:
            out = attend_plain(rotated, k, v, segment_BT, self.window, self.backend)
        return self.project_out(out), (k, v)
