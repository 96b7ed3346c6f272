"""The laws of each kind of service: what a user's earlier orders there make of an item's utility.

With a = own_dynamics, an item `i` of category c, variety v, price level r and brand b (as its place among the brands of
the category) gets `a` times the following, where `D(i)` are the days since the user's last order of `i`, `l` is the
user's last order in the service, and a term with days in it is absent where there was no such order:

    food         SLOT * exp(-D(i) / SLOT_DAYS), if i is the last order here in the request's slot of the week, which is
                 a part of the day on weekdays or at weekends
                 + STREAK * exp(-D(i) / STREAK_DAYS)
    marketplace  -OWNED, if i was ever ordered
                 + FOLLOW * exp(-D(l) / FOLLOW_DAYS), if b(i) = follow[c(l), c(i)]
                 - THRIFT * r(i), if l is of the highest price
    health       REFILL * exp(-(D(i) - R)^2 / (2 (REFILL_WIDTH R)^2)) - EARLY [D(i) < R / 2],   R = refill[c(i)]
                 + SEASON * season[season of the year, c(i), v(i)]

`follow`, `refill` and `season` are the service's own (`services.py`). All of it is a function of observed orders and
the time, so that the exact posterior stays computable; an order is remembered in O(1).
"""

import dataclasses

import numpy as np

from moerec.data.city import names, timeline
from moerec.data.city.services import FOOD, MARKETPLACE, N_KINDS
from moerec.data.city.world import World

SLOT, SLOT_DAYS = 3.0, 28.0
STREAK, STREAK_DAYS = 2.0, 2.0
OWNED = 4.0
FOLLOW, FOLLOW_DAYS = 2.5, 14.0
THRIFT = 0.8
REFILL, REFILL_WIDTH, EARLY = 3.5, 0.15, 2.5
SEASON = 1.2

_NEVER = np.iinfo(np.int32).min
_START_S = int(timeline.START.astype("datetime64[s]").astype(np.int64))
_N_SLOTS = len(timeline.DAYPARTS) * len(timeline.WEEKDAYS)


@dataclasses.dataclass(frozen=True)
class Orders:
    """The orders of users as far as the laws need them; positions are within a service, -1 for none.

    Attributes:
      when_ZPI: of each service `[users, its items]` int32, seconds from `timeline.START` to the last order.
      last_PZ: position of the last order.
      slot_PZH: position of the last order in each of the H slots of the week.
    """

    when_ZPI: list[np.ndarray]
    last_PZ: np.ndarray
    slot_PZH: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Service:
    """What the laws look up for a service's items; `thrift_I` and `season_SI` are factors of their weights."""

    kind: int
    category_I: np.ndarray
    is_dear_I: np.ndarray
    thrift_I: np.ndarray
    follows_CI: np.ndarray
    refill_I: np.ndarray
    season_SI: np.ndarray


def _look_up(world: World, z: int) -> _Service:
    bounds, tables, strength = world.catalogue.offsets, world.tables, world.config.own_dynamics
    items = slice(bounds[z], bounds[z + 1])
    category_I, price_I = world.category_I[items], world.price_I[items]
    return _Service(
        kind=z % N_KINDS,
        category_I=category_I,
        is_dear_I=price_I == len(names.ASPECTS["budget"]) - 1,
        thrift_I=np.exp(-strength * THRIFT * price_I).astype(np.float32),
        follows_CI=tables.follow_ZCC[z][:, category_I] == world.place_I[items],
        refill_I=tables.refill_ZC[z, category_I],
        season_SI=np.exp(strength * SEASON * tables.season_ZSCV[z][:, category_I, world.variety_I[items]]).astype(
            np.float32
        ),
    )


class Dynamics:
    """The laws of a world's services, as factors of the items' weights."""

    def __init__(self, world: World):
        self._strength = world.config.own_dynamics
        self._services = [_look_up(world, z) for z in range(world.catalogue.n_services)]

    def no_orders(self, n_users: int) -> Orders:
        """Orders of users who have none yet."""
        n_services = len(self._services)
        return Orders(
            [np.full((n_users, len(service.category_I)), _NEVER, np.int32) for service in self._services],
            np.full((n_users, n_services), -1, np.int32),
            np.full((n_users, n_services, _N_SLOTS), -1, np.int32),
        )

    def remember(self, orders: Orders, service_P: np.ndarray, position_P: np.ndarray, time_P: np.ndarray):
        """Notes (in place) what each of the first P users ordered where and when (unix seconds)."""
        user = np.arange(len(service_P))
        for z, when_PI in enumerate(orders.when_ZPI):
            rows = np.flatnonzero(service_P == z)
            when_PI[rows, position_P[rows]] = time_P[rows] - _START_S
        orders.last_PZ[user, service_P] = position_P
        orders.slot_PZH[user, service_P, _slot_of(time_P)] = position_P

    def apply(self, weight_PI: np.ndarray, z: int, orders: Orders, rows: np.ndarray, time: np.ndarray):
        """Multiplies (in place) weights `[P, items of service z]` by what the users' orders and the time make of them.

        Args: rows: `[P]` in `orders`. time: `[P]` unix seconds of the requests.
        """
        service, second, when_PI = self._services[z], time - _START_S, orders.when_ZPI[z][rows]
        user, position = np.nonzero(when_PI != _NEVER)
        days = (second[user] - when_PI[user, position]) / timeline.DAY_S
        if service.kind == FOOD:
            is_usual = orders.slot_PZH[rows, z, _slot_of(time)][user] == position
            utility = STREAK * np.exp(-days / STREAK_DAYS) + is_usual * SLOT * np.exp(-days / SLOT_DAYS)
        elif service.kind == MARKETPLACE:
            utility = np.full(len(user), -OWNED)
            self._follow_up(weight_PI, service, orders.last_PZ[rows, z], when_PI, second)
        else:
            lasts = service.refill_I[position]
            utility = REFILL * np.exp(-0.5 * ((days - lasts) / (REFILL_WIDTH * lasts)) ** 2)
            utility -= EARLY * (days < lasts / 2)
            weight_PI *= service.season_SI[timeline.clock_of(time)[2]]
        weight_PI[user, position] *= np.exp(self._strength * utility).astype(np.float32)

    def _follow_up(
        self, weight_PI: np.ndarray, service: _Service, last_P: np.ndarray, when_PI: np.ndarray, second: np.ndarray
    ):
        """Multiplies (in place) by what the last order in the marketplace, of those who have one, leads to."""
        user = np.flatnonzero(last_P >= 0)
        last = last_P[user]
        days = (second[user] - when_PI[user, last]) / timeline.DAY_S
        factor = np.exp(self._strength * FOLLOW * np.exp(-days / FOLLOW_DAYS)).astype(np.float32)
        follows_PI = service.follows_CI[service.category_I[last]]
        weight_PI[user] *= np.where(follows_PI, factor[:, None], np.float32(1))
        weight_PI[user[service.is_dear_I[last]]] *= service.thrift_I


def _slot_of(time: np.ndarray) -> np.ndarray:
    """`[P]` the slot of the week of each time: the part of the day, on weekdays or at weekends."""
    daypart, weekend, _ = timeline.clock_of(time)
    return daypart * len(timeline.WEEKDAYS) + weekend
