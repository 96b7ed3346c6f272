"""Draws users and their events from a world, vectorised over users, step by step through their events."""

import dataclasses

import numpy as np

from moerec.config import CityConfig
from moerec.data.city import timeline
from moerec.data.city.choice import ItemChoice, Past, need_logits, recency, service_probabilities, softmax
from moerec.data.city.profile import draw_profile
from moerec.data.city.services import N_KINDS
from moerec.data.city.world import Truth, World, make_world
from moerec.data.dataset import SECOND_US, Dataset, EventLog

_PAST_BYTES = 64 * 2**20  # of the users' orders at a time, where services have dynamics of their own


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
    n = world.config.n_users
    shared = rng.choice(world.n_types, size=n, p=world.type_prior_K)
    private = rng.choice(world.n_types, size=(n, N_KINDS), p=world.type_prior_K)
    keep = rng.random((n, N_KINDS)) < world.config.rho
    of_kind = np.where(keep, shared[:, None], private)
    return shared, np.tile(of_kind, (1, world.catalogue.n_services // N_KINDS))


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
    uniform = rng.random((len(time), 3), dtype=np.float32)
    draw = _EventDraw(world, type_PZ, offsets, time, context, open_EZ, uniform)
    users = np.argsort(-np.diff(offsets), kind="stable")  # so that those who still have events are always the first
    n = len(users)
    if world.config.own_dynamics:  # the time of each user's last order of each item is kept
        n = max(1, _PAST_BYTES // (4 * world.catalogue.n_items))
    for lo in range(0, len(users), n):
        draw.run(users[lo : lo + n])
    return draw.need, draw.item


class _EventDraw:
    """The choices of users, given their types, the times and contexts of their events, and uniform draws `[events, 3]`.

    `need` and `item` are filled by `run`.
    """

    def __init__(
        self,
        world: World,
        type_PZ: np.ndarray,
        offsets: np.ndarray,
        time: np.ndarray,
        context: np.ndarray,
        open_EZ: np.ndarray | None,
        uniform: np.ndarray,
    ):
        self._type_PZ, self._offsets, self._time, self._context = type_PZ, offsets, time, context
        self._open_EZ, self._uniform = open_EZ, uniform
        self._choice, self._bounds = ItemChoice(world), world.catalogue.offsets
        self._logits = need_logits(world, time, context)
        self._recency = recency(world, time, offsets)
        self._after_NN = world.need_after_NN.astype(np.float32)
        self._service_DNZ = service_probabilities(world)
        self._daypart = timeline.clock_of(time)[0]
        self.need, self.item = np.zeros(len(time), np.int16), np.zeros(len(time), np.int32)

    def run(self, users: np.ndarray):
        """Draws all events of users, who are sorted by falling numbers of events."""
        lengths = np.diff(self._offsets)[users]
        past = self._choice.empty_past(len(users))
        previous = np.zeros(len(users), np.int64)
        for step in range(int(lengths[0])):
            active = users[: np.count_nonzero(lengths > step)]
            event = self._offsets[active] + step
            n = len(active)
            logits = self._logits[event] + self._recency[event, None] * self._after_NN[previous[:n]]
            need = _pick(softmax(logits), self._uniform[event, 0])
            share = self._service_DNZ[self._daypart[event], need]
            share = share if self._open_EZ is None else share * self._open_EZ[event]
            service = _pick(share, self._uniform[event, 1])
            position = self._draw_positions(past, active, event, need, service)
            self._choice.remember(past, service, position, self._time[event])
            self.need[event], self.item[event] = need, self._bounds[service] + position
            previous[:n] = need

    def _draw_positions(
        self, past: Past, active: np.ndarray, event: np.ndarray, need: np.ndarray, service: np.ndarray
    ) -> np.ndarray:
        """`[active]` the items' positions in their services."""
        position = np.zeros(len(active), np.int64)
        for z in range(len(self._choice.ranges)):
            rows = np.flatnonzero(service == z)
            here = event[rows]
            weights = self._choice.weights(z, self._context[here], self._time[here], past, rows)
            weights *= self._choice.base[z][need[rows], self._type_PZ[active[rows], z]]
            position[rows] = _pick(weights, self._uniform[here, 2])
        return position
