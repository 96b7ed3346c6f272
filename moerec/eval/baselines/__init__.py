"""Baselines: fitted on training events, or trained by the same trainer, and ranked like any model."""

from moerec.eval.baselines.base import (
    BASELINES,
    BaselineInputs,
    Scorer,
    TunedRanks,
    count_stored,
    rank_by_scores,
    register_baseline,
    register_scorer,
)
from moerec.eval.baselines.graph_text import GraphText, Settings, fit_graph_text
from moerec.eval.baselines.graph_text_choice import GRIDS, Choice, Grid, choose_settings
from moerec.eval.baselines.knn import ItemKnn, fit_cross_service_knn, fit_item_knn
from moerec.eval.baselines.markov import Markov, fit_markov
from moerec.eval.baselines.popularity import fit_popularity, fit_service_popularity
from moerec.eval.baselines.popularity_by_hour import fit_hour_popularity
from moerec.eval.baselines.popularity_recent import fit_recent_popularity
from moerec.eval.baselines.sasrec import sasrec_config, sasrec_full_config

__all__ = [
    "BASELINES",
    "GRIDS",
    "BaselineInputs",
    "Choice",
    "GraphText",
    "Grid",
    "ItemKnn",
    "Markov",
    "Scorer",
    "Settings",
    "TunedRanks",
    "choose_settings",
    "count_stored",
    "fit_cross_service_knn",
    "fit_graph_text",
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
    "sasrec_full_config",
]
