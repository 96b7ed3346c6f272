"""What is asked of a run: a request in words, and its codes."""

import re
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moerec.config.terminal import printable
from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset
from moerec.data.prepare.binning import NUMBER, find_ranges, name_ranges
from moerec.data.splits import parse_date
from moerec.errors import InputError
from moerec.train.run_dir import Run

NOTHING: Mapping[str, str] = types.MappingProxyType({})


class RecommendRequest(NamedTuple):
    """When something is wanted, unix seconds (None: not known), and its context by name; what is left out is missing.

    Events at or after the time are no history. `service` narrows the list to one service's catalogue. `fields` are
    static profile fields by name, in the place of the user's own. `utc_offset` is how many seconds the clock at the
    request's place is ahead of UTC; at None it is what the time zones of the data say, or as at the last event.
    """

    time: float | None = None
    context: Mapping[str, str] = NOTHING
    service: str = ""
    fields: Mapping[str, str] = NOTHING
    utc_offset: int | None = None

    @property
    def time_us(self) -> np.ndarray:
        """`[1]` int64, the time as an event log has it."""
        known = self.time is not None and abs(self.time) < np.iinfo(np.int64).max // SECOND_US
        return np.array([round(self.time * SECOND_US) if known else UNKNOWN_TIME], np.int64)  # type: ignore[operator]


def read_request(context: list[str], time: str, service: str, fields: list[str] | None = None) -> RecommendRequest:
    """A request in words: entries `name=value` or `name=value,name=value`; an ISO date and time, or nothing.

    The time is UTC unless it names an offset, which is then that of the clock at the request's place; "Z" names none.

    Raises:
      InputError: an entry is of another form, or a name is there twice; no such time.
    """
    pairs = _read_pairs(context, "--context"), service, _read_pairs(fields or [], "--fields")
    if not time:
        return RecommendRequest(None, *pairs)
    when = parse_date(time, "--time")
    seconds, rest_us = divmod(when.time_us, SECOND_US)
    return RecommendRequest(seconds + rest_us / SECOND_US if rest_us else seconds, *pairs, when.utc_offset)


def _read_pairs(entries: list[str], flag: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in (part for given in entries for part in re.split(r",(?=[^,=]+=)", given)):
        name, _, value = entry.partition("=")
        if not name or not value:
            raise InputError(f"{flag}: {entry!r} is not of the form name=value")
        if name in found:
            raise InputError(f"{flag}: {name} is there twice")
        found[name] = value
    return found


def encode_context(
    dataset: Dataset, edges: Mapping[str, tuple[float, ...]], context: Mapping[str, str], where: str = "--context"
) -> np.ndarray:
    """`[C]` int64 codes of the features, 0 for those that are not given, the last code for another value.

    A feature whose values are the ranges between its `edges` may be given as a number, too.

    Raises:
      InputError: there is no such feature, or a range of it is asked for by what is none; it begins with `where`.
    """
    if not isinstance(context, Mapping):
        raise InputError(f"{where}: {context!r} is no mapping of features to values")
    for name in context:
        if name not in dataset.context:
            raise InputError(f"{where}: {name!r} is none of {', '.join(dataset.context) or 'no features'}")
    codes = [
        _find_code(name, context.get(name, ""), values, edges.get(name, ()), where)
        for name, values in dataset.context.items()
    ]
    return np.array(codes, np.int64)


def _find_code(name: str, value: str, values: tuple[str, ...], edges: tuple[float, ...], where: str) -> int:
    if not value:
        return 0
    if value in values:
        return values.index(value) + 1
    if not edges or values != tuple(name_ranges(edges)):
        return len(values) + 1
    if not re.fullmatch(NUMBER, value):
        raise InputError(f"{where}: {name}={value} is no number and none of its ranges")
    return int(find_ranges(np.array(float(value)), edges))


def encode_fields(
    dataset: Dataset, fields: Mapping[str, str], own_Y: np.ndarray, where: str = "--fields"
) -> np.ndarray:
    """`[Y]` codes of the static profile fields: `own_Y`, but for those that are given.

    Raises:
      InputError: there is no such field, or no such value of it in the data; it begins with `where`.
    """
    if not isinstance(fields, Mapping):
        raise InputError(f"{where}: {fields!r} is no mapping of fields to values")
    codes = own_Y.copy()
    for name, value in fields.items():
        if name not in dataset.profile:
            raise InputError(f"{where}: {name!r} is none of {', '.join(dataset.profile) or 'no fields'}")
        known = dataset.profile_values[name]
        if value not in known:
            raise InputError(f"{where}: {name}={value}: there are {', '.join(known)}")
        codes[list(dataset.profile).index(name)] = known.index(value) + 1
    return codes


def hide_unknown(run: Run, code_NC: np.ndarray) -> np.ndarray:
    """`[..., C]` codes with "unseen" for those that no event has; the model knows all of the built-in world's."""
    if run.data.world is not None:
        return code_NC
    dataset = run.data.dataset
    unseen_C = np.array([len(values) + 1 for values in dataset.context.values()], np.int64)
    is_known_NC = code_NC == 0
    for c, known in enumerate(dataset.log.known_context):
        is_known_NC[..., c] |= np.isin(code_NC[..., c], known)
    return np.where(is_known_NC, code_NC, unseen_C)


def list_unseen(run: Run, context: Mapping[str, str]) -> list[str]:
    """A line for each value of a request that the model has never seen."""
    dataset, edges = run.data.dataset, run.config.data.schema.edges
    code_C = hide_unknown(run, encode_context(dataset, edges, context))
    return [
        f"{printable(name)}={printable(context[name])}: never seen in training; there are {', '.join(values)}"
        for (name, values), code in zip(dataset.context.items(), code_C, strict=True)
        if code == len(values) + 1
    ]
