"""The world's conditional probabilities, vectorised; the simulation and the oracle share them."""

import dataclasses

import numpy as np

from moerec.data.city import names, timeline
from moerec.data.city.dynamics import Dynamics, Orders
from moerec.data.city.world import BUDGET_WEIGHT, LOYALTY, RECENCY_S, VARIETY_WEIGHT, World

_CONTEXT_COLUMN = {name: column for column, name in enumerate(timeline.CONTEXT)}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def need_logits(world: World, time: np.ndarray, context: np.ndarray) -> np.ndarray:
    """`[events, N]` float32: the part of the needs' logits that comes from the request's time and context."""
    codes = dict(zip(("daypart", "weekday", "season"), timeline.clock_of(time), strict=True))
    codes |= {name: context[:, column] for name, column in _CONTEXT_COLUMN.items()}
    effect = sum(table[codes[feature]] for feature, table in world.need_when.items())
    return (world.need_base_N + world.config.kappa * effect).astype(np.float32)


def recency(world: World, time: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """`[events]` float32 weight of the previous need: tau / (1 + gap / RECENCY_S), 0 at a user's first event."""
    gap = np.diff(time, prepend=time[:1])
    weight = world.config.tau / (1 + np.maximum(gap, 0) / RECENCY_S)
    weight[offsets[:-1][np.diff(offsets) > 0]] = 0
    return weight.astype(np.float32)


def service_probabilities(world: World) -> np.ndarray:
    """`[dayparts, N, Z]` float32: the service given the need and the part of the day."""
    logits = world.service_fit_NZ[None] + world.config.kappa * world.service_when_DZ[:, None]
    return softmax(logits).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Past:
    """What the next choices of users depend on, written in place by `ItemChoice.remember`.

    Attributes:
      last_PZC: `[users, Z, C]` int32, the position (in its service) of the last item that a user bought in each service
        and category, -1 where there is none.
      orders: what the services' own dynamics depend on; None without them.
    """

    last_PZC: np.ndarray
    orders: Orders | None


class ItemChoice:
    """The choice of an item: weights that depend on need and type, times weights that depend on context and past.

    `base[z]` is `[N, K, items of z]` float32.
    """

    def __init__(self, world: World):
        bounds = world.catalogue.offsets
        self._world = world
        self.ranges = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        taste_KI = _taste(world)
        fit_NI = world.need_fit_NC[:, world.category_I]
        self.base = []
        for lo, hi in self.ranges:
            utility = fit_NI[:, None, lo:hi] + taste_KI[None, :, lo:hi]
            self.base.append(np.exp(utility - utility.max(axis=-1, keepdims=True)).astype(np.float32))
        # a line is a brand within a category: loyalty and weather depend on an item through its line only
        n_brands = len(names.BRANDS)
        lines, self._line_I = np.unique(world.category_I * n_brands + world.brand_I, return_inverse=True)
        self._category_of_line = lines // n_brands
        kappa, habit = world.config.kappa, world.config.habit
        self._weather_when, self._temperature_when = (
            np.exp(kappa * world.category_when[f]).astype(np.float32) for f in ("weather", "temperature")
        )
        self._loyalty = np.float32(np.exp(habit * LOYALTY))
        self._repeat_C = np.exp(habit * world.repeat_C).astype(np.float32)
        self._dynamics = Dynamics(world) if world.config.own_dynamics else None

    def empty_past(self, n_users: int) -> Past:
        """The past of users who have bought nothing."""
        last_PZC = np.full((n_users, len(self.ranges), len(names.CATEGORIES)), -1, np.int32)
        return Past(last_PZC, self._dynamics.no_orders(n_users) if self._dynamics else None)

    def remember(self, past: Past, service_P: np.ndarray, position_P: np.ndarray, time_P: np.ndarray):
        """Notes (in place) that each of the first P users bought the item at `position_P` of `service_P`, and when."""
        category = self._world.category_I[self._world.catalogue.offsets[service_P] + position_P]
        past.last_PZC[np.arange(len(service_P)), service_P, category] = position_P
        if self._dynamics is not None and past.orders is not None:
            self._dynamics.remember(past.orders, service_P, position_P, time_P)

    def weights(self, service: int, context: np.ndarray, time: np.ndarray, past: Past, rows: np.ndarray) -> np.ndarray:
        """`[P, items of the service]` float32: the factor of context, time and past.

        Args: context `[P, 3]`, time `[P]` (unix seconds) of the requests; `[P]` the rows of their users in `past`.
        """
        lo, hi = self.ranges[service]
        last_PC = past.last_PZC[rows, service]
        when_PC = self._weather_when[context[:, 0]] * self._temperature_when[context[:, 1]]
        line_PL = when_PC[:, self._category_of_line]
        user, category = np.nonzero(last_PC >= 0)
        position = last_PC[user, category]
        line_PL[user, self._line_I[lo + position]] *= self._loyalty
        weight_PI = np.take(line_PL, self._line_I[lo:hi], axis=1)
        weight_PI[user, position] *= self._repeat_C[category]
        if self._dynamics is not None and past.orders is not None:
            self._dynamics.apply(weight_PI, service, past.orders, rows, time)
        return weight_PI


def _taste(world: World) -> np.ndarray:
    """`[K, I]` utility of the items to each type, popularity included."""
    aspects = [c.aspect for c in names.CATEGORIES.values()]
    value_KC = np.stack([world.aspect_K[aspect] for aspect in aspects], axis=1)
    variety = VARIETY_WEIGHT * (value_KC[:, world.category_I] == world.variety_I[None])
    budget = -BUDGET_WEIGHT * np.abs(world.aspect_K["budget"][:, None] - world.price_I[None])
    return variety + budget + world.brand_taste_KR[:, world.brand_I] + world.popularity_I[None]
