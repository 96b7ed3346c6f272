"""First events of users whom training has not seen: predicted from the request, and from nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from moerec.config import SplitConfig
from moerec.data.load import load_data
from moerec.data.splits import TRAIN
from moerec.eval.probes.first_events import evaluate_first_events
from moerec.eval.ranking import make_test_set
from moerec.nn.model import Predictor, SequenceModel
from moerec.train.run_dir import bind_catalog, make_sizes
from tests.small_model import fill
from tests.tiny import make_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with random weights, which heeds all that it is given."""
    config = make_config()
    split = SplitConfig(kind="user", user_fraction=0.3)
    model = dataclasses.replace(config.model, event_time=True)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, split=split), model=model)
    data = load_data(config.data, tmp_path_factory.mktemp("first"))
    shapes = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config.model, make_sizes(config, data)))
    predictor = Predictor(fill(shapes), None)
    return config, data, predictor, bind_catalog(predictor, data.catalog)


def evaluate(world, data, mask_seen=False):
    config, _, predictor, catalog = world
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, mask_seen=mask_seen))
    return evaluate_first_events(config, data, make_test_set(config, data), predictor, catalog)


def change(data, rows: np.ndarray, *, items: bool):
    """The data with other times, places, contexts and actions of some events, and other items of them, too."""
    log, dataset = data.dataset.log, data.dataset
    n_codes = np.array([len(values) for values in dataset.context.values()])
    columns = {name: getattr(log, name).copy() for name in ("item", "action", "time_us", "context", "utc_offset")}
    columns["time_us"][rows] += 5 * 3600 * 10**6
    columns["utc_offset"][rows] += 3 * 3600
    columns["context"][rows] = (columns["context"][rows] + 1) % n_codes
    columns["action"][rows] = (columns["action"][rows] + 1) % len(dataset.actions)
    if items:
        columns["item"][rows] = (columns["item"][rows] + 37) % dataset.catalogue.n_items
    return dataclasses.replace(
        data, dataset=dataclasses.replace(dataset, log=dataclasses.replace(log, **columns)), split_ids=data.split_ids
    )


@pytest.mark.parametrize("mask_seen", [False, True])
def test_all_held_out_users_first_events_are_ranked(world, mask_seen):
    """Nothing has been seen before a first event, so that nothing is masked."""
    _, data, _, _ = world
    users = make_test_set(world[0], data).user
    assert len(users) == len(set(users.tolist())) == 18
    first = data.dataset.log.offsets[users]
    found = evaluate(world, data, mask_seen)
    assert set(found) == {"model", "popularity_by_hour", "difference", "p_value"}
    services = data.dataset.catalogue.services
    n = {name: int((data.dataset.event_service[first] == z).sum()) for z, name in enumerate(services)}
    for table in (found["model"], found["popularity_by_hour"]):
        assert {name: row["n"] for name, row in table["in_service"].items()} == {k: v for k, v in n.items() if v}
        assert table["union"]["all"]["n"] == 18
    means = [found[name]["union"]["all"]["recall@10"] for name in ("model", "popularity_by_hour")]
    assert found["difference"] == pytest.approx(means[0] - means[1])
    assert 0 < found["p_value"] <= 1
    assert found == evaluate(world, data)


def test_what_the_users_do_later_changes_nothing(world):
    _, data, _, _ = world
    log = data.dataset.log
    held_out = np.setdiff1d(np.arange(log.n_users), log.user[data.split_ids == TRAIN])
    later = np.flatnonzero(np.isin(log.user, held_out) & ~np.isin(np.arange(log.n_events), log.offsets[:-1]))
    assert len(later) > 100
    assert evaluate(world, change(data, later, items=True)) == evaluate(world, data)


def test_the_request_alone_changes_the_models_ranks(world):
    """Its time and place and context: no action, no item, which it does not have."""
    _, data, _, _ = world
    first = data.dataset.log.offsets[make_test_set(world[0], data).user]
    before, after = evaluate(world, data), evaluate(world, change(data, first, items=False))
    assert before["model"] != after["model"]
    assert before["model"]["union"]["all"]["n"] == after["model"]["union"]["all"]["n"]


def test_popularity_by_hour_has_learnt_from_the_others(world):
    """Other training events are another popularity, and leave the model alone."""
    _, data, _, _ = world
    trained = np.flatnonzero(data.split_ids == TRAIN)
    before, after = evaluate(world, data), evaluate(world, change(data, trained, items=True))
    assert before["model"] == after["model"]
    assert before["popularity_by_hour"] != after["popularity_by_hour"]
