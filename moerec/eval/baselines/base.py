"""What a baseline is, and the ranking of those that score all items on the host."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import scipy.sparse

from moerec.config import Config
from moerec.config.registry import Registry
from moerec.data.dataset import Dataset
from moerec.data.histories import Histories
from moerec.data.load import RunData
from moerec.errors import WorkError
from moerec.eval.metrics import Ranks, concatenate_counts, count_ranks
from moerec.eval.ranking.dataset import EvalDataset

MOST_SCORES = 1 << 25  # in memory at once, a quarter of a GiB


class Scorer(Protocol):
    """Anything that scores the union catalogue for a chunk of targets without looking at the targets' items."""

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        """`[n, I]` finite floats for the targets `[n]` (rows of the log), given their histories."""
        ...


P = ParamSpec("P")
S = TypeVar("S", bound=Scorer)


class BaselineInputs(NamedTuple):
    """What a baseline is made from: the run's config and data, its test targets, and a folder of its own."""

    config: Config
    data: RunData
    examples: EvalDataset
    workdir: Path


class TunedRanks(Ranks):
    """Ranks that come with what they were set to, mostly on the validation targets, and how large what gave them is;
    for `metrics.json`.

    `size` has `n_params` of what is trained, with its `steps` and `seconds`; else `n_stored` (`count_stored`).
    """

    settings: dict[str, Any]
    size: dict[str, Any]

    def __new__(cls, ranks: Ranks, settings: dict[str, Any], size: dict[str, Any] | None = None) -> "TunedRanks":
        made = super().__new__(cls, *ranks)
        made.settings, made.size = settings, size or {}
        return made


Baseline = Callable[[BaselineInputs], Ranks | None]  # None where the data have nothing that it could rank by
BASELINES: Registry[Baseline] = Registry("baseline", "baselines")
register_baseline = BASELINES.register  # a function of `BaselineInputs`, under the name that configs give


def register_scorer(name: str) -> Callable[[Callable[P, S]], Callable[P, S]]:
    """Decorates `fit(dataset, split_ids) -> Scorer`, a baseline that scores all items at once on the host.

    Raises:
      InputError: the name is taken.
    """

    def add(fit: Callable[P, S]) -> Callable[P, S]:
        def rank(inputs: BaselineInputs) -> Ranks:
            data, examples = inputs.data, inputs.examples
            scorer = cast(Callable[..., Scorer], fit)(data.dataset, data.split_ids)
            seen = inputs.config.eval.mask_seen
            ranks = rank_by_scores(scorer, data.dataset, examples.targets, examples.histories, seen)
            return TunedRanks(ranks, {}, {"n_stored": count_stored(scorer, data.dataset, data.split_ids)})

        rank.__wrapped__ = fit  # type: ignore[attr-defined]
        BASELINES.register(name)(rank)
        return fit

    return add


def count_stored(model: object, *given: object) -> int:
    """How many numbers a fitted model holds: entries of its arrays, nonzero ones of sparse matrices, each array once.

    A model that holds more than its answers need, such as what was tried, says so itself (`n_stored`).

    Args: given: what it has of others, such as the data set, which is not counted.
    """
    if isinstance(own := getattr(model, "n_stored", None), int):
        return own
    met, total, waiting = {id(x) for x in given}, 0, [model]
    while waiting:
        part = waiting.pop()
        if id(part) in met or isinstance(part, (type, str)):
            continue
        met.add(id(part))
        if isinstance(part, np.ndarray):
            total += part.size
        elif scipy.sparse.issparse(part):
            total += int(cast(Any, part).nnz)
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            waiting += part
        else:
            waiting += vars(part).values() if hasattr(part, "__dict__") else ()
    return total


def rank_by_scores(
    model: Scorer,
    dataset: Dataset,
    targets: np.ndarray,
    histories: Histories,
    mask_seen: bool,
    chunk: int = 512,
) -> Ranks:
    """Ranks each target in its service's catalogue and in the union of all.

    Args:
      model: scores the chunks.
      dataset: the data set that `targets` and `histories` index.
      targets: `[n]` rows of the log.
      histories: what the model may see.
      mask_seen: whether items of the user's history are no candidates; a target among them is a miss.
      chunk: targets scored at once, at most; fewer where their histories are very long, or the catalogue is large.

    Raises:
      WorkError: a score is not finite, or the scores have another shape than `[targets, items]`.
    """
    catalogue, item = dataset.catalogue, dataset.log.item
    own, union = [], []
    seen = histories.distinct(item) if mask_seen else None
    chunk = max(min(chunk, MOST_SCORES // max(catalogue.n_items, 1)), 1)
    for which, part in histories.blocks(chunk):
        start, stop = which.start, which.stop
        answer = item[targets[which]]
        scores = model.score(dataset, targets[which], part)
        if scores.shape != (stop - start, catalogue.n_items):
            raise WorkError(f"scores of shape {scores.shape} for {stop - start} targets and {catalogue.n_items} items")
        masked = None
        if seen is not None:
            own_part = seen.slice(start, stop)
            masked = (own_part.offsets, item[own_part.rows])
        service = catalogue.service[answer]
        ranges = (catalogue.offsets[service], catalogue.offsets[service + 1])
        own.append(count_ranks(scores, answer, masked, ranges, first_row=start))
        union.append(own[-1] if catalogue.n_services == 1 else count_ranks(scores, answer, masked, first_row=start))
    return Ranks(concatenate_counts(own), concatenate_counts(union))
