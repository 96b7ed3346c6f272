"""Baselines against dictionaries and loops, and against the published row of the data folder's README."""

import collections
import dataclasses
import datetime
import functools
import itertools
import operator

import numpy as np
import pytest
import scipy.sparse

from moerec.data import splits
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog
from moerec.data.histories import Histories
from moerec.data.load import load_data
from moerec.errors import InputError, WorkError
from moerec.eval import baselines, metrics
from moerec.eval.baselines import (
    BASELINES,
    BaselineInputs,
    count_stored,
    rank_by_scores,
    register_baseline,
    register_scorer,
)
from moerec.eval.baselines.item_to_item import weigh_histories
from moerec.eval.ranking import make_test_set
from tests.amazon3_tables import read_amazon3
from tests.eval.small_logs import DAY, hold_out, make_world, train_sequences
from tests.tiny import make_config


def history_items(dataset, histories, t):
    return dataset.log.item[histories.rows[histories.offsets[t] : histories.offsets[t + 1]]].tolist()


def test_popularity_is_the_share_of_training_events():
    dataset = make_world()
    split_ids, targets, histories = hold_out(dataset)
    scores = baselines.fit_popularity(dataset, split_ids).score(dataset, targets, histories)
    count = collections.Counter(functools.reduce(operator.iadd, train_sequences(dataset, split_ids).values(), []))
    expected = [count[i] / sum(count.values()) for i in range(dataset.catalogue.n_items)]
    np.testing.assert_allclose(scores, np.tile(expected, (len(targets), 1)), rtol=1e-6)


def test_service_popularity_multiplies_service_and_item():
    dataset = make_world()
    split_ids, targets, histories = hold_out(dataset)
    offsets = histories.offsets.copy()
    offsets[1:] -= offsets[1]  # the first target has no history now
    histories = Histories(offsets, histories.rows[-offsets[-1] :])
    scores = baselines.fit_service_popularity(dataset, split_ids).score(dataset, targets, histories)
    sequences = train_sequences(dataset, split_ids).values()
    item_count = collections.Counter(functools.reduce(operator.iadd, sequences, []))
    of = dataset.catalogue.service.tolist()
    pairs = collections.Counter((of[i], of[j]) for s in sequences for i, j in itertools.pairwise(s))
    service_count = collections.Counter(of[i] for i in functools.reduce(operator.iadd, sequences, []))
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    for t in (0, 1, 5, 9):
        seen = history_items(dataset, histories, t)
        for i in range(dataset.catalogue.n_items):
            if seen:
                z = of[seen[-1]]
                p_service = (1 + pairs[z, of[i]]) / (2 + pairs[z, 0] + pairs[z, 1])
            else:
                p_service = (1 + service_count[of[i]]) / (2 + sum(service_count.values()))
            assert scores[t, i] == pytest.approx(p_service * item_count[i] / service_count[of[i]], rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_hour_popularity_equals_a_loop(seed):
    """Smoothed by hand: each hour on the local clock has twenty events more, shared out as all of training is."""
    dataset, rng = make_world(seed, sizes=(6, 5, 1)), np.random.default_rng(seed)
    n = dataset.log.n_events
    time = rng.integers(0, 300 * DAY, n)
    time[rng.random(n) < 0.2] = UNKNOWN_TIME
    log = dataclasses.replace(dataset.log, time_us=time, utc_offset=900 * rng.integers(-50, 50, n).astype(np.int32))
    dataset = dataclasses.replace(dataset, log=log)
    split_ids, targets, histories = hold_out(dataset)

    def hour_of(row):
        if time[row] == UNKNOWN_TIME:
            return None
        clock = datetime.timedelta(microseconds=int(time[row]), seconds=int(log.utc_offset[row]))
        return (datetime.datetime(1970, 1, 1) + clock).hour

    trained = [row for row in range(n) if split_ids[row] == splits.TRAIN]
    events = [(hour_of(row), int(log.item[row])) for row in trained]
    of = dataset.catalogue.service.tolist()
    share = collections.Counter(i for _, i in events)
    share = {i: share[i] / len(events) for i in range(12)}
    scores = baselines.fit_hour_popularity(dataset, split_ids).score(dataset, targets, histories)
    assert scores.dtype == np.float32
    assert {hour_of(row) is None for row in targets} == {False, True}
    for t, row in enumerate(targets):
        hour = hour_of(row)
        if hour is None:
            np.testing.assert_allclose(scores[t], list(share.values()), rtol=1e-5)
            continue
        at_hour = collections.Counter(i for h, i in events if h == hour)
        for i in range(12):
            of_service = sum(share[j] for j in range(12) if of[j] == of[i])
            n_service = sum(at_hour[j] for j in range(12) if of[j] == of[i])
            p_service = (n_service + 20 * of_service) / (at_hour.total() + 20)
            p_item = (at_hour[i] + 20 * share[i] / of_service) / (n_service + 20) if of_service else 0
            assert scores[t, i] == pytest.approx(p_service * p_item, rel=1e-5)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)


def test_markov_equals_dictionaries():
    dataset = make_world()
    split_ids, targets, histories = hold_out(dataset)
    model = baselines.fit_markov(dataset, split_ids, strength=2.0)
    scores = model.score(dataset, targets, histories)
    sequences = train_sequences(dataset, split_ids).values()
    pair, source = collections.Counter(), collections.Counter()
    for sequence in sequences:
        for i, j in itertools.pairwise(sequence):
            pair[i, j] += 1
            source[i] += 1
    count = collections.Counter(functools.reduce(operator.iadd, sequences, []))
    for t in range(len(targets)):
        seen = history_items(dataset, histories, t)
        for j in range(dataset.catalogue.n_items):
            last = seen[-1:]
            p = count[j] / sum(count.values())
            expected = (pair[last[0], j] + 2 * p) / (source[last[0]] + 2) if last else p
            assert scores[t, j] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("within_service", [False, True])
@pytest.mark.parametrize("last_n", [None, 2])
def test_item_knn_equals_sets(within_service, last_n):
    dataset = make_world()
    split_ids, targets, histories = hold_out(dataset)
    model = baselines.fit_item_knn(dataset, split_ids, 0.6, last_n, within_service)
    scores = model.score(dataset, targets, histories)
    users = collections.defaultdict(set)
    for (p, _), sequence in train_sequences(dataset, split_ids).items():
        for i in sequence:
            users[i].add(p)
    of = dataset.catalogue.service

    def similarity(i, j):
        if not (users[i] and users[j]):
            return 0.0
        return len(users[i] & users[j]) / np.sqrt(len(users[i]) * len(users[j]))

    for t in range(0, len(targets), 3):
        seen = history_items(dataset, histories, t)
        for j in range(dataset.catalogue.n_items):
            path = [i for i in seen if not within_service or of[i] == of[j]][::-1][:last_n]
            expected = sum(0.6**k * similarity(i, j) for k, i in enumerate(path))
            assert scores[t, j] == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("within_service", [False, True])
@pytest.mark.parametrize(("last_n", "n_kept"), [(None, 0), (2, 0), (2, 5)])
def test_similarities_that_are_not_kept_are_computed_the_same(monkeypatch, within_service, last_n, n_kept):
    """`n_kept` items' at most are kept."""
    dataset = make_world()
    split_ids, targets, histories = hold_out(dataset)
    kept = baselines.fit_item_knn(dataset, split_ids, 0.6, last_n, within_service)
    monkeypatch.setattr("moerec.eval.baselines.knn._MOST_KEPT", n_kept * dataset.catalogue.n_items)
    n_rows = 2 if last_n is None else 4  # of similarities at once: four are what two items of two services need
    monkeypatch.setattr("moerec.eval.baselines.knn._MOST_AT_ONCE", n_rows * dataset.catalogue.n_items)
    other = baselines.fit_item_knn(dataset, split_ids, 0.6, last_n, within_service)
    scores, others = (model.score(dataset, targets, histories) for model in (kept, other))
    assert scores.dtype == others.dtype == np.float32
    rows_kept = [part.is_kept.sum() for part in other.similarity._ranges]
    assert sum(rows_kept) >= n_kept
    assert sum(rows_kept) < dataset.catalogue.n_items
    if last_n is None or n_kept:  # the sum over a request's items is taken in parts
        np.testing.assert_allclose(others, scores, rtol=1e-5)
    else:
        np.testing.assert_array_equal(others, scores)


@pytest.mark.parametrize("per_service", [False, True])
@pytest.mark.parametrize("within_service", [False, True])
def test_weights_are_the_same_however_long_the_histories_are(monkeypatch, within_service, per_service):
    dataset = make_world()
    _, _, histories = hold_out(dataset, per_service)
    plain = weigh_histories(dataset, Histories(histories.offsets, histories.rows), 0.5, 2, within_service)
    monkeypatch.setattr("moerec.eval.baselines.item_to_item._MANY_ROWS", 0)
    found = weigh_histories(dataset, histories, 0.5, 2, within_service)
    np.testing.assert_array_equal(found.toarray(), plain.toarray())


def test_history_weights_add_up_over_repeats():
    dataset = make_world()
    rows = np.arange(4)
    dataset.log.item[:4] = [1, 7, 1, 2]
    weight = weigh_histories(dataset, Histories(np.array([0, 4]), rows), 0.5, None, True).toarray()[0]
    assert weight[[1, 2, 7]].tolist() == [0.5 + 0.25, 1.0, 1.0]


SCORERS = [name for name in BASELINES.names() if hasattr(BASELINES[name], "__wrapped__")]


def test_all_but_the_trained_ones_score_on_the_host():
    assert set(BASELINES.names()) - set(SCORERS) == {"sasrec_one_negative", "sasrec_sampled", "sasrec_full"}
    assert {"popularity", "popularity_by_service", "popularity_recent", "popularity_by_hour"} < set(SCORERS)
    assert {"markov", "item_knn", "item_knn_cross"} < set(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("per_service", [False, True])
def test_nothing_held_out_reaches_a_model(name, per_service):
    """Other items at the held-out events change neither the fit nor the scores of targets that do not see them."""
    dataset = make_world(3)
    split_ids, _, _ = hold_out(dataset, per_service)
    targets = splits.select_targets(dataset, split_ids, splits.VALID)
    histories = splits.gather_histories(dataset, targets, False)
    fit = BASELINES[name].__wrapped__
    before = fit(dataset, split_ids).score(dataset, targets, histories)
    item = dataset.log.item.copy()
    changed = np.flatnonzero(split_ids != splits.TRAIN)
    in_history = np.isin(changed, histories.rows)
    service = dataset.event_service[changed[~in_history]]
    first, last = dataset.catalogue.offsets[service], dataset.catalogue.offsets[service + 1]
    item[changed[~in_history]] = first + (item[changed[~in_history]] - first + 1) % (last - first)
    log = EventLog(dataset.log.offsets, item, dataset.log.action, dataset.log.time_us, dataset.log.context)
    other = Dataset(dataset.catalogue, log, dataset.users)
    after = fit(other, split_ids).score(other, targets, histories)
    assert before.dtype == np.float32
    assert np.all(np.isfinite(before))
    np.testing.assert_array_equal(before, after)


class Constant:
    def score(self, dataset, targets, histories):
        return np.zeros((len(targets), dataset.catalogue.n_items), np.float32)


class Table:
    """Scores that depend on the target's row alone."""

    def score(self, dataset, targets, histories):
        return np.stack([np.random.default_rng(t).integers(0, 5, dataset.catalogue.n_items) for t in targets])


def test_a_constant_model_scores_k_over_the_candidates():
    dataset = make_world(sizes=(40, 30))
    _, targets, histories = hold_out(dataset)
    ranked = rank_by_scores(Constant(), dataset, targets, histories, mask_seen=False, chunk=7)
    table = metrics.build_table(ranked, dataset.event_service[targets], dataset.catalogue.services)
    assert table["union"]["all"]["recall@10"] == pytest.approx(10 / 70)
    assert table["in_service"]["a"]["recall@10"] == pytest.approx(10 / 40)
    assert table["in_service"]["b"]["recall@5"] == pytest.approx(5 / 30)


@pytest.mark.parametrize("chunk", [1, 7, 500])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_ranking_equals_a_loop_over_candidates(chunk, mask_seen):
    dataset = make_world(1)
    _, targets, histories = hold_out(dataset)
    ranked = rank_by_scores(Table(), dataset, targets, histories, mask_seen, chunk)
    scores = Table().score(dataset, targets, histories)
    of = dataset.catalogue.service
    for t, target in enumerate(targets):
        answer = dataset.log.item[target]
        seen = set(history_items(dataset, histories, t)) if mask_seen else set()
        if answer in seen:
            for counts in ranked:
                assert metrics.per_target_metrics(counts)["mrr"][t] == 0  # a miss
            continue
        union = [i for i in range(dataset.catalogue.n_items) if i not in seen]
        for counts, items in ((ranked.union, union), (ranked.in_service, [i for i in union if of[i] == of[answer]])):
            assert counts.greater[t] == sum(scores[t, i] > scores[t, answer] for i in items)
            assert counts.equal[t] == sum(scores[t, i] == scores[t, answer] for i in items)


def test_scores_of_another_shape_are_refused():
    class Short:
        def score(self, dataset, targets, histories):
            return np.zeros((len(targets), 3))

    dataset = make_world()
    _, targets, histories = hold_out(dataset)
    with pytest.raises(WorkError, match="scores of shape"):
        rank_by_scores(Short(), dataset, targets, histories, mask_seen=False)


@pytest.fixture
def own_names(monkeypatch):
    """What a test registers is forgotten behind it."""
    monkeypatch.setattr(BASELINES, "_found", dict(BASELINES._found))


@pytest.mark.parametrize("register", [register_scorer, register_baseline])
def test_a_name_is_registered_once(own_names, register):
    def fit(*_):
        raise AssertionError("not called")

    for name in ("popularity", "sasrec_sampled"):
        before = BASELINES[name]
        with pytest.raises(InputError, match=f"baseline '{name}': the name is taken by"):
            register(name)(fit)
        assert BASELINES[name] is before
    assert register("mine")(fit) is fit
    register("mine")(fit)  # a module that is read twice registers itself anew

    def other(*_):
        raise AssertionError("not called")

    for again in (register_scorer, register_baseline):
        with pytest.raises(InputError, match=r"baseline 'mine': the name is taken by .*fit"):
            again("mine")(other)


def test_an_unknown_name_is_refused_in_one_line():
    with pytest.raises(InputError) as refused:
        _ = BASELINES["popularty"]
    said = str(refused.value)
    assert len(said.splitlines()) == 1
    assert said.startswith("config.baselines: 'popularty' is none of ")
    assert all(name in said for name in BASELINES.names())
    assert "--plugin=MODULE" in said
    assert "popularty" not in BASELINES


@pytest.mark.parametrize("mask_seen", [False, True])
def test_an_own_scorer_is_ranked_as_rank_by_scores_does(own_names, tmp_path, mask_seen):
    config = make_config()
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, mask_seen=mask_seen))
    data = load_data(config.data, tmp_path)
    examples, given = make_test_set(config, data), []

    @register_scorer("mine")
    def fit(dataset, split_ids):
        given.append((dataset, split_ids))
        return Table()

    found = BASELINES["mine"](BaselineInputs(config, data, examples, tmp_path / "mine"))
    assert given[0][0] is data.dataset
    assert given[0][1] is data.split_ids
    by_hand = rank_by_scores(Table(), data.dataset, examples.targets, examples.histories, mask_seen)
    for one, other in zip(found, by_hand, strict=True):
        np.testing.assert_array_equal(one.greater, other.greater)
        np.testing.assert_array_equal(one.equal, other.equal)
    assert not (tmp_path / "mine").exists()


def test_what_a_baseline_stores_is_counted_once_and_what_it_was_given_not_at_all():
    shared, given = np.ones((3, 4)), np.ones(1000)

    @dataclasses.dataclass
    class Model:
        data: object
        parts: list

    sparse = scipy.sparse.csr_matrix(np.eye(5))
    model = Model(given, [shared, (sparse, {"a": shared, "b": np.ones(7)}), "text", 3, None])
    assert count_stored(model, given) == 12 + 5 + 7
    assert count_stored(model) == 1000 + 12 + 5 + 7


PUBLISHED = {  # HR@5, HR@10, NDCG@10 of the decayed item-kNN and HR@10 of popularity
    "beauty": (0.0475, 0.0670, 0.0388, 0.0120),
    "sports": (0.0248, 0.0341, 0.0202, 0.0091),
    "toys": (0.0573, 0.0771, 0.0469, 0.0090),
}


@pytest.mark.parametrize("service", PUBLISHED)
def test_published_rows_of_amazon3_are_reproduced(service):
    dataset = read_amazon3((service,))
    split_ids, targets, histories = hold_out(dataset, per_service=True)
    found = []
    for fit in (baselines.fit_item_knn, baselines.fit_popularity):
        ranked = rank_by_scores(fit(dataset, split_ids), dataset, targets, histories, mask_seen=True, chunk=1024)
        found.append(metrics.summarise(metrics.per_target_metrics(ranked.in_service)))
    knn, popularity = found
    values = [knn["recall@5"], knn["recall@10"], knn["ndcg@10"], popularity["recall@10"]]
    assert values == pytest.approx(PUBLISHED[service], abs=0.002)
