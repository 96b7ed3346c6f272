"""The compiled programs behind `Recommender`: one for each kind of answer and each shape of a batch."""

import functools

import jax
import jax.numpy as jnp

from moerec.nn.heads.item import log_prob_items, pick_slots
from moerec.nn.heads.origin import split_listed
from moerec.nn.heads.query_blocks import map_blocks
from moerec.nn.model import Predictor
from moerec.nn.model.inspect import SlotTrace, trace_slots
from moerec.nn.moe.hypotheses import ask_all, followed_services
from moerec.types import Batch, Catalog, PointerMixture


@functools.partial(jax.jit, static_argnames="k")
def list_best(
    predictor: Predictor,
    catalog: Catalog,
    batch: Batch,
    slot_Q: jax.Array,
    allowed_Z: jax.Array,
    exclude_QX: jax.Array,
    k: int,
) -> tuple[jax.Array, ...]:
    """The best items `[Q, K]`, their log-probabilities, parts and groups, and the posterior, as `Recommendations`."""
    at_Q, n_slots = jnp.maximum(slot_Q, 0), batch.item_BT.shape[1]
    pointers: PointerMixture | None
    group_QXG = log_domain_QZ = None

    def pick(log_p_QI: jax.Array, exclude_QX: jax.Array) -> tuple[jax.Array, jax.Array]:
        n_items = log_p_QI.shape[1]
        place_QX = jnp.where(exclude_QX >= 0, exclude_QX, n_items)  # padding falls off the end
        open_QI = jnp.where(allowed_Z[catalog.service_I], log_p_QI, -jnp.inf)
        open_QI = open_QI.at[jnp.arange(len(place_QX))[:, None], place_QX].set(-jnp.inf, mode="drop")
        return jax.lax.top_k(open_QI, k)

    if predictor.config.is_asked:
        below = predictor.params.read(batch, catalog)
        log_domain_QZ = predictor.weigh_services(below, at_Q)
        has_groups = bool(predictor.config.moe.layers)
        answers = predictor.ask(batch, catalog, at_Q, ask_all(log_domain_QZ), below=below, weigh_groups=has_groups)
        best_QK, item_QK = predictor.map_answers(pick, answers, slot_Q, catalog, (exclude_QX,))
        pointers, item_QS, group_QXG = answers.pointers, answers.item_QS, answers.group_QXG
    else:
        outputs = predictor.encode(batch, catalog)

        def pick_block(slot_Q: jax.Array, exclude_QX: jax.Array) -> tuple[jax.Array, jax.Array]:
            return pick(log_prob_items(outputs, batch, slot_Q, catalog), exclude_QX)

        best_QK, item_QK = map_blocks(pick_block, (slot_Q, exclude_QX), catalog.service_I.shape[0])
        if outputs.log_domain_BTZ is not None:
            log_domain_QZ = outputs.log_domain_BTZ.reshape(-1, outputs.log_domain_BTZ.shape[-1])[at_Q]
        item_QS, pointers = batch.item_BT[at_Q // n_slots], None
        if outputs.pointers is not None:
            pointers = pick_slots(outputs.pointers, at_Q, n_slots)
            pointers = pointers._replace(part_BXTS=pointers.part_BXTS[:, :, None])  # one answer
    item_QK = jnp.where(best_QK > -jnp.inf, item_QK, -1)
    service_QK = catalog.service_I[jnp.maximum(item_QK, 0)]
    p_QK, place_QK = jnp.exp(best_QK), jnp.zeros_like(service_QK)
    if predictor.config.is_asked:
        assert log_domain_QZ is not None
        p_QK = jnp.exp(best_QK - jnp.take_along_axis(log_domain_QZ, service_QK, axis=1))
        place_QK = service_QK
    part_QKC = split_listed(p_QK, pointers, place_QK, item_QK, item_QS, catalog)
    group_QK = service_QK
    if group_QXG is not None:
        group_QK = jnp.take_along_axis(jnp.argmax(group_QXG, axis=-1), service_QK, axis=1)
    found = item_QK, best_QK, part_QKC, group_QK.astype(jnp.int32)
    return found if log_domain_QZ is None else (*found, jnp.exp(log_domain_QZ))


@jax.jit
def score_items(predictor: Predictor, catalog: Catalog, batch: Batch, slot_Q: jax.Array) -> jax.Array:
    """`[Q, I]`, log p(item)."""
    return jax.nn.log_softmax(predictor.score(batch, slot_Q, catalog))


@jax.jit
def read_states(predictor: Predictor, catalog: Catalog, batch: Batch, slot_Q: jax.Array) -> jax.Array:
    """`[Q, D]`, the states that score the items; `[Q, Z, D]` where services are asked."""
    at_Q = jnp.maximum(slot_Q, 0)
    if predictor.config.is_asked:
        below = predictor.params.read(batch, catalog)
        hypotheses = ask_all(predictor.weigh_services(below, at_Q))
        return predictor.ask(batch, catalog, at_Q, hypotheses, below=below).state_QXD
    state_BTD = predictor.encode(batch, catalog).state_BTD
    return state_BTD.reshape(-1, state_BTD.shape[-1])[at_Q]


@jax.jit
def trace_requests(
    predictor: Predictor, catalog: Catalog, batch: Batch, slot_Q: jax.Array, service: jax.Array
) -> SlotTrace:
    """What happens at each slot; where services are asked, the requests' slots ask this one, or none (-1)."""
    hypothesis_BT = None
    if predictor.config.is_asked:
        hypothesis_BT = followed_services(batch, predictor.params.n_services)
        flat_S = hypothesis_BT.reshape(-1)
        at_Q = jnp.where(slot_Q >= 0, slot_Q, flat_S.shape[0])
        hypothesis_BT = flat_S.at[at_Q].set(service, mode="drop").reshape(hypothesis_BT.shape)
    return trace_slots(predictor, batch, catalog, hypothesis_BT)
