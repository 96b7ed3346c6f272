"""The services of the city: `3 m` of them, service `3 k + j` being of kind `j` (food, marketplace, health).

Three are those of `names.SERVICES`. More are copies of each kind, which differ in their items, in the share of a need
that goes to each, and in their tables. Shares and tables come from random streams of their own, so that the rest of
the world does not depend on them.
"""

import dataclasses

import numpy as np

from moerec.data.city import names, timeline

N_KINDS = len(names.SERVICES)
FOOD, MARKETPLACE, HEALTH = range(N_KINDS)
BRANDS_PER_CATEGORY = 6
REFILL_DAYS = (7, 14, 21, 28)

_EVEN_SHARE = 0.1  # of a need's weight in a kind, what is spread evenly, so that every service has every need
_TABLE_STREAM, _SHARE_STREAM = 3, 4  # 0 to 2 are those of the parameters, the users and the days


@dataclasses.dataclass(frozen=True)
class ServiceTables:
    """What the laws of `dynamics.py` look up; C categories, S seasons, V varieties.

    Attributes:
      follow_ZCC: `[Z, C of the last order, C]` the place, among its category's brands, of the brand that follows.
      refill_ZC: days that a purchase of the category lasts, one of `REFILL_DAYS`.
      season_ZSCV: -1, 0 or 1.
    """

    follow_ZCC: np.ndarray
    refill_ZC: np.ndarray
    season_ZSCV: np.ndarray


def draw_tables(seed: int, n_services: int) -> ServiceTables:
    """Draws each service's tables; those of a service do not depend on how many others there are."""
    n_categories, n_seasons = len(names.CATEGORIES), len(timeline.SEASONS)
    n_varieties = max(map(len, names.VARIETIES.values()))
    follow, refill, season = [], [], []
    for z in range(n_services):
        rng = np.random.default_rng([seed, _TABLE_STREAM, z])
        follow.append(rng.integers(BRANDS_PER_CATEGORY, size=(n_categories, n_categories)))
        refill.append(rng.choice(REFILL_DAYS, size=n_categories))
        season.append(rng.integers(-1, 2, size=(n_seasons, n_categories, n_varieties)))
    return ServiceTables(np.stack(follow), np.stack(refill), np.stack(season))


def name_services(n_services: int) -> tuple[str, ...]:
    """The names of three services, or such as `samokat0`, `megamarket0`, `kuper0`, `samokat1` of more."""
    n_copies = n_services // N_KINDS
    if n_copies == 1:
        return names.SERVICES
    return tuple(f"{name}{copy}" for copy in range(n_copies) for name in names.SERVICES)


def spread_weights(weight_NJ: np.ndarray, n_services: int, seed: int) -> np.ndarray:
    """`[N, Z]` weights of the services for each need, from `[N, kinds]`; a kind's services share out its weight."""
    n_needs, n_copies = len(weight_NJ), n_services // N_KINDS
    if n_copies == 1:
        return weight_NJ
    rng = np.random.default_rng([seed, _SHARE_STREAM])
    share_NMJ = rng.dirichlet(np.ones(n_copies), size=(n_needs, N_KINDS)).transpose(0, 2, 1)
    share_NMJ = _EVEN_SHARE / n_copies + (1 - _EVEN_SHARE) * share_NMJ
    return (weight_NJ[:, None] * share_NMJ).reshape(n_needs, n_services)
