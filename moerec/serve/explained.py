"""A trained run that answers: what one user wants next, at some time and in some context, and why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config.terminal import printable
from moerec.data.dataset import SECOND_US, UNKNOWN_TIME
from moerec.data.histories import Histories
from moerec.data.packing import device_time
from moerec.errors import InputError
from moerec.eval.probes.answers import AskedAnswer, ask_services, describe_asked
from moerec.eval.probes.profile_aspects import relevance_of_aspects
from moerec.eval.ranking.lists import best_items
from moerec.nn.heads.item import log_prob_items
from moerec.nn.heads.near_pointers import near_names
from moerec.nn.heads.service_answers import component_names
from moerec.nn.model import Predictor
from moerec.nn.profile import MemoryParams, UserState
from moerec.serve.aspects import name_aspects
from moerec.serve.profiles import explain_difference, observe_events, open_profiles, read_profile
from moerec.serve.recommender.packed_requests import Requests, pack_requests
from moerec.serve.request import RecommendRequest, encode_context, encode_fields, hide_unknown
from moerec.train.run_dir import Run
from moerec.types import NO_TIME, Batch, Catalog


class Recommendation(NamedTuple):
    """Attributes:
    item: `[n]` int64 items of the catalogue, best first. log_p: `[n]`, log-softmax of the scores over the union: logs
    of probabilities if the loss ranks the union (not under `loss.scope=service` or `loss.kind=one_negative`).
    domain: `[Z]`, the analyser's posterior over services; None in a dense model.
    relevance: `[M]`, what each slot of the profile matters to the request; None in a model without one, and where
      nothing is known of a user that a profile could hold.
    weight: `[X]`, weights of the mixture's components; None where there is one, and where services are asked.
    asked: where they are, what each answers.
    """

    item: np.ndarray
    log_p: np.ndarray
    domain: np.ndarray | None
    relevance: np.ndarray | None
    weight: np.ndarray | None
    asked: AskedAnswer | None = None


def recommend(
    run: Run, user: str | None, request: RecommendRequest, n: int, profile: UserState | None = None, mass: float = 1.0
) -> Recommendation:
    """The `n` items that a user most probably wants next, after all of their events before the request.

    Who has no event before it, or is nobody yet (None), is answered by the request alone: its time, context and fields.
    Items that the user had by then are no candidates where the configuration says so (`eval.mask_seen`). Of the events
    the model is given the last `data.history_len`; with a `profile`, those that it has not seen, and it beside them.
    Where services are asked, those are that have `mass` of the posterior together; the items of others have no
    probability.

    Raises:
      InputError: `n` below 1; `mass` out of (0, 1], or below 1 where a service is named; nobody is called so; there
        are no events, and the model was not trained to do without; an unknown feature, field or service; no such time;
        the profile has seen all events before the request.
    """
    config, dataset = run.config, run.data.dataset
    if n < 1:
        raise InputError("--top_k: must be at least 1")
    if not 0 < mass <= 1:
        raise InputError("--mass: must lie in (0, 1]")
    rows = find_history(run, user, request)
    if not len(rows) and not config.data.first_event:
        raise InputError(f"--user: {user!r} has no events before the request, and the run has data.first_event=false")
    allowed, service = np.ones(dataset.catalogue.n_items, bool), None
    if request.service:
        if request.service not in dataset.catalogue.services:
            raise InputError(f"--service: {request.service!r} is none of {', '.join(dataset.catalogue.services)}")
        if mass < 1 and config.model.is_asked:
            raise InputError("--mass: --service names the one that is asked")
        service = dataset.catalogue.services.index(request.service)
        allowed = dataset.catalogue.service == service
    if config.eval.mask_seen:
        allowed[dataset.log.item[rows]] = False
    is_continued = profile is not None and int(profile.n_events) > 0
    if profile is not None:
        rows, profile = _continue_profile(run, rows, profile)
    batch, slot = _make_batch(run, user, rows, request, is_continued)
    is_known = bool(is_continued or len(rows) or batch.request.field_BTY[0, slot].any())
    if config.model.is_asked:
        log_p_I, asked = ask_services(run.predictor, run.catalog, batch, slot, profile, allowed, n, mass, service)
        best = best_items(log_p_I, allowed & np.isfinite(log_p_I), n)
        relevance = asked.relevance if is_known else None
        return Recommendation(best, log_p_I[best].astype(np.float64), asked.domain, relevance, None, asked)
    log_p_I, found = _predict(run.predictor, batch, slot, run.catalog, profile)
    log_p_I = np.asarray(log_p_I, np.float64)
    best = best_items(log_p_I, allowed, n)
    domain, relevance, weight = found
    if not is_known:
        relevance = None
    found = domain, relevance, weight
    domain, relevance, weight = (None if x is None else np.asarray(x) for x in found)
    return Recommendation(best, log_p_I[best], domain, relevance, weight)


def answer_users(
    run: Run,
    users: Sequence[str | None],
    request: RecommendRequest,
    n: int,
    profiles: Path | None,
    mass: float,
    notes: TextIO,
) -> list[dict[str, Any]]:
    """For each user the answer by names (`describe_answer`) with its history, and as `lines` of text; None is somebody
    new.

    Args: as `recommend`; a store of profiles or None; where what is to be known of an answer by them goes, a line each.

    Raises:
      InputError: somebody is named twice; as `recommend` and `recall_profile`.
    """
    if len(set(users)) < len(users):
        raise InputError("--user: somebody is named twice")
    if n < 1:
        raise InputError("--top_k: must be at least 1")
    found = []
    for user in users:
        profile, told = recall_profile(run, user, request, profiles)
        for note in told:
            print(note, file=notes)
        answer = recommend(run, user, request, n, profile, mass)
        if profiles is not None and profile is None:
            answer = answer._replace(relevance=None)
        history, described = describe_history(run, user, request), describe_answer(run, answer)
        lines = [*history.pop("lines"), "", *described.pop("lines")]
        found.append({"user": user, "history": history, **described, "lines": lines})
    return found


def recall_profile(
    run: Run, user: str | None, request: RecommendRequest, folder: Path | None
) -> tuple[UserState | None, list[str]]:
    """A user's profile in a store, None where it has none, and in a line each what is to be known of an answer by it.

    Raises:
      InputError: there is no such store, or it is another run's; the profile has seen other events than the user's.
    """
    if user is None or folder is None:
        return None, []
    params, dataset = run.predictor.params, run.data.dataset
    profile, is_stored = read_profile(open_profiles(folder, params), params, dataset, user)
    if not is_stored:
        return None, [f"{user}: no profile in the store; the last events alone count"]
    n_seen = int(profile.n_events)
    n_given = min(len(find_history(run, user, request)) - n_seen, run.config.data.history_len)
    reason = explain_difference(run.config, n_given) if n_seen and n_given > 0 else ""
    return profile, [f"{user}: not the answer that the whole history would give: {reason}"] if reason else []


def _continue_profile(run: Run, rows: np.ndarray, profile: UserState) -> tuple[np.ndarray, UserState]:
    """The rows that the model is given, and the profile before them, `[1, ...]`."""
    rest, start = rows[int(profile.n_events) :], jax.tree.map(lambda leaf: leaf[None], profile)
    if not len(rest) and int(profile.n_events):
        raise InputError(
            "--profiles: the profile has seen all events before the request; "
            "experiments.observe leaves some to the request (--recent)"
        )
    n_old = max(len(rest) - run.config.data.history_len, 0)  # which a row does not hold
    if n_old:
        log = run.data.dataset.log
        start = observe_events(run.predictor.params, run.catalog, log, start, rest[:1], np.array([n_old]))
    return rest[n_old:], start


@jax.jit
def _predict(predictor: Predictor, batch: Batch, slot: jax.Array, catalog: Catalog, start_B: UserState | None):
    """Log-probabilities `[I]` of all items of a bound catalogue at a flat slot; and what else the model says."""
    profile = None if start_B is None else predictor.params.read_profiles(batch, catalog, start_B)
    outputs = predictor.encode(batch, catalog, profile=profile)
    log_p_QI = log_prob_items(outputs, batch, slot[None], catalog)

    def pick(x_BTX, is_log):
        if x_BTX is None:
            return None
        x_X = x_BTX.reshape(-1, x_BTX.shape[-1])[slot]
        return jnp.exp(x_X) if is_log else x_X

    weight_BTX = None if outputs.pointers is None else outputs.pointers.log_weight_BTX
    found = pick(outputs.log_domain_BTZ, True), pick(outputs.relevance_BTM, False), pick(weight_BTX, True)
    return log_p_QI[0], found


def find_user(run: Run, user: str) -> int:
    """The user's number in the data. Raises: InputError, where nobody is called so."""
    users = run.data.dataset.users
    (at,) = np.nonzero(users == user)
    if not len(at):
        raise InputError(f"--user: no such user as {user!r}; the first is {str(users[0])!r}")
    return int(at[0])


def find_history(run: Run, user: str | None, request: RecommendRequest) -> np.ndarray:
    """Rows of the log: the user's events before the request; none of somebody who is nobody yet."""
    log = run.data.dataset.log
    if request.time is not None and device_time(request.time_us)[0] == NO_TIME:
        raise InputError("--time: must lie between 1932 and 2068")
    if user is None:
        return np.zeros(0, np.int64)
    at = find_user(run, user)
    rows = np.arange(*log.offsets[at : at + 2])
    if request.time is None:
        return rows
    time_us = log.time_us[rows]
    return rows[(time_us == UNKNOWN_TIME) | (time_us < request.time_us)]


def _make_batch(
    run: Run, user: str | None, rows: np.ndarray, request: RecommendRequest, is_continued: bool
) -> tuple[Batch, int]:
    """The last events of a history in one row, and the slot whose request this is."""
    data, dataset = run.config.data, run.data.dataset
    own_Y = np.zeros(dataset.profile_codes[0].shape[1], np.int32)
    fields = dict(request.fields)
    if user is not None:
        at = find_user(run, user)
        own_Y = dataset.profile_codes[0][at]
        fields = {name: str(values[at]) for name, values in dataset.profile.items()} | fields
    code_C = encode_context(dataset, data.schema.edges, request.context)
    utc_offset = np.array([request.utc_offset or 0], np.int32)
    if request.utc_offset is None:
        if run.data.zones is not None:  # by what was said, be it known to the model or not
            zones = run.data.zones.of_somebody(data.schema, fields)
            utc_offset = zones.find_utc_offsets(np.zeros(1, np.int64), request.time_us, code_C[None])
        elif len(rows):
            utc_offset = dataset.log.utc_offset[rows[-1:]]  # the clock of the last event, if events have their own
    asked = Requests(
        dataset.log,
        Histories(np.array([0, len(rows)]), rows),
        encode_fields(dataset, request.fields, own_Y)[None],
        request.time_us,
        utc_offset,
        hide_unknown(run, code_C)[None],
        np.array([user or ""], object),
    )
    (packed,) = pack_requests(run, asked, is_continued)
    return packed.batch, int(packed.slot[0])


def _name_relevance(run: Run, relevance_M: np.ndarray) -> dict[str, float]:
    """By aspects, as a profile card numbers them, with what they stand for; by slots where a memory has no aspects."""
    *of_slots, of_fields = relevance_M.tolist()
    model = run.predictor.params
    names, parts = [f"slot {k}" for k in range(len(of_slots))], of_slots
    if isinstance(model.profile, MemoryParams):
        parts = relevance_of_aspects(relevance_M[None], run.config.model.personal)[0].tolist()
        meanings = name_aspects(run.data.dataset.catalogue, model, run.catalog)
        told = [f" ({', '.join(printable(token) for token in meaning)})" if meaning else "" for meaning in meanings]
        names = [f"aspect {k}{meaning}" for k, meaning in enumerate(told)]
    return {**dict(zip(names, parts, strict=True)), "fields": of_fields}


def describe_history(run: Run, user: str | None, request: RecommendRequest, n: int = 5) -> dict[str, Any]:
    """The history of a request: how many events it has, and the last `n` of those that the model is given, oldest
    first; and as `lines` of text.
    """
    dataset, rows = run.data.dataset, find_history(run, user, request)
    log, catalogue = dataset.log, dataset.catalogue
    given = rows[-run.config.data.history_len :]
    events = []
    for row in given[-n:].tolist():
        item, time_us = int(log.item[row]), int(log.time_us[row])
        known = time_us != UNKNOWN_TIME
        events.append(
            {
                "time": str(np.datetime64(time_us // SECOND_US, "s")) if known else None,
                "service": catalogue.services[catalogue.service[item]],
                "action": dataset.actions[log.action[row]],
                "id": str(catalogue.ids[item]),
                "text": str(catalogue.text[item]),
            }
        )
    who = "a new user" if user is None else user
    used = f", of which the model reads the last {len(given):,}" if len(given) < len(rows) else ""
    lines = [f"{who}: {len(rows):,} events before the request{used}" + ("; the last of them (UTC):" if events else "")]
    for event in events:
        action = f" {event['action']}" if len(dataset.actions) > 1 else ""
        when = (event["time"] or "time not known")[:16].replace("T", " ")
        lines.append(f"  {when:<16s}  {event['service']}{action}  {event['id']}  {event['text']}".rstrip())
    return {"n_events": len(rows), "n_used": len(given), "events": events, "lines": [printable(x) for x in lines]}


def _name_weights(run: Run) -> list[str]:
    """What is mixed in a model in which no service is asked."""
    services, near = run.data.dataset.catalogue.services, near_names(run.config.model)
    named = {"softmax": "catalogue", "shared": "own history", **{name: f"neighbors by {name}" for name in near}}
    own = [f"own {name}" for name in services]
    return [named.get(name, name) for name in component_names(run.config.model, own)]


def describe_answer(run: Run, answer: Recommendation) -> dict[str, Any]:
    """The answer by names, and as `lines` of text."""
    catalogue = run.data.dataset.catalogue
    service = catalogue.service[answer.item]
    items = [
        {"service": catalogue.services[z], "id": str(catalogue.ids[i]), "text": str(catalogue.text[i]), "p": float(p)}
        for z, i, p in zip(service, answer.item, np.exp(answer.log_p), strict=True)
    ]
    found: dict[str, Any] = {"items": items}
    shown = [[printable(text) for text in (x["service"], x["id"], x["text"] or x["id"])] for x in items]
    wide = [max([least, *(len(row[k]) for row in shown)]) for k, least in enumerate((12, 10))]
    lines = [f"{'p':>7s}  {'service':<{wide[0]}s} {'id':<{wide[1]}s} text"]
    for x, (z, i, text) in zip(items, shown, strict=True):
        lines.append(f"{x['p']:7.4f}  {z:<{wide[0]}s} {i:<{wide[1]}s} {text}")
    if answer.domain is not None:
        found["domain"] = dict(zip(catalogue.services, map(float, answer.domain), strict=True))
        shares = ", ".join(f"{name} {p:.2f}" for name, p in found["domain"].items())
        lines.append(f"service of what comes next: {shares}")
    if answer.asked is not None:
        found["services"], of_services = describe_asked(run.config.model, catalogue, answer.asked)
        lines += of_services
        # A service that was named keeps its own probability; the most probable ones have theirs made up to one.
        if sum(a.weight - answer.asked.domain[a.service] for a in answer.asked.answers) > 1e-6:
            found["not_asked"] = [name for name in catalogue.services if name not in found["services"]]
            lines.append(f"not asked: {', '.join(found['not_asked'])}; p and the weights are of the others alone")
    if answer.weight is not None:
        names = _name_weights(run)
        found["weight"] = dict(zip(names, answer.weight.tolist(), strict=True))
        lines.append("mixture weights: " + ", ".join(f"{name} {w:.2f}" for name, w in found["weight"].items()))
    if answer.relevance is not None:
        found["relevance"] = _name_relevance(run, answer.relevance)
        lines.append(
            "relevance of the profile: " + ", ".join(f"{name} {x:.2f}" for name, x in found["relevance"].items())
        )
    return {**found, "lines": [printable(line) for line in lines]}
