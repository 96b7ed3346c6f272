"""Baselines: fitted on training events, or trained by the same trainer, and ranked like any model."""

from moerec.eval.baselines.base import (
    BASELINES,
    BaselineInputs,
    Scorer,
    rank_by_scores,
    register_baseline,
    register_scorer,
)
from moerec.eval.baselines.knn import ItemKnn, fit_cross_service_knn, fit_item_knn
from moerec.eval.baselines.markov import Markov, fit_markov
from moerec.eval.baselines.popularity import fit_popularity, fit_service_popularity
from moerec.eval.baselines.popularity_by_hour import fit_hour_popularity
from moerec.eval.baselines.popularity_recent import fit_recent_popularity
from moerec.eval.baselines.sasrec import sasrec_config

__all__ = [
    "BASELINES",
    "BaselineInputs",
    "ItemKnn",
    "Markov",
    "Scorer",
    "fit_cross_service_knn",
    "fit_hour_popularity",
    "fit_item_knn",
    "fit_markov",
    "fit_popularity",
    "fit_recent_popularity",
    "fit_service_popularity",
    "rank_by_scores",
    "register_baseline",
    "register_scorer",
    "sasrec_config",
]
