"""A trained run that answers: what one person wants next, at some time and in some context, and why."""

import datetime
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.checkpoint import Checkpoints
from moerec.config import Config
from moerec.config.stored import read_config
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.load import Prepared, load_data
from moerec.data.packing import device_time, fill_batch
from moerec.data.ranges import find_ranges
from moerec.data.zones import find_zones
from moerec.errors import InputError
from moerec.evaluate import catalogue_vectors, score_items
from moerec.nn.model import SequenceModel
from moerec.shapes import Batch, ItemTable
from moerec.sharding import make_mesh, param_shardings, replicated
from moerec.state import evaluated_model, init_state
from moerec.train import make_sizes


class Trained(NamedTuple):
    """A run's configuration, data, best parameters, and what those need of the catalogue."""

    config: Config
    data: Prepared
    model: SequenceModel
    table: ItemTable


class Request(NamedTuple):
    """When something is wanted, unix seconds (None: not known), and its context by name; what is left out is missing.

    `service` narrows the list to one service's catalogue.
    """

    time: int | None = None
    context: Mapping[str, str] = types.MappingProxyType({})
    service: str = ""


class Answer(NamedTuple):
    """Attributes:
    item: `[K]` int64 items of the catalogue, best first. log_p: `[K]`, logs of their probabilities in the union.
    domain: `[Z]`, the analyser's posterior over services; None in a dense model.
    relevance: `[M]`, what each slot of the profile matters to the request; None in a model without one.
    weight: `[X]`, weights of the mixed answers; None where there is one.
    """

    item: np.ndarray
    log_p: np.ndarray
    domain: np.ndarray | None
    relevance: np.ndarray | None
    weight: np.ndarray | None


def load_run(workdir: Path) -> Trained:
    """The best parameters of a run directory, on one device.

    Raises:
      InputError: it is no run directory, or holds no checkpoint.
    """
    config = read_config(workdir / "config.json")
    data = load_data(config.data, workdir)
    mesh = make_mesh(1, 1, 1)
    shapes = jax.eval_shape(lambda: init_state(config, make_sizes(data)))
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, mesh)
    )
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir}: holds no checkpoint")
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        state, _ = checkpoints.restore_best(like)
    finally:
        checkpoints.close()
    return Trained(config, data, evaluated_model(state), jax.device_put(data.item_table, replicated(mesh)))


def recommend(trained: Trained, person: str, request: Request, n: int) -> Answer:
    """The `n` items that a person most probably wants next, after all of their events.

    Items that they had are no candidates where the configuration says so (`eval.mask_seen`).

    Raises:
      InputError: nobody is called so, or has events; an unknown feature or service.
    """
    config, dataset = trained.config, trained.data.dataset
    batch, slot = _make_batch(trained, person, request)
    score_I, found = _score(trained.model, batch, slot, trained.table)
    log_p_I = np.asarray(jax.nn.log_softmax(score_I), np.float64)
    allowed = np.ones(dataset.catalogue.n_items, bool)
    if request.service:
        if request.service not in dataset.catalogue.services:
            raise InputError(f"service {request.service!r}: there are {', '.join(dataset.catalogue.services)}")
        allowed = dataset.catalogue.service == dataset.catalogue.services.index(request.service)
    if config.eval.mask_seen:
        allowed[dataset.log.item[_rows_of(trained, person)]] = False
    best = np.argsort(np.where(allowed, -log_p_I, np.inf), kind="stable")[: min(n, int(allowed.sum()))]
    return Answer(best, log_p_I[best], *(None if x is None else np.asarray(x) for x in found))


@jax.jit
def _score(model: SequenceModel, batch: Batch, slot: jax.Array, table: ItemTable):
    """Scores `[I]` of all items at a flat slot, and what else the model says there."""
    vectors = catalogue_vectors(model, table)
    score_QI = score_items(model, batch, slot[None], table, vectors)
    output = model.encode(batch, table, vector_ID=vectors[0])  # the same as inside `score_items`: computed once

    def pick(x_BTX, is_log):
        if x_BTX is None:
            return None
        x_X = x_BTX.reshape(-1, x_BTX.shape[-1])[slot]
        return jnp.exp(x_X) if is_log else x_X

    weight_BTX = None if output.answers is None else output.answers.log_weight_BTX
    found = pick(output.log_domain_BTZ, True), pick(output.relevance_BTM, False), pick(weight_BTX, True)
    return score_QI[0], found


def _rows_of(trained: Trained, person: str) -> np.ndarray:
    dataset = trained.data.dataset
    (at,) = np.nonzero(dataset.people == person)
    if not len(at):
        raise InputError(f"person {person!r}: nobody is called so; the first is {str(dataset.people[0])!r}")
    lo, hi = dataset.log.offsets[at[0] : at[0] + 2]
    if lo == hi:
        raise InputError(f"person {person!r}: has no events")
    return np.arange(lo, hi)


def _make_batch(trained: Trained, person: str, request: Request) -> tuple[Batch, int]:
    """The person's last events in one row, and the slot whose request this is."""
    data, dataset = trained.config.data, trained.data.dataset
    rows = _rows_of(trained, person)[-data.history_len :]
    n, last = len(rows), len(rows) - 1
    people = np.full(n, int(dataset.log.person[rows[0]]))
    batch = fill_batch(
        dataset.log,
        slot=np.arange(n),
        source=rows,
        following=np.append(rows[1:], rows[-1]),
        position=np.arange(n),
        segment=np.ones(n, np.int32),
        weight=np.zeros(n, np.float32),
        shape=(1, data.seq_len),
        fields=dataset.profile_codes[0][people],
    )
    time = np.array([UNKNOWN_TIME if request.time is None else request.time], np.int64)
    context = np.array(encode_context(trained, request.context), np.int64)
    zones = find_zones(dataset, trained.config.data.schema)
    batch.request_time_BT[0, last] = device_time(time)[0]
    batch.request_shift_BT[0, last] = 0 if zones is None else zones.find_shifts(people[:1], time, context[None])[0]
    batch.request_context_BTC[0, last] = context
    return batch, last


def encode_context(trained: Trained, context: Mapping[str, str]) -> list[int]:
    """Codes of the features, 0 for those that are not given; a value that no event has is "unseen".

    A numeric feature may be given as a number or by its range's name.
    """
    dataset, edges = trained.data.dataset, trained.config.data.schema.edges
    for name in context:
        if name not in dataset.context:
            raise InputError(f"context {name!r}: there are {', '.join(dataset.context) or 'none'}")
    codes = []
    for c, (name, values) in enumerate(dataset.context.items()):
        code = _find_code(name, context.get(name, ""), values, edges.get(name))
        is_seen = code == 0 or bool(np.any(dataset.log.context[:, c] == code))
        codes.append(code if is_seen else len(values) + 1)
    return codes


def _find_code(name: str, value: str, values: tuple[str, ...], edges: tuple[float, ...] | None) -> int:
    if not value:
        return 0
    if value in values:
        return values.index(value) + 1
    if edges is None:
        return len(values) + 1
    try:
        return int(find_ranges(np.array(float(value)), edges))
    except ValueError as error:
        raise InputError(f"context {name!r}: {value!r} is no number and none of its ranges") from error


def read_request(context: list[str], time: str, service: str) -> Request:
    """A request in words: `name=value` entries, and an ISO date and time (UTC) or nothing."""
    features = {}
    for entry in context:
        name, _, value = entry.partition("=")
        if not name or not value:
            raise InputError(f"--context: {entry!r} is not of the form name=value")
        features[name] = value
    moment = None
    if time:
        try:
            parsed = datetime.datetime.fromisoformat(time)
        except ValueError as error:
            raise InputError(f"--time: {time!r} is no ISO date and time, such as 2024-05-01T09:00") from error
        moment = int((parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp())
    return Request(moment, features, service)


def describe_answer(trained: Trained, answer: Answer) -> dict[str, Any]:
    """The answer by names, and as `lines` of text."""
    catalogue = trained.data.dataset.catalogue
    service = catalogue.service[answer.item]
    items = [
        {"service": catalogue.services[z], "id": str(catalogue.ids[i]), "text": str(catalogue.text[i]), "p": float(p)}
        for z, i, p in zip(service, answer.item, np.exp(answer.log_p), strict=True)
    ]
    found: dict[str, Any] = {"items": items}
    lines = [f"{x['p']:7.4f}  {x['service']:<12s} {x['id']:<10s} {x['text']}" for x in items]
    if answer.domain is not None:
        found["domain"] = dict(zip(catalogue.services, map(float, answer.domain), strict=True))
        lines.append("analyser: " + ", ".join(f"{name} {p:.2f}" for name, p in found["domain"].items()))
    if answer.weight is not None:
        found["weight"] = answer.weight.tolist()
    if answer.relevance is not None:
        found["relevance"] = answer.relevance.tolist()
        lines.append("profile: " + " ".join(f"{x:.2f}" for x in answer.relevance))
    return {**found, "lines": lines}
