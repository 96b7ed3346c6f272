"""What the history in other services is worth to a trained model: with it, without it, and with nothing else.

The targets are those of users who use two services or more; of other services' events those count that stand in the
history anyway (`gather_histories`: with `split.per_service`, of strictly earlier times).
"""

from typing import Any

import numpy as np

from moerec.config import Config
from moerec.data.dataset import find_multi_service_users
from moerec.data.load import RunData
from moerec.eval.baselines import fit_service_popularity, rank_by_scores
from moerec.eval.metrics import per_target_metrics
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.eval.significance import paired_test
from moerec.nn.model import Predictor
from moerec.types import Catalog

METRICS = ("ndcg@10", "recall@10")


def describe_transfer(
    config: Config, predictor: Predictor, data: RunData, targets: np.ndarray, catalog: Catalog
) -> dict[str, dict[str, Any]]:
    """`{service: {n, all, own, others, popularity, gain, cold}}`, ranked in the target's service.

    `all`, `own` and `others` are the model's metrics by whose history it is given: that of all services, of the
    target's own, and of the others alone (a newcomer to the service). `popularity` is that in the service. `gain` is
    all - own, `cold` is others - popularity: difference of NDCG@10, and p-value of a paired test over users. Each
    history is cut to the last `data.history_len` events that it has, so that the own one may reach further back alone.
    """
    dataset = data.dataset
    chosen = targets[find_multi_service_users(dataset)[dataset.log.users_of(targets)]]
    if not len(chosen):
        return {}
    found = {}
    for history in ("all", "own", "others"):
        examples = EvalDataset(dataset, chosen, config, history=history)
        found[history] = per_target_metrics(rank_targets(predictor, examples, catalog).in_service)
    popular = fit_service_popularity(dataset, data.split_ids)
    # The histories of a newcomer: the same items are candidates.
    ranked = rank_by_scores(popular, dataset, chosen, examples.histories, config.eval.mask_seen)
    found["popularity"] = per_target_metrics(ranked.in_service)
    user, service = dataset.log.user[chosen], dataset.event_service[chosen]
    table_of = {}
    for code, name in enumerate(dataset.catalogue.services):
        rows = service == code
        if rows.any():
            means = {part: {m: float(values[m][rows].mean()) for m in METRICS} for part, values in found.items()}
            tests = {}
            for test, (first, second) in {"gain": ("all", "own"), "cold": ("others", "popularity")}.items():
                a, b = (found[part]["ndcg@10"][rows] for part in (first, second))
                result = paired_test(a, b, config.seed, user[rows])
                tests[test] = {"difference": result.difference, "p_value": result.p_value}
            table_of[name] = {"n": int(rows.sum()), **means, **tests}
    return table_of
