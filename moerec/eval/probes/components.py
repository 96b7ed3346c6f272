"""What each component of the answers is worth: without it the others share its weight, and targets are ranked."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from moerec.eval.metrics import COLDNESS, ScoredRanks, bucket_coldness, per_target_metrics
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.nn.heads.service_answers import component_names
from moerec.nn.model import Predictor
from moerec.types import Catalog


def evaluate_components(
    predictor: Predictor, examples: EvalDataset, catalog: Catalog, count_I: np.ndarray
) -> dict[str, Any]:
    """`probes["components"]`: what log-likelihood and NDCG@10 of the targets lose without each component.

    Of `all` targets and by how many training events the `target` has and the `last_event` before it. A target has no
    less than a uniform guess over all items (the floor): what is left may give it nothing at all. `fell` is the share
    of the targets that had more than that, and have not without the component: what they lose is more than is told.

    Args: a model with pointers; the targets; a catalogue bound to it; `[I]`, each item's number of training events.
    """
    item = examples.dataset.log.item
    last = examples.histories.last(1)
    count_before = np.zeros(len(examples.targets))
    count_before[last.owner] = count_I[item[last.rows]]
    labels = {"target": bucket_coldness(count_I[examples.target_item]), "last_event": bucket_coldness(count_before)}
    floor = -np.log(examples.dataset.catalogue.n_items)
    own = _measure(rank_targets(predictor, examples, catalog), examples)
    found = {}
    for place, name in enumerate(component_names(predictor.config, examples.dataset.catalogue.services)):
        without = _measure(rank_targets(predictor._replace(without=jnp.asarray(place)), examples, catalog), examples)
        lost = {metric: own[metric] - without[metric] for metric in own}
        lost["fell"] = (own["log_p"] > floor) & (without["log_p"] <= floor)
        row: dict[str, Any] = {"all": _average(lost, np.full(len(count_before), True))}
        for which, label in labels.items():
            row[which] = {name: _average(lost, label == name) for name in COLDNESS if np.any(label == name)}
        found[name] = row
    return found


def _measure(ranks: ScoredRanks, examples: EvalDataset) -> dict[str, np.ndarray]:
    return {
        "log_p": np.maximum(ranks.log_p, -np.log(examples.dataset.catalogue.n_items)),
        "ndcg@10": per_target_metrics(ranks.union)["ndcg@10"],
        "in_service_ndcg@10": per_target_metrics(ranks.in_service)["ndcg@10"],
    }


def _average(values: dict[str, np.ndarray], is_chosen: np.ndarray) -> dict[str, float]:
    return {"n": int(np.sum(is_chosen)), **{key: float(x[is_chosen].mean()) for key, x in values.items()}}
