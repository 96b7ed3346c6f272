"""Calendar features of a time, as small learned tables; each holds an entry for "not known"."""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.nn.layers import declare, normal
from moerec.shapes import NO_TIME
from pallas_kernels.attention import find_bucket

N_HOURS, N_WEEKDAYS, N_SEASONS, N_GAPS = 24, 7, 24, 24
DAY = 86_400


def calendar_codes(time: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hour, weekday (0 is Monday) and half-month of the year; the last code of each is "not known".

    Args:
      time: int32 seconds since 2000-01-01 (a Saturday), or `NO_TIME`.
    """
    known = time != NO_TIME
    day = time // DAY
    hour = jnp.where(known, (time // 3600) % 24, N_HOURS)
    weekday = jnp.where(known, (day + 5) % 7, N_WEEKDAYS)
    # Seasons drift by under a day in the 68 years that fit: leap days average out in 365.25.
    season = jnp.where(known, (((day * 4) % 1461) * N_SEASONS) // 1461, N_SEASONS)
    return hour, weekday, season


class TimeEmbedding(nnx.Module):
    """Sum of the embeddings of hour, weekday, season and gap."""

    def __init__(self, key: jax.Array, d: int, stddev: float):
        keys = jax.random.split(key, 4)
        sizes = (N_HOURS, N_WEEKDAYS, N_SEASONS, N_GAPS)
        self.hour, self.weekday, self.season, self.gap = (
            declare(k, (n + 1, d), (None, "embed"), normal(stddev), decay="embedding")
            for k, n in zip(keys, sizes, strict=True)
        )

    def __call__(self, time_BT: jax.Array, since_BT: jax.Array) -> jax.Array:
        """Args: the time to embed, and the time from which its gap counts; int32 seconds since 2000, or `NO_TIME`."""
        hour, weekday, season = calendar_codes(time_BT)
        gap = find_bucket(since_BT, time_BT, N_GAPS + 1)
        return self.hour[...][hour] + self.weekday[...][weekday] + self.season[...][season] + self.gap[...][gap]
