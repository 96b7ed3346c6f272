"""What every backend of `attend` takes, and which blocks of keys a block of queries can see at all.

Letters as in `pallas_kernels`: B sequences, T slots (queries), S slots (keys), N query heads, K key/value heads, Q
query heads of one key head (N = K Q), H head width, J buckets of time, G groups, I blocks of queries, C blocks of keys,
U slots of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """Attributes as the arguments of `pallas_kernels.attention.attend`; both of a pair of the last four may be None."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    segment_BT: jax.Array
    time_BT: jax.Array | None
    time_bias_NJ: jax.Array | None
    group_BT: jax.Array | None
    group_bias_BTNG: jax.Array | None


NEVER = -1e30  # a logit of what is not visible: its weight is exactly zero beside any that is
BEHIND = 1e30  # the log-sum-exp of added slots


class Gradients(NamedTuple):
    """Of the operands that have one; None where the operand is."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    time_bias_NJ: jax.Array | None
    group_bias_BTNG: jax.Array | None

    def cast(self, operands: Operands) -> "Gradients":
        """Each in the type of its operand."""
        named = self._asdict().items()
        cast: list[Any] = [None if g is None else g.astype(getattr(operands, name).dtype) for name, g in named]
        return Gradients(*cast)


def pad_slots(x: jax.Array, block: int, fill: float = 0) -> jax.Array:
    """`[B, T, …]` with T a multiple of `block`; a segment of 0 is padding.

    No slot sees what stands behind it, and the outputs of what is added are cut off. Its log-sum-exp must be large:
    then its weights are zero in the backward pass, whatever its biases are.
    """
    spare = -x.shape[1] % block
    pads = [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pads, constant_values=fill) if spare else x


def find_block_bounds(segment_BT: jax.Array, block: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """int32 `[B, I]` and `[B, C]`: the first block of keys that queries may see, the last block that may see keys.

    Blocks outside hold no visible pair; those inside may or may not, so segments need not be contiguous. Blocks are
    compared by the range of their segments, padding (0) apart, since it stands behind the highest segment.

    Args:
      segment_BT: T is a multiple of `block`.
      window: as in `attend`.
    """
    b, t = segment_BT.shape
    n = t // block
    segment_BIU = segment_BT.reshape(b, n, block)
    is_padding = segment_BIU == 0
    info = jnp.iinfo(jnp.int32)
    least_BI = jnp.min(jnp.where(is_padding, info.max, segment_BIU), axis=2)
    most_BI = jnp.max(jnp.where(is_padding, info.min, segment_BIU), axis=2)
    padded_BI = jnp.any(is_padding, axis=2)
    meet_BIC = (least_BI[:, :, None] <= most_BI[:, None, :]) & (least_BI[:, None, :] <= most_BI[:, :, None])
    meet_BIC |= padded_BI[:, :, None] & padded_BI[:, None, :]
    i, j = jnp.arange(n, dtype=jnp.int32)[:, None], jnp.arange(n, dtype=jnp.int32)[None, :]
    visible_BIC = meet_BIC & (j <= i)
    if window is not None:
        visible_BIC &= (i - j - 1) * block + 1 < window  # the nearest pair of two blocks that are not the same
    # A block always sees itself, so there is a first and a last.
    first_BI = jnp.min(jnp.where(visible_BIC, j, n), axis=2)
    last_BC = jnp.max(jnp.where(visible_BIC, i, 0), axis=1)
    return first_BI.astype(jnp.int32), last_BC.astype(jnp.int32)


def count_most_blocks(n_blocks: int, block: int, window: int | None) -> int:
    """How many blocks of keys, its own among them, a block of queries sees at most."""
    return n_blocks if window is None else min(n_blocks, (window - 2) // block + 2)
