"""The settings of item graph and texts, chosen on the validation targets: as a whole, and with a part left out."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moerec.data.dataset import Dataset
from moerec.data.splits import VALID
from moerec.eval.baselines.base import BaselineInputs, TunedRanks, rank_by_scores, register_baseline
from moerec.eval.baselines.graph_text import ALL, DEFAULT, JOINT, OWN, GraphText, Parts, Settings, fit_graph_text
from moerec.eval.metrics import count_ranks, per_target_metrics
from moerec.eval.ranking.dataset import EvalDataset, make_valid_set

MOST_VALID = 8000  # validation targets that choose
MOST_CELLS = 1 << 23  # scores of a block of targets


class Grid(NamedTuple):
    """The values of `Settings` that are tried, in all combinations."""

    history: tuple[str, ...] = (OWN, ALL, JOINT)
    decay: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 1.0)
    gap_decay: tuple[float | None, ...] = (0.0, 0.5, 0.8, 1.0)
    text_weight: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0)

    @property
    def first(self) -> Settings:
        """What is taken where there is nothing to choose by: the defaults, as far as they are among what is tried."""
        return DEFAULT._replace(
            **{name: tried[0] for name, tried in self._asdict().items() if getattr(DEFAULT, name) not in tried}
        )


GRIDS = {
    "graph_text": Grid(),
    "graph_text_no_text": Grid(text_weight=(0.0,)),
    "graph_text_no_graph": Grid(gap_decay=(None,), text_weight=(1.0,)),
    "graph_text_own": Grid(history=(OWN,)),
}


class Choice(NamedTuple):
    """Attributes:
    settings: the best of the grid. score: their NDCG@10, None without validation targets. n: targets that chose.
    """

    settings: Settings
    score: float | None
    n: int


def choose_settings(inputs: BaselineInputs, parts: Parts, grid: Grid) -> Choice:
    """The settings that rank the validation targets best, by the NDCG@10 that picks a model's step, too
    (`eval.selection`): the mean over services of that in the service, or that in the union. The first if several do.
    """
    config, data = inputs.config, inputs.data
    if not np.any(data.split_ids == VALID):
        return Choice(grid.first, None, 0)
    n_valid = min(config.train.n_valid, MOST_VALID)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, n_valid=n_valid))
    examples, by_service = make_valid_set(config, data), config.eval.selection == "in_service"
    n = len(examples.targets)
    gain = {Settings(*values): np.zeros(n) for values in itertools.product(*grid)}
    for which, services in _list_blocks(examples, by_service):
        for settings, found in _rank_block(examples, which, services, parts, grid):
            gain[settings][which] = found
    present = np.unique(examples.target_service)
    rows = [examples.target_service == z for z in present] if by_service else [np.ones(n, bool)]
    score = {settings: float(np.mean([found[own].mean() for own in rows])) for settings, found in gain.items()}
    best = max(score, key=score.__getitem__)
    return Choice(best, score[best], n)


def _list_blocks(examples: EvalDataset, by_service: bool) -> Iterator[tuple[np.ndarray, range]]:
    """Numbers of targets, and the services among whose items they are ranked together."""
    catalogue, service = examples.dataset.catalogue, examples.target_service
    parts = [(np.flatnonzero(service == z), range(z, z + 1)) for z in np.unique(service).tolist()]
    if not by_service:
        parts = [(np.arange(len(service)), range(catalogue.n_services))]
    for which, services in parts:
        n_columns = catalogue.offsets[services.stop] - catalogue.offsets[services.start]
        n = int(max(MOST_CELLS // n_columns, 1))
        for block, _ in examples.histories.take(which).blocks(n):
            yield which[block], services


def _rank_block(
    examples: EvalDataset, which: np.ndarray, services: range, parts: Parts, grid: Grid
) -> Iterator[tuple[Settings, np.ndarray]]:
    """All settings of the grid, and the NDCG@10 of the targets `which` by them."""
    histories, measure = examples.histories.take(which), _make_measure(examples, which, services)
    offsets = examples.dataset.catalogue.offsets
    nothing = np.zeros((len(which), offsets[services.stop] - offsets[services.start]), np.float32)
    for history, decay in itertools.product(grid.history, grid.decay):
        weight_nI = parts.weigh(histories, history, decay)
        text = nothing
        if any(grid.text_weight):
            text = np.hstack([parts.score_text(weight_nI, z, history) for z in services])
        for gap_decay in grid.gap_decay:
            graph = nothing
            if gap_decay is not None:
                graph = np.hstack([parts.score_graph(weight_nI, z, history, gap_decay) for z in services])
            for text_weight in grid.text_weight:
                scores = graph + np.float32(text_weight) * text if text_weight else graph
                yield Settings(history, decay, gap_decay, text_weight), measure(scores)


def _make_measure(examples: EvalDataset, which: np.ndarray, services: range) -> Callable[[np.ndarray], np.ndarray]:
    """The NDCG@10 of targets by scores of the services' items."""
    lo, hi = (examples.dataset.catalogue.offsets[z] for z in (services.start, services.stop))
    item, seen = examples.dataset.log.item, None
    if examples.config.eval.mask_seen:
        distinct = examples.histories.take(which).distinct(item)
        inside = distinct.keep((item[distinct.rows] >= lo) & (item[distinct.rows] < hi))
        seen = inside.offsets, item[inside.rows] - lo
    target = examples.target_item[which] - lo
    return lambda scores: per_target_metrics(count_ranks(scores, target, seen))["ndcg@10"]


def _register(name: str, grid: Grid) -> None:
    def rank(inputs: BaselineInputs) -> TunedRanks:
        data, examples = inputs.data, inputs.examples
        parts = Parts(data.dataset, data.split_ids)
        chosen = choose_settings(inputs, parts, grid)
        chunk = int(min(max(MOST_CELLS // data.dataset.catalogue.n_items, 1), 512))
        scorer, seen = GraphText(parts, chosen.settings), inputs.config.eval.mask_seen
        ranks = rank_by_scores(scorer, data.dataset, examples.targets, examples.histories, seen, chunk)
        settings = {**chosen.settings._asdict(), "valid_ndcg@10": chosen.score, "n_valid": chosen.n}
        return TunedRanks(ranks, settings, {"n_stored": scorer.n_stored})

    def fit(dataset: Dataset, split_ids: np.ndarray) -> GraphText:
        return fit_graph_text(dataset, split_ids, grid.first)

    rank.__wrapped__ = fit  # type: ignore[attr-defined]
    register_baseline(name)(rank)


for _name, _grid in GRIDS.items():
    _register(_name, _grid)
