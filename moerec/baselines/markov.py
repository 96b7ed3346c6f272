"""First-order Markov chain over items, backed off to popularity."""

import dataclasses
import itertools

import numpy as np
import scipy.sparse

from moerec.baselines.item_to_item import weigh_histories
from moerec.baselines.popularity import count_items
from moerec.baselines.ranking import Histories
from moerec.data.dataset import Dataset
from moerec.data.splits import TRAIN


@dataclasses.dataclass(frozen=True)
class Markov:
    """`p(j | i) = (count(i, j) + strength p(j)) / (count(i) + strength)` for the last item i of the history.

    With `within_service` each service has its own chain, driven by the last item of that service.
    """

    transition: scipy.sparse.csr_matrix  # [I, I] float32, count(i, j) / (count(i) + strength)
    backoff: np.ndarray  # [I] float32, strength / (count(i) + strength)
    share: np.ndarray  # [I] float32, p(j)
    within_service: bool

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        last = weigh_histories(dataset, histories, 1.0, 1, self.within_service)
        scores = (last @ self.transition).toarray()
        catalogue = dataset.catalogue
        ranges = itertools.pairwise(catalogue.offsets.tolist() if self.within_service else [0, catalogue.n_items])
        for lo, hi in ranges:
            left = 1 - last[:, lo:hi] @ (1 - self.backoff[lo:hi])  # 1 where there is no last item
            scores[:, lo:hi] += left[:, None] * self.share[lo:hi]
        return scores


def fit_markov(dataset: Dataset, roles: np.ndarray, strength: float = 1.0, within_service: bool = False) -> Markov:
    """Counts which item follows which among each person's training events (of one service, with `within_service`)."""
    log, n_items = dataset.log, dataset.catalogue.n_items
    trained = np.flatnonzero(roles == TRAIN)
    chain = log.person[trained]
    if within_service:
        chain = chain * dataset.catalogue.n_services + dataset.event_service[trained]
        order = np.argsort(chain, kind="stable")
        trained, chain = trained[order], chain[order]
    follows = chain[1:] == chain[:-1]
    before, after = log.item[trained[:-1]][follows], log.item[trained[1:]][follows]
    count = scipy.sparse.csr_matrix((np.ones(len(before)), (before, after)), (n_items, n_items))
    total = np.asarray(count.sum(axis=1)).ravel() + strength
    popularity = count_items(dataset, roles)
    return Markov(
        scipy.sparse.csr_matrix(scipy.sparse.diags(1 / total) @ count, dtype=np.float32),
        (strength / total).astype(np.float32),
        (popularity / max(popularity.sum(), 1)).astype(np.float32),
        within_service,
    )
