"""Ranks the targets of any scorer: what a baseline, the oracle of the city world and a test share."""

from typing import NamedTuple, Protocol

import numpy as np

from moerec.data.dataset import Dataset
from moerec.errors import WorkError
from moerec.eval.metrics import RankCounts, concatenate_counts, count_ranks

Histories = tuple[np.ndarray, np.ndarray]  # (offsets [n + 1], rows of the log), as gather_histories makes them


class Scorer(Protocol):
    """Anything that scores the union catalogue for a chunk of targets without looking at the targets' items."""

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        """`[n, I]` finite floats for the targets `[n]` (rows of the log), given their histories."""
        ...


class Ranked(NamedTuple):
    in_service: RankCounts
    union: RankCounts


def slice_histories(histories: Histories, start: int, stop: int) -> Histories:
    """The histories of the targets `start <= t < stop`."""
    offsets, rows = histories
    return offsets[start : stop + 1] - offsets[start], rows[offsets[start] : offsets[stop]]


def rank_by_scores(
    model: Scorer,
    dataset: Dataset,
    targets: np.ndarray,
    histories: Histories,
    mask_seen: bool,
    chunk: int = 512,
) -> Ranked:
    """Ranks each target in its service's catalogue and in the union of all.

    Args:
      model: scores the chunks.
      dataset: the data set that `targets` and `histories` index.
      targets: `[n]` rows of the log.
      histories: what the model may see.
      mask_seen: whether items of the user's history are no candidates; a target among them is a miss.
      chunk: targets scored at once.

    Raises:
      WorkError: a score is not finite, or the scores have another shape than `[targets, items]`.
    """
    catalogue, item = dataset.catalogue, dataset.log.item
    own, union = [], []
    for start in range(0, len(targets), chunk):
        stop = min(start + chunk, len(targets))
        answer = item[targets[start:stop]]
        scores = model.score(dataset, targets[start:stop], slice_histories(histories, start, stop))
        if scores.shape != (stop - start, catalogue.n_items):
            raise WorkError(f"scores of shape {scores.shape} for {stop - start} targets and {catalogue.n_items} items")
        masked = None
        if mask_seen:
            offsets, rows = slice_histories(histories, start, stop)
            masked = (offsets, item[rows])
        service = np.searchsorted(catalogue.offsets, answer, side="right") - 1
        ranges = (catalogue.offsets[service], catalogue.offsets[service + 1])
        own.append(count_ranks(scores, answer, masked, ranges, first_row=start))
        union.append(own[-1] if catalogue.n_services == 1 else count_ranks(scores, answer, masked, first_row=start))
    return Ranked(concatenate_counts(own), concatenate_counts(union))
