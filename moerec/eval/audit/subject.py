"""What the checks look at: a data set under its split, with everything that several checks need."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from moerec.config import SplitConfig
from moerec.data.dataset import UNKNOWN_TIME, Dataset
from moerec.data.histories import Histories
from moerec.data.splits import TEST, TRAIN, assign_split_ids, gather_histories, select_targets
from moerec.errors import WorkError


@dataclasses.dataclass(frozen=True)
class Subject:
    """A data set with the split of its events.

    Attributes:
      split: how it is split.
      dataset: as training gets it (with its ties shuffled already where the split says so).
      split_ids: `[events]`.
      per_service: whether sequences are those of a user in a service (rather than of a user).
      targets: `[n]` rows of the test events.
      histories: what a prediction of them may see.
    """

    split: SplitConfig
    dataset: Dataset
    split_ids: np.ndarray
    per_service: bool
    targets: np.ndarray
    histories: Histories

    @functools.cached_property
    def train(self) -> np.ndarray:
        """Rows of the training events."""
        return np.flatnonzero(self.split_ids == TRAIN)

    @functools.cached_property
    def service(self) -> np.ndarray:
        return self.dataset.event_service

    @functools.cached_property
    def user(self) -> np.ndarray:
        return self.dataset.log.user

    @functools.cached_property
    def group(self) -> np.ndarray:
        """`[events]` the sequence that each event belongs to: the user's, or the user's in the service."""
        return self.user * self.dataset.catalogue.n_services + self.service if self.per_service else self.user

    @functools.cached_property
    def previous(self) -> np.ndarray:
        """`[events]` row of the event before in the same group, or -1."""
        order = np.argsort(self.group, kind="stable")
        previous = np.full(len(order), -1)
        same = self.group[order[1:]] == self.group[order[:-1]]
        previous[order[1:][same]] = order[:-1][same]
        return previous

    @functools.cached_property
    def tied(self) -> np.ndarray:
        """`[events]` whether the event has the known time of the event before in its group."""
        time, previous = self.dataset.log.time_us, self.previous
        return (previous >= 0) & (time != UNKNOWN_TIME) & (time == time[previous])

    def split_by_service(self, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """`(service, its rows)` for each service that has any."""
        for code, name in enumerate(self.dataset.catalogue.services):
            own = rows[self.service[rows] == code]
            if len(own):
                yield name, own


def prepare_subject(dataset: Dataset, split: SplitConfig, seed: int) -> Subject:
    """Splits the data set as training would.

    Raises:
      WorkError: the split leaves nothing to train on or nothing to test on.
    """
    split_ids = assign_split_ids(dataset, split, seed)
    targets = select_targets(dataset, split_ids, TEST)
    if not len(targets) or not np.any(split_ids == TRAIN):
        raise WorkError("audit: the split leaves no test events or no training events")
    per_service = split.is_per_service
    return Subject(split, dataset, split_ids, per_service, targets, gather_histories(dataset, targets, per_service))
