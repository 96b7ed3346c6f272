"""Services asked for one request: whom to ask, what each answers, and which expert and component an item comes from."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import ModelConfig
from moerec.data.dataset import ItemTable
from moerec.nn.heads.answers import log_prob_chosen, split_components
from moerec.nn.heads.service_answers import component_names
from moerec.nn.model import Below, Predictor
from moerec.nn.moe.hypotheses import Hypotheses
from moerec.nn.profile import UserState
from moerec.types import Batch, Catalog


class ServiceAnswer(NamedTuple):
    """What one service answers.

    Attributes:
      service: its number. weight: p(service), as it weighs the answer.
      item: `[n]` int64, its best items that may be listed. p: `[n]`, p(item | service).
      part: `[n, C]`, what each component gave of it; rows add up to `p`.
      gate: `[C]`, weights of the components. expert: `[G]`, the router's shares of the groups of experts, mean over the
        layers; None without experts.
    """

    service: int
    weight: float
    item: np.ndarray
    p: np.ndarray
    part: np.ndarray
    gate: np.ndarray
    expert: np.ndarray | None


class AskedAnswer(NamedTuple):
    """Attributes: `domain` `[Z]`, the calibrated posterior; `answers` of the services asked, the most probable first;
    `relevance` `[M]` of the profile's slots, or None.
    """

    domain: np.ndarray
    answers: tuple[ServiceAnswer, ...]
    relevance: np.ndarray | None


@jax.jit
def _read(
    predictor: Predictor, batch: Batch, slot: jax.Array, catalog: Catalog, start_B: UserState | None
) -> tuple[Below, jax.Array, jax.Array | None]:
    """All that no hypothesis changes; `[Z]`, the log-posterior that weighs the answers; and the profile's relevance."""
    profile = None if start_B is None else predictor.params.read_profiles(batch, catalog, start_B)
    below = predictor.params.read(batch, catalog, profile)
    relevance_BTM = below.relevance_BTM
    relevance_M = None if relevance_BTM is None else relevance_BTM.reshape(-1, relevance_BTM.shape[-1])[slot]
    return below, predictor.weigh_services(below, slot[None])[0], relevance_M


@partial(jax.jit, static_argnames="n")
def _ask(
    predictor: Predictor,
    batch: Batch,
    slot: jax.Array,
    catalog: Catalog,
    below: Below,
    hypotheses: Hypotheses,
    allowed_I: jax.Array,
    n: int,
):
    """`[I]` log p(item), -inf for items of services that were not asked; and of each service its `n` best items, their
    probabilities by component, the gates, and the sums of the routing.
    """
    answers = predictor.ask(batch, catalog, slot[None], hypotheses, below=below)
    log_p_I = log_prob_chosen(answers, catalog)[0]
    part_XCI = split_components(answers, catalog)[0]
    own_XI = catalog.service_I == answers.service_QX[0][:, None]
    p_XI = jnp.where(own_XI & allowed_I, jnp.sum(part_XCI, axis=1), -1)
    best_XJ, item_XJ = jax.lax.top_k(p_XI, n)
    part_XCJ = jnp.take_along_axis(part_XCI, item_XJ[:, None], axis=2)
    gate_XC = jnp.ones((p_XI.shape[0], 1))
    if answers.pointers is not None:
        gate_XC = jnp.exp(answers.pointers.log_weight_BTX[0])
    routed_LZE = None if answers.routing is None else answers.routing.probability_LZE
    return log_p_I, best_XJ, item_XJ, jnp.moveaxis(part_XCJ, 1, 2), gate_XC, routed_LZE


def choose_services(log_weight_Z: np.ndarray, mass: float, service: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Whom to ask, and the log-weights of their answers: one service that is named (with its own probability), or the
    most probable ones that have `mass` of the posterior together, whose weights then add up to one.

    Their number is rounded up to a power of two, so that few programs are compiled.
    """
    order = np.argsort(-log_weight_Z, kind="stable")
    if service is not None:
        return np.array([service], np.int32), log_weight_Z[[service]]
    n = len(order)
    if mass < 1:
        reached = np.cumsum(np.exp(log_weight_Z[order].astype(np.float64)))
        n = min(1 << int(np.searchsorted(reached, mass)).bit_length(), n)
    chosen = order[:n]
    log_weight = log_weight_Z[chosen].astype(np.float64)
    return chosen.astype(np.int32), (log_weight - np.logaddexp.reduce(log_weight)).astype(np.float32)


def ask_services(
    predictor: Predictor,
    catalog: Catalog,
    batch: Batch,
    slot: int,
    start_B: UserState | None,
    allowed: np.ndarray,
    n: int,
    mass: float,
    service: int | None,
) -> tuple[np.ndarray, AskedAnswer]:
    """`[I]` log p(item) of a request, and what it is made of.

    Args:
      catalog: bound to the predictor. slot: the request's. start_B: what a profile knows already.
      allowed: `[I]` bool, items that may be listed.
      n: items of a service's list. mass, service: as `choose_services`.
    """
    at = np.int32(slot)
    below, log_weight_Z, relevance_M = _read(predictor, batch, at, catalog, start_B)
    service_X, log_weight_X = choose_services(np.asarray(log_weight_Z), mass, service)
    asked_QX = service_X[None]
    hypotheses = Hypotheses(*map(jnp.asarray, (log_weight_X[None], asked_QX, asked_QX, asked_QX)))
    n_listed = min(n, len(allowed))
    found = _ask(predictor, batch, at, catalog, below, hypotheses, allowed, n_listed)
    log_p_I, best_XJ, item_XJ, part_XJC, gate_XC = map(np.asarray, found[:-1])
    routed_LZE = None if found[-1] is None else np.asarray(found[-1])
    answers = []
    for place, (z, weight) in enumerate(zip(service_X.tolist(), np.exp(log_weight_X).tolist(), strict=True)):
        kept = best_XJ[place] >= 0
        expert = None if routed_LZE is None else share_groups(predictor.config, routed_LZE[:, z])
        of_items = item_XJ[place][kept].astype(np.int64), best_XJ[place][kept], part_XJC[place][kept]
        answers.append(ServiceAnswer(z, weight, *of_items, gate_XC[place], expert))
    relevance = None if relevance_M is None else np.asarray(relevance_M)
    return log_p_I, AskedAnswer(np.exp(np.asarray(log_weight_Z)), tuple(answers), relevance)


def share_groups(config: ModelConfig, routed_LE: np.ndarray) -> np.ndarray:
    """`[G]`, the groups' shares of what the routers give to experts `[L, E]`, mean over the layers."""
    share_E = (routed_LE / np.maximum(routed_LE.sum(axis=1, keepdims=True), 1e-30)).mean(axis=0)
    return share_E.reshape(-1, config.moe.n_per_group).sum(axis=1)


def describe_asked(config: ModelConfig, catalogue: ItemTable, found: AskedAnswer) -> tuple[dict[str, Any], list[str]]:
    """The services' answers by names, and as lines of text."""
    components = component_names(config)
    groups = (*catalogue.services, "cross")
    services, lines = {}, []
    for answer in found.answers:
        name = catalogue.services[answer.service]
        listed = [
            {
                "id": str(catalogue.ids[i]),
                "text": str(catalogue.text[i]),
                "p": float(p),
                "components": {c: float(x) for c, x in zip(components, part, strict=True)},
                "source": components[int(np.argmax(part))],
            }
            for i, p, part in zip(answer.item, answer.p, answer.part, strict=True)
        ]
        services[name] = {
            "weight": answer.weight,
            "components": dict(zip(components, answer.gate.tolist(), strict=True)),
            "items": listed,
        }
        experts = ""
        if answer.expert is not None:
            shares = {group: float(x) for group, x in zip(groups, answer.expert, strict=False) if x > 1e-6}
            services[name]["experts"] = shares
            experts = "; experts " + ", ".join(f"{group} {x:.2f}" for group, x in shares.items())
        gates = ", ".join(f"{c} {w:.2f}" for c, w in zip(components, answer.gate, strict=True))
        lines.append(f"{name} ({answer.weight:.2f}; {gates}{experts}):")
        for item in listed[:3]:
            lines.append(f"{item['p']:9.4f}  {item['id']:<12s} {item['text']} ({item['source']})")
    return services, lines
