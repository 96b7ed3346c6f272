"""Draws users and their events from a world, vectorised over users, step by step through their events."""

import dataclasses

import numpy as np

from moerec.config import CityConfig
from moerec.data.city import timeline
from moerec.data.city.choice import ItemChoice, need_logits, recency, service_probabilities, softmax
from moerec.data.city.profile import draw_profile
from moerec.data.city.world import Truth, World, make_world
from moerec.data.dataset import SECOND_US, Dataset, EventLog


def generate(config: CityConfig, seed: int) -> tuple[Dataset, World]:
    """Simulates the city: the data set, and the world with its latent truth. The same seed gives the same bytes."""
    world = make_world(config, seed)
    rng = np.random.default_rng([seed, 1])
    type_P, type_PZ = _draw_users(world, rng)
    profile = draw_profile(world, rng, type_P)
    lengths = timeline.draw_lengths(rng, config.n_users, config.events_per_user)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    time = timeline.draw_times(rng, offsets)
    context = timeline.context_of(time, world.days)
    features, services = dict(timeline.CONTEXT), world.catalogue.services
    if config.n_closed:
        features[timeline.OPEN] = timeline.name_openings(services)
        opened = timeline.draw_openings(rng, offsets, len(services), config.n_closed)
        context = np.column_stack([context, opened])
    open_EZ = timeline.read_openings(features, context, len(services))
    need, item = _draw_events(world, rng, type_PZ, offsets, time, context, open_EZ)
    dataset = Dataset(
        catalogue=world.catalogue,
        log=EventLog(offsets, item, np.zeros(len(item), np.int16), time * SECOND_US, context),
        users=np.array([f"p{k:06d}" for k in range(config.n_users)], dtype=np.str_),
        actions=("order",),
        context=features,
        profile=profile,
    )
    return dataset, dataclasses.replace(world, truth=Truth(type_P, type_PZ, need))


def _draw_users(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shared types `[users]` and types by service `[users, Z]`."""
    n, n_services = world.config.n_users, world.catalogue.n_services
    shared = rng.choice(world.n_types, size=n, p=world.type_prior_K)
    private = rng.choice(world.n_types, size=(n, n_services), p=world.type_prior_K)
    keep = rng.random((n, n_services)) < world.config.rho
    return shared, np.where(keep, shared[:, None], private)


def _pick(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One index per row, with probability proportional to its weight, from uniforms in [0, 1)."""
    total = np.cumsum(weights, axis=1)
    index = (total <= (uniform * total[:, -1])[:, None]).sum(axis=1)
    return np.minimum(index, weights.shape[1] - 1)


def _draw_events(
    world: World,
    rng: np.random.Generator,
    type_PZ: np.ndarray,
    offsets: np.ndarray,
    time: np.ndarray,
    context: np.ndarray,
    open_EZ: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`[events]` needs (int16) and items (int32)."""
    choice = ItemChoice(world)
    n_events = len(time)
    uniform = rng.random((n_events, 3), dtype=np.float32)
    logits = need_logits(world, time, context)
    weight = recency(world, time, offsets)
    after = world.need_after_NN.astype(np.float32)
    service_DNZ = service_probabilities(world)
    daypart = timeline.clock_of(time)[0]
    lengths = np.diff(offsets)
    users = np.argsort(-lengths, kind="stable")  # so that those who still have events are always the first
    last_PZC = choice.empty_past(len(users))
    need, item = np.zeros(n_events, np.int16), np.zeros(n_events, np.int32)
    previous = np.zeros(len(users), np.int64)
    for step in range(int(lengths.max())):
        active = users[: np.count_nonzero(lengths > step)]
        event = offsets[active] + step
        n = len(active)
        now = _pick(softmax(logits[event] + weight[event, None] * after[previous[:n]]), uniform[event, 0])
        share = service_DNZ[daypart[event], now]
        service = _pick(share if open_EZ is None else share * open_EZ[event], uniform[event, 1])
        position = np.zeros(n, np.int64)
        for z in range(len(choice.ranges)):
            rows = np.flatnonzero(service == z)
            weights = choice.weights(z, context[event[rows]], last_PZC[rows, z])
            weights *= choice.base[z][now[rows], type_PZ[active[rows], z]]
            position[rows] = _pick(weights, uniform[event[rows], 2])
        choice.remember(last_PZC[:n], service, position)
        need[event], item[event] = now, world.catalogue.offsets[service] + position
        previous[:n] = now
    return need, item
