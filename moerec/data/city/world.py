"""The parameters of the city and its generative model.

There are three kinds of services (food, marketplace, health) with as many services each (`services.py`). A user has a
shared taste type `u ~ type_prior` and, in the services of each kind, one type, which is `u` with probability rho and
otherwise drawn anew from `type_prior`; `s_z` is that of the kind of service `z`. The `t`-th event of a user comes at an
exogenous time with an exogenous context (`timeline.py`); then

    need     p(n | previous n')  ~ exp(need_base[n] + kappa * Σ_f need_when[f][value of f, n]
                                       + tau * recency * need_after[n', n]),   recency = 1 / (1 + gap / RECENCY_S)
             with f over daypart, weekday, season, weather, temperature, holiday; a first event has no last term;
    service  p(z | n)            ~ exp(service_fit[n, z] + kappa * service_when[daypart, z]), of those that are open;
    item     p(i | n, z, s = s_z) ~ exp(U), i among the items of z, where U is the sum of
             need fit         need_fit[n, category]
             variety fit      VARIETY_WEIGHT where the item's variety is the type's value of the category's aspect
             budget fit       -BUDGET_WEIGHT * |price - budget of the type|
             brand taste      brand_taste[s, brand]
             popularity       popularity[i]
             weather fit      kappa * Σ_f category_when[f][value of f, category], f over weather and temperature
             brand loyalty    habit * LOYALTY where the user's last item of the category in this service has the brand
             repeat           habit * repeat[category] where it is the very item (negative for durables)
             own dynamics     own_dynamics * what the laws of the service's kind make of the user's earlier orders in it
                              and the time (`dynamics.py`): routines, things bought once and what follows, refills.

Rows of `*_when` for a context are by code, row 0 ("missing") being zero. Nothing latent but (n, s) enters, so the exact
posterior is computable, and the number of services does not enlarge the table of it. rho = 0 leaves nothing shared
between kinds of services but the needs, tau = 0 nothing in the needs.
"""

import dataclasses
from typing import Any

import numpy as np

from moerec.config import CityConfig
from moerec.data.city import names, timeline
from moerec.data.city.services import (
    BRANDS_PER_CATEGORY,
    N_KINDS,
    ServiceTables,
    draw_tables,
    name_services,
    spread_weights,
)
from moerec.data.dataset import ItemTable
from moerec.errors import InputError

RECENCY_S = 4 * timeline.DAY_S
VARIETY_WEIGHT = 2.8
BUDGET_WEIGHT = 1.5
BRAND_WEIGHT = 1.4
POPULARITY_SCALE = 0.7
LOYALTY = 0.8
NEED_FIT = 5.5  # of a category that serves the need at all

_CLOCK = {"daypart": timeline.DAYPARTS, "weekday": timeline.WEEKDAYS, "season": timeline.SEASONS}
_KIND_WHEN = {"night": (1.2, 0.0, -0.6), "morning": (0.5, 0.0, 0.0), "evening": (0.0, 0.0, 0.4)}


@dataclasses.dataclass(frozen=True)
class Truth:
    """What nobody observes.

    Attributes:
      type_P: the shared type.
      type_PZ: each user's type by service; the services of a kind have one.
      need: `[events]`.
    """

    type_P: np.ndarray
    type_PZ: np.ndarray
    need: np.ndarray


@dataclasses.dataclass(frozen=True)
class World:
    """Every probability table (log-odds; see the module) and, once users were simulated, the latent truth.

    Attributes:
      type_prior_K: probabilities of the types; K is 1 when users are identical.
      aspect_K: aspect -> `[K]` the type's value, index into `names.ASPECTS`.
      brand_taste_KR: `[K, brands]`.
      need_base_N, need_after_NN (`[previous, next]`), need_fit_NC (C categories).
      need_when: feature -> `[values, N]`; `category_when`: feature -> `[values, C]`.
      service_fit_NZ, service_when_DZ: `[dayparts, Z]`.
      category_I, brand_I, price_I, variety_I, product_I: int attributes of the items; popularity_I.
      place_I: the brand's place among those of the item's category.
      repeat_C: log-odds of the very same item again.
      days: `[days, 3]` context codes of the year.
      tables: what differs between services of a kind, for `dynamics.py`.
    """

    config: CityConfig
    seed: int
    catalogue: ItemTable
    type_prior_K: np.ndarray
    aspect_K: dict[str, np.ndarray]
    brand_taste_KR: np.ndarray
    need_base_N: np.ndarray
    need_after_NN: np.ndarray
    need_fit_NC: np.ndarray
    need_when: dict[str, np.ndarray]
    category_when: dict[str, np.ndarray]
    service_fit_NZ: np.ndarray
    service_when_DZ: np.ndarray
    category_I: np.ndarray
    brand_I: np.ndarray
    place_I: np.ndarray
    price_I: np.ndarray
    variety_I: np.ndarray
    product_I: np.ndarray
    popularity_I: np.ndarray
    repeat_C: np.ndarray
    days: np.ndarray
    tables: ServiceTables
    truth: Truth | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(names.NEEDS)[: self.config.n_needs]

    @property
    def n_types(self) -> int:
        return len(self.type_prior_K)

    def type_given_shared(self) -> np.ndarray:
        """`[K, K]`: probability of a service's type (column) given the shared one (row)."""
        rho = self.config.rho
        return rho * np.eye(self.n_types) + (1 - rho) * self.type_prior_K[None, :]


def make_world(config: CityConfig, seed: int) -> World:
    """Draws the world's parameters; they do not depend on rho, kappa, tau, habit, own_dynamics or the number of users.

    Raises: InputError where more needs are asked for than the city knows.
    """
    if config.n_needs > len(names.NEEDS):
        raise InputError(f"config.data.city.n_needs: must be at most {len(names.NEEDS)}")
    rng = np.random.default_rng([seed, 0])
    chosen = list(names.NEEDS)[: config.n_needs]
    needs = [names.NEEDS[name] for name in chosen]
    n_copies = config.n_services // N_KINDS
    service_NZ = spread_weights(np.array([need.services for need in needs], float), config.n_services, seed)
    service_when_DZ = np.array([_KIND_WHEN.get(d, (0.0, 0.0, 0.0)) * n_copies for d in timeline.DAYPARTS])
    if config.identical_services:
        service_NZ, service_when_DZ = np.ones_like(service_NZ), np.zeros_like(service_when_DZ)
    service_NZ /= service_NZ.sum(axis=1, keepdims=True)
    fit = [{name: NEED_FIT + value for name, value in need.categories.items()} for need in needs]
    fit_NC = np.array([[row.get(category, 0.0) for category in names.CATEGORIES] for row in fit])
    items = _draw_items(rng, config, n_copies * (service_NZ.T @ (fit_NC > 0)))
    n_types = 1 if config.identical_users else config.n_types
    aspects, brand_taste = _draw_types(rng, config.n_types)
    prior = 1 / (np.arange(n_types) + 4.0)
    return World(
        config=config,
        seed=seed,
        catalogue=_make_catalogue(config, items),
        type_prior_K=prior / prior.sum(),
        aspect_K={name: value[:n_types] for name, value in aspects.items()},
        brand_taste_KR=brand_taste[:n_types],
        need_base_N=np.array([need.base for need in needs]),
        need_after_NN=np.array([[need.next.get(other, 0.0) for other in chosen] for need in needs]),
        need_fit_NC=fit_NC,
        need_when=_when_tables([need.when for need in needs], (*_CLOCK, *timeline.CONTEXT)),
        category_when=_when_tables([c.when for c in names.CATEGORIES.values()], ("weather", "temperature")),
        service_fit_NZ=np.log(service_NZ),
        service_when_DZ=service_when_DZ,
        repeat_C=np.array([c.repeat for c in names.CATEGORIES.values()]),
        days=timeline.make_days(np.random.default_rng([seed, 2])),
        tables=draw_tables(seed, config.n_services),
        **items,
    )


def _when_tables(effects: list[dict[str, float]], features: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Feature -> `[values, len(effects)]`; a context's table has the row 0 for "missing"."""
    values = {**_CLOCK, **{name: ("", *value) for name, value in timeline.CONTEXT.items()}}
    return {f: np.array([[effect.get(value, 0.0) for effect in effects] for value in values[f]]) for f in features}


def _draw_types(rng: np.random.Generator, n_types: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each type's value of each aspect (`[K]`, balanced) and taste for each brand (`[K, brands]`)."""
    aspects = {name: rng.permutation(np.arange(n_types) % len(values)) for name, values in names.ASPECTS.items()}
    liking = rng.choice([-1.0, 0.0, 1.0], p=[0.35, 0.35, 0.3], size=(n_types, len(names.BRANDS)))
    return aspects, BRAND_WEIGHT * liking


def _draw_items(rng: np.random.Generator, config: CityConfig, demand_ZC: np.ndarray) -> dict[str, Any]:
    """The items' attributes, independent draws, so that an index carries no information; `[I]` arrays by name."""
    n, n_services = config.items_per_service, config.n_services
    n_varieties = np.array([len(names.VARIETIES[c.aspect]) for c in names.CATEGORIES.values()])
    brands_CB = np.stack([rng.permutation(len(names.BRANDS))[:BRANDS_PER_CATEGORY] for _ in names.CATEGORIES])
    share_ZC = demand_ZC + 0.15
    share_ZC /= share_ZC.sum(axis=1, keepdims=True)
    draws = 1 if config.identical_services else n_services
    category = np.concatenate([rng.choice(len(names.CATEGORIES), size=n, p=share_ZC[z]) for z in range(draws)])
    size = n * draws
    place = rng.integers(BRANDS_PER_CATEGORY, size=size)
    items = {
        "category_I": category,
        "brand_I": brands_CB[category, place],
        "place_I": place,
        "price_I": rng.integers(len(names.ASPECTS["budget"]), size=size),
        "variety_I": rng.integers(n_varieties[category]),
        "product_I": rng.integers(12, size=size),
        "popularity_I": POPULARITY_SCALE * rng.normal(size=size),
    }
    return {name: np.tile(value, n_services // draws) for name, value in items.items()}


def _make_catalogue(config: CityConfig, items: dict[str, np.ndarray]) -> ItemTable:
    text, attributes = names.write_titles(
        items["category_I"], items["product_I"], items["brand_I"], items["variety_I"], items["price_I"]
    )
    n, services = config.items_per_service, name_services(config.n_services)
    return ItemTable(
        services=services,
        offsets=np.arange(len(services) + 1, dtype=np.int64) * n,
        ids=np.array([f"{service}-{k:05d}" for service in services for k in range(n)], dtype=np.str_),
        text=text,
        attributes=attributes,
    )
