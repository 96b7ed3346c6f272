"""First-order Markov chain over items, backed off to popularity."""

import dataclasses

import numpy as np
import scipy.sparse

from moerec.data.dataset import Dataset
from moerec.data.histories import Histories
from moerec.data.splits import TRAIN
from moerec.eval.baselines.base import register_scorer
from moerec.eval.baselines.item_to_item import weigh_histories
from moerec.eval.baselines.popularity import count_items


@dataclasses.dataclass(frozen=True)
class Markov:
    """`p(j | i) = (count(i, j) + strength p(j)) / (count(i) + strength)` for the last item i of the history."""

    transition: scipy.sparse.csr_matrix  # [I, I] float32, count(i, j) / (count(i) + strength)
    backoff: np.ndarray  # [I] float32, strength / (count(i) + strength)
    share: np.ndarray  # [I] float32, p(j)

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        last = weigh_histories(dataset, histories, 1.0, 1, within_service=False)
        left = 1 - last @ (1 - self.backoff)  # 1 where there is no last item
        return (last @ self.transition).toarray() + left[:, None] * self.share


@register_scorer("markov")
def fit_markov(dataset: Dataset, split_ids: np.ndarray, strength: float = 1.0) -> Markov:
    """Counts which item follows which among each user's training events."""
    log, n_items = dataset.log, dataset.catalogue.n_items
    trained = np.flatnonzero(split_ids == TRAIN)
    chain = log.user[trained]
    follows = chain[1:] == chain[:-1]
    before, after = log.item[trained[:-1]][follows], log.item[trained[1:]][follows]
    count = scipy.sparse.csr_matrix((np.ones(len(before)), (before, after)), (n_items, n_items))
    total = np.asarray(count.sum(axis=1)).ravel() + strength
    popularity = count_items(dataset, split_ids)
    return Markov(
        scipy.sparse.csr_matrix(scipy.sparse.diags(1 / total) @ count, dtype=np.float32),
        (strength / total).astype(np.float32),
        (popularity / max(popularity.sum(), 1)).astype(np.float32),
    )
