"""`attend_plain`: attention without biases, where a platform has one through a library's kernel.

cuDNN's on NVIDIA GPUs and splash attention on TPUs; both come with JAX. Neither takes biases by time or group, nor
gives a log-sum-exp that has a gradient: what needs either goes through `attend`.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.extend
import jax.numpy as jnp

from pallas_kernels.attention.api import BACKENDS, attend, unsupported_reason
from pallas_kernels.attention.operands import Operands, pad_slots

LIBRARIES = {"cudnn": "gpu", "splash": "tpu"}  # the platform that each is for, as a device's `platform` says
PLAIN_BACKENDS = (*BACKENDS, *LIBRARIES)
_LANES = 128  # slots come in multiples of what a TPU's vectors hold
# On GPUs, too: of a masked row of which half of such a block is left over, cuDNN's gradient of queries is NaN on H100.
_CUDNN_MULTIPLE = 128
_CUDNN_MOST = 2048  # slots up to which a mask of all pairs takes no more than the activations beside it
_SPLASH_BLOCKS = (512, 256, _LANES)  # the largest that divides the slots


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
      backend: a name in `PLAIN_BACKENDS`. `cudnn` is it where the program is lowered for NVIDIA GPUs, JAX finds one in
        this process, and it can take the operands; `splash` is it where the program is lowered for TPUs; elsewhere
        both are `attend`'s `auto`. `auto` is `cudnn` for rows up to 2,048 slots without a window; it is never
        `splash`, which computes blocks of other segments where our own kernel leaves them out. On a mesh it belongs
        inside `jax.shard_map`, for `splash` with `check_vma=False`.

    Raises:
      ValueError: the backend is unknown, or shapes or types do not fit.
    """
    operands = (q_BTNH, k_BTKH, v_BTKH, segment_BT)
    reason = unsupported_reason(Operands(*operands, None, None, None, None), window, None, backend, PLAIN_BACKENDS)
    if reason:
        raise ValueError(f"attend_plain: {reason}")

    def own(*operands: jax.Array) -> jax.Array:
        return attend(*operands, window=window, backend="auto" if backend in LIBRARIES else backend)[0]

    # Every branch is traced, whatever the platform is: one that would refuse the operands must not be among them.
    platforms: dict[str, Any] = {}
    if backend == "splash":
        platforms["tpu"] = partial(attend_splash, window=window)
    is_small = window is None and q_BTNH.shape[1] <= _CUDNN_MOST
    if (backend == "cudnn" or (backend == "auto" and is_small)) and not cudnn_unsupported_reason(q_BTNH):
        platforms["cuda"] = partial(attend_cudnn, window=window)
    return jax.lax.platform_dependent(*operands, default=own, **platforms) if platforms else own(*operands)


def cudnn_unsupported_reason(q_BTNH: jax.Array) -> str:
    """Why cuDNN cannot take the operands here, or nothing. JAX traces its call only where it finds a GPU to ask."""
    d_head = q_BTNH.shape[-1]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q_BTNH.dtype}"
    if d_head % 8 or d_head > 128:
        return f"takes heads of multiples of 8 up to 128, not of {d_head}"
    if jax.default_backend() != "gpu" or "cuda" not in jax.extend.backend.get_backend().platform_version:
        return "there is no NVIDIA GPU in this process"
    capability = jax.local_devices(backend="gpu")[0].compute_capability
    # Before 8.0 there are no such kernels; of 10.3 JAX refuses to trace for some versions of cuDNN.
    if tuple(map(int, capability.split("."))) < (8, 0) or capability == "10.3":
        return f"does not run on GPUs of compute capability {capability}"
    return ""


def attend_cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attend_plain` through `jax.nn.dot_product_attention`, which takes segments as a mask `[B, 1, T, T]`.

    It is kept for the gradient in two bytes a pair; JAX 0.10.2 makes a gradient of it, too, as large.

    Args: `implementation="xla"` computes the same on any platform.
    """
    t = q_BTNH.shape[1]
    q, k, v, segment = (pad_slots(x, _CUDNN_MULTIPLE) for x in (q_BTNH, k_BTKH, v_BTKH, segment_BT))
    ago_TS = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    mask_B1TS = ((segment[:, :, None] == segment[:, None, :]) & (ago_TS >= 0))[:, None]
    if window is not None:  # by the mask: cuDNN's own windows are not known to go with one
        mask_B1TS &= ago_TS < window
    # That it is causal is in the mask, and said for the blocks that cuDNN can leave out by it.
    out = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, is_causal=True, implementation=implementation)
    return out[:, :t]


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """`attend_plain` through JAX's splash attention, which leaves out blocks that are later or outside of the window.

    Args: `interpret=True` runs its kernels in Pallas's interpreter, on any platform.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, n, d_head = q_BTNH.shape[1:]
    q_BTNH = q_BTNH * jnp.asarray(d_head**-0.5, q_BTNH.dtype)
    q, k, v = (jnp.moveaxis(pad_slots(x, _LANES), 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    segment = pad_slots(segment_BT, _LANES)
    n_slots = segment.shape[1]
    square = (n_slots, n_slots)
    mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
    block = next(size for size in _SPLASH_BLOCKS if n_slots % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    masks = splash.MultiHeadMask([mask] * n)
    kernel = splash.make_splash_mha_single_device(masks, block_sizes=sizes, interpret=interpret)
    out_BNTH = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment))
    return jnp.moveaxis(out_BNTH, 2, 1)[:, :t]
