"""The data of a run with what new tables add: users, events since training, and items that were never trained on."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moerec.config import SchemaConfig
from moerec.config.terminal import printable
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog, ItemTable
from moerec.data.load import RunData
from moerec.data.neighbors import ItemNames
from moerec.data.splits import TEST
from moerec.data.timezones import Zones, find_zones
from moerec.serve.new_data.read import NewTables


class Additions(NamedTuple):
    """What new tables have added to a run, in numbers.

    Attributes:
      events, users, items: that are new. undescribed: of the items those that no item table describes.
      known_events, known_items, known_users: that the run has already; its own texts and fields are kept.
      left_out: events and items by what the run does not know of them, such as their service, the most frequent ones
        named with their numbers.
      unseen: values of context and of profile fields that nothing was learnt of, by column; they count as unseen and
        as missing.
      notes: lines about rows that were put aside.
    """

    events: int = 0
    users: int = 0
    items: int = 0
    undescribed: int = 0
    known_events: int = 0
    known_items: int = 0
    known_users: int = 0
    left_out: Mapping[str, int] = {}
    unseen: Mapping[str, tuple[str, ...]] = {}
    notes: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Lines of text."""
        new = {"users": self.users, "events": self.events, "items": self.items}
        lines = [f"new: {', '.join(_count(n, name) for name, n in new.items())}"]
        if self.undescribed:
            told = _count(self.undescribed, "items")
            lines.append(f"in events alone, so that nothing but the service speaks: {told} of the new ones")
        known = {"events": self.known_events, "items": self.known_items, "users": self.known_users}
        told = ", ".join(_count(n, name) for name, n in known.items() if n)
        if told:
            lines.append(f"known already, and left as they are: {told}")
        lines += [f"left out: {_count(n, what)}" for what, n in self.left_out.items()]
        for name, values in self.unseen.items():
            more = f" and {len(values) - 3} more" if len(values) > 3 else ""
            lines.append(f"{printable(name)}: never seen in training: {', '.join(map(printable, values[:3]))}{more}")
        return [*lines, *self.notes]


def _count(n: int, things: str) -> str:
    """`1 event of …`, `2 events of …`: of the first word the plural is given."""
    first, space, rest = things.partition(" ")
    return f"{n:,} {first.removesuffix('s') if n == 1 else first}{space}{rest}"


def _name_most(counts: Mapping[str, int]) -> str:
    """The three names with the largest counts."""
    most = sorted(counts.items(), key=lambda x: -x[1])
    more = f" and {len(most) - 3} more" if len(most) > 3 else ""
    return ", ".join(f"{printable(name)} {n:,}" for name, n in most[:3]) + more


class Joined(NamedTuple):
    """Attributes:
    data: with all users, events and items, but with the run's tokens, neighbors and states.
    number: `[I]` int64, the new number of each item of the run. additions: what is new.
    """

    data: RunData
    number: np.ndarray
    additions: Additions


def join_new(data: RunData, schema: SchemaConfig, new: NewTables) -> Joined:
    """Joins new tables to the data of a run. Nothing in it is trained on: new events are of no split that is learnt.

    An event that the run has already (user, item, action and known time) counts once. Events of services or actions
    that the run does not know are left out, since the model has no place for them.
    """
    dataset = data.dataset
    left_out: dict[str, int] = {}
    unseen: dict[str, tuple[str, ...]] = {}
    catalogue = dataset.catalogue
    n_known_items = n_described = 0
    if new.items is not None:
        known = ItemNames.of(catalogue).find(new.items)
        strange = _count_strange(new.items, catalogue, left_out)
        n_known_items = int((known >= 0).sum())
        catalogue = _join_items(catalogue, new.items)
        n_described = len(known) - n_known_items - strange
    if new.events is not None:
        catalogue = _join_items(catalogue, new.events.catalogue)
    number = ItemNames.of(catalogue).find(dataset.catalogue)
    names = np.array([*dataset.users, *_list_new_names(dataset, new)], object)
    profile = _join_profile(dataset, new, names, unseen)
    log = dataset.log
    log = dataclasses.replace(
        log,
        offsets=np.concatenate([log.offsets, np.full(len(names) - log.n_users, log.n_events)]),
        item=number[log.item].astype(np.int32),
    )
    joined = dataclasses.replace(dataset, catalogue=catalogue, log=log, users=names, profile=profile)
    split_ids, n_events, n_known_events = data.split_ids, 0, 0
    zones = None if data.zones is None else find_zones(joined, schema)
    if new.events is not None:
        events = _translate(joined, schema, zones, new.events, left_out, unseen)
        joined, source, n_known_events = _merge_events(joined, events)
        n_events = int((source < 0).sum())
        split_ids = np.where(source >= 0, np.append(split_ids, TEST)[source], TEST).astype(split_ids.dtype)
    n_new = catalogue.n_items - len(number)
    additions = Additions(
        events=n_events,
        users=len(names) - dataset.log.n_users,
        items=n_new,
        undescribed=n_new - n_described,
        known_events=n_known_events,
        known_items=n_known_items,
        known_users=len({*new.users} & {*dataset.users.tolist()}),
        left_out=left_out,
        unseen=unseen,
        notes=new.notes,
    )
    is_old = np.zeros(catalogue.n_items, bool)
    is_old[number] = True
    data = dataclasses.replace(
        data,
        dataset=joined,
        split_ids=split_ids,
        zones=zones,
        item_number=np.concatenate([number[data.item_number], np.flatnonzero(~is_old)]).astype(np.int32),
    )
    return Joined(data, number, additions)


def _count_strange(items: ItemTable, catalogue: ItemTable, left_out: dict[str, int]) -> int:
    """Items of services that the run does not have."""
    counts = zip(items.services, np.diff(items.offsets).tolist(), strict=True)
    strange = {name: n for name, n in counts if name not in catalogue.services and n}
    if strange:
        left_out[f"items of services that the run does not have ({_name_most(strange)})"] = sum(strange.values())
    return sum(strange.values())


def _join_items(old: ItemTable, more: ItemTable) -> ItemTable:
    """The catalogue with the items that it has not yet, of the services that it has, behind those of their service."""
    place = {name: z for z, name in enumerate(old.services)}
    service = np.array([place.get(name, -1) for name in more.services], np.int64)[more.service]
    added = np.flatnonzero((ItemNames.of(old).find(more) < 0) & (service >= 0))
    of_all = np.concatenate([old.service, service[added]])
    order = np.argsort(of_all, kind="stable")
    columns = [
        np.concatenate([getattr(old, name), getattr(more, name)[added]])[order]
        for name in ("ids", "text", "attributes")
    ]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(of_all, minlength=old.n_services))]).astype(np.int64)
    return ItemTable(old.services, offsets, *columns)


def _list_new_names(dataset: Dataset, new: NewTables) -> list[str]:
    """Users of the new tables that the run does not have, in the order of the tables."""
    known = set(dataset.users.tolist())
    given = [*([] if new.events is None else new.events.users.tolist()), *new.users]
    return [name for name in dict.fromkeys(given) if name not in known]


def _join_profile(
    dataset: Dataset, new: NewTables, names: np.ndarray, unseen: dict[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """The profile fields of all users; of the run's users theirs, of new ones those of the user table.

    No value comes in that the run does not have, and none goes: the codes of the fields, which the model was trained
    with, stay what they are.
    """
    n_old, row = dataset.log.n_users, {name: k for k, name in enumerate(new.users)}
    at = np.array([row.get(name, -1) for name in names[n_old:].tolist()], np.int64)
    profile = {}
    for name, values in dataset.profile.items():
        own = np.full(len(names), "", object)
        own[:n_old] = values
        if name in new.fields:
            given = np.append(new.fields[name], "")[at]
            known = np.isin(given.astype(str), np.unique(values.astype(str))) if len(given) else np.zeros(0, bool)
            own[n_old:] = np.where(known, given, "")
            strange = tuple(dict.fromkeys(x for x in given[~known].tolist() if x))
            if strange:
                unseen[name] = strange
        profile[name] = own
    return profile


class _Events(NamedTuple):
    """New events in the numbers of the joined data, in their published order."""

    user: np.ndarray
    log: EventLog


def _translate(
    joined: Dataset,
    schema: SchemaConfig,
    zones: Zones | None,
    new: Dataset,
    left_out: dict[str, int],
    unseen: dict[str, tuple[str, ...]],
) -> _Events:
    catalogue, log = joined.catalogue, new.log
    item = ItemNames.of(catalogue).find(new.catalogue)[log.item]
    actions = np.array([joined.actions.index(name) if name in joined.actions else -1 for name in new.actions])
    action = actions[log.action] if schema.action else np.zeros(log.n_events, np.int64)
    service = new.catalogue.service[log.item]
    for is_out, code, names, what in (
        (item < 0, service, new.catalogue.services, "services"),
        ((item >= 0) & (action < 0), log.action, new.actions, "actions"),
    ):
        if is_out.any():
            counts = np.bincount(code[is_out], minlength=len(names)).tolist()
            told = _name_most({name: n for name, n in zip(names, counts, strict=True) if n})
            left_out[f"events of {what} that the run does not have ({told})"] = sum(counts)
    place = {name: k for k, name in enumerate(joined.users.tolist())}
    user = np.array([place[name] for name in new.users.tolist()], np.int64)[log.user]
    context = np.zeros((log.n_events, len(joined.context)), np.int16)
    for c, (name, values) in enumerate(joined.context.items()):
        if name not in new.context:
            continue
        code, strange = _translate_codes(name, values, joined, new)
        context[:, c] = code[log.context[:, list(new.context).index(name)]]
        if strange:
            unseen[name] = strange
    utc_offset = log.utc_offset
    if zones is not None and not utc_offset.any():
        utc_offset = zones.find_utc_offsets(user, log.time_us, context)
    kept = np.flatnonzero((item >= 0) & (action >= 0))
    columns = (x[kept] for x in (item.astype(np.int32), action.astype(np.int16), log.time_us, context, utc_offset))
    return _Events(user[kept], EventLog(np.array([0, len(kept)]), *columns))


def _translate_codes(
    name: str, values: tuple[str, ...], joined: Dataset, new: Dataset
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The run's code of each code of a new feature; what no event of the run has is "unseen"."""
    c, n_unseen = list(joined.context).index(name), len(values) + 1
    seen = set(np.unique(joined.log.context[:, c]).tolist())
    place = {value: k for k, value in enumerate(values, 1)}
    own = [place.get(value, n_unseen) for value in new.context[name]]
    code = [0, *(k if k in seen else n_unseen for k in own)]
    used = np.unique(new.log.context[:, list(new.context).index(name)])
    strange = tuple(new.context[name][k - 1] for k in used.tolist() if k and code[k] == n_unseen)
    return np.array(code, np.int16), strange


def _merge_events(joined: Dataset, events: _Events) -> tuple[Dataset, np.ndarray, int]:
    """The data set with the new events in their places; of each event its row in the run, -1 for a new one; and how
    many of the new ones the run has already.
    """
    log, new = joined.log, events.log
    columns = [
        np.concatenate([getattr(log, name), getattr(new, name)])
        for name in ("item", "action", "time_us", "context", "utc_offset")
    ]
    item, action, time_us = columns[:3]
    user = np.concatenate([log.user, events.user])
    source = np.concatenate([np.arange(log.n_events), np.full(new.n_events, -1)])
    concerned = np.isin(user, events.user)  # only their events can be met again
    rows = np.flatnonzero(concerned & (time_us != UNKNOWN_TIME))
    keys = np.stack([user[rows], item[rows], action[rows], time_us[rows]], axis=1)
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    again = rows[(source[rows] < 0) & (source[rows[first]][group.reshape(-1)] >= 0)]
    keep = np.ones(len(user), bool)
    keep[again] = False
    unordered = np.zeros(joined.log.n_users, bool)  # whoever has an unknown time stays as published
    unordered[user[keep & (time_us == UNKNOWN_TIME)]] = True
    kept = np.flatnonzero(keep)
    order = kept[np.lexsort((np.where(unordered[user], 0, time_us)[kept], user[kept]))]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user[kept], minlength=log.n_users))]).astype(np.int64)
    merged = EventLog(offsets, *(column[order] for column in columns))
    return dataclasses.replace(joined, log=merged), source[order], len(again)
