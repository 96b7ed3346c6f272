"""Attention with all its `[T, S]` arrays in plain JAX, which differentiates it: what the other backends agree with."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.buckets import find_bucket
from pallas_kernels.attention.operands import NEVER, Operands


def attend_reference(operands: Operands, window: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp as of `pallas_kernels.attention.attend`; sums in float32."""
    q_BTNH, k_BTKH, v_BTKH, segment_BT, time_BT, time_bias_NJ, group_BT, group_bias_BTNG = operands
    (b, t, n, h), heads = q_BTNH.shape, k_BTKH.shape[2]
    q_BTKQH = q_BTNH.reshape(b, t, heads, n // heads, h)
    logit = jnp.einsum("BTKQH,BSKH->BKQTS", q_BTKQH, k_BTKH, preferred_element_type=jnp.float32) * h**-0.5
    logit_BNTS = logit.reshape(b, n, t, t)
    if time_BT is not None and time_bias_NJ is not None:
        bucket_BTS = find_bucket(time_BT[:, None, :], time_BT[:, :, None], time_bias_NJ.shape[1])
        logit_BNTS += time_bias_NJ.astype(jnp.float32)[:, bucket_BTS].swapaxes(0, 1)
    if group_BT is not None and group_bias_BTNG is not None:
        group_BSG = jax.nn.one_hot(group_BT, group_bias_BTNG.shape[3], dtype=jnp.float32)
        bias_BTNG = group_bias_BTNG.astype(jnp.float32)
        logit_BNTS += jnp.einsum("BTNG,BSG->BNTS", bias_BTNG, group_BSG, precision=jax.lax.Precision.HIGHEST)
    ago_TS = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
    visible_BTS = (segment_BT[:, :, None] == segment_BT[:, None, :]) & (ago_TS >= 0)
    if window is not None:
        visible_BTS &= ago_TS < window
    logit_BNTS = jnp.where(visible_BTS[:, None], logit_BNTS, NEVER)
    lse_BNT = jax.nn.logsumexp(logit_BNTS, axis=-1)
    weight_BKQTS = jnp.exp(logit_BNTS - lse_BNT[..., None]).astype(v_BTKH.dtype).reshape(logit.shape)
    out_BTKQH = jnp.einsum("BKQTS,BSKH->BTKQH", weight_BKQTS, v_BTKH, preferred_element_type=jnp.float32)
    return out_BTKQH.reshape(b, t, n, h).astype(q_BTNH.dtype), lse_BNT.swapaxes(1, 2)
