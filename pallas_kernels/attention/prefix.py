"""Attention of every slot to a few keys of its own, and the exact combination of attentions over several sets of keys.

Letters as in `pallas_kernels`: B sequences, T slots, N query heads, K key/value heads, Q query heads of one key head,
H head width, M keys of a slot.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def attend_few(logit_M: jax.Array, read: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention to few keys that need not be there as arrays: `attend_prefix` without its operands.

    Args:
      logit_M: float32 `[..., M]`, of all keys. read: from weights `[..., M]` to the sums of the values.

    Returns:
      What `read` makes of the softmax, and the log-sum-exp `[...]` of the logits.
    """
    lse = jax.nn.logsumexp(logit_M, axis=-1)
    return read(jnp.exp(logit_M - lse[..., None])), lse


def attend_prefix(
    q_BTNH: jax.Array, k_BTMKH: jax.Array, v_BTMKH: jax.Array, bias_BTM: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Each slot's attention to its own M keys, with keys and values as arrays; plain JAX, and differentiated by it.

    Args:
      q_BTNH: queries; head n uses key head `n // (N // K)`.
      k_BTMKH, v_BTMKH: keys and values, in the queries' type.
      bias_BTM: added to the logits of all heads.

    Returns:
      Output `[B, T, N, H]` in the queries' type, and float32 log-sum-exp `[B, T, N]` of `q·k / sqrt(H) + bias`.

    Raises:
      ValueError: shapes do not fit.
    """
    b, t, n, h = q_BTNH.shape
    heads = k_BTMKH.shape[3] if k_BTMKH.ndim == 5 else 0
    fits = heads and n % heads == 0 and k_BTMKH.shape == v_BTMKH.shape == (b, t, k_BTMKH.shape[2], heads, h)
    if not fits or not k_BTMKH.shape[2]:
        raise ValueError(f"attend_prefix: {q_BTNH.shape}, {k_BTMKH.shape}, {v_BTMKH.shape} do not fit")
    q_BTKQH = q_BTNH.reshape(b, t, heads, n // heads, h)
    logit_BTKQM = jnp.einsum("BTKQH,BTMKH->BTKQM", q_BTKQH, k_BTMKH, preferred_element_type=jnp.float32) * h**-0.5
    if bias_BTM is not None:
        logit_BTKQM += bias_BTM[:, :, None, None]

    def read(weight_BTKQM):
        weight_BTKQM = weight_BTKQM.astype(v_BTMKH.dtype)
        return jnp.einsum("BTKQM,BTMKH->BTKQH", weight_BTKQM, v_BTMKH, preferred_element_type=jnp.float32)

    out, lse_BTKQ = attend_few(logit_BTKQM, read)
    return out.reshape(b, t, n, h).astype(q_BTNH.dtype), lse_BTKQ.reshape(b, t, n)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each (Rabe and Staats 2021).

    Args:
      parts: pairs of output `[B, T, N, H]` and log-sum-exp `[B, T, N]`. A set without keys has the log-sum-exp -inf,
        and any finite output; not all sets of one row may be such.

    Returns:
      Output in the type of the first one, and float32 log-sum-exp; both differentiable.

    Raises:
      ValueError: there are no parts, or shapes do not fit.
    """
    if not parts or any(o.shape != parts[0][0].shape or a.shape != o.shape[:-1] for o, a in parts):
        raise ValueError(f"merge: {[(o.shape, a.shape) for o, a in parts]} do not fit")
    lses = jnp.stack([a.astype(jnp.float32) for _, a in parts])
    lse_BTN = jax.nn.logsumexp(lses, axis=0)
    weights = jnp.exp(lses - lse_BTN)
    weighed = [o.astype(jnp.float32) * w[..., None] for (o, _), w in zip(parts, weights, strict=True)]
    total = sum(weighed[1:], weighed[0])
    return total.astype(parts[0][0].dtype), lse_BTN
