"""Item graph and texts without learning: what is near to the history by transitions, and what is written alike.

`score(j) = sum_k decay^k (graph(item_k, j) + text_weight cosine(item_k, j))` over the k-th last events of the history,
with the normalised graph of training transitions (`make_item_graph`) and TF-IDF vectors of texts and attributes. The
settings are chosen in `graph_text_choice`.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np
import scipy.sparse

from moerec.data.dataset import Dataset
from moerec.data.histories import Histories
from moerec.data.neighbors import count_transitions, make_item_graph, make_text_vectors, weigh_transitions
from moerec.data.splits import TRAIN
from moerec.eval.baselines.item_to_item import weigh_histories

MAX_GAP = 10  # places between two events that count as a transition, at most
MOST_PAIRS = 1 << 24  # pairs of events that are counted; where there are more, those farthest apart are not
OWN, ALL, JOINT = "own", "all", "joint"


class Settings(NamedTuple):
    """Attributes:
    history: whose events speak for an item, and how their places are counted, that is, how they decay. `own`: those of
      the item's service, by their places among these. `all`: those of all services, by their places in their own.
      `joint`: those of all services, by their places among all.
    decay: of an event's weight with each later event.
    gap_decay: of a transition's weight with each event in between; None leaves the graph out.
    text_weight: of the cosine, against the graph.
    """

    history: str = ALL
    decay: float = 0.7
    gap_decay: float | None = 0.8
    text_weight: float = 0.1


DEFAULT = Settings()


class Parts:
    """The matrices behind the scores, each made once, when it is asked for; by the service whose items are scored.

    Their memory is that of the texts' words and of at most `2 MOST_PAIRS` entries for each graph; scores are made for
    as many targets as are asked for.
    """

    def __init__(self, dataset: Dataset, split_ids: np.ndarray):
        self._dataset, self._split_ids = dataset, split_ids
        self._edges = list(itertools.pairwise(dataset.catalogue.offsets.tolist()))
        self._counts: dict[bool, list[scipy.sparse.csr_matrix]] = {}
        self._graphs: dict[tuple[bool, float], list[scipy.sparse.csr_matrix]] = {}
        self._texts: tuple[scipy.sparse.csr_matrix, list[scipy.sparse.csr_matrix]] | None = None
        n_events = int(np.count_nonzero(split_ids == TRAIN))
        self.max_gap = int(np.clip(MOST_PAIRS // max(n_events, 1), 1, MAX_GAP))

    @functools.cached_property
    def has_words(self) -> bool:
        """Whether any item has a text or an attribute."""
        catalogue = self._dataset.catalogue
        return any(map(str.strip, catalogue.text.tolist())) or any(map(str.strip, catalogue.attributes.tolist()))

    @functools.cached_property
    def has_transitions(self) -> bool:
        """Whether any user has two items in training."""
        log, trained = self._dataset.log, np.flatnonzero(self._split_ids == TRAIN)
        user, item = log.users_of(trained), log.item[trained]
        return bool(np.any((user[1:] == user[:-1]) & (item[1:] != item[:-1])))

    def weigh(self, histories: Histories, history: str, decay: float) -> scipy.sparse.csr_matrix:
        """`[n, I]` the weights of the items of each history."""
        return weigh_histories(self._dataset, histories, decay, None, within_service=history != JOINT)

    def score_graph(self, weight_nI: scipy.sparse.csr_matrix, z: int, history: str, gap_decay: float) -> np.ndarray:
        """`[n, items of the service]` float32."""
        graphs = self._find_graphs(history == OWN, gap_decay)
        return (weight_nI @ graphs[z]).toarray()

    def score_text(self, weight_nI: scipy.sparse.csr_matrix, z: int, history: str) -> np.ndarray:
        """`[n, items of the service]` float32."""
        if self._texts is None:
            vector_IV = make_text_vectors(self._dataset.catalogue)
            # Words of many items first: what is read again and again stands together.
            n_items_V = np.bincount(vector_IV.indices, minlength=vector_IV.shape[1])
            vector_IV = vector_IV[:, np.argsort(-n_items_V, kind="stable")]
            vector_IV.sort_indices()
            self._texts = vector_IV, [vector_IV[lo:hi] for lo, hi in self._edges]
        vector_IV, by_service = self._texts
        if history == OWN:
            lo, hi = self._edges[z]
            asked_nV = weight_nI[:, lo:hi] @ by_service[z]
        else:
            asked_nV = weight_nI @ vector_IV
        # Common words fill the product, so that it is made as a dense one: many times faster. Targets stand side by
        # side, and each item adds up its words in their order: equal texts get equal scores, to the bit.
        asks = np.flatnonzero(np.diff(asked_nV.indptr))
        found = np.zeros((len(weight_nI.indptr) - 1, by_service[z].shape[0]), np.float32)
        found[asks] = (by_service[z] @ asked_nV[asks].T.toarray(order="C")).T
        return found

    def count(self, settings: Settings) -> int:
        """Numbers of the matrices that the scores of one choice come from."""
        graph = [] if settings.gap_decay is None else self._find_graphs(settings.history == OWN, settings.gap_decay)
        text = self._texts[0].nnz if settings.text_weight and self._texts else 0
        return int(text) + sum(int(part.nnz) for part in graph)

    def _find_graphs(self, within_service: bool, gap_decay: float) -> list[scipy.sparse.csr_matrix]:
        key = within_service, gap_decay
        if key not in self._graphs:
            weight_II = weigh_transitions(self._count(within_service), gap_decay)
            graph = scipy.sparse.csc_matrix(make_item_graph(weight_II))
            self._graphs[key] = [scipy.sparse.csr_matrix(graph[:, lo:hi]) for lo, hi in self._edges]
        return self._graphs[key]

    def _count(self, within_service: bool) -> list[scipy.sparse.csr_matrix]:
        if within_service not in self._counts:
            counts = count_transitions(self._dataset, self._split_ids, self.max_gap, within_service)
            if not within_service:  # pairs of two services stand as far apart as the joint history has them
                pairs = zip(self._count(True), counts, strict=True)
                counts = [own + self._keep_crossing(both) for own, both in pairs]
            self._counts[within_service] = counts
        return self._counts[within_service]

    def _keep_crossing(self, count_II: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        pairs, service = count_II.tocoo(), self._dataset.catalogue.service
        crosses = service[pairs.row] != service[pairs.col]
        kept = (pairs.data[crosses], (pairs.row[crosses], pairs.col[crosses]))
        return scipy.sparse.csr_matrix(kept, count_II.shape)


@dataclasses.dataclass(frozen=True)
class GraphText:
    """The scores of one choice of settings, over the items of all services."""

    parts: Parts
    settings: Settings

    @property
    def n_stored(self) -> int:
        """Numbers that the scores come from (texts once they have been read)."""
        return self.parts.count(self.settings)

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        history, decay, gap_decay, text_weight = self.settings
        weight_nI = self.parts.weigh(histories, history, decay)
        scores, offsets = np.zeros((len(targets), dataset.catalogue.n_items), np.float32), dataset.catalogue.offsets
        for z, (lo, hi) in enumerate(itertools.pairwise(offsets.tolist())):
            if gap_decay is not None:
                scores[:, lo:hi] = self.parts.score_graph(weight_nI, z, history, gap_decay)
            if text_weight:
                scores[:, lo:hi] += np.float32(text_weight) * self.parts.score_text(weight_nI, z, history)
        return scores


def fit_graph_text(dataset: Dataset, split_ids: np.ndarray, settings: Settings = DEFAULT) -> GraphText:
    """Counts the transitions among training events, and reads the texts of all items."""
    return GraphText(Parts(dataset, split_ids), settings)
