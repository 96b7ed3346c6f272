"""A trained run that answers: what one user wants next, at some time and in some context, and why."""

import dataclasses
import functools
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.config.stored import read_config
from moerec.data.prepare.binning import NUMBER, find_ranges, name_ranges
from moerec.data.dataset import UNKNOWN_TIME, Dataset
from moerec.data.load import RunData, reload_data
from moerec.data.packing import device_time, fill_batch
from moerec.data.splits import parse_date
from moerec.data.timezones import find_zones
from moerec.errors import InputError
from moerec.eval.probes.profile_aspects import relevance_of_aspects
from moerec.eval.ranking import catalogue_vectors, score_output
from moerec.nn.model import SequenceModel
from moerec.nn.profile import MemoryParams, UserState
from moerec.nn.sharding import make_mesh, param_shardings, replicated
from moerec.serve.profiles import observe_events
from moerec.train.checkpoint import Checkpoints
from moerec.train.loop import make_sizes
from moerec.train.step import evaluated_model, init_state
from moerec.types import NO_TIME, Batch, Catalog


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's configuration, data, best parameters, and what those need of the catalogue."""

    config: Config
    data: RunData
    model: SequenceModel
    table: Catalog

    @functools.cached_property
    def known(self) -> tuple[np.ndarray, ...]:
        """For each feature of the context the codes that events have."""
        return tuple(np.unique(column) for column in self.data.dataset.log.context.T)

    @functools.cached_property
    def vectors(self) -> tuple[jax.Array, jax.Array]:
        """`catalogue_vectors`, which every request is scored against."""
        return catalogue_vectors(self.model, self.table)


class RecommendRequest(NamedTuple):
    """When something is wanted, unix seconds (None: not known), and its context by name; what is left out is missing.

    Events at or after the time are no history. `service` narrows the list to one service's catalogue.
    """

    time: int | None = None
    context: Mapping[str, str] = types.MappingProxyType({})
    service: str = ""


class Recommendation(NamedTuple):
    """Attributes:
    item: `[K]` int64 items of the catalogue, best first. log_p: `[K]`, log-softmax of the scores over the union: logs
    of probabilities if the loss ranks the union (not under `loss.scope=service` or `loss.kind=one_negative`).
    domain: `[Z]`, the analyser's posterior over services; None in a dense model.
    relevance: `[M]`, what each slot of the profile matters to the request; None in a model without one.
    weight: `[X]`, weights of the mixed answers; None where there is one.
    """

    item: np.ndarray
    log_p: np.ndarray
    domain: np.ndarray | None
    relevance: np.ndarray | None
    weight: np.ndarray | None


def load_run(workdir: Path) -> Run:
    """The best parameters of a finished run, on one device; nothing is written.

    Raises:
      InputError: it is no directory of a finished run.
    """
    config = read_config(workdir / "config.json")
    if not (workdir / "metrics.json").exists():
        raise InputError(f"{workdir}: this run is not finished; the command that began it goes on with it")
    data = reload_data(config.data, workdir)
    mesh = make_mesh(1, 1, 1)
    shapes = jax.eval_shape(lambda: init_state(config, make_sizes(data)))
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, mesh)
    )
    if not (workdir / "checkpoints" / "best").is_dir():
        raise InputError(f"{workdir}: holds no checkpoint")
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        state, _ = checkpoints.restore_best(like)
    finally:
        checkpoints.close()
    return Run(config, data, evaluated_model(state), jax.device_put(data.item_table, replicated(mesh)))


def recommend(
    trained: Run, user: str, request: RecommendRequest, n: int, profile: UserState | None = None
) -> Recommendation:
    """The `n` items that a user most probably wants next, after all of their events before the request.

    Items that they had by then are no candidates where the configuration says so (`eval.mask_seen`). Of the events the
    model is given the last `data.history_len`; with a `profile`, those that it has not seen, and it beside them.

    Raises:
      InputError: `n` below 1; nobody is called so, or has events before; an unknown feature or service; no such time;
        the profile has seen all events before the request.
    """
    config, dataset = trained.config, trained.data.dataset
    if n < 1:
        raise InputError("--top_k: must be at least 1")
    rows = find_history(trained, user, request)
    allowed = np.ones(dataset.catalogue.n_items, bool)
    if request.service:
        if request.service not in dataset.catalogue.services:
            raise InputError(f"--service: {request.service!r} is none of {', '.join(dataset.catalogue.services)}")
        allowed = dataset.catalogue.service == dataset.catalogue.services.index(request.service)
    if config.eval.mask_seen:
        allowed[dataset.log.item[rows]] = False
    if profile is not None:
        rows, profile = _continue_profile(trained, rows, profile)
    asked = _make_batch(trained, rows, request)
    score_I, found = _score(trained.model, *asked, trained.table, trained.vectors, profile)
    log_p_I = np.asarray(jax.nn.log_softmax(score_I), np.float64)
    best = np.argsort(np.where(allowed, -log_p_I, np.inf), kind="stable")[: min(n, int(allowed.sum()))]
    return Recommendation(best, log_p_I[best], *(None if x is None else np.asarray(x) for x in found))


def _continue_profile(trained: Run, rows: np.ndarray, profile: UserState) -> tuple[np.ndarray, UserState]:
    """The rows that the model is given, and the profile before them, `[1, ...]`."""
    rest, start = rows[int(profile.n_events) :], jax.tree.map(lambda leaf: leaf[None], profile)
    if not len(rest):
        raise InputError(
            "--profiles: the profile has seen all events before the request; "
            "experiments.observe leaves some to the request (--recent)"
        )
    n_old = max(len(rest) - trained.config.data.history_len, 0)  # which a row does not hold
    if n_old:
        log = trained.data.dataset.log
        start = observe_events(trained.model, trained.table, log, start, rest[:1], np.array([n_old]))
    return rest[n_old:], start


@jax.jit
def _score(model, batch: Batch, slot: jax.Array, table: Catalog, vectors, start_B: UserState | None):
    """Scores `[I]` of all items, whose `catalogue_vectors` are given, at a flat slot; and what else the model says."""
    output = model.encode(batch, table, vector_ID=vectors[0], start_B=start_B)
    score_QI = score_output(output, batch, slot[None], vectors)

    def pick(x_BTX, is_log):
        if x_BTX is None:
            return None
        x_X = x_BTX.reshape(-1, x_BTX.shape[-1])[slot]
        return jnp.exp(x_X) if is_log else x_X

    weight_BTX = None if output.answers is None else output.answers.log_weight_BTX
    found = pick(output.log_domain_BTZ, True), pick(output.relevance_BTM, False), pick(weight_BTX, True)
    return score_QI[0], found


def find_history(trained: Run, user: str, request: RecommendRequest) -> np.ndarray:
    """Rows of the log: the user's events before the request."""
    dataset = trained.data.dataset
    (at,) = np.nonzero(dataset.users == user)
    if not len(at):
        raise InputError(f"--user: nobody is called {user!r}; the first is {str(dataset.users[0])!r}")
    rows = np.arange(*dataset.log.offsets[at[0] : at[0] + 2])
    when = ""
    if request.time is not None:
        if device_time(np.array([request.time]))[0] == NO_TIME:
            raise InputError("--time: must lie between 1932 and 2068")
        time = dataset.log.time[rows]
        rows = rows[(time == UNKNOWN_TIME) | (time < request.time)]
        when = " before --time"
    if not len(rows):
        raise InputError(f"--user: {user!r} has no events{when}")
    return rows


def _make_batch(trained: Run, rows: np.ndarray, request: RecommendRequest) -> tuple[Batch, int]:
    """The last events of a history in one row, and the slot whose request this is."""
    data, dataset = trained.config.data, trained.data.dataset
    rows = rows[-data.history_len :]
    n, last = len(rows), len(rows) - 1
    user = np.searchsorted(dataset.log.offsets, rows[:1], side="right") - 1
    batch = fill_batch(
        dataset.log,
        slot=np.arange(n),
        source=rows,
        following=np.append(rows[1:], rows[-1]),
        position=np.arange(n),
        segment=np.ones(n, np.int32),
        weight=np.zeros(n, np.float32),
        shape=(1, data.seq_len),
        fields=np.repeat(dataset.profile_codes[0][user], n, axis=0),
    )
    time = np.array([UNKNOWN_TIME if request.time is None else request.time], np.int64)
    code_C = encode_context(dataset, data.schema.edges, request.context)
    zones = find_zones(dataset, data.schema)  # by what was said, be it known to the model or not
    utc_offset = np.zeros(1, np.int32) if zones is None else zones.find_utc_offsets(user, time, code_C[None])
    batch.request_time_BT[0, last] = device_time(time)[0]
    batch.request_utc_offset_BT[0, last] = utc_offset[0]
    batch.request_context_BTC[0, last] = _hide_unknown(trained, code_C)
    return batch, last


def _hide_unknown(trained: Run, code_C: np.ndarray) -> np.ndarray:
    """The codes with "unseen" for those that no event has; the model knows all of the built-in world's."""
    if trained.data.world is not None:
        return code_C
    unseen_C = np.array([len(values) + 1 for values in trained.data.dataset.context.values()], np.int64)
    is_known_C = np.array([code in known for code, known in zip(code_C, trained.known, strict=True)], bool)
    return np.where(is_known_C | (code_C == 0), code_C, unseen_C)


def encode_context(dataset: Dataset, edges: Mapping[str, tuple[float, ...]], context: Mapping[str, str]) -> np.ndarray:
    """`[C]` int64 codes of the features, 0 for those that are not given, the last code for another value.

    A feature whose values are the ranges between its `edges` may be given as a number, too.
    """
    for name in context:
        if name not in dataset.context:
            raise InputError(f"--context: {name!r} is none of {', '.join(dataset.context) or 'no features'}")
    codes = [
        _find_code(name, context.get(name, ""), values, edges.get(name, ())) for name, values in dataset.context.items()
    ]
    return np.array(codes, np.int64)


def _find_code(name: str, value: str, values: tuple[str, ...], edges: tuple[float, ...]) -> int:
    if not value:
        return 0
    if value in values:
        return values.index(value) + 1
    if not edges or values != tuple(name_ranges(edges)):
        return len(values) + 1
    if not re.fullmatch(NUMBER, value):
        raise InputError(f"--context: {name}={value} is no number and none of its ranges")
    return int(find_ranges(np.array(float(value)), edges))


def list_unseen(trained: Run, context: Mapping[str, str]) -> list[str]:
    """A line for each value of a request that the model has never seen."""
    dataset, edges = trained.data.dataset, trained.config.data.schema.edges
    code_C = _hide_unknown(trained, encode_context(dataset, edges, context))
    return [
        f"{name}={context[name]}: never seen in training; there are {', '.join(values)}"
        for (name, values), code in zip(dataset.context.items(), code_C, strict=True)
        if code == len(values) + 1
    ]


def read_request(context: list[str], time: str, service: str) -> RecommendRequest:
    """A request in words: entries `name=value` or `name=value,name=value`; an ISO date and time (UTC), or nothing."""
    features: dict[str, str] = {}
    for entry in (part for given in context for part in re.split(r",(?=[^,=]+=)", given)):
        name, _, value = entry.partition("=")
        if not name or not value:
            raise InputError(f"--context: {entry!r} is not of the form name=value")
        if name in features:
            raise InputError(f"--context: {name} is there twice")
        features[name] = value
    return RecommendRequest(parse_date(time, "--time") if time else None, features, service)


def _name_relevance(trained: Run, relevance_M: np.ndarray) -> dict[str, float]:
    """By aspects, as a portrait numbers them; by slots where a memory has no aspects."""
    *of_slots, of_fields = relevance_M.tolist()
    kind, parts = "slot", of_slots
    if isinstance(trained.model.profile, MemoryParams):
        kind, parts = "aspect", relevance_of_aspects(relevance_M[None], trained.config.model.personal)[0].tolist()
    return {**{f"{kind} {k}": x for k, x in enumerate(parts)}, "fields": of_fields}


def describe_answer(trained: Run, answer: Recommendation) -> dict[str, Any]:
    """The answer by names, and as `lines` of text."""
    catalogue = trained.data.dataset.catalogue
    service = catalogue.service[answer.item]
    items = [
        {"service": catalogue.services[z], "id": str(catalogue.ids[i]), "text": str(catalogue.text[i]), "p": float(p)}
        for z, i, p in zip(service, answer.item, np.exp(answer.log_p), strict=True)
    ]
    found: dict[str, Any] = {"items": items}
    lines = [f"{'p':>7s}  {'service':<12s} {'id':<10s} text"]
    lines += [f"{x['p']:7.4f}  {x['service']:<12s} {x['id']:<10s} {x['text']}" for x in items]
    if answer.domain is not None:
        found["domain"] = dict(zip(catalogue.services, map(float, answer.domain), strict=True))
        shares = ", ".join(f"{name} {p:.2f}" for name, p in found["domain"].items())
        lines.append(f"service of what comes next: {shares}")
    if answer.weight is not None:
        names = ["catalogue", *(f"own {name}" for name in catalogue.services), "own history"]
        names = names if len(names) == len(answer.weight) else [names[0], names[-1]]  # one pointer
        found["weight"] = dict(zip(names, answer.weight.tolist(), strict=True))
        lines.append("weights of the answers: " + ", ".join(f"{name} {w:.2f}" for name, w in found["weight"].items()))
    if answer.relevance is not None:
        found["relevance"] = _name_relevance(trained, answer.relevance)
        lines.append(
            "relevance of the profile: " + ", ".join(f"{name} {x:.2f}" for name, x in found["relevance"].items())
        )
    return {**found, "lines": lines}
