"""`attend`: causal attention within packed segments, with biases by time and by group that are computed block by block.

Letters as in `pallas_kernels`: B sequences, T slots (queries), S slots (keys), N query heads, K key/value heads, H head
width, J buckets of time, G groups. The group of a key is what the bias by group tells apart, such as its service.

`jax.nn.dot_product_attention` is no backend here: JAX 0.10.2 and 0.12 stop the gradient of the log-sum-exp that it
returns (`return_residual`). Where none is needed, nor a bias, `attend_plain` may go through it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import tpu, xla_blocks
from pallas_kernels.attention.operands import Gradients, Operands
from pallas_kernels.attention.reference import attend_reference
from pallas_kernels.varying import vary, varying_axes

# A backend is a pair: forward(operands, window, block) gives the output and the log-sum-exp; backward(operands, output,
# log-sum-exp, their cotangents, window, block) the `Gradients`.
_KERNELS: dict[str, tuple[Callable, Callable]] = {
    "xla_blocks": (xla_blocks.forward, xla_blocks.backward),
    "pallas_tpu": (tpu.forward, tpu.backward),
    "pallas_interpret": (partial(tpu.forward, interpret=True), partial(tpu.backward, interpret=True)),
}
BACKENDS = ("reference", "auto", *_KERNELS)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    time_BT: jax.Array | None = None,
    time_bias_NJ: jax.Array | None = None,
    group_BT: jax.Array | None = None,
    group_bias_BTNG: jax.Array | None = None,
    window: int | None = None,
    backend: str = "auto",
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention (Ainslie et al. 2023) of each slot to those of its segment up to itself.

    The logit of slot t for slot s is `q_t · k_s / sqrt(H) + time_bias[n, bucket(time_t - time_s)] +
    group_bias[t, n, group_s]`. Visible are slots of the same segment with `s <= t`, and `t - s < window`; padding
    attends to padding, so that every slot sees at least itself. No array grows with T S but in `reference`
    (FlashAttention: Dao et al. 2022, Dao 2023).

    Args:
      q_BTNH: queries, float32 or bfloat16; head n uses key head `n // (N // K)`.
      k_BTKH, v_BTKH: keys and values, in the queries' type.
      segment_BT: int32 number of the segment, 0 for padding. Segments need not be contiguous, but blocks are left out
        by their range of numbers.
      time_BT: int32 seconds since 2000-01-01; -2^31 is "not known".
      time_bias_NJ: bias of each bucket of `pallas_kernels.attention.buckets`; comes with `time_BT`.
      group_BT: int32 group of each key, 0 … G - 1.
      group_bias_BTNG: what each query adds to the logits of keys of each group; comes with `group_BT`.
      window: how many slots a slot sees at most, itself among them; None: all.
      backend: a name in `BACKENDS`. `reference` holds `[B, N, T, S]` arrays and is differentiated by JAX; `auto` is
        `pallas_tpu` where the program is lowered for TPUs and they can take the operands, else `xla_blocks`. On a mesh
        it belongs inside `jax.shard_map`, over sequences or heads; `pallas_interpret` only with `check_vma=False`.
      block: slots of a block; None: what suits the backend. TPUs want multiples of 128.

    Returns:
      Output `[B, T, N, H]` in the queries' type, and float32 `[B, T, N]` log-sum-exp of the visible logits. Gradients
      flow through both, to queries, keys, values and biases.

    Raises:
      ValueError: the backend is unknown, shapes or types do not fit, or one of a pair is missing.
    """
    operands = Operands(q_BTNH, k_BTKH, v_BTKH, segment_BT, time_BT, time_bias_NJ, group_BT, group_bias_BTNG)
    reason = unsupported_reason(operands, window, block, backend, BACKENDS)
    if reason:
        raise ValueError(f"attend: {reason}")
    if backend == "reference":
        return attend_reference(operands, window)
    # Inside `shard_map`, what is equal on all devices is typed as different here: JAX then sums its gradient over them,
    # which our own backward pass does not.
    axes = varying_axes(*jax.tree.leaves(operands))
    return _attend(backend, window, block, jax.tree.map(lambda a: vary(a, axes), operands))


def unsupported_reason(
    operands: Operands, window: int | None, block: int | None, backend: str, backends: tuple[str, ...]
) -> str:
    """What is wrong with the arguments of `attend`, or nothing. Args: `backends`, the names there are."""
    q, k, v, segment, time, time_bias, group, group_bias = operands
    if backend not in backends:
        return f"{backend!r} is none of {', '.join(backends)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] + q.shape[3:] != k.shape[:2] + k.shape[3:]:
        return f"queries {q.shape}, keys {k.shape}, values {v.shape} do not fit"
    b, t, n, _ = q.shape
    if not t or n % k.shape[2]:
        return f"{n} query heads over {t} slots do not fit {k.shape[2]} key heads"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are of the types {q.dtype}, {k.dtype}, {v.dtype}, not of one"
    for name, x in (("segment_BT", segment), ("time_BT", time), ("group_BT", group)):
        if x is not None and (x.shape != (b, t) or x.dtype != jnp.int32):
            return f"{name} is {x.dtype}{x.shape}, not int32{(b, t)}"
    if (time is None) != (time_bias is None) or (group is None) != (group_bias is None):
        return "time_BT and time_bias_NJ come together, and so do group_BT and group_bias_BTNG"
    if time_bias is not None and (time_bias.ndim != 2 or time_bias.shape[0] != n or time_bias.shape[1] < 2):
        return f"time_bias_NJ is {time_bias.shape}, not {n} heads by at least 2 buckets"
    if group_bias is not None and (
        group_bias.ndim != 4 or group_bias.shape[:3] != (b, t, n) or not group_bias.shape[3]
    ):
        return f"group_bias_BTNG is {group_bias.shape}, which does not begin with {(b, t, n)}"
    if (window is not None and window < 1) or (block is not None and block < 1):
        return f"window {window} and block {block} are at least 1"
    return ""


def _run(backend: str, step: int, window: int | None, block: int | None, *operands):
    """Forward (step 0) or backward (1) of a backend."""
    if backend != "auto":
        return _KERNELS[backend][step](*operands, window=window, block=block)
    # Every branch is traced, whatever the platform is: one that would refuse the operands must not be among them.
    here = _KERNELS["xla_blocks"][step]
    batched = partial(here, window=window, block=block, batched=True)  # one object: equal branches are lowered once
    on_tpu = partial(_KERNELS["pallas_tpu"][step], window=window, block=block)
    tpu_step = batched if tpu.unsupported_reason(operands[0], block) else on_tpu
    platforms = {"tpu": tpu_step, "cuda": batched, "rocm": batched}
    return jax.lax.platform_dependent(*operands, default=partial(here, window=window, block=block), **platforms)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend: str, window: int | None, block: int | None, operands: Operands):
    return _forward(backend, window, block, operands)[0]


def _forward(backend: str, window: int | None, block: int | None, operands: Operands):
    out_BTNH, lse_BTN = _run(backend, 0, window, block, operands)
    return (out_BTNH, lse_BTN), (operands, out_BTNH, lse_BTN)


def _backward(backend: str, window: int | None, block: int | None, residuals, cotangents):
    operands, out_BTNH, lse_BTN = residuals
    gradients: Gradients = _run(backend, 1, window, block, operands, out_BTNH, lse_BTN, *cotangents)
    without: dict[str, Any] = {"segment_BT": None, "time_BT": None, "group_BT": None}
    return (operands._replace(**gradients._asdict(), **without),)


_attend.defvjp(_forward, _backward)
