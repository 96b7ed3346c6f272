"""How far the clocks of events' places are ahead of UTC, by the time zone of a city or of a user."""

import datetime
import zoneinfo
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from moerec.config import SchemaConfig
from moerec.data.dataset import SECOND_US, Dataset
from moerec.data.packing import device_time
from moerec.errors import InputError
from moerec.types import NO_TIME

DAY, QUARTER = 86_400, 900  # clocks change at whole quarters of an hour of UTC


class Zones(NamedTuple):
    """Attributes:
    names: of the zones. of_user: `[users]`, which of them is each user's; or
    of_context: `[codes]`, that of each code of the context feature `feature`.
    """

    names: tuple[str, ...]
    of_user: np.ndarray | None = None
    of_context: np.ndarray | None = None
    feature: int = 0

    def of_somebody(self, schema: SchemaConfig, fields: Mapping[str, str]) -> "Zones":
        """The zones for one user, known or new, whose profile fields these are."""
        if self.of_user is None:
            return self
        values = list(schema.zone_of)
        value = fields.get(schema.zone_column, "")
        return self._replace(of_user=np.array([values.index(value) + 1 if value in values else 0]))

    def find_utc_offsets(self, user: np.ndarray, time_us: np.ndarray, context: np.ndarray) -> np.ndarray:
        """`[n]` int32 seconds ahead of UTC, 0 where a time is unknown or too far off for the model.

        Args: `[n]`; `[n]` microseconds since 1970; and `[n, C]` codes.
        """
        if self.of_context is not None:
            zone = self.of_context[context[:, self.feature]]
        else:
            zone = np.zeros(len(time_us), np.int64) if self.of_user is None else self.of_user[user]
        utc_offset, known = np.zeros(len(time_us), np.int32), device_time(time_us) != NO_TIME
        for k, name in enumerate(self.names):
            at = np.flatnonzero((zone == k) & known)
            utc_offset[at] = find_utc_offsets_in(name, time_us[at] // SECOND_US)
        return utc_offset


def find_utc_offsets_in(zone: str, time: np.ndarray) -> np.ndarray:
    """`[n]` int32 seconds that clocks in an IANA time zone are ahead of UTC at `[n]` unix seconds.

    Python looks at the ends of each day; only where they differ it looks at the day's quarters of an hour.
    """
    info = zoneinfo.ZoneInfo(zone)

    def ahead(moments: np.ndarray) -> np.ndarray:
        utc = (datetime.datetime.fromtimestamp(int(m), datetime.UTC) for m in moments)
        offsets = (moment.astimezone(info).utcoffset() for moment in utc)
        return np.array([0 if o is None else int(o.total_seconds()) for o in offsets], np.int32)

    day, which = np.unique(time // DAY, return_inverse=True)
    first, last = ahead(day * DAY), ahead(day * DAY + DAY - QUARTER)
    utc_offset = first[which]
    changing = np.flatnonzero((first != last)[which])
    quarter, which = np.unique(time[changing] // QUARTER, return_inverse=True)
    utc_offset[changing] = ahead(quarter * QUARTER)[which]
    return utc_offset


def describe_unzoned(dataset: Dataset, schema: SchemaConfig) -> str:
    """A line about the events that have UTC for want of an entry in `zones`, with some of the values; empty if none.

    Another common zone than UTC is meant for all others, and nothing is said.
    """
    if not schema.zone_column or schema.zone != "UTC":
        return ""
    log, column = dataset.log, schema.zone_column
    if column in dataset.context:
        feature = list(dataset.context).index(column)
        count = np.bincount(log.context[:, feature], minlength=len(dataset.context[column]) + 2)
        found = dict(zip(("", *dataset.context[column]), count.tolist(), strict=False))
    else:
        values, which = np.unique(dataset.profile[column], return_inverse=True)
        found = dict(zip(values.tolist(), np.bincount(which, np.diff(log.offsets)).astype(int).tolist(), strict=True))
    left = {value: n for value, n in found.items() if n and value not in schema.zone_of}
    if not left:
        return ""
    first = sorted(left, key=lambda value: (value == "", -left[value]))  # what is missing comes last
    names = [repr(value) if value else "no value" for value in first]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"config.data.schema.zones: {sum(left.values()):,} of {log.n_events:,} events have UTC, as there is no "
        f"entry for {column} {', '.join(names[:3])}{more}"
    )


def settle_zones(dataset: Dataset, schema: SchemaConfig) -> tuple[Zones | None, str]:
    """The zones that the events' clocks are by, None where there are none or the times name the offsets of their own;
    and a line about what has no effect, has no zone or is read as UTC, or nothing.

    Raises:
      InputError: as `find_zones`.
    """
    zones = find_zones(dataset, schema)
    if zones is not None and dataset.log.utc_offset.any():
        return None, "config.data.schema: no zones are used, as the times name the offsets of their own clocks"
    return zones, "" if zones is None else describe_unzoned(dataset, schema) or _describe_clock(schema)


def _describe_clock(schema: SchemaConfig) -> str:
    """A line where local times could be meant and are not read."""
    if schema.time_unit != "iso" or schema.zone == "UTC":
        return ""
    return f"column {schema.time}: its times, which name no offset, are read as UTC; clocks are those of {schema.zone}"


def find_zones(dataset: Dataset, schema: SchemaConfig) -> Zones | None:
    """The zones of a data set, None where all clocks show UTC.

    Raises:
      InputError: the column is neither of the context nor of the profile, or has none of the values.
    """
    if not schema.zone_column:
        return None if schema.zone == "UTC" else Zones((schema.zone,))
    by_value = schema.zone_of
    names = (schema.zone, *by_value.values())
    number = {value: k for k, value in enumerate(by_value, 1)}

    def require_values(found: Collection[str]) -> None:
        if not any(value in found for value in by_value):
            raise InputError(
                f"config.data.schema.zones: {schema.zone_column} is never {' or '.join(map(repr, by_value))}"
            )

    if schema.zone_column in dataset.context:
        require_values(dataset.context[schema.zone_column])
        feature = list(dataset.context).index(schema.zone_column)
        codes = [number.get(value, 0) for value in dataset.context[schema.zone_column]]
        return Zones(names, of_context=np.array([0, *codes, 0]), feature=feature)  # missing, values, unseen
    if schema.zone_column in dataset.profile:
        values = dataset.profile[schema.zone_column].tolist()
        require_values(set(values))
        return Zones(names, of_user=np.array([number.get(value, 0) for value in values], np.int64))
    raise InputError(f"config.data.schema.zone_column: {schema.zone_column!r} is no column of context or profile")
