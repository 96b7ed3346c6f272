"""The request that a report shows, of models that answer at once: against the ranking, and against the log."""

import dataclasses

import numpy as np
import pytest

from moerec.config import MoEConfig
from moerec.data.load import load_data
from moerec.data.splits import TEST
from moerec.eval.probes.example import N_SHOWN, describe_example, pick_row
from moerec.eval.ranking import EvalDataset, make_test_set, rank_targets
from tests.tiny import make_config, make_untrained

MOE = MoEConfig(layers=(0,), n_per_group=2, d_expert=8, tile=8)
KINDS = {
    "dense": {"pointer": "services", "text_pointer": True},
    "experts": {"moe": MOE},
}


def make_run(folder, mask_seen=False, **model):
    config = make_config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, text_neighbors=4),
        model=dataclasses.replace(config.model, n_layers=1, **model),
        eval=dataclasses.replace(config.eval, mask_seen=mask_seen),
    )
    return make_untrained(folder, config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_a_request(kind, tmp_path):
    run = make_run(tmp_path, **KINDS[kind])
    dataset, log = run.data.dataset, run.data.dataset.log
    row = pick_row(run.config, make_test_set(run.config, run.data))
    found = describe_example(run.config, dataset, row, run.predictor, run.catalog)
    (user,) = log.users_of(np.array([row]))
    before = np.arange(log.offsets[user], row)
    assert found["user"] == dataset.users[user]
    assert found["n_history"] == len(before)
    assert [event["id"] for event in found["history"]] == dataset.catalogue.ids[log.item[before[-N_SHOWN:]]].tolist()
    assert np.datetime64(found["time"], "us").astype(np.int64) == log.time_us[row]
    assert found["target"]["id"] == dataset.catalogue.ids[log.item[row]]
    # The place and the probability are those of the ranking.
    ranks = rank_targets(run.predictor, EvalDataset(dataset, np.array([row]), run.config), run.catalog)
    greater, equal = int(ranks.union.greater[0]), int(ranks.union.equal[0])
    assert found["target"]["rank"] == pytest.approx(1 + greater + (equal - 1) / 2)
    assert np.log(found["target"]["p"]) == pytest.approx(ranks.log_p[0], rel=1e-3)
    p = [item["p"] for item in found["items"]]
    assert len(p) == N_SHOWN
    assert p == sorted(p, reverse=True)
    for item in found["items"]:
        assert sum(item["components"].values()) == pytest.approx(item["p"], rel=1e-4)
    for part in ("weights", "domain", "experts"):
        assert part not in found or sum(found[part].values()) == pytest.approx(1, abs=1e-5)
    assert ("weights" in found) == ("pointer" in KINDS[kind])
    assert ("domain" in found) == ("moe" in KINDS[kind]) == ("experts" in found)
    if kind == "experts":
        assert set(found["experts"]) == {*dataset.catalogue.services, "cross"}


def test_items_that_are_no_candidates_are_not_listed(tmp_path):
    run = make_run(tmp_path, mask_seen=True)
    dataset = run.data.dataset
    examples = make_test_set(run.config, run.data)
    for row in (examples.targets[examples.is_repeated][0], examples.targets[~examples.is_repeated][0]):
        found = describe_example(run.config, dataset, int(row), run.predictor, run.catalog)
        before = np.arange(dataset.log.offsets[dataset.log.users_of(np.array([row]))[0]], row)
        had = set(dataset.log.item[before].tolist())
        assert not {item["id"] for item in found["items"]} & {str(dataset.catalogue.ids[i]) for i in had}
        assert found["n_candidates"] == dataset.catalogue.n_items - len(had)
        assert (found["target"]["rank"] is None) == (dataset.log.item[row] in had)


def test_the_seed_draws_the_user_and_nothing_else_does(tmp_path):
    """All targets with a history of some length are met by some seed; the model is not asked."""
    config = make_config()
    data = load_data(config.data, tmp_path)
    examples = make_test_set(config, data)
    rows = [pick_row(dataclasses.replace(config, seed=seed), examples) for seed in range(400)]
    assert rows[:5] == [pick_row(dataclasses.replace(config, seed=seed), examples) for seed in range(5)]
    fit = set(examples.targets[examples.history_len >= N_SHOWN].tolist())
    assert set(rows) <= fit
    assert len(set(rows)) > 0.9 * len(fit)
    first = np.flatnonzero(data.split_ids == TEST)[:0]
    assert pick_row(config, EvalDataset(data.dataset, first, config)) is None
