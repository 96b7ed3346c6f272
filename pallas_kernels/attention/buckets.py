"""Log-spaced buckets of the seconds between two times, decided by whole numbers: bitwise equal in every backend.

Bucket j of J is `floor(1.5 log2(1 + hours))`, at most J - 2; a negative gap counts as none. Bucket J - 1 is "not
known": either time is `NO_TIME`. A logarithm rounds differently on each device; a comparison with a threshold does not.
"""

from functools import cache

import jax
import jax.numpy as jnp

NO_TIME = -(2**31)  # in an int32 array of seconds since 2000-01-01: not known
NOT_KNOWN = 2**31 - 1  # in the order of gaps: behind the longest, which is 2^32 - 2 seconds
HOUR = 3600


@cache
def list_thresholds(n_buckets: int) -> tuple[int, ...]:
    """Whole seconds at which buckets 1, 2, … J - 2 begin, as far as a gap between two int32 times can reach.

    `1.5 log2(1 + s / 3600) >= j` is `(s + 3600)^3 >= 3600^3 4^j`, which integers decide exactly.

    Args:
      n_buckets: J, with the one for "not known".
    """
    thresholds = []
    for bucket in range(1, n_buckets - 1):
        cube = HOUR**3 * 4**bucket
        near = round(cube ** (1 / 3))
        root = next(x for x in range(near - 2, near + 3) if x**3 >= cube)  # the float is off by less than one
        if root - HOUR > 2**32 - 2:
            break
        thresholds.append(root - HOUR)
    return tuple(thresholds)


@cache
def list_starts(n_buckets: int) -> tuple[int, ...]:
    """Where each bucket begins in the order of `order_gap`, J int32; buckets out of reach begin with the last."""
    reached = [NO_TIME, *(s + NO_TIME for s in list_thresholds(n_buckets))]
    return (*reached, *[NOT_KNOWN] * (n_buckets - len(reached)))


def order_gap(earlier: jax.Array, later: jax.Array) -> jax.Array:
    """int32 that grows with the gap, from -2^31 for none; greatest is "not known".

    A gap of over 68 years fits into uint32 only, which TPUs compare badly: this is the uint32 with its sign bit turned.

    Args:
      earlier, later: int32 seconds since 2000-01-01, or `NO_TIME`; they broadcast.
    """
    # The difference may wrap round; read as uint32 it is right.
    gap = jnp.where(later > earlier, (later - earlier) ^ NO_TIME, NO_TIME)
    return jnp.where((earlier != NO_TIME) & (later != NO_TIME), gap, NOT_KNOWN)


def find_bucket(earlier: jax.Array, later: jax.Array, n_buckets: int) -> jax.Array:
    """int32 bucket of each gap, from 0 to J - 1; arguments as of `order_gap`, and J."""
    gap = order_gap(earlier, later)
    bucket = jnp.zeros_like(gap)
    for start in list_starts(n_buckets)[1:]:
        bucket += (gap >= start).astype(jnp.int32)
    return bucket
