"""Times that are hardly meant: of another unit than was told, a number that stands for none, or far from all others."""

import datetime
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME

HOUR_US = 3600 * SECOND_US
DAY = 24  # hours, of which all that follows counts
EARLIEST = (datetime.date(1990, 1, 1) - datetime.date(1970, 1, 1)).days * DAY
AHEAD = 7 * DAY  # of the machine's clock
LEAST_EVENTS = 20  # of which some can be far from the others
TRIMMED, REACH, LEAST_SPREAD = 100, 5, 30 * DAY  # one in so many at either end; times the spread of the rest; of it
# Days that stand for no time, where nothing else happens for months on either side.
_STAND_INS = [
    (datetime.date(*day) - datetime.date(1970, 1, 1)).days * DAY
    for day in ((1990, 1, 1), (1999, 12, 31), (2000, 1, 1), (2001, 1, 1))
]
_SILENCE = 120 * DAY


class TimeCounts(NamedTuple):
    """Known times by hour.

    Attributes:
      hour: `[n]` int64, rising, hours since 1970. n_events: `[n]` int64, those in each.
      first_us, last_us: microseconds since 1970. n_unknown: events without a time.
    """

    hour: np.ndarray
    n_events: np.ndarray
    first_us: int
    last_us: int
    n_unknown: int

    @property
    def n(self) -> int:
        """Events whose time is known."""
        return int(self.n_events.sum())

    @property
    def median_us(self) -> int:
        """The beginning of the hour in the middle, or the first time if that is later."""
        middle = np.searchsorted(np.cumsum(self.n_events), (self.n + 1) // 2)
        return max(int(self.hour[middle]) * HOUR_US, self.first_us)


class FarTimes(NamedTuple):
    """Hours since 1970 in which a time is far off: before 1990, later than now, or far from all others."""

    early: np.ndarray
    late: np.ndarray
    isolated: np.ndarray

    def holds(self, time_us: np.ndarray) -> np.ndarray:
        """`[n]` bool, which of the times are far off; not those that are unknown."""
        return np.isin(time_us // HOUR_US, np.concatenate(self)) & (time_us != UNKNOWN_TIME)


def count_times(time_us: np.ndarray) -> TimeCounts:
    """Args: `[n]` microseconds since 1970, or `UNKNOWN_TIME`."""
    known = time_us[time_us != UNKNOWN_TIME]
    hour, count = np.unique(known // HOUR_US, return_counts=True)
    first, last = (int(known.min()), int(known.max())) if len(known) else (0, 0)
    return TimeCounts(hour, count, first, last, len(time_us) - len(known))


def add_counts(parts: Sequence[TimeCounts]) -> TimeCounts:
    """The counts of several parts of the data together."""
    known = [part for part in parts if len(part.hour)]
    n_unknown = sum(part.n_unknown for part in parts)
    if not known:
        return TimeCounts(np.zeros(0, np.int64), np.zeros(0, np.int64), 0, 0, n_unknown)
    hour, which = np.unique(np.concatenate([part.hour for part in known]), return_inverse=True)
    count = np.bincount(which, np.concatenate([part.n_events for part in known])).astype(np.int64)
    first, last = min(part.first_us for part in known), max(part.last_us for part in known)
    return TimeCounts(hour, count, first, last, n_unknown)


def find_far_times(times: TimeCounts, now: float | None = None) -> FarTimes:
    """The hours whose times are hardly meant.

    Far from all others are times that lie further from the middle 98 of 100 events than five times what these span,
    behind a gap of as much at least; and the days that programs write for no time, where they stand alone.

    Args:
      now: unix seconds; of this machine's clock if None.
    """
    latest = int((time.time() if now is None else now) // 3600) + AHEAD
    is_early, is_late = times.hour < EARLIEST, times.hour > latest
    usual = ~(is_early | is_late)
    hour, count = times.hour[usual], times.n_events[usual]
    is_alone = _find_outliers(hour, count) | _find_stand_ins(hour)
    return FarTimes(times.hour[is_early], times.hour[is_late], hour[is_alone])


def _find_outliers(hour: np.ndarray, count: np.ndarray) -> np.ndarray:
    n = int(count.sum())
    if n < LEAST_EVENTS:
        return np.zeros(len(hour), bool)
    trimmed, before = max(n // TRIMMED, 1), np.cumsum(count)
    low, high = (hour[np.searchsorted(before, place, side="right")] for place in (trimmed, n - 1 - trimmed))
    spread = max(high - low, LEAST_SPREAD)
    behind_gap = np.flatnonzero(np.diff(hour) > spread)  # the last hour before each gap
    left = behind_gap[hour[behind_gap] < low - REACH * spread]
    right = behind_gap[hour[behind_gap + 1] > high + REACH * spread] + 1
    place = np.arange(len(hour))
    return (place <= left.max(initial=-1)) | (place >= right.min(initial=len(hour)))


def _find_stand_ins(hour: np.ndarray) -> np.ndarray:
    day, which = np.unique(hour // DAY * DAY, return_inverse=True)
    if len(day) < 2:
        return np.zeros(len(hour), bool)
    gap = np.diff(day)
    silence = max(_SILENCE, 5 * int(np.median(gap)))
    is_silent = np.concatenate([[True], gap > silence, [True]])
    is_alone = np.isin(day, _STAND_INS) & is_silent[1:] & is_silent[:-1]
    return is_alone[which] & (hour % DAY == 0)


def say_time(time_us: int) -> str:
    """A time as an ISO date and time, UTC, with what it has of a second."""
    return str(np.datetime64(time_us, "us").astype("datetime64[s]" if time_us % SECOND_US == 0 else "datetime64[us]"))


def describe_times(times: TimeCounts) -> str:
    """First, median (to the hour) and last time in words."""
    if not len(times.hour):
        return "no event has a time"
    moments = (times.first_us, times.median_us, times.last_us)
    told = "first {}, median {}, last {}".format(*map(say_time, moments))
    return told + (f"; {times.n_unknown:,} events without" if times.n_unknown else "")


def describe_far_times(times: TimeCounts, far: FarTimes) -> str:
    """One line about the times that are far off; empty where none are."""
    parts = [
        (far.early, f"before 1990, the first at {say_time(times.first_us)}"),
        (far.late, f"later than now, the last at {say_time(times.last_us)}"),
        (far.isolated, "far from all others, as on " + ", ".join(sorted({_say_day(h) for h in far.isolated})[:3])),
    ]
    told = [f"{int(times.n_events[np.isin(times.hour, hours)].sum()):,} {text}" for hours, text in parts if len(hours)]
    if not told:
        return ""
    causes = [guess_cause(times.first_us)] * bool(len(far.early)) + [guess_cause(times.last_us)] * bool(len(far.late))
    asked = " or ".join(dict.fromkeys(filter(None, causes)))
    return f"of {times.n:,} times, " + "; ".join(told) + (f" ({asked}?)" if asked else "")


def _say_day(hour: int) -> str:
    return str(np.datetime64(int(hour), "h").astype("datetime64[D]"))


def guess_cause(time_us: int) -> str:
    """What a time that is far off may have been before it was read, in words; empty where nothing comes to mind."""
    if time_us in (0, -1_000, -SECOND_US, -24 * HOUR_US):
        return "a number that stands for no time"
    if say_time(time_us)[5:10] in ("12-31", "01-01") and time_us > EARLIEST * HOUR_US:
        return "a date that stands for no time"
    for unit_us, unit in ((SECOND_US, "seconds"), (1_000, "milliseconds"), (24 * HOUR_US, "days")):
        number, rest = divmod(time_us, unit_us)
        if rest:
            continue
        for low, high, cause in (
            (EARLIEST * 3600, 4_102_444_800, "seconds"),
            (19_900_101, 20_991_231, "dates written as numbers, such as 20150602,"),
            (32_874, 73_050, "day numbers of a spreadsheet"),
            (EARLIEST // DAY, 32_873, "days"),
            (1_990, 2_099, "years"),
        ):
            if low <= number <= high and cause != unit:
                return f"{cause} read as {unit}"
    return ""
