"""When requests come and what the day is like: exogenous, so independent of every user's tastes and needs.

Times are local unix seconds within 2024 and do not depend on the latents, so a posterior may treat them as given.
"""

from collections.abc import Iterable

import numpy as np

DAYPARTS = ("night", "morning", "day", "evening")  # by hour: 0-5, 6-10, 11-16, 17-23
WEEKDAYS = ("weekday", "weekend")
SEASONS = ("winter", "spring", "summer", "autumn")
CONTEXT: dict[str, tuple[str, ...]] = {
    "weather": ("clear", "cloudy", "rain", "snow"),
    "temperature": ("frost", "cold", "mild", "hot"),
    "holiday": ("none", "eve", "holiday"),
}
OPEN = "open"  # a fourth feature where services are closed in turn: which of them one may choose from

DAY_S = 86_400
START = np.datetime64("2024-01-01")
N_DAYS = 366
_HOLIDAYS = ((1, 1, 8), (2, 23, 1), (3, 8, 1), (5, 1, 1), (5, 9, 1), (6, 12, 1), (11, 4, 1), (12, 31, 1))
_EVE_DAYS = 4
# Share of a day's requests by hour.
_HOUR_WEIGHT = np.array([2, 1, 1, 1, 1, 1, 3, 5, 6, 6, 5, 4, 5, 5, 4, 4, 5, 6, 7, 8, 8, 7, 5, 3], float)
_HOUR_OF_SHARE = np.concatenate([[0.0], np.cumsum(_HOUR_WEIGHT) / _HOUR_WEIGHT.sum()])


def make_days(rng: np.random.Generator) -> np.ndarray:
    """`[N_DAYS, 3]` int16 context codes of each day of the year, in the order of `CONTEXT`; one city, one weather."""
    day = np.arange(N_DAYS)
    noise = np.convolve(rng.normal(size=N_DAYS + 6), np.full(7, 7**-0.5), "valid")
    celsius = 6 - 17 * np.cos(2 * np.pi * (day - 15) / N_DAYS) + 4 * noise
    temperature = np.searchsorted([-4, 8, 19], celsius)
    wet = rng.random(N_DAYS)
    fall = np.where(celsius < 0, CONTEXT["weather"].index("snow"), CONTEXT["weather"].index("rain"))
    weather = np.where(wet < 0.3, 0, np.where(wet < 0.65, 1, fall))
    holiday = np.zeros(N_DAYS, np.int64)
    first = [int((np.datetime64(f"2024-{m:02d}-{d:02d}") - START).astype(int)) for m, d, _ in _HOLIDAYS]
    for start in first:
        holiday[max(0, start - _EVE_DAYS) : start] = 1
    for start, (_, _, length) in zip(first, _HOLIDAYS, strict=True):
        holiday[start : start + length] = 2
    return np.stack([weather, temperature, holiday], axis=1).astype(np.int16) + 1


def draw_lengths(rng: np.random.Generator, n_users: int, mean: float) -> np.ndarray:
    """`[users]` int64 numbers of events, at least 3, with the given mean (a gamma-mixed Poisson)."""
    return 3 + rng.poisson((mean - 3) * rng.gamma(6.0, 1 / 6.0, n_users))


def draw_times(rng: np.random.Generator, offsets: np.ndarray) -> np.ndarray:
    """`[events]` int64 seconds, strictly rising per user: bursts of hours, pauses of days, and the day's rhythm."""
    n_users, n_events = len(offsets) - 1, offsets[-1]
    user = np.repeat(np.arange(n_users), np.diff(offsets))
    short = rng.random(n_events) < 0.5
    gap = np.where(short, rng.exponential(0.2, n_events), rng.exponential(4.0, n_events))
    gap[offsets[:-1]] = 0
    elapsed = np.cumsum(gap)
    elapsed -= elapsed[offsets[:-1]][user]
    span = elapsed[offsets[1:] - 1]
    first_day = 60 * rng.random(n_users)
    last_day = N_DAYS - 1 - 60 * rng.random(n_users)
    # a user's bursts are squeezed where they would run past the year, never stretched
    squeeze = np.minimum(1.0, (last_day - first_day) / np.maximum(span, 1e-9))
    start = first_day + (last_day - first_day - span * squeeze) * rng.random(n_users)
    day = start[user] + elapsed * squeeze[user]
    whole = np.floor(day)
    hour = np.interp(day - whole, _HOUR_OF_SHARE, np.arange(25.0))
    second = (whole * DAY_S + hour * 3600).astype(np.int64)
    position = np.arange(n_events) - offsets[:-1][user]  # one second apart at least
    return START.astype("datetime64[s]").astype(np.int64) + second + position


def draw_openings(rng: np.random.Generator, offsets: np.ndarray, n_services: int, n_closed: int) -> np.ndarray:
    """`[events]` int16 codes of the context feature `OPEN`.

    Each service in turn is closed for `n_closed` events, in an order of each user's own; at the event after them
    nothing but that service is open. Counted back from the last event, which is such a return.
    """
    n_events = np.diff(offsets)
    first = np.repeat(rng.integers(0, n_services, len(n_events)), n_events)
    ahead = np.repeat(offsets[1:], n_events) - 1 - np.arange(offsets[-1])
    turn = -(-ahead // n_closed)  # of what is closed; the last event's is 0
    is_return = ahead % n_closed == 0
    return (1 + (first + turn + is_return) % n_services + np.where(is_return, 0, n_services)).astype(np.int16)


def name_openings(services: tuple[str, ...]) -> tuple[str, ...]:
    """The values of the context feature `OPEN`, such as `only samokat` and `not samokat`."""
    return tuple(f"{word} {name}" for word in ("only", "not") for name in services)


def read_openings(features: Iterable[str], context: np.ndarray, n_services: int) -> np.ndarray | None:
    """`[events, Z]` bool, the services to choose from, all where that is missing; None where no feature tells.

    Args: names of the features of the context; their codes `[events, C]`.
    """
    if OPEN not in (order := list(features)):
        return None
    code = context[:, order.index(OPEN), None]
    is_named = (code - 1) % n_services == np.arange(n_services)
    return (code == 0) | (is_named == (code <= n_services))


def context_of(time: np.ndarray, days: np.ndarray) -> np.ndarray:
    """`[events, 3]` int16, the context codes of the day of each time."""
    day = (time - START.astype("datetime64[s]").astype(np.int64)) // DAY_S
    return days[np.clip(day, 0, N_DAYS - 1)]


def month_of(time: np.ndarray) -> np.ndarray:
    """`[events]` int64 month of the year of each time, from 0."""
    return time.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64) % 12


def month_of_days() -> np.ndarray:
    """`[N_DAYS]` month of each day, from 0."""
    return month_of((START + np.arange(N_DAYS)).astype("datetime64[s]").astype(np.int64))


def clock_of(time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices into `DAYPARTS`, `WEEKDAYS` and `SEASONS` of each time, each `[events]` int64."""
    hour = time % DAY_S // 3600
    daypart = np.searchsorted([6, 11, 17], hour, side="right")
    weekend = ((time // DAY_S + 3) % 7 >= 5).astype(np.int64)  # 1970-01-01 was a Thursday
    return daypart, weekend, (month_of(time) + 1) % 12 // 3
