"""One request of the test set and what the model answers, as a report shows it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset
from moerec.data.splits import TEST
from moerec.eval.probes.answers import ask_services, describe_asked, share_groups
from moerec.eval.ranking import EvalDataset
from moerec.eval.ranking.dataset import RankQueries
from moerec.eval.ranking.lists import best_items
from moerec.nn.heads.item import log_softmax_items, pick_slots, spread_each
from moerec.nn.heads.service_answers import component_names
from moerec.nn.model import Predictor
from moerec.nn.sharding import mesh_of
from moerec.types import Batch, Catalog

N_LISTED = 5  # items of a service's answer
N_SHOWN = 8  # last events, and items of the model's list


class Answer(NamedTuple):
    """Attributes:
    log_p: `[I]`, log p(item) over the union. items: the best candidates, and `[n, C]` what each component gave of their
      probabilities. found: what else the model says, by names.
    """

    log_p: np.ndarray
    items: np.ndarray
    part: np.ndarray
    found: dict[str, Any]


def pick_row(config: Config, examples: EvalDataset) -> int | None:
    """The row of a target that the seed draws, whatever the model makes of it: of those with `N_SHOWN` events before
    them; where there are none, of those that there is a slot to ask at (None without one).
    """
    rng = np.random.default_rng([config.seed, TEST])
    for is_fit in (examples.history_len >= N_SHOWN, examples.has_slot):
        if is_fit.any():
            return int(examples.targets[rng.choice(np.flatnonzero(is_fit & examples.has_slot))])
    return None


def describe_example(
    config: Config, dataset: Dataset, row: int, predictor: Predictor, catalog: Catalog
) -> dict[str, Any]:
    """`metrics["example"]`: whose request it is and when (UTC), its context, the last events before it, the model's
    list beside the target, and what the list is made of.

    An item has p(item) and what each component gave of it; items of the history are left out where they are no
    candidates (`eval.mask_seen`), and a target among them has no rank. There is the posterior over services (`domain`)
    where the model has an analyser, the components' weights (`weights`) and the shares of the groups of experts
    (`experts`) where it has such; or, where services are asked, each one's answer with its own (`services`).

    Args: the target's row in the log, before which there is a slot to ask at; a catalogue bound to the predictor.
    """
    alone = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=1))
    examples, catalogue, log = EvalDataset(dataset, np.array([row]), alone), dataset.catalogue, dataset.log
    ((_, batch, queries),) = examples.batches()
    allowed = np.ones(catalogue.n_items, bool)
    seen = np.asarray(queries.seen[0])
    allowed[seen[seen >= 0]] = False
    answer_request = _ask if config.model.is_asked else _answer
    with mesh_of(predictor):
        answer = answer_request(config, dataset, predictor, batch, queries, catalog, allowed)
    names = component_names(config.model, catalogue.services)

    def name(item: int) -> dict[str, Any]:
        service = catalogue.services[catalogue.service[item]]
        return {"service": service, "id": str(catalogue.ids[item]), "text": str(catalogue.text[item])}

    def tell(event: int) -> dict[str, Any]:
        action = dataset.actions[log.action[event]]
        return {**name(int(log.item[event])), "action": action, "time": _format_time(log.time_us[event])}

    items = []
    for item, part in zip(answer.items.tolist(), answer.part, strict=True):
        shares = dict(zip(names, map(float, part), strict=True))
        items.append({**name(item), "p": float(np.exp(answer.log_p[item])), "components": shares})
    target = int(log.item[row])
    return {
        "user": str(dataset.users[log.users_of(np.array([row]))[0]]),
        "time": _format_time(log.time_us[row]),
        "context": _name_context(dataset, row),
        "n_history": int(examples.history_len[0]),
        "history": [tell(event) for event in examples.histories.last(N_SHOWN).rows.tolist()],
        "target": {**tell(row), "p": float(np.exp(answer.log_p[target])), "rank": _find_rank(answer, target, allowed)},
        "n_candidates": int(allowed.sum()),
        "items": items,
        **answer.found,
    }


def _ask(
    config: Config,
    dataset: Dataset,
    predictor: Predictor,
    batch: Batch,
    queries: RankQueries,
    catalog: Catalog,
    allowed: np.ndarray,
) -> Answer:
    """Of a model in which services are asked: the best of their lists, each weighed by its service."""
    slot, catalogue = int(queries.slot[0]), dataset.catalogue
    log_p_I, asked = ask_services(predictor, catalog, batch, slot, None, allowed, N_SHOWN, 1.0, None)
    item = np.concatenate([answer.item for answer in asked.answers])
    part = np.concatenate([answer.weight * answer.part for answer in asked.answers])
    best = np.argsort(-log_p_I[item], kind="stable")[:N_SHOWN]
    services, _ = describe_asked(config.model, catalogue, asked)
    for service in services.values():
        del service["items"][N_LISTED:]
    return Answer(log_p_I, item[best], part[best], {"domain": _by_service(dataset, asked.domain), "services": services})


def _answer(
    config: Config,
    dataset: Dataset,
    predictor: Predictor,
    batch: Batch,
    queries: RankQueries,
    catalog: Catalog,
    allowed: np.ndarray,
) -> Answer:
    """Of a model that answers at once."""
    parts = _split_answer(predictor, batch, np.int32(queries.slot[0]), catalog)
    part_CI, weight_C, domain_Z, routed_LE = (None if x is None else np.asarray(x) for x in parts)
    assert part_CI is not None
    p_I, services = part_CI.sum(axis=0), dataset.catalogue.services
    best = best_items(p_I, allowed, N_SHOWN)
    found: dict[str, Any] = {}
    if domain_Z is not None:
        found["domain"] = _by_service(dataset, domain_Z)
    if weight_C is not None:
        found["weights"] = dict(zip(component_names(config.model, services), map(float, weight_C), strict=True))
    if routed_LE is not None:
        groups = (*(services if config.model.moe.services else ()), "cross")
        shares = share_groups(config.model, routed_LE)
        found["experts"] = {group: float(x) for group, x in zip(groups, shares, strict=False)}
    log_p = np.log(np.maximum(p_I, np.finfo(np.float32).tiny))
    return Answer(log_p, best, part_CI[:, best].T, found)


@jax.jit
def _split_answer(predictor: Predictor, batch: Batch, slot: jax.Array, catalog: Catalog):
    """`[C, I]`, what each component gives to each item; the weights `[C]`, the posterior `[Z]` and the routing `[L, E]`
    of the slot, each None where there is none.
    """
    n_slots, at = batch.item_BT.shape[1], slot[None]
    is_slot_BT = (jnp.arange(batch.item_BT.size) == slot).reshape(batch.item_BT.shape)
    outputs = predictor.encode(batch, catalog, domain_BT=jnp.where(is_slot_BT, 0, -1))
    parts, weight_X = [jnp.exp(log_softmax_items(outputs, batch, at, catalog))[0]], None
    if outputs.pointers is not None:
        pointers = pick_slots(outputs.pointers, at, n_slots)
        weight_X = jnp.exp(pointers.log_weight_BTX[0])
        spread = spread_each(pointers, batch.item_BT[at // n_slots], catalog)
        parts = [weight_X[0] * parts[0], *(x_QI[0] for x_QI in spread)]
    domain_BTZ, routing = outputs.log_domain_BTZ, outputs.routing
    domain_Z = None if domain_BTZ is None else jnp.exp(domain_BTZ.reshape(-1, domain_BTZ.shape[-1])[slot])
    return jnp.stack(parts), weight_X, domain_Z, None if routing is None else routing.probability_LZE[:, 0]


def _find_rank(answer: Answer, target: int, allowed: np.ndarray) -> float | None:
    """The target's expected place among the candidates; None where it is none."""
    if not allowed[target]:
        return None
    log_p_J, own = answer.log_p[allowed], answer.log_p[target]
    return float(1 + np.sum(log_p_J > own) + (np.sum(log_p_J == own) - 1) / 2)


def _by_service(dataset: Dataset, value_Z: np.ndarray) -> dict[str, float]:
    return dict(zip(dataset.catalogue.services, map(float, value_Z), strict=True))


def _name_context(dataset: Dataset, row: int) -> dict[str, str]:
    """What is known of the request, by names."""
    codes = zip(dataset.context.items(), dataset.log.context[row].tolist(), strict=True)
    return {name: str(values[code - 1]) for (name, values), code in codes if 0 < code <= len(values)}


def _format_time(time_us: np.int64) -> str | None:
    return None if time_us == UNKNOWN_TIME else str(np.datetime64(int(time_us) // SECOND_US, "s"))
