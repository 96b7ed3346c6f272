"""Embeddings of times: their places in the calendar, and the gaps since earlier events; each has a "not known"."""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import TimeConfig
from moerec.nn.layers import declare, normal
from moerec.types import NO_TIME
from pallas_kernels.attention import find_bucket

DAY = 86_400
N_GAPS = 24
N_CODES = {"hour": 24, "weekday": 7, "month_day": 31, "season": 24}
N_WAVES = {"hour": 6, "weekday": 3, "month_day": 4, "season": 4}  # harmonics; three are all that seven days have


def _month_day(day: jax.Array) -> jax.Array:
    """Day of the month from 0, of days since 2000-01-01, in the Gregorian calendar (after Hinnant 2021)."""
    shifted = day + 730_425  # from 1 March of the year 0, so that the leap day ends a year
    day_of_era = shifted % 146_097
    year = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year + year // 4 - year // 100)
    month = (5 * day_of_year + 2) // 153
    return day_of_year - (153 * month + 2) // 5


def calendar_places(time: jax.Array) -> dict[str, tuple[jax.Array, int]]:
    """Where a time stands in each cycle: whole numbers from 0, and how many of them make the cycle.

    `hour` counts seconds of the day, `weekday` days from Monday, `month_day` days of 31, `season` quarters of days of
    four years: leap days average out, and seasons drift by under a day in the 136 years that fit.

    Args:
      time: int32 seconds since 2000-01-01 (a Saturday); `NO_TIME` has a place without meaning.
    """
    day = time // DAY
    return {
        "hour": (time % DAY, DAY),
        "weekday": ((day + 5) % 7, 7),
        "month_day": (_month_day(day), 31),
        "season": ((day * 4) % 1461, 1461),
    }


def calendar_codes(time: jax.Array) -> dict[str, jax.Array]:
    """Hour, weekday, day of the month and half-month of the year; the last code of each is "not known"."""
    known = time != NO_TIME
    codes = {name: (place * N_CODES[name]) // cycle for name, (place, cycle) in calendar_places(time).items()}
    return {name: jnp.where(known, code, N_CODES[name]) for name, code in codes.items()}


def calendar_waves(time: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Fourier features `[..., 2 * waves + 1]`: cosines and sines of each cycle's harmonics, and 1 for "not known".

    Where a time is not known all waves are 0.
    """
    known = time != NO_TIME
    places, waves = calendar_places(time), []
    for name in names:
        place, cycle = places[name]
        turns = jnp.arange(1, N_WAVES[name] + 1, dtype=jnp.int32)
        # The turns' whole part goes before anything is rounded.
        angle = (2 * jnp.pi / cycle) * ((place[..., None] * turns) % cycle).astype(jnp.float32)
        waves += [jnp.cos(angle), jnp.sin(angle)]
    flat = jnp.concatenate([*waves, jnp.zeros((*time.shape, 0))], axis=-1) * known[..., None]
    return jnp.concatenate([flat, (~known)[..., None].astype(jnp.float32)], axis=-1)


def last_times(time_BT: jax.Array, service_BT: jax.Array, position_BT: jax.Array, n_services: int) -> jax.Array:
    """`[B, T, Z]`, time of the last event in each service up to slot t, which counts; `NO_TIME` without one."""
    t = time_BT.shape[1]
    slot_T = jnp.arange(t, dtype=jnp.int32)
    own_BTZ = service_BT[..., None] == jnp.arange(n_services)
    last_BTZ = jax.lax.cummax(jnp.where(own_BTZ, slot_T[:, None], -1), axis=1)
    time_BTZ = jnp.take_along_axis(time_BT[..., None], jnp.maximum(last_BTZ, 0), axis=1)
    return jnp.where(last_BTZ >= (slot_T - position_BT)[..., None], time_BTZ, NO_TIME)


class TimeEmbedding(nnx.Module):
    """Sum of what is switched on: features of the calendar, as tables or as waves (Kazemi et al. 2019), and gaps."""

    def __init__(self, key: jax.Array, d: int, stddev: float, config: TimeConfig, n_services: int = 1):
        """Args: services whose last events' gaps are embedded, each with a table of its own."""
        names = ("hour", "weekday", "season", "gap", "month_day", "service_gap", "wave")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))

        def table(name: str, on: bool, *shape: int) -> nnx.Param | None:
            def init(key, shape, dtype):
                return normal(stddev)(key, shape, dtype).at[..., -1, :].set(0)  # "not known", which data may never say

            axes = (*(None for _ in shape), "embed")
            return declare(keys[name], (*shape, d), axes, init, decay="embedding") if on else None

        is_table, calendar = config.kind == "table", config.calendar
        self.hour, self.weekday, self.month_day, self.season = (
            table(name, is_table and name in calendar, n + 1) for name, n in N_CODES.items()
        )
        n_waves = 2 * sum(N_WAVES[name] for name in calendar) + 1
        self.wave_XD = table("wave", bool(calendar) and not is_table, n_waves)
        self.gap = table("gap", config.gap, N_GAPS + 1)
        self.service_gap = table("service_gap", config.service_gap, n_services, N_GAPS + 1)
        self.calendar = calendar

    def __call__(
        self, time_BT: jax.Array, utc_offset_BT: jax.Array, since_BT: jax.Array, last_BTZ: jax.Array | None = None
    ) -> jax.Array:
        """Vectors `[B, T, D]`.

        Args: the time to embed; how far clocks are ahead of it there, which the calendar goes by; the time from which
        its gap counts; and the times from which its gaps in services count. int32 seconds since 2000, or `NO_TIME`.
        """
        parts = []
        clock_BT = jnp.where(time_BT == NO_TIME, NO_TIME, time_BT + utc_offset_BT)
        if self.wave_XD is not None:
            parts.append(calendar_waves(clock_BT, self.calendar) @ self.wave_XD[...])
        else:
            codes = calendar_codes(clock_BT)
            parts += [getattr(self, name)[...][codes[name]] for name in self.calendar]
        if self.gap is not None:
            parts.append(self.gap[...][find_bucket(since_BT, time_BT, N_GAPS + 1)])
        if self.service_gap is not None:
            assert last_BTZ is not None
            bucket_BTZ = find_bucket(last_BTZ, time_BT[..., None], N_GAPS + 1)
            service_Z = jnp.arange(bucket_BTZ.shape[-1])
            parts.append(jnp.sum(self.service_gap[...][service_Z, bucket_BTZ], axis=-2))
        return sum(parts, jnp.zeros((), jnp.float32))
