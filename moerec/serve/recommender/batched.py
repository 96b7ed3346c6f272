"""A trained run as a library: lists, scores, vectors, states, routing and attention for many users at once.

    recommender = Recommender(load_run("runs/demo"))
    print(recommender.recommend(["user 7"], time="2024-05-01T20:00", k=5).to_table())

Each kind of answer is one compiled program (`programs`) for each shape (`packed_requests`); a second call of a shape
compiles nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import pyarrow as pa

from moerec.data.dataset import ItemTable
from moerec.data.histories import Histories, make_histories
from moerec.errors import InputError
from moerec.eval.ranking.dataset import pad_seen
from moerec.nn.heads.service_answers import component_names
from moerec.nn.model import Predictor
from moerec.nn.model.inspect import SlotTrace
from moerec.serve.new_data import Additions, extend_run
from moerec.serve.recommender.packed_requests import (
    Moment,
    PackedRequests,
    Requests,
    UserEvent,
    UserHistory,
    ask_of_histories,
    ask_of_users,
    find_item,
    find_users,
    pack_requests,
    place_items,
    read_contexts,
    read_moments,
)
from moerec.serve.recommender.programs import list_best, read_states, score_items, trace_requests
from moerec.train.run_dir import Run
from moerec.types import Catalog

ItemKey: TypeAlias = tuple[str, str]  # service and id
Contexts: TypeAlias = Mapping[str, str] | Sequence[Mapping[str, str]] | None
SHORTEST_LIST = 16  # items that a program lists at least
Times: TypeAlias = Moment | Sequence[Moment] | np.ndarray


class Recommendations(NamedTuple):
    """The best items of `n` requests.

    Attributes:
      users: `[n]` names; empty for histories. item: `[n, k]` int64 items of the catalogue, best first, -1 where there
        are fewer. log_p: `[n, k]` float32, log-probabilities over the items of all services; -inf there.
      part: `[n, k, C]` float32, what each component of the mixture gave of the probability given the item's service (of
        the probability, where services are not asked).
      group: `[n, k]` int32, of the groups of experts the one that weighs most in the answer that the item is from; the
        last is the cross-domain one. Where services are not asked or have no experts, the item's service.
      domain: `[n, Z]` float32, the posterior over services; None in a dense model.
      catalogue, components: what items and parts are called.
    """

    users: np.ndarray
    item: np.ndarray
    log_p: np.ndarray
    part: np.ndarray
    group: np.ndarray
    domain: np.ndarray | None
    catalogue: ItemTable
    components: tuple[str, ...]

    def to_table(self) -> pa.Table:
        """One row an item: user, rank (from 1), service, item, text, p, group, and component, the largest part. Of
        histories the users are "history 0", "history 1" and so on.
        """
        row, place = np.nonzero(self.item >= 0)
        users = [str(name) or f"history {k}" for k, name in enumerate(self.users.tolist())]
        item = self.item[row, place]
        services, groups = (pa.array(names) for names in (self.catalogue.services, (*self.catalogue.services, "cross")))
        return pa.table(
            {
                "user": pa.array([users[k] for k in row.tolist()], pa.string()),
                "rank": pa.array(place + 1, pa.int32()),
                "service": services.take(pa.array(self.catalogue.service[item])),
                "item": pa.array(self.catalogue.ids[item].tolist(), pa.string()),
                "text": pa.array(self.catalogue.text[item].tolist(), pa.string()),
                "p": pa.array(np.exp(self.log_p[row, place]), pa.float32()),
                "group": groups.take(pa.array(self.group[row, place])),
                "component": pa.array(self.components).take(pa.array(self.part[row, place].argmax(axis=1))),
            }
        )


class Recommender:
    """Answers from the best parameters of a run. What it is given may be a batch of any size."""

    def __init__(self, run: Run):
        """Args: of `load_run`."""
        self.run = run

    def with_new(
        self,
        interactions: str | Path | None = None,
        items: str | Path | None = None,
        users: str | Path | None = None,
    ) -> tuple["Recommender", Additions]:
        """One that knows of new tables, too, and what in them is new (`extend_run`). Nothing is retrained.

        Raises:
          InputError: a table cannot be read.
        """
        run, additions = extend_run(self.run, interactions, items, users)
        return Recommender(run), additions

    def recommend(
        self,
        users: Sequence[str] | None = None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None = None,
        *,
        time: Times = None,
        context: Contexts = None,
        services: Sequence[str] | None = None,
        exclude: Sequence[ItemKey] | Sequence[Sequence[ItemKey]] = (),
        k: int = 10,
    ) -> Recommendations:
        """The `k` items that each most probably wants next, after all of their events before the request.

        Items that somebody had are no candidates where the configuration says so (`eval.mask_seen`).

        Args:
          users: names of users in the data; or histories: people in no table, by their events.
          time: of the requests, one or one each: unix seconds, ISO texts (UTC unless they name an offset) or datetimes;
            events from then on are no history. context: features of the requests by name, one or one each.
          services: whose items may be listed; None: all. exclude: items that may not, for all or for each.

        Raises:
          InputError: `k` is below 1; no such user, item, service, feature or time; or nothing is known of somebody, and
            the model was not trained to do without (`data.first_event`).
        """
        requests, allowed, excluded = self._check(users, histories, time, context, services, exclude, k)
        catalogue, k = self._catalogue, min(k, self._catalogue.n_items)
        n_listed = min(max(1 << (k - 1).bit_length(), SHORTEST_LIST), catalogue.n_items)  # few programs

        def ask(packed: PackedRequests) -> tuple[jax.Array, ...]:
            exclude_QX = _lay_excluded(excluded, packed.which, len(packed.slot))
            return list_best(*self._model, packed.batch, packed.slot, allowed, exclude_QX, n_listed)

        found = self._collect(requests, ask)
        item, log_p, part, group = (array[:, :k] for array in found[:4])
        domain = found[4] if len(found) > 4 else None
        names = component_names(self.run.config.model, catalogue.services)
        return Recommendations(requests.names, item.astype(np.int64), log_p, part, group, domain, catalogue, names)

    def check(self, users: Sequence[str], **options: Any) -> None:
        """Raises what `recommend` would of the same request, and computes nothing. Args: as `recommend`."""
        wanted = {"time": None, "context": None, "services": None, "exclude": (), "k": 10, **options}
        self._check(users, None, *wanted.values())

    def _check(
        self,
        users: Sequence[str] | None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None,
        time: Times,
        context: Contexts,
        services: Sequence[str] | None,
        exclude: Sequence[ItemKey] | Sequence[Sequence[ItemKey]],
        k: int,
    ) -> tuple[Requests, np.ndarray, list[tuple[Histories, np.ndarray]]]:
        """The requests, whose items may be listed, and those that may not. Args, Raises: as `recommend`."""
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k: must be a whole number of at least 1, not {k!r}")
        requests = self._read(users, histories, time, context)
        return requests, self._allow(services), self._exclude(requests, exclude)

    def score(
        self,
        users: Sequence[str] | None = None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None = None,
        *,
        time: Times = None,
        context: Contexts = None,
    ) -> np.ndarray:
        """`[n, I]` float32, log-probabilities of all items, as `item_vectors` has them. Args, Raises: `recommend`."""
        requests = self._read(users, histories, time, context)
        (found,) = self._collect(requests, lambda x: (score_items(*self._model, x.batch, x.slot),))
        return found

    def list_answerable(self, users: Sequence[str], time: Moment = None) -> list[str]:
        """Those of the users who have an event before a time, or all where a model does without (`data.first_event`).

        Raises:
          InputError: no such user.
        """
        if self.run.config.data.first_event:
            return list(users)
        requests = self._read(users, None, time, None)
        return [name for name, n in zip(users, requests.before.length.tolist(), strict=True) if n]

    def list_known(self, items: Sequence[ItemKey]) -> list[ItemKey]:
        """Those of the items that the run has."""
        return [key for key in items if key in self._place_of_item]

    def item_vectors(self) -> tuple[list[ItemKey], np.ndarray]:
        """The items' names, and `[I, D]` float32 vectors: a state's dot product with one, and a bias, is its score."""
        catalogue = self._catalogue
        names = [(catalogue.services[z], str(i)) for z, i in zip(catalogue.service, catalogue.ids, strict=True)]
        return names, np.asarray(self.run.catalog.vector_ID)

    def user_states(
        self,
        users: Sequence[str] | None = None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None = None,
        *,
        time: Times = None,
        context: Contexts = None,
    ) -> np.ndarray:
        """The states that score the items: `[n, D]` float32; `[n, Z, D]`, one for each service, where these are asked.

        Args, Raises: as `recommend`.
        """
        requests = self._read(users, histories, time, context)
        (found,) = self._collect(requests, lambda x: (read_states(*self._model, x.batch, x.slot),))
        return found

    def routing(
        self,
        users: Sequence[str] | None = None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None = None,
        *,
        time: Times = None,
        context: Contexts = None,
        service: str | None = None,
    ) -> list[SlotTrace]:
        """Of each request, to which experts each of its slots goes, and the analyser's posterior and the profile's
        relevance there: a `SlotTrace` of one row `[1, ...]`, without the attention.

        Where services are asked, slots of the past ask the service that followed; the last one asks `service`, or none.

        Args, Raises: as `recommend`; InputError: the model has no experts.
        """
        if not self.run.config.model.moe.layers:
            raise InputError("routing: this run has no experts; train it with model.moe.layers")
        traces = self._trace(self._read(users, histories, time, context), service)
        return [trace._replace(attention_BLNTS=None, memory_BLNTM=None) for trace in traces]

    def attention(
        self,
        users: Sequence[str] | None = None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None = None,
        *,
        time: Times = None,
        context: Contexts = None,
        service: str | None = None,
    ) -> list[SlotTrace]:
        """Of each request, what each head of each layer reads at each of its slots: a `SlotTrace` of one row.

        Args, Raises: as `routing`, experts aside.
        """
        return self._trace(self._read(users, histories, time, context), service)

    def _trace(self, requests: Requests, service: str | None) -> list[SlotTrace]:
        z = -1 if service is None else self._find_service(service)
        traces: list[SlotTrace | None] = [None] * len(requests)
        for packed in pack_requests(self.run, requests):
            found = jax.tree.map(np.asarray, trace_requests(*self._model, packed.batch, packed.slot, np.int32(z)))
            width = packed.batch.kind_BT.shape[1]
            for row, i in enumerate(packed.which.tolist()):
                n = int(packed.slot[row]) % width + 1
                traces[i] = SlotTrace(
                    found.attention_BLNTS[row : row + 1, :, :, :n, :n],
                    None if found.memory_BLNTM is None else found.memory_BLNTM[row : row + 1, :, :, :n],
                    *(None if x is None else x[row : row + 1, :, :n] for x in (found.expert_BLTA, found.weight_BLTA)),
                    *(None if x is None else x[row : row + 1, :n] for x in (found.log_domain_BTZ, found.relevance_BTM)),
                )
        return [trace for trace in traces if trace is not None]

    @property
    def _catalogue(self) -> ItemTable:
        return self.run.data.dataset.catalogue

    @property
    def _model(self) -> tuple[Predictor, Catalog]:
        return self.run.predictor, self.run.catalog

    @functools.cached_property
    def _place_of_user(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.run.data.dataset.users.tolist())}

    @functools.cached_property
    def _place_of_item(self) -> dict[ItemKey, int]:
        return place_items(self.run.data.dataset)

    def _read(
        self,
        users: Sequence[str] | None,
        histories: Sequence[UserHistory | Sequence[UserEvent]] | None,
        time: Times,
        context: Contexts,
    ) -> Requests:
        if (users is None) == (histories is None):
            raise InputError("users, histories: one of the two says whom to answer")
        if isinstance(users, str):
            raise InputError(f"users: {users!r} is one name; a list of names is needed")
        n = len(users) if users is not None else len(histories or ())
        when = read_moments(time, n)
        codes = read_contexts(self.run, context, n)
        if users is not None:
            at = find_users(self._place_of_user, users)
            return ask_of_users(self.run, at, when, codes)
        people = [_read_history(own, f"histories[{k}]") for k, own in enumerate(histories or ())]
        return ask_of_histories(self.run, people, self._place_of_item, when, codes)

    def _find_service(self, name: str) -> int:
        if name not in self._catalogue.services:
            raise InputError(f"services: {name!r} is none of {', '.join(self._catalogue.services)}")
        return self._catalogue.services.index(name)

    def _allow(self, services: Sequence[str] | None) -> np.ndarray:
        """`[Z]` bool, whose items may be listed."""
        if services is None:
            return np.ones(self._catalogue.n_services, bool)
        if isinstance(services, str):
            raise InputError(f"services: {services!r} is one name; a list of names is needed")
        allowed = np.zeros(self._catalogue.n_services, bool)
        allowed[[self._find_service(name) for name in services]] = True
        return allowed

    def _exclude(
        self, requests: Requests, exclude: Sequence[ItemKey] | Sequence[Sequence[ItemKey]]
    ) -> list[tuple[Histories, np.ndarray]]:
        """The items that may not be listed: histories of each request, and the items that their rows are of."""
        n = len(requests)
        is_common = all(len(key) == 2 and isinstance(key[0], str) for key in exclude)
        keys: list[Any] = [list(exclude)] if is_common else [list(own) for own in exclude]
        if not is_common and len(keys) != n:
            raise InputError(f"exclude: items of {len(keys)} requests, and there are {n}")
        dataset, place = self.run.data.dataset, self._place_of_item if len(exclude) else {}
        given = [find_item(dataset, place, item, service, "exclude") for own in keys for service, item in own]
        ends = np.cumsum([0, *map(len, keys)])
        start, stop = (np.broadcast_to(edge, n) for edge in (ends[:-1], ends[1:]))
        found: list[tuple[Histories, np.ndarray]] = [(make_histories(start, stop), np.array(given, np.int32))]
        if self.run.config.eval.mask_seen:
            found.append((requests.before.distinct(requests.log.item), requests.log.item))
        return found

    def _collect(
        self, requests: Requests, ask: Callable[[PackedRequests], tuple[jax.Array, ...]]
    ) -> tuple[np.ndarray, ...]:
        """The answers of all batches, in the order of the requests; one batch is packed while another is computed."""
        out: list[np.ndarray] = []
        waiting: list[tuple[np.ndarray, tuple[jax.Array, ...]]] = []

        def settle() -> None:
            which, arrays = waiting.pop()
            for k, array in enumerate(arrays):
                rows = np.asarray(array)[: len(which)]
                if len(out) == k:
                    out.append(np.zeros((len(requests), *rows.shape[1:]), rows.dtype))
                out[k][which] = rows

        for packed in pack_requests(self.run, requests):
            arrays = ask(packed)
            if waiting:
                settle()
            waiting.append((packed.which, arrays))
        if waiting:
            settle()
        if not out:
            raise InputError("users, histories: nobody is asked about")
        return tuple(out)


def _read_history(own: UserHistory | Sequence[UserEvent], where: str) -> UserHistory:
    events = own.events if isinstance(own, UserHistory) else own
    # `UserEvent` is a sequence, too: of its fields, none of which is an event.
    if not isinstance(events, Sequence) or not all(isinstance(event, UserEvent) for event in events):
        raise InputError(f"{where}: must be a list of UserEvent, or a UserHistory")
    return UserHistory(events, own.fields) if isinstance(own, UserHistory) else UserHistory(events)


def _lay_excluded(excluded: list[tuple[Histories, np.ndarray]], which: np.ndarray, n: int) -> np.ndarray:
    """`[n, X]` int32 items that a batch of requests may not list, -1 for none; X is of few sizes, each a program."""
    columns = []
    for histories, item in excluded:
        own = histories.take(which)
        width = 1 << max(int(own.length.max(initial=0)) - 1, 0).bit_length()
        columns.append(pad_seen(own, item[own.rows], width))
    laid = np.concatenate(columns, axis=1)
    return np.concatenate([laid, np.full((n - len(laid), laid.shape[1]), -1, np.int32)])
