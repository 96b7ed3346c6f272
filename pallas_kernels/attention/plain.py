"""`attend_plain`: attention without biases, through the libraries' kernels where a platform has better ones than ours.

cuDNN's on NVIDIA GPUs and splash attention on TPUs; both come with JAX. Neither takes biases by time or group, nor
gives a log-sum-exp that has a gradient: what needs either goes through `attend`.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.extend
import jax.numpy as jnp

from pallas_kernels.attention.api import BACKENDS, attend
from pallas_kernels.attention.operands import pad_slots

LIBRARIES = ("cudnn", "splash", "splash_interpret")
PLAIN_BACKENDS = (*BACKENDS, *LIBRARIES)
# Slots come in multiples of it: to TPUs it is the width of a vector; on GPUs cuDNN's gradient of queries is NaN where
# half of a block of as many is left over (PyTorch issue 196678).
_LANES = 128
_LARGEST_BLOCK = 512
_BLOCKS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


def attend_plain(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    window: int | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`[B, T, N, H]`, as the output of `attend` without biases.

    Args:
      q_BTNH, k_BTKH, v_BTKH, segment_BT, window: as of `attend`.
      backend: a name in `PLAIN_BACKENDS`. `auto` is `cudnn` where the program is lowered for NVIDIA GPUs, one is there
        and takes the operands, else `attend`'s. `splash` is never chosen: what leaves out blocks of other segments
        computes less of packed rows; `splash_interpret` is the same in Pallas's interpreter. On a mesh it belongs
        inside `jax.shard_map`, with `check_vma=False` where `is_library`.

    Raises:
      ValueError: as of `attend`; or the library cannot take the operands.
    """
    operands = (q_BTNH, k_BTKH, v_BTKH, segment_BT)
    if backend in ("splash", "splash_interpret"):
        return _attend_splash(*operands, window, interpret=backend != "splash")
    if backend == "cudnn":
        reason = cudnn_unsupported_reason(q_BTNH)
        if reason:
            raise ValueError(f"attend_plain: cudnn: {reason}")
        return attend_cudnn(*operands, window)

    def own(*operands: jax.Array) -> jax.Array:
        return attend(*operands, window=window, backend=backend)[0]

    # Every branch is traced, whatever the platform is: one that would refuse the operands must not be among them.
    if not is_library(q_BTNH, backend):
        return own(*operands)
    return jax.lax.platform_dependent(*operands, cuda=partial(attend_cudnn, window=window), default=own)


def is_library(q_BTNH: jax.Array, backend: str) -> bool:
    """Whether a library's kernel is among what is traced; JAX's check of what varies over a mesh knows none of them."""
    return backend in LIBRARIES or (backend == "auto" and not cudnn_unsupported_reason(q_BTNH))


def cudnn_unsupported_reason(q_BTNH: jax.Array) -> str:
    """Why cuDNN cannot take the operands here, or nothing. JAX traces its call only where it finds a GPU to ask."""
    d_head = q_BTNH.shape[-1]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q_BTNH.dtype}"
    if d_head % 8 or d_head > 128:
        return f"takes heads of multiples of 8 up to 128, not of {d_head}"
    if jax.default_backend() != "gpu" or "cuda" not in jax.extend.backend.get_backend().platform_version:
        return "there is no NVIDIA GPU in this process"
    return ""


def attend_cudnn(
    q_BTNH, k_BTKH, v_BTKH, segment_BT, window: int | None, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """Through `jax.nn.dot_product_attention`, which takes segments as a mask: two bytes a pair of slots, of one head.

    Args: `implementation="xla"` computes the same on any platform.
    """
    t = q_BTNH.shape[1]
    q, k, v, segment = (pad_slots(x, _LANES) for x in (q_BTNH, k_BTKH, v_BTKH, segment_BT))
    mask_B1TS = (segment[:, :, None] == segment[:, None, :])[:, None]
    # The mask says all of it; that it is causal is said for the blocks that can be left out.
    ago_TS = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    mask_B1TS &= (ago_TS >= 0) & (ago_TS < (window or q.shape[1]))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, is_causal=True, implementation=implementation)
    return out[:, :t]


def _attend_splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, window: int | None, interpret: bool) -> jax.Array:
    """JAX's splash attention, whose kernels leave out what is later or outside of the window, block by block."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, n, d_head = q_BTNH.shape[1:]
    q_BTNH = q_BTNH * jnp.asarray(d_head**-0.5, q_BTNH.dtype)
    q, k, v = (jnp.moveaxis(pad_slots(x, _LANES), 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    segment = pad_slots(segment_BT, _LANES)
    n_slots = segment.shape[1]
    square = (n_slots, n_slots)
    mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
    block = next(b for b in (_LARGEST_BLOCK, 256, _LANES) if n_slots % b == 0)
    named: dict[str, Any] = dict.fromkeys(_BLOCKS, block)
    sizes = splash.BlockSizes(**named)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * n), block_sizes=sizes, interpret=interpret
    )
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment))
    return jnp.moveaxis(out, 2, 1)[:, :t]
