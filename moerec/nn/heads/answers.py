"""The answer aggregator: `p(item) = Σ_z p(z) p(item | z)`, of services that were asked; computed nowhere else.

Each service answers over its own catalogue, so that an item is one service's to give.
"""

import itertools

import jax
import jax.numpy as jnp

from moerec.nn.heads.item import add_probability, spread_each, spread_pointers
from moerec.nn.heads.xent import mark_items
from moerec.nn.layers import MASK_VALUE
from moerec.types import Answers, Catalog, NearPointer, PointerMixture


def _of_service(x: PointerMixture | None, place: int | jax.Array) -> PointerMixture | None:
    """The mixtures `[Q, ...]` of the services asked at one place of X; shares of neighbors are of the row's events."""
    if x is None:
        return None
    near = {}
    for name, pointer in x.near.items():
        part_BTS = None if pointer.part_BTS is None else pointer.part_BTS[:, place]
        near[name] = NearPointer(pointer.share_BSX, part_BTS)
    return PointerMixture(x.log_weight_BTX[:, place], x.part_BXTS[:, :, place], near)


def _mix(log_softmax_QI: jax.Array, pointers: PointerMixture | None, pointed_QI: jax.Array | None) -> jax.Array:
    if pointers is None or pointed_QI is None:
        return log_softmax_QI
    return add_probability(log_softmax_QI + pointers.log_weight_BTX[:, :1], pointed_QI)


def _repeat_bias(answers: Answers, catalog: Catalog) -> jax.Array | float:
    """`[Q, I]`, what is added to the scores of the softmax for items that the history has."""
    if answers.had_QS is None:
        return 0.0
    assert catalog.repeat_I is not None
    had_QI = mark_items(jnp.where(answers.had_QS, answers.item_QS, -1), catalog.service_I.shape[0])
    return jnp.where(had_QI, catalog.repeat_I, 0)


def log_prob_all(answers: Answers, catalog: Catalog, offsets: tuple[int, ...]) -> jax.Array:
    """`[Q, I]`, log p(item), where all services were asked, in the order of the catalogue.

    Args: a bound catalogue; where each service's items begin in it, and its end.
    """
    vector_ID, bias_I = catalog.vector_ID, catalog.bias_I
    assert vector_ID is not None
    assert bias_I is not None
    pointers, pointed_QI = answers.pointers, None
    if pointers is not None:
        pointed_QI = spread_pointers(pointers, answers.item_QS, catalog)
    parts, bias_QI = [], bias_I[None] + _repeat_bias(answers, catalog)
    for z, (low, high) in enumerate(itertools.pairwise(offsets)):  # over services: shapes differ
        score_QI = answers.state_QXD[:, z] @ vector_ID[low:high].T + bias_QI[:, low:high]
        own_QI = None if pointed_QI is None else pointed_QI[:, low:high]
        answer_QI = _mix(jax.nn.log_softmax(score_QI), _of_service(pointers, z), own_QI)
        parts.append(answers.log_service_QX[:, z, None] + answer_QI)
    return jnp.concatenate(parts, axis=1)


def _score_own(answers: Answers, catalog: Catalog, place: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[Q, I]`, the softmax's scores of the services at one place of X, -inf for others' items; and whose."""
    vector_ID, bias_I = catalog.vector_ID, catalog.bias_I
    assert vector_ID is not None
    assert bias_I is not None
    own_QI = catalog.service_I == answers.service_QX[:, place, None]
    score_QI = answers.state_QXD[:, place] @ vector_ID.T + bias_I + _repeat_bias(answers, catalog)
    return jnp.where(own_QI, score_QI, -jnp.inf), own_QI


def _answer(answers: Answers, catalog: Catalog, place: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[Q, I]`, log p(item | service) of the services at one place of X, laid over all items; and which are theirs.

    Outside a service's catalogue the values mean nothing.
    """
    score_QI, own_QI = _score_own(answers, catalog, place)
    pointers, pointed_QI = _of_service(answers.pointers, place), None
    if pointers is not None:
        pointed_QI = spread_pointers(pointers, answers.item_QS, catalog)
    return _mix(jax.nn.log_softmax(score_QI), pointers, pointed_QI), own_QI


def log_prob_chosen(answers: Answers, catalog: Catalog) -> jax.Array:
    """`[Q, I]`, log p(item), whichever services were asked; -inf for the items of others.

    Every service's answer is laid over all items, so that it is for few queries, or few services.
    """
    total_QI = jnp.full((answers.state_QXD.shape[0], catalog.service_I.shape[0]), -jnp.inf)
    for place in range(answers.service_QX.shape[1]):  # over the few services asked
        answer_QI, own_QI = _answer(answers, catalog, place)
        total_QI = jnp.where(own_QI, answers.log_service_QX[:, place, None] + answer_QI, total_QI)
    return total_QI


def log_prob_target(answers: Answers, catalog: Catalog, target_Q: jax.Array) -> jax.Array:
    """`[Q, X]`, log p(target | service) by each answer; -inf where the target is not of the service that answers."""

    def of_place(place):
        answer_QI, own_QI = _answer(answers, catalog, place)
        answer_QI = jnp.where(own_QI, answer_QI, -jnp.inf)
        return jnp.take_along_axis(answer_QI, target_Q[:, None], axis=1)[:, 0]

    return jax.lax.map(of_place, jnp.arange(answers.service_QX.shape[1])).T


def split_components(answers: Answers, catalog: Catalog) -> jax.Array:
    """`[Q, X, C, I]`, what each component gives to each item; over C they add up to p(item | service).

    For few queries: it is laid over all items. Those of other services are given nothing.
    """
    rows = []
    for place in range(answers.service_QX.shape[1]):  # over the few services asked
        score_QI, own_QI = _score_own(answers, catalog, place)
        softmax_QI = jax.nn.softmax(score_QI)
        pointers = _of_service(answers.pointers, place)
        if pointers is None:
            rows.append(softmax_QI[:, None])
            continue
        parts = [jnp.exp(pointers.log_weight_BTX[:, :1]) * softmax_QI]
        parts += [jnp.where(own_QI, x_QI, 0) for x_QI in spread_each(pointers, answers.item_QS, catalog)]
        rows.append(jnp.stack(parts, axis=1))
    return jnp.stack(rows, axis=1)


def softmax_alone(answers: Answers, catalog: Catalog) -> tuple[jax.Array, PointerMixture | None]:
    """`[Q, I]`, log p(item | service) by the softmax of the one service that was asked; and what it is mixed with."""
    return jax.nn.log_softmax(_score_own(answers, catalog, 0)[0]), _of_service(answers.pointers, 0)


def drop_component(pointers: PointerMixture, component: int | jax.Array) -> PointerMixture:
    """The mixtures without one of their components, the others' weights made larger in proportion.

    Where it was the only one it stays: an answer needs one.

    Args:
      component: its place among the weights; 0 is the softmax.
    """
    log_weight, part_BXTS = pointers.log_weight_BTX, pointers.part_BXTS
    kept = jnp.where(jnp.arange(log_weight.shape[-1]) == component, MASK_VALUE, log_weight)
    log_left = jax.nn.logsumexp(kept, axis=-1)
    is_alone = log_left < -30.0
    kept = jnp.where(is_alone[..., None], log_weight, kept - log_left[..., None])
    scale_BT1 = jnp.where(is_alone, 1.0, jnp.exp(-jnp.where(is_alone, 0, log_left)))[..., None]
    dropped = (jnp.arange(part_BXTS.shape[1]) == component - 1)[:, None, None]
    part_BXTS = jnp.where(dropped & ~is_alone[:, None, :, None], 0, part_BXTS) * scale_BT1[:, None]
    return pointers._replace(log_weight_BTX=kept, part_BXTS=part_BXTS)
