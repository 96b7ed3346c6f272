"""What the request alone is worth: the first event of users whom training has not seen."""

from typing import Any

from moerec.config import Config
from moerec.data.load import RunData
from moerec.eval.baselines.base import rank_by_scores
from moerec.eval.baselines.popularity_by_hour import fit_hour_popularity
from moerec.eval.metrics import build_table, per_target_metrics
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.eval.significance import paired_test
from moerec.nn.model import Predictor
from moerec.types import Catalog


def evaluate_first_events(
    config: Config, data: RunData, examples: EvalDataset, predictor: Predictor, catalog: Catalog
) -> dict[str, Any]:
    """`probes["first_events"]`: `{model, popularity_by_hour}`, each as a row of the results, and the paired difference
    of the union's recall@10.

    Args:
      examples: the test targets of a split by user, whose users are not trained on. Their first events are predicted
        from the control slot: from the request's time and context and the static profile fields.
    """
    dataset, seen = data.dataset, config.eval.mask_seen
    targets = dataset.log.offsets[examples.user]
    first = EvalDataset(dataset, targets, config)
    own = rank_targets(predictor, first, catalog)
    popular = fit_hour_popularity(dataset, data.split_ids)
    others = rank_by_scores(popular, dataset, targets, first.histories, seen)
    services = dataset.catalogue.services
    a, b = (per_target_metrics(ranks.union)["recall@10"] for ranks in (own, others))
    tested = paired_test(a, b, config.seed, first.user)
    return {
        "model": build_table(own, first.target_service, services),
        "popularity_by_hour": build_table(others, first.target_service, services),
        "difference": tested.difference,
        "p_value": tested.p_value,
    }
