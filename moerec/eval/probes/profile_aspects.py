"""Whether the profile router looks at the aspects of taste that the request's true need is about (built-in world).

Nothing is fitted: what a memory slot holds is told by the events that write it. Each category of the world's items
speaks of one aspect of taste (diet, pets, …), so that the shares with which the items write into a memory aspect make
it a distribution over the world's, and the router's relevance a guess of which of them matters now.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import PersonalConfig
from moerec.data.city import names
from moerec.data.city.choice import softmax
from moerec.data.city.oracle import match_items
from moerec.data.city.world import World
from moerec.data.dataset import Dataset
from moerec.nn.model import SequenceModel
from moerec.nn.profile.memory import MemoryParams, share_aspects
from moerec.types import Catalog

N_PERMUTATIONS = 1000


def aspect_of_items(world: World, dataset: Dataset) -> np.ndarray:
    """`[I]` index into `names.ASPECTS` of the data set's items."""
    order = list(names.ASPECTS)
    of_category = np.array([order.index(category.aspect) for category in names.CATEGORIES.values()])
    return of_category[world.category_I[match_items(world, dataset)]]


def aspects_of_needs(world: World) -> np.ndarray:
    """`[needs, aspects of the world]`, of the orders that serve a need the share of each aspect's categories."""
    order = list(names.ASPECTS)
    share_NC = softmax(world.need_fit_NC)
    out = np.zeros((len(share_NC), len(order)))
    for c, category in enumerate(names.CATEGORIES.values()):
        out[:, order.index(category.aspect)] += share_NC[:, c]
    return out


def describe_aspects(
    world: World, dataset: Dataset, model: SequenceModel, table: Catalog, relevance_QM: np.ndarray, rows: np.ndarray
) -> dict[str, Any] | None:
    """`probes["profile_aspects"]`: the mean probability that relevance gives to the true need's aspects, and chance.

    `found` is that mean, over one target a user; `chance` the same with the relevances of other users' targets, at
    their times and in their contexts; `p_value` that of a permutation test; `best` what a router would have that always
    picked the best memory aspect; `writes` `[aspects, aspects of the world]`, of what each memory aspect holds the
    share of each of the world's (`names`).

    Args:
      relevance_QM: of the targets with a slot, whose rows in the log are `rows`.

    Returns None for a memory without aspects of its own.
    """
    if world.truth is None or not isinstance(model.profile, MemoryParams):
        return None
    personal = model.config.personal
    _, first = np.unique(dataset.log.users_of(rows), return_index=True)
    relevance_QM, rows = relevance_QM[first], rows[first]
    written_IX = written_by_items(model, table)
    writes_XX = np.zeros((personal.n_aspects, len(names.ASPECTS)))
    np.add.at(writes_XX.T, aspect_of_items(world, dataset), written_IX)
    writes_XX /= writes_XX.sum(axis=1, keepdims=True)
    relevance_QX = relevance_of_aspects(relevance_QM, personal)
    relevance_QX = relevance_QX / np.maximum(relevance_QX.sum(axis=1, keepdims=True), 1e-30)
    truth_QX = aspects_of_needs(world)[world.truth.need[rows]]
    value_QX = truth_QX @ writes_XX.T
    found = float(np.mean(np.sum(relevance_QX * value_QX, axis=1)))
    rng = np.random.default_rng(0)
    orders = (rng.permutation(len(rows)) for _ in range(N_PERMUTATIONS))
    permuted = [float(np.mean(np.sum(relevance_QX[order] * value_QX, axis=1))) for order in orders]
    return {
        "found": found,
        "chance": float(np.mean(permuted)),
        "best": float(value_QX.max(axis=1).mean()),
        "p_value": (1 + int(np.sum(np.array(permuted) >= found))) / (1 + N_PERMUTATIONS),
        "names": list(names.ASPECTS),
        "writes": writes_XX.tolist(),
    }


def relevance_of_aspects(relevance_QM: np.ndarray, personal: PersonalConfig) -> np.ndarray:
    """`[Q, aspects]`, sums over the time scales of each aspect, without the last slot, of the static fields."""
    return relevance_QM[:, :-1].reshape(len(relevance_QM), personal.n_aspects, personal.n_scales).sum(axis=2)


def written_by_items(model: SequenceModel, table: Catalog) -> np.ndarray:
    """`[I, aspects]` float64, how many events' worth the training events of each item wrote into each aspect."""
    return np.asarray(share_items(model, table), np.float64) * np.asarray(table.count_I)[:, None]


@jax.jit
def share_items(model: SequenceModel, table: Catalog) -> jax.Array:
    """`[I, aspects]`, how an event with each item, of the first action, is shared among the aspects."""
    item_I = jnp.arange(table.service_I.shape[0])
    x_ID = model.event_vectors(item_I, jnp.zeros_like(item_I), table)
    profile = model.profile
    assert isinstance(profile, MemoryParams)
    return jax.vmap(lambda x_D: share_aspects(profile, x_D))(x_ID)
