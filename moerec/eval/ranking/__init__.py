"""Full ranking: targets with their histories, and where a model puts them."""

from moerec.eval.ranking.dataset import EvalDataset, RankQueries, make_test_set, make_valid_set
from moerec.eval.ranking.rank import evaluate_targets, make_evaluator, rank_batch, rank_targets

__all__ = [
    "EvalDataset",
    "RankQueries",
    "evaluate_targets",
    "make_evaluator",
    "make_test_set",
    "make_valid_set",
    "rank_batch",
    "rank_targets",
]
