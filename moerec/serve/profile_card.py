"""One user's profile in words: how much of which aspect, what matters to two requests, what the context changes."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config.terminal import printable
from moerec.data.dataset import SECOND_US, UNKNOWN_TIME
from moerec.data.packing import device_time
from moerec.errors import InputError
from moerec.eval.probes.profile_aspects import relevance_of_aspects
from moerec.nn.profile import MemoryParams, UserState
from moerec.nn.profile.memory import decay_rates, evidence
from moerec.serve.aspects import name_aspects
from moerec.serve.explained import find_history, recommend
from moerec.serve.profiles import observe_events, start_profile
from moerec.serve.request import RecommendRequest
from moerec.train.run_dir import Run

N_VALUES = 6  # of a feature of the context that is varied


class Aspect(NamedTuple):
    """Attributes:
    number: from 0. evidence: events' worth that its slots hold at the first request. half_lives: hours, of its slots.
    stands_for: attributes whose items write most into it, as a multiple of what they write on the average; it is the
      model's, and the same for everybody.
    relevance: to each request, of all its slots.
    """

    number: int
    evidence: float
    half_lives: list[float]
    stands_for: dict[str, float]
    relevance: list[float]


class ContextEffect(NamedTuple):
    """An item that some of the lists hold; its rank (from 1) and probability by the value of the feature."""

    service: str
    id: str
    text: str
    rank: dict[str, int]
    p: dict[str, float]


class ProfileCard(NamedTuple):
    """Attributes:
    user, fields: name, and the static profile fields that are known. n_events: by service.
    requests: times, UTC, and the context of all of them. aspects: by what they matter to the first request.
    field_relevance: to each request, of the slot of static fields.
    feature, wishes: the feature of the context that is varied in the first request, and what is then in the lists.
    """

    user: str
    fields: dict[str, str]
    n_events: dict[str, int]
    requests: list[str]
    context: dict[str, str]
    aspects: list[Aspect]
    field_relevance: list[float]
    feature: str
    context_effects: list[ContextEffect]


def summarize_profile(
    run: Run,
    user: str,
    times: Sequence[float],
    context: Mapping[str, str],
    feature: str,
    top_k: int,
    utc_offsets: Sequence[int | None] = (),
) -> ProfileCard:
    """The profile card of a user.

    Args:
      times: of the requests, unix seconds; none: a Saturday's evening and a Monday's morning after the last event.
      utc_offsets: how many seconds the clock at the place of each request is ahead of UTC; None: not told.
      context: of all requests; what is not named is as at the last event before the first of them.
      feature: of the context, whose own value and then others, `N_VALUES` in all, are tried; the empty string varies
        nothing.

    Raises:
      InputError: the run keeps no aspects, or has no such feature; or as `recommend`.
    """
    dataset, model = run.data.dataset, run.predictor.params
    if not isinstance(model.profile, MemoryParams):
        raise InputError("--workdir: this run keeps no profile of aspects; train it with model.personal.layers")
    if feature and feature not in dataset.context:
        raise InputError(f"--vary: {feature!r} is none of {', '.join(dataset.context) or 'no features'}")
    asked = make_requests(run, user, times, context, utc_offsets)
    answers = [recommend(run, user, request, top_k) for request in asked]
    rows = find_history(run, user, asked[0])
    relevance_QM = np.stack([np.asarray(answer.relevance) for answer in answers])
    aspects = _list_aspects(run, rows, asked[0], relevance_QM)
    at = int(np.flatnonzero(dataset.users == user)[0])
    services = np.bincount(dataset.event_service[rows], minlength=dataset.catalogue.n_services)
    return ProfileCard(
        user=user,
        fields={name: str(values[at]) for name, values in dataset.profile.items() if values[at]},
        n_events=dict(zip(dataset.catalogue.services, services.tolist(), strict=True)),
        requests=[_say_time(int(request.time or 0)) for request in asked],
        context=dict(asked[0].context),
        aspects=sorted(aspects, key=lambda aspect: -aspect.relevance[0]),
        field_relevance=relevance_QM[:, -1].tolist(),
        feature=feature,
        context_effects=_vary(run, user, asked[0], feature, top_k),
    )


def make_requests(
    run: Run, user: str, times: Sequence[float], context: Mapping[str, str], utc_offsets: Sequence[int | None] = ()
) -> list[RecommendRequest]:
    """The requests of `summarize_profile`."""
    dataset = run.data.dataset
    rows = find_history(run, user, RecommendRequest(times[0] if times else None))
    if not len(rows):
        raise InputError(f"--user: {user!r} has no events before --time")
    last = rows[-1]
    if not times:
        if (time_us := int(dataset.log.time_us[last])) == UNKNOWN_TIME:
            raise InputError(f"--time: is needed, as the last event of {user!r} has none")
        times = [next_time(time_us / SECOND_US, 5, 20), next_time(time_us / SECOND_US, 0, 8)]
    known = zip(dataset.context.items(), dataset.log.context[last], strict=True)
    before = {name: values[code - 1] for (name, values), code in known if 0 < code <= len(values)}
    offsets = utc_offsets or [None] * len(times)
    return [
        RecommendRequest(when, {**before, **context}, utc_offset=offset)
        for when, offset in zip(times, offsets, strict=True)
    ]


def next_time(after: float, weekday: int, hour: int) -> int:
    """Unix seconds of the first such hour, UTC, on such a day of the week (0 is Monday) after a time."""
    when = datetime.datetime.fromtimestamp(after, datetime.UTC)
    days = (weekday - when.weekday()) % 7
    found = when.replace(hour=hour, minute=0, second=0, microsecond=0) + datetime.timedelta(days=days)
    return int((found if found > when else found + datetime.timedelta(days=7)).timestamp())


def _list_aspects(run: Run, rows: np.ndarray, request: RecommendRequest, relevance_QM: np.ndarray) -> list[Aspect]:
    model, personal = run.predictor.params, run.config.model.personal
    assert isinstance(model.profile, MemoryParams)
    state = observe_history(run, rows)
    at = jnp.asarray(device_time(request.time_us)[0])
    shape = (personal.n_aspects, personal.n_scales)
    evidence_XX = np.asarray(evidence(model.profile, state, at)).reshape(shape)
    half_life_XX = np.log(2) / np.asarray(decay_rates(model.profile)).reshape(shape)
    relevance_QX = relevance_of_aspects(relevance_QM, personal)
    meanings = name_aspects(run.data.dataset.catalogue, model, run.catalog)
    columns = (evidence_XX.sum(axis=1).tolist(), half_life_XX.tolist(), meanings, relevance_QX.T.tolist())
    return [Aspect(number, *values) for number, values in enumerate(zip(*columns, strict=True))]


def observe_history(run: Run, rows: np.ndarray) -> UserState:
    """The user's state after these rows of the log."""
    rows, nobody = rows[-run.config.data.history_len :], start_profile(run.predictor.params)
    start = jax.tree.map(lambda leaf: leaf[None], nobody)
    log = run.data.dataset.log
    states = observe_events(run.predictor.params, run.catalog, log, start, rows[:1], np.array([len(rows)]))
    return jax.tree.map(lambda leaf: leaf[0], states)


def _vary(run: Run, user: str, request: RecommendRequest, feature: str, top_k: int) -> list[ContextEffect]:
    """What is among the first in the list of some value of the feature, and where it stands for each."""
    catalogue = run.data.dataset.catalogue
    rank: dict[str, dict[int, int]] = {}
    log_p: dict[str, dict[int, float]] = {}
    values = run.data.dataset.context[feature] if feature else ("",)
    now = [value for value in values if value == request.context.get(feature)]
    for value in [*now, *(value for value in values if value not in now)][:N_VALUES]:
        varied = request._replace(context={**request.context, feature: value}) if feature else request
        answer = recommend(run, user, varied, catalogue.n_items)
        rank[value] = {int(item): place for place, item in enumerate(answer.item, 1)}
        log_p[value] = dict(zip(answer.item.tolist(), answer.log_p.tolist(), strict=True))
    listed = sorted(
        {item for places in rank.values() for item, place in places.items() if place <= top_k},
        key=lambda item: [places[item] for places in rank.values()],
    )
    return [
        ContextEffect(
            catalogue.services[catalogue.service[item]],
            str(catalogue.ids[item]),
            str(catalogue.text[item]),
            {value: places[item] for value, places in rank.items()},
            {value: float(np.exp(found[item])) for value, found in log_p.items()},
        )
        for item in listed
    ]


def _say_time(time: int) -> str:
    return f"{datetime.datetime.fromtimestamp(time, datetime.UTC):%a %Y-%m-%d %H:%M}"


def describe_card(card: ProfileCard) -> dict[str, Any]:
    """Nested dictionaries and lists, for JSON."""
    plain = card._asdict()
    return {**plain, **{name: [x._asdict() for x in plain[name]] for name in ("aspects", "context_effects")}}


def render_card(card: ProfileCard) -> str:
    """The profile card for a terminal."""
    card = _make_printable(card)
    services = ", ".join(f"{name} {n}" for name, n in card.n_events.items())
    fields = ", ".join(f"{name} {value}" for name, value in card.fields.items()) or "no fields"
    context = ", ".join(f"{name}={value}" for name, value in card.context.items()) or "context not known"
    heads = [when[:3] + when[-6:] for when in card.requests]
    heads = heads if len(set(heads)) == len(heads) else card.requests  # on the same days of two weeks
    lives = [", ".join(map(_say_hours, aspect.half_lives)) for aspect in card.aspects]
    width = max(14, *map(len, lives))
    lines = [
        f"{card.user}: {fields}; {sum(card.n_events.values())} events ({services})",
        "requests: " + "; ".join(card.requests) + f" UTC; {context}",
        "",
        f"aspect  evidence  {'half-lives':{width}s}  relevance to {'  '.join(heads)}   stands for",
    ]
    for aspect, lived in zip(card.aspects, lives, strict=True):
        told = "  ".join(f"{r:{len(head)}.2f}" for r, head in zip(aspect.relevance, heads, strict=True))
        meaning = ", ".join(f"{token} x{lift:.1f}" for token, lift in aspect.stands_for.items())
        lines.append(f"{aspect.number:6d}  {aspect.evidence:8.1f}  {lived:{width}s}               {told}   {meaning}")
    told = "  ".join(f"{r:{len(head)}.2f}" for r, head in zip(card.field_relevance, heads, strict=True))
    lines += [f"{'fields':{width + 33}s}{told}", ""]
    values = list(card.context_effects[0].rank) if card.context_effects else []
    by = f" by {card.feature}" if card.feature else ""
    lines.append(f"{card.requests[0]}, rank and p{by}")
    lines.append("".join(f"{value:>14s}" for value in values))
    for effect in card.context_effects:
        cells = "".join(f"{effect.rank[value]:6d} {effect.p[value]:7.4f}" for value in values)
        lines.append(f"{cells}  {effect.service:<12s} {effect.id:<10s} {effect.text}".rstrip())
    return "\n".join(lines)


def _make_printable(value: Any) -> Any:
    """The same with all text printable; named tuples, dictionaries and lists are gone through."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_make_printable(key): _make_printable(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(_make_printable, value))
    return [_make_printable(inner) for inner in value] if isinstance(value, list) else value


def _say_hours(hours: float) -> str:
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
