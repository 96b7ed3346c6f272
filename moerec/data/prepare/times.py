"""Columns of times as microseconds since 1970 UTC: numbers of a unit, ISO dates and times, dates and timestamps.

Where a time names its offset from UTC, the offset is kept beside it: it is what the clock at the event's place shows.
"""

import zoneinfo
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME
from moerec.data.prepare.tables import as_binary
from moerec.data.timezones import find_utc_offsets_in

DAY_US = 86_400 * SECOND_US
UNITS = {"s": ("seconds", SECOND_US), "ms": ("milliseconds", 1_000), "day": ("days", DAY_US)}
_ARROW_UNITS = {"s": SECOND_US, "ms": 1_000, "us": 1}
_YEAR_1_US, _YEAR_9999_US = -62_135_596_800_000_000, 253_402_300_799_999_999
_MOST_OFFSET = 18 * 3600  # seconds; more is none of any place

_INTEGER = r"^-?[0-9]{1,18}$"
_DECIMAL = r"^-?[0-9]+\.?[0-9]*([eE][+-]?[0-9]{1,3})?$"
_POWER = r"^-?[0-9]+\.?(?P<digits>[0-9]*)[eE]\+?(?P<power>[0-9]{1,3})$"
_DATE, _CLOCK = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}", r"[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?"
_WITHOUT_OFFSET = _DATE + f"({_CLOCK})?$"
_WITH_OFFSET = _DATE + _CLOCK + r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"
_OFFSET = r"(?P<sign>[+-])(?P<hours>[0-9]{2}):?(?P<minutes>[0-9]{0,2})$"


class Times(NamedTuple):
    """Attributes:
    time_us: `[n]` int64, UNKNOWN_TIME where empty or bad. utc_offset: `[n]` int32, seconds ahead of UTC, 0 where none
    is named. is_bad: `[n]` bool, what cannot be read.
    names_offset: `[n]` bool, ISO times that name an offset; None where the column's type settles it.
    """

    time_us: np.ndarray
    utc_offset: np.ndarray
    is_bad: np.ndarray
    names_offset: np.ndarray | None = None


class TimeColumn:
    """A column of times, read batch by batch. Texts name an offset from UTC all or none: a clock without a place among
    others is hours off, and nothing shows whose. The larger part of the first batch says which it is.
    """

    def __init__(self, name: str, unit: str):
        self.name, self.unit = name, unit
        self.has_offsets: bool | None = None

    @property
    def meaning(self) -> str:
        """What a value is read as, in words."""
        return UNITS[self.unit][0] if self.unit in UNITS else "an ISO date or time"

    def read(self, values: pa.Array) -> tuple[Times, np.ndarray]:
        """The times, and `[n]` bool, those which name an offset and the others do not, or the reverse."""
        times = parse_times(values, self.unit)
        if times.names_offset is None:
            return times, np.zeros(len(values), bool)
        known = times.time_us != UNKNOWN_TIME
        if self.has_offsets is None and known.any():
            self.has_offsets = bool(times.names_offset[known].mean() >= 0.5)
        return times, known & (times.names_offset != self.has_offsets)


def parse_times(values: pa.Array, unit: str) -> Times:
    """Reads a column of times.

    `unit` is s, ms, day or iso (without an offset: UTC); a column of dates or timestamps says its own, and its time
    zone is that of the events' clocks. Beyond microseconds the digits of ISO texts and of timestamps are cut;
    numbers are rounded. Times outside the years 1 to 9999 are bad: they are in another unit.

    Raises:
      ValueError: the column's type holds no times, or not to the second; the message is the rest of a sentence about
        the column.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind, names_offset = values.type, None
    utc_offset = np.zeros(len(values), np.int32)
    is_number = unit in UNITS and (pa.types.is_integer(kind) or pa.types.is_floating(kind))
    filled = values.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        time_us, read = _from_stamps(values), filled
    elif is_number and pa.types.is_integer(kind):
        time_us, read = _scale(_whole_numbers(values), UNITS[unit][1]), filled
    elif is_number:
        number = values.to_numpy(zero_copy_only=False)
        filled = ~np.isnan(number)  # null is NaN, too
        time_us, read = _from_floats(number, unit)
    elif _is_text(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind) or pa.types.is_integer(kind):
        text = as_binary(values)
        filled = pc.greater(pc.binary_length(text), 0).to_numpy(zero_copy_only=False)
        if unit == "iso":
            time_us, utc_offset, names_offset, read = _parse_iso(text)
        else:
            time_us, read = _parse_numbers(text, UNITS[unit][1])
    else:
        raise ValueError(f"{kind} is no type of a time" + (" that is ISO text" if pa.types.is_floating(kind) else ""))
    is_bad = filled & ~(read & (time_us >= _YEAR_1_US) & (time_us <= _YEAR_9999_US))
    known = filled & ~is_bad
    time_us = np.where(known, time_us, UNKNOWN_TIME)
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        utc_offset[known] = _find_offsets(kind, time_us[known])
    return Times(time_us, np.where(known, utc_offset, 0).astype(np.int32), is_bad, names_offset)


def matches(text: pa.Array, pattern: str) -> np.ndarray:
    """`[n]` bool, which texts have the pattern in them."""
    return pc.match_substring_regex(text, pattern).to_numpy(zero_copy_only=False)


def castable(array: pa.Array, target: pa.DataType) -> np.ndarray:
    """`[n]` bool: which values arrow casts to `target`. Halves the array around those it refuses."""
    good = np.ones(len(array), bool)
    parts = [(0, len(array))]
    while parts:
        lo, n = parts.pop()
        try:
            array.slice(lo, n).cast(target)
        except pa.ArrowInvalid:
            if n == 1:
                good[lo] = False
            else:
                parts += [(lo, n // 2), (lo + n // 2, n - n // 2)]
    return good


def has_lost_digits(text: pa.Array) -> np.ndarray:
    """`[n]` bool: numbers printed as a power of ten whose digits end before the last whole one, such as `1.43E+09`."""
    lost = np.zeros(len(text), bool)
    at = np.flatnonzero(matches(text, _POWER))
    parts = pc.extract_regex(text.take(pa.array(at)), _POWER)
    n_digits = pc.binary_length(pc.struct_field(parts, "digits")).to_numpy(zero_copy_only=False)
    power = pc.struct_field(parts, "power").cast(pa.string()).cast(pa.int64()).to_numpy(zero_copy_only=False)
    lost[at] = power > n_digits
    return lost


def _is_text(kind: pa.DataType) -> bool:
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names or pa.types.is_fixed_size_binary(kind)


def _whole_numbers(values: pa.Array) -> np.ndarray:
    """`[n]` int64, clipped to what one holds; 0 where null."""
    numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
    if numbers.dtype == np.uint64:
        numbers = np.minimum(numbers, np.uint64(np.iinfo(np.int64).max))
    return numbers.astype(np.int64)


def _scale(numbers: np.ndarray, unit_us: int) -> np.ndarray:
    """`[n]` int64 in microseconds; what would run over is far outside the years that are allowed, and stays so."""
    limit = np.iinfo(np.int64).max // unit_us
    return np.clip(numbers, -limit, limit) * unit_us


def _from_stamps(values: pa.Array) -> np.ndarray:
    kind = values.type
    if pa.types.is_date(kind):
        unit, plain = ("day", pa.int32()) if pa.types.is_date32(kind) else ("ms", pa.int64())
        return _scale(_whole_numbers(values.cast(plain)), UNITS[unit][1])
    numbers = _whole_numbers(values.cast(pa.int64()))
    return numbers // 1000 if kind.unit == "ns" else _scale(numbers, _ARROW_UNITS[kind.unit])


def _find_offsets(kind: pa.TimestampType, time_us: np.ndarray) -> np.ndarray:
    """`[n]` int32 seconds ahead of UTC by the time zone of a column, which is a name or an offset."""
    fixed = pc.extract_regex(pa.array([kind.tz]), "^" + _OFFSET)[0].as_py()
    if fixed:
        offset = int(fixed["hours"]) * 3600 + int(fixed["minutes"] or 0) * 60
        return np.full(len(time_us), -offset if fixed["sign"] == "-" else offset, np.int32)
    try:
        return find_utc_offsets_in(kind.tz, time_us // SECOND_US)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{kind} is of no time zone that is known here") from None


def _from_floats(numbers: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    name, unit_us = UNITS[unit]
    scaled = np.nan_to_num(numbers.astype(np.float64), nan=0.0, posinf=9e18, neginf=-9e18) * unit_us
    in_range = np.abs(scaled) <= _YEAR_9999_US
    largest = np.abs(numbers[in_range & ~np.isnan(numbers)]).max(initial=0)
    step = float(np.spacing(largest))
    has_fractions = bool(np.any(numbers[in_range] % 1 > 0))
    if step > 1 or (has_fractions and step * unit_us > SECOND_US):
        told = f"{step:.0f} {name}" if step > 1 else f"{step * unit_us / SECOND_US:.0f} seconds"
        raise ValueError(
            f"its type {numbers.dtype} cannot hold such times, which it rounds to {told}; write float64 or int64"
        )
    return np.rint(np.clip(scaled, -9e18, 9e18)).astype(np.int64), np.isfinite(numbers)


def _parse_numbers(text: pa.Array, unit_us: int) -> tuple[np.ndarray, np.ndarray]:
    time_us = np.zeros(len(text), np.int64)
    whole = matches(text, _INTEGER)
    numbers = text.filter(pa.array(whole)).cast(pa.string()).cast(pa.int64()).to_numpy(zero_copy_only=False)
    time_us[whole] = _scale(numbers, unit_us)
    if whole.all():
        return time_us, whole
    broken = ~whole & matches(text, _DECIMAL)
    broken &= ~has_lost_digits(text)
    floats = text.filter(pa.array(broken)).cast(pa.string()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    time_us[broken] = np.rint(np.clip(floats * unit_us, -9e18, 9e18)).astype(np.int64)
    return time_us, whole | broken


def _parse_iso(text: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Microseconds, offsets in seconds, which name one, and which could be read; each `[n]`."""
    n = len(text)
    time_us, utc_offset = np.zeros(n, np.int64), np.zeros(n, np.int64)
    read, names_offset = np.zeros(n, bool), matches(text, _WITH_OFFSET)
    without = matches(text, _WITHOUT_OFFSET)
    utc_offset[names_offset] = _read_offsets(text.filter(pa.array(names_offset)))
    for chosen, kind in ((without, pa.timestamp("us")), (names_offset, pa.timestamp("us", "UTC"))):
        at = np.flatnonzero(chosen & (np.abs(utc_offset) <= _MOST_OFFSET))
        stamps = text.take(pa.array(at)).cast(pa.string())
        stamps = pc.replace_substring_regex(stamps, r"(\.[0-9]{6})[0-9]+", r"\1")
        good = castable(stamps, kind)  # a date such as 30 February fits the pattern
        time_us[at[good]] = stamps.filter(pa.array(good)).cast(kind).cast(pa.int64()).to_numpy(zero_copy_only=False)
        read[at[good]] = True
    return time_us, utc_offset, names_offset, read


def _read_offsets(text: pa.Array) -> np.ndarray:
    """`[n]` int64 seconds that texts end with; 0 for a Z."""
    parts = pc.extract_regex(text, _OFFSET)

    def number(name: str) -> np.ndarray:
        digits = pc.struct_field(parts, name).cast(pa.string()).fill_null("0")
        return pc.if_else(pc.equal(digits, ""), "0", digits).cast(pa.int64()).to_numpy(zero_copy_only=False)

    sign = pc.struct_field(parts, "sign").cast(pa.string()).fill_null("+")
    seconds = number("hours") * 3600 + number("minutes") * 60
    return np.where(pc.equal(sign, "-").to_numpy(zero_copy_only=False), -seconds, seconds)
