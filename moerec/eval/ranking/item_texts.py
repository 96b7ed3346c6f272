"""How well texts find their items and items tell their texts, over the items that were held out and over the others."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from moerec.config import Config
from moerec.data.load import RunData
from moerec.data.packing import place_sequences
from moerec.data.pipeline.item_texts import TO_ITEM, TO_TEXT, pack_item_texts
from moerec.data.pipeline.mixture import Widths
from moerec.errors import WorkError
from moerec.eval.language import HeldOut, describe_valid, format_language, measure_nats
from moerec.eval.metrics import build_table, per_target_metrics, summarise
from moerec.eval.ranking.dataset import RankQueries
from moerec.eval.ranking.rank import make_evaluator, rank_targets
from moerec.nn.model import Predictor
from moerec.tasks import LanguageModel
from moerec.tasks.base import render_targets
from moerec.train.loop import Evaluator
from moerec.types import Batch, Catalog

HELD_OUT, TRAINED = "held_out", "trained"  # the groups of items


class ItemTextTargets:
    """Items that have a text, as sequences packed once per batch of a fixed shape."""

    def __init__(self, config: Config, data: RunData, item: np.ndarray, way: str):
        """Args: the items; whether they are asked for (`TO_ITEM`) or told of (`TO_TEXT`)."""
        assert data.item_texts is not None
        self.item, self._way, self._data, self._texts = item, way, data, data.item_texts
        self._n, self._row_len = config.eval.batch_size, config.data.seq_len
        self._length = self._texts.length[item] + 1
        n_rows = math.ceil(self._n * float(self._length.mean() if len(item) else 1) / self._row_len * 1.1)
        self._shape = max(1, n_rows), self._row_len
        self._widths = Widths.of(data)

    def batches(self) -> Iterator[tuple[slice, Batch, RankQueries]]:
        """Consecutive items: which, their sequences, and whom these ask for; nothing is masked."""
        items, done = self._data.dataset.catalogue, 0
        to_item = np.full(len(self.item), self._way == TO_ITEM)
        while done < len(self.item):
            placed = place_sequences(self._length[done : done + self._n], *self._shape)
            which = slice(done, done + placed.n)
            item, length = self.item[which], self._length[which]
            packed = pack_item_texts(self._texts, items, item, to_item[which], placed, self._shape)
            # Measured as documents are: by the name of the task whose targets tokens are.
            targets = render_targets([LanguageModel()], packed)
            batch = self._widths.widen(packed.batch)._replace(targets=targets)
            of_service = items.service[item]
            low, high = items.offsets[of_service], items.offsets[of_service + 1]
            queries = RankQueries(
                slot=self._pad(placed.start + length - 1, -1),
                target=self._pad(item, -1),
                low=self._pad(low, 0),
                high=self._pad(high, 1),
                seen=self._pad(np.full((placed.n, 1), -1), -1),
            )
            yield which, batch, queries
            done += placed.n

    def users_of(self, which: slice) -> np.ndarray:
        """Nobody."""
        raise WorkError("texts of items are of no user")

    def _pad(self, values: np.ndarray, empty: int) -> np.ndarray:
        more = np.full((self._n - len(values), *values.shape[1:]), empty)
        return np.concatenate([values, more]).astype(np.int32)


def rank_items_by_text(config: Config, data: RunData, item: np.ndarray, predictor: Predictor, catalog: Catalog) -> dict:
    """The table of items that are asked for by their texts, and `in_service` of all of them together; full ranking."""
    ranks = rank_targets(predictor, ItemTextTargets(config, data, item, TO_ITEM), catalog)
    items = data.dataset.catalogue
    table = build_table(ranks, items.service[item], items.services)
    table["in_service"]["all"] = summarise(per_target_metrics(ranks.in_service))
    return table


def measure_item_texts(
    config: Config, data: RunData, item: np.ndarray, predictor: Predictor, catalog: Catalog
) -> dict[str, float | int]:
    """Nats a token and bits a byte of the items' texts, told by the items. The end of a text counts, but is no byte."""
    texts = data.item_texts
    assert texts is not None
    batches = (batch for _, batch, _ in ItemTextTargets(config, data, item, TO_TEXT).batches())
    nats, n_tokens = measure_nats(config, predictor, batches, catalog)
    n_bytes = int(texts.n_bytes[item].sum())
    found = {"nats_per_token": nats, "bits_per_byte": nats * n_tokens / math.log(2) / max(n_bytes, 1)}
    return found | {"n_items": len(item), "n_tokens": n_tokens, "n_bytes": n_bytes}


def evaluate_words(config: Config, data: RunData, predictor: Predictor, catalog: Catalog) -> dict[str, Any]:
    """`metrics.json` `tasks` of a run with words beside events: each task's metrics, those of items by group.

    The figures that stand without a group are those of the held-out items: of what training was not given.
    """
    found: dict[str, Any] = {}
    if data.corpus is not None and "lm" in config.tasks:
        found["lm"] = HeldOut(config, data.corpus, Widths.of(data).widen).measure(predictor, catalog)
    for task, measure in ((TO_ITEM, rank_items_by_text), (TO_TEXT, measure_item_texts)):
        if task not in config.tasks or data.item_texts is None:
            continue
        own = {}
        for group in (HELD_OUT, TRAINED):
            item = data.item_texts.list_items(group == HELD_OUT)
            if len(item):
                own[group] = measure(config, data, item, predictor, catalog)
        held: dict[str, Any] = own.get(HELD_OUT, {})
        if task == TO_ITEM:
            tails = {"union": "", "in_service": "_in_service"}
            held = {f"recall@10{tail}": held[part]["all"]["recall@10"] for part, tail in tails.items() if held}
        else:
            held = {name: held[name] for name in ("nats_per_token", "bits_per_byte") if held}
        found[task] = {**held, **own}
    return found


def make_mixed_evaluator(config: Config, data: RunData) -> Evaluator:
    """Scores what is trained by its ranking of events, as without words, and tells how the other tasks do."""
    rank = make_evaluator(config, data)
    if not config.data.mix.has_words:
        return rank
    assert data.corpus is not None
    assert data.item_texts is not None
    documents = HeldOut(config, data.corpus, Widths.of(data).widen)
    item = data.item_texts.list_items(held_out=True)
    n = min(len(item), config.train.n_valid)
    item = item[np.arange(n) * len(item) // max(n, 1)]  # they lie evenly among all

    def evaluate(predictor: Predictor, catalog: Catalog) -> tuple[float, dict[str, float]]:
        score, valid = rank(predictor, catalog)
        if "lm" in config.tasks:
            valid |= describe_valid(documents.measure(predictor, catalog, config.train.n_valid))
        if TO_ITEM in config.tasks and n:
            table = rank_items_by_text(config, data, item, predictor, catalog)
            valid[f"valid/{TO_ITEM}/recall@10"] = table["union"]["all"]["recall@10"]
        if TO_TEXT in config.tasks and n:
            told = measure_item_texts(config, data, item, predictor, catalog)
            valid[f"valid/{TO_TEXT}/bits_per_byte"] = told["bits_per_byte"]
        return score, valid

    return evaluate


def format_words(metrics: dict[str, Any]) -> str:
    """A line for each task on words of a run that has events, too; empty where there is none."""
    tasks = metrics.get("tasks") or {}
    lines = [format_language(metrics)] if "lm" in tasks else []
    for group in (HELD_OUT, TRAINED):
        if found := tasks.get(TO_ITEM, {}).get(group):
            union, own = (found[part]["all"]["recall@10"] for part in ("union", "in_service"))
            told = f"recall@10 {union:.4f}, among its service's {own:.4f}"
            lines.append(f"{TO_ITEM}: {told}; {found['union']['all']['n']:,} {group.replace('_', ' ')} items")
        if found := tasks.get(TO_TEXT, {}).get(group):
            told = f"{found['nats_per_token']:.4f} nats, {found['bits_per_byte']:.4f} bits a byte"
            lines.append(f"{TO_TEXT}: {told}; {found['n_items']:,} {group.replace('_', ' ')} items")
    return "\n".join(lines)
