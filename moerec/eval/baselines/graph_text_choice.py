"""The settings of item graph and texts, chosen on the validation targets: as a whole, and with a part left out.

All are tried on a few targets, and the better ones on more of them (successive halving: Jamieson & Talwalkar 2016),
which is a sixth of the work of trying all on all. Where there are few targets, all are tried on all.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moerec.data.dataset import Dataset
from moerec.data.splits import VALID
from moerec.eval.baselines.base import BaselineInputs, TunedRanks, rank_by_scores, register_baseline
from moerec.eval.baselines.graph_text import ALL, DEFAULT, JOINT, OWN, GraphText, Parts, Settings, fit_graph_text
from moerec.eval.metrics import count_ranks, ndcg_at
from moerec.eval.ranking.dataset import EvalDataset, make_valid_set

MOST_VALID = 8000  # validation targets that choose
ROUNDS = (500, 2000)  # targets after which the better ones of the settings go on
KEPT = 0.25  # the share of the settings that do
MOST_CELLS = 1 << 20  # scores of a block of targets that choose, so that it stays in a processor's cache
MOST_RANKED = 1 << 22  # scores of a block of test targets, which is scored once
LEAST_ROWS = 8  # targets of a block where there are very many items


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

    def reduce(self, parts: Parts, n_services: int) -> "Grid":
        """The grid without what changes no score, of the data that there are."""
        grid = self
        if n_services == 1:
            grid = grid._replace(history=grid.history[:1])
        if not parts.has_words:
            grid = grid._replace(text_weight=grid.text_weight[:1])
        if not parts.has_transitions or parts.max_gap == 1:
            grid = grid._replace(gap_decay=grid.gap_decay[:1])
        return grid


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


def choose_settings(inputs: BaselineInputs, parts: Parts, grid: Grid, rounds: Sequence[int] = ROUNDS) -> Choice:
    """The settings that rank the validation targets best, by the NDCG@10 that picks a model's step, too
    (`eval.selection`): the mean over services of that in the service, or that in the union. The first if several do.

    Args:
      rounds: rising numbers of targets; after each, `KEPT` of the settings go on. With none all are tried on all.
    """
    config, data = inputs.config, inputs.data
    if not np.any(data.split_ids == VALID):
        return Choice(grid.first, None, 0)
    n_valid = min(config.train.n_valid, MOST_VALID)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, n_valid=n_valid))
    examples, by_service = make_valid_set(config, data), config.eval.selection == "in_service"
    service, n = examples.target_service, len(examples.targets)
    order, before = _order_targets(service, by_service, config.data.seed), 0
    left = [Settings(*values) for values in itertools.product(*grid.reduce(parts, data.dataset.catalogue.n_services))]
    gain = {settings: np.zeros(n) for settings in left}
    for done in (*(k for k in rounds if k < n), n):
        for which, services in _list_blocks(examples, order[before:done], by_service):
            for settings, found in _rank_block(examples, which, services, parts, left):
                gain[settings][which] = found
        measured, before = order[:done], done
        rows = [measured[service[measured] == z] for z in np.unique(service[measured])] if by_service else [measured]
        score = {settings: float(np.mean([gain[settings][own].mean() for own in rows])) for settings in left}
        if done < n:
            best = sorted(left, key=score.__getitem__, reverse=True)[: max(round(KEPT * len(left)), 1)]
            left = [settings for settings in left if settings in best]  # in their order, which settles what is level
    chosen = max(left, key=score.__getitem__)
    return Choice(chosen, score[chosen], n)


def _order_targets(service: np.ndarray, by_service: bool, seed: int) -> np.ndarray:
    """`[n]` the numbers of the targets at random; where services count alike, as many of each among the first."""
    order = np.random.default_rng([seed, VALID, 1]).permutation(len(service))
    if not by_service:
        return order
    own = service[order]
    grouped = np.argsort(own, kind="stable")
    place = np.empty(len(order), np.int64)
    place[grouped] = np.arange(len(order)) - np.searchsorted(own[grouped], own[grouped])
    return order[np.argsort(place, kind="stable")]


def _list_blocks(examples: EvalDataset, targets: np.ndarray, by_service: bool) -> Iterator[tuple[np.ndarray, range]]:
    """Numbers of targets, and the services among whose items they are ranked together."""
    catalogue, service = examples.dataset.catalogue, examples.target_service[targets]
    parts = [(targets[service == z], range(z, z + 1)) for z in np.unique(service).tolist()]
    if not by_service:
        parts = [(targets, range(catalogue.n_services))]
    for which, services in parts:
        n = _count_rows(MOST_CELLS, int(catalogue.offsets[services.stop] - catalogue.offsets[services.start]))
        for block, _ in examples.histories.take(which).blocks(n):
            yield which[block], services


def _count_rows(most_cells: int, n_items: int) -> int:
    """Targets of a block whose items are scored at once."""
    return int(np.clip(most_cells // max(n_items, 1), LEAST_ROWS, 512))


def _rank_block(
    examples: EvalDataset, which: np.ndarray, services: range, parts: Parts, tried: Sequence[Settings]
) -> Iterator[tuple[Settings, np.ndarray]]:
    """The settings, and the NDCG@10 of the targets `which` by them; what they share is computed once."""
    histories, measure = examples.histories.take(which), _make_measure(examples, which, services)
    offsets = examples.dataset.catalogue.offsets
    nothing = np.zeros((len(which), offsets[services.stop] - offsets[services.start]), np.float32)
    for (history, decay), members in itertools.groupby(tried, lambda settings: settings[:2]):
        alike, text = list(members), nothing
        weight_nI = parts.weigh(histories, history, decay)
        if any(settings.text_weight for settings in alike):
            text = np.hstack([parts.score_text(weight_nI, z, history) for z in services])
        for gap_decay, weights in itertools.groupby(alike, lambda settings: settings.gap_decay):
            graph = nothing
            if gap_decay is not None:
                graph = np.hstack([parts.score_graph(weight_nI, z, history, gap_decay) for z in services])
            for settings in weights:
                is_mixed = settings.text_weight > 0
                yield settings, measure(graph + np.float32(settings.text_weight) * text if is_mixed else graph)


def _make_measure(examples: EvalDataset, which: np.ndarray, services: range) -> Callable[[np.ndarray], np.ndarray]:
    """The NDCG@10 of targets by scores of the services' items."""
    lo, hi = (examples.dataset.catalogue.offsets[z] for z in (services.start, services.stop))
    item, seen = examples.dataset.log.item, None
    if examples.config.eval.mask_seen:
        distinct = examples.histories.take(which).distinct(item)
        inside = distinct.keep((item[distinct.rows] >= lo) & (item[distinct.rows] < hi))
        seen = inside.offsets, item[inside.rows] - lo
    target = examples.target_item[which] - lo
    return lambda scores: ndcg_at(count_ranks(scores, target, seen), 10)


def _find_reason(inputs: BaselineInputs, parts: Parts, grid: Grid) -> str:
    """Why a baseline would have nothing to say; empty where it has."""
    if not (parts.has_words or parts.has_transitions):
        return "the items have neither texts nor attributes, and nobody has two of them in training"
    is_single = inputs.data.dataset.catalogue.n_services == 1
    if is_single and grid == GRIDS["graph_text_own"] and "graph_text" in inputs.config.baselines:
        return "it is graph_text where there is one service"
    return ""


def _register(name: str, grid: Grid) -> None:
    def rank(inputs: BaselineInputs) -> TunedRanks | None:
        data, examples = inputs.data, inputs.examples
        parts = Parts(data.dataset, data.split_ids)
        reason = _find_reason(inputs, parts, grid)
        if reason:
            print(f"baseline {name}: left out, since {reason}", file=sys.stderr)
            return None
        chosen = choose_settings(inputs, parts, grid)
        scorer, seen = GraphText(parts, chosen.settings), inputs.config.eval.mask_seen
        chunk = _count_rows(MOST_RANKED, data.dataset.catalogue.n_items)
        ranks = rank_by_scores(scorer, data.dataset, examples.targets, examples.histories, seen, chunk)
        settings = {**chosen.settings._asdict(), "valid_ndcg@10": chosen.score, "n_valid": chosen.n}
        return TunedRanks(ranks, settings, {"n_stored": scorer.n_stored})

    def fit(dataset: Dataset, split_ids: np.ndarray) -> GraphText:
        return fit_graph_text(dataset, split_ids, grid.first)

    rank.__wrapped__ = fit  # type: ignore[attr-defined]
    register_baseline(name)(rank)


for _name, _grid in GRIDS.items():
    _register(_name, _grid)
