"""Transfer between services, against data sets from which the other services' events, or the own ones, are deleted."""

import dataclasses

import numpy as np
import pytest

from moerec.config import SplitConfig
from moerec.data.dataset import find_multi_service_users
from moerec.data.load import load_data
from moerec.data.splits import TEST, select_targets
from moerec.eval.metrics import per_target_metrics
from moerec.eval.probes.transfer import describe_transfer
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.train.run_dir import bind_catalog, make_sizes
from moerec.train.state import init_state, make_predictor
from tests.tiny import make_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = make_config()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, split=SplitConfig(kind="leave_one_out", per_service=True))
    )
    data = load_data(config.data, tmp_path_factory.mktemp("transfer"))
    predictor = make_predictor(init_state(config, make_sizes(config, data)))
    return config, data, predictor, bind_catalog(predictor, data.catalog)


def delete(dataset, row: int, own: bool):
    """The user of a target alone has events: those of strictly earlier times, of its service or of the others.

    The other users stay, for the codes of profile fields are numbered over all of them.
    """
    log, service = dataset.log, dataset.event_service
    user = log.user[row]
    rows = [
        r
        for r in range(log.offsets[user], row)
        if (service[r] == service[row]) == own and (own or log.time_us[r] < log.time_us[row])
    ]
    offsets = np.where(np.arange(log.n_users + 1) > user, len(rows) + 1, 0)
    return dataclasses.replace(dataset, log=log.take(np.array([*rows, row]), offsets)), len(rows)


def test_metrics_are_those_of_data_without_the_other_or_the_own_events(trained):
    config, data, predictor, catalog = trained
    dataset = data.dataset
    targets = select_targets(dataset, data.split_ids, TEST)[::9]
    found = describe_transfer(config, predictor, data, targets, catalog)
    assert find_multi_service_users(dataset)[dataset.log.user[targets]].all()
    by_hand = {name: {"own": [], "others": []} for name in dataset.catalogue.services}
    for row in targets:
        for history in ("own", "others"):
            alone, last = delete(dataset, int(row), history == "own")
            ranks = rank_targets(predictor, EvalDataset(alone, np.array([last]), config), catalog).in_service
            name = dataset.catalogue.services[dataset.event_service[row]]
            by_hand[name][history].append(float(per_target_metrics(ranks)["ndcg@10"][0]))
    for name, values in by_hand.items():
        assert found[name]["n"] == len(values["own"])
        for history, ndcg in values.items():
            assert found[name][history]["ndcg@10"] == pytest.approx(np.mean(ndcg), abs=1e-6)
        assert found[name]["gain"]["difference"] == pytest.approx(
            found[name]["all"]["ndcg@10"] - found[name]["own"]["ndcg@10"]
        )
        assert found[name]["cold"]["difference"] == pytest.approx(
            found[name]["others"]["ndcg@10"] - found[name]["popularity"]["ndcg@10"]
        )
        assert 0 < found[name]["gain"]["p_value"] <= 1


def test_who_uses_one_service_is_no_traveller(trained):
    config, data, predictor, catalog = trained
    dataset, log = data.dataset, data.dataset.log
    rows = np.flatnonzero((dataset.event_service == 0) | (log.user >= 3))
    counts = np.bincount(log.user[rows], minlength=log.n_users)
    alone = dataclasses.replace(dataset, log=log.take(rows, np.concatenate([[0], np.cumsum(counts)])))
    assert find_multi_service_users(alone).tolist() == [False] * 3 + [True] * (log.n_users - 3)
    targets = np.flatnonzero(alone.log.user < 3)[-1:]
    only = dataclasses.replace(data, dataset=alone)
    assert describe_transfer(config, predictor, only, targets, catalog) == {}
