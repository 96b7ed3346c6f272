"""Count-based baselines: fitted on training events, scored over the union catalogue, ranked like any model."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from moerec.data.dataset import Dataset
from moerec.eval.baselines.knn import ItemKnn, fit_item_knn
from moerec.eval.baselines.markov import Markov, fit_markov
from moerec.eval.baselines.popularity import fit_popularity, fit_recent_popularity, fit_service_popularity
from moerec.eval.baselines.ranking import Histories, Ranked, Scorer, rank_by_scores

BASELINES: Mapping[str, Callable[[Dataset, np.ndarray], Scorer]] = MappingProxyType(
    {
        "popularity": fit_popularity,
        "popularity_by_service": fit_service_popularity,
        "popularity_recent": fit_recent_popularity,
        "markov": fit_markov,
        "item_knn": fit_item_knn,  # each service by itself
        "item_knn_cross": functools.partial(fit_item_knn, within_service=False),
    }
)

__all__ = [
    "BASELINES",
    "Histories",
    "ItemKnn",
    "Markov",
    "Ranked",
    "Scorer",
    "fit_item_knn",
    "fit_markov",
    "fit_popularity",
    "fit_recent_popularity",
    "fit_service_popularity",
    "rank_by_scores",
]
