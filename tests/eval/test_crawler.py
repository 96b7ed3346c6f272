"""One user with thousands of events, most of them targets: the same figures, and never all rows of their histories."""

import tracemalloc

import numpy as np
import pytest

from moerec.config import AuditConfig, Config, DataConfig, EvalConfig, SplitConfig
from moerec.data import splits
from moerec.data.histories import Histories
from moerec.data.splits import TEST, TRAIN, gather_histories
from moerec.eval import audit
from moerec.eval.audit.subject import Subject
from moerec.eval.baselines import BASELINES, rank_by_scores
from moerec.eval.ranking import EvalDataset
from tests.random_dataset import make_dataset

SCORERS = [name for name in BASELINES.names() if hasattr(BASELINES[name], "__wrapped__")]


def make_crawler(n_events, n_targets, items_per_service=(60, 90)):
    """A data set, its split, and the targets: the crawler's last events, and the last event of everybody else."""
    dataset = make_dataset([n_events, *range(40)], items_per_service)
    log = dataset.log
    targets = np.concatenate([np.arange(n_events - n_targets, n_events), log.offsets[3:] - 1])
    split_ids = np.full(log.n_events, TRAIN, np.int8)
    split_ids[targets] = TEST
    return dataset, split_ids, targets


def make_config(mask_seen=True):
    return Config(data=DataConfig(seq_len=16, history_len=8), eval=EvalConfig(mask_seen=mask_seen, batch_size=32))


def run_checks(dataset, split_ids, targets):
    subject = Subject(SplitConfig(), dataset, split_ids, False, targets, gather_histories(dataset, targets, False))
    return [row for check in audit.CHECKS for row in check(subject, AuditConfig())]


def written_out(dataset, targets, per_service):
    found = splits.gather_histories(dataset, targets, per_service)
    return Histories(found.offsets, found.rows)


def test_the_audit_says_the_same_of_histories_a_few_at_a_time(monkeypatch):
    case = make_crawler(400, 150)
    with monkeypatch.context() as patch:
        patch.setattr("moerec.eval.ranking.dataset.gather_histories", written_out)
        patch.setattr(f"{__name__}.gather_histories", written_out)
        wanted = run_checks(*case)
    monkeypatch.setattr("moerec.data.histories.MOST_ROWS", 500)
    assert run_checks(*case) == wanted
    assert len(wanted) > 15


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("mask_seen", [False, True])
def test_baselines_rank_the_same_a_few_targets_at_a_time(monkeypatch, name, mask_seen):
    dataset, split_ids, targets = make_crawler(400, 150)
    model = BASELINES[name].__wrapped__(dataset, split_ids)
    wanted = rank_by_scores(model, dataset, targets, written_out(dataset, targets, False), mask_seen)
    monkeypatch.setattr("moerec.data.histories.MOST_ROWS", 500)
    monkeypatch.setattr("moerec.eval.baselines.item_to_item._MANY_ROWS", 0)
    found = rank_by_scores(model, dataset, targets, gather_histories(dataset, targets, False), mask_seen)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.greater, other.greater)
        np.testing.assert_array_equal(one.equal, other.equal)


@pytest.mark.parametrize("history", ["all", "own", "others"])
def test_batches_are_the_same_and_the_mask_is_as_wide_as_there_are_items(monkeypatch, history):
    dataset, split_ids, targets = make_crawler(400, 150, (5, 7))
    visible = split_ids != TEST
    found = EvalDataset(dataset, targets, make_config(), visible, history)
    monkeypatch.setattr("moerec.eval.ranking.dataset.gather_histories", written_out)
    wanted = EvalDataset(dataset, targets, make_config(), visible, history)
    assert found.history_len.tolist() == wanted.history_len.tolist()
    assert found.repeated == wanted.repeated
    n_batches = 0
    for (which, batch, asked), (same, other, others) in zip(found.batches(), wanted.batches(), strict=True):
        assert which == same
        for x, y in zip([*batch[:8], *batch.request, *asked], [*other[:8], *other.request, *others], strict=True):
            np.testing.assert_array_equal(x, y)
        assert asked.seen.shape[1] <= 16
        for target, seen in zip(range(which.start, which.stop), asked.seen, strict=False):
            kept = seen[seen >= 0].tolist()
            rows = wanted.histories.slice(target, target + 1).rows
            assert sorted(kept) == sorted(set(dataset.log.item[rows].tolist()))
        n_batches += 1
    assert n_batches > 5


def test_no_array_is_as_large_as_all_histories_together(monkeypatch):
    dataset, split_ids, targets = make_crawler(2000, 1200)
    monkeypatch.setattr("moerec.data.histories.MOST_ROWS", 1 << 14)
    monkeypatch.setattr("moerec.eval.baselines.item_to_item._MANY_ROWS", 1 << 12)
    monkeypatch.setattr("moerec.eval.audit.chance._N_DRAWS", 100)  # as many whatever the data
    monkeypatch.setattr("moerec.eval.audit.chance._N_SEQUENCES", 1000)
    names = ("popularity_by_service", "markov", "item_knn", "item_knn_cross")
    models = [BASELINES[name].__wrapped__(dataset, split_ids) for name in names]
    n_bytes = 8 * int(gather_histories(dataset, targets, False).length.sum())
    tracemalloc.start()
    try:
        run_checks(dataset, split_ids, targets)
        examples = EvalDataset(dataset, targets, make_config())
        assert sum(which.stop - which.start for which, _, _ in examples.batches()) == len(targets)
        for model in models:
            rank_by_scores(model, dataset, targets, examples.histories, True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n_bytes / 4, (peak, n_bytes)
