"""Item graph and texts against loops over histories; and what is chosen against trying everything apart."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from moerec.config import SplitConfig
from moerec.data import splits
from moerec.data.load import RunData, load_data
from moerec.eval import baselines, metrics
from moerec.eval.baselines import (
    BASELINES,
    GRIDS,
    BaselineInputs,
    GraphText,
    Grid,
    Settings,
    choose_settings,
    graph_text,
    graph_text_choice,
    rank_by_scores,
)
from moerec.eval.baselines.graph_text import ALL, JOINT, OWN, Parts
from moerec.eval.ranking import make_test_set, make_valid_set
from tests.data.neighbors.small_items import BRANDS, WORDS
from tests.eval.small_logs import hold_out, make_world, train_sequences
from tests.tiny import make_config

SMALL = Grid(decay=(0.5, 1.0), gap_decay=(None, 0.0, 0.6), text_weight=(0.0, 0.2))


def make_texts(dataset, seed):
    """The same with up to four words an item, and brands."""
    rng, n = np.random.default_rng(seed), dataset.catalogue.n_items
    text = np.array([" ".join(rng.choice(WORDS, rng.integers(0, 5)).tolist()) for _ in range(n)], object)
    brand = np.array([str(rng.choice([*BRANDS, ""])) for _ in range(n)], object)
    return dataclasses.replace(dataset, catalogue=dataclasses.replace(dataset.catalogue, text=text, attributes=brand))


def chain_items(dataset, seed):
    """The same with most events followed by their item's successor."""
    rng, item = np.random.default_rng(seed), dataset.log.item.copy()
    for k in range(1, len(item)):
        if dataset.log.user[k] == dataset.log.user[k - 1] and rng.random() < 0.7:
            item[k] = (item[k - 1] + 1) % dataset.catalogue.n_items
    return dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, item=item))


def make_inputs(folder, seed=0, selection="in_service", mask_seen=True, n_users=60, chained=False, **world):
    dataset, config = make_texts(make_world(seed, n_users, **world), seed), make_config()
    dataset = chain_items(dataset, seed) if chained else dataset
    own = SplitConfig(per_service=True, past_only=True)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, split=own),
        eval=dataclasses.replace(config.eval, selection=selection, mask_seen=mask_seen),
        train=dataclasses.replace(config.train, n_valid=1000),
    )
    split_ids = splits.assign_split_ids(dataset, own, 0)
    known = load_data(config.data, folder)
    data = RunData(dataset, split_ids, known.tokens, None, None, np.arange(dataset.catalogue.n_items))
    return BaselineInputs(config, data, make_test_set(config, data), folder)


def build_graph(dataset, split_ids, crosses, gap_decay):
    """Dictionaries of normalised weights of pairs of items."""
    of, weight = dataset.catalogue.service, {}

    def add(i, j, x):
        weight[i, j] = weight.get((i, j), 0) + x

    for within in (True, False):
        for sequence in train_sequences(dataset, split_ids, within).values():
            for a, b in itertools.combinations(range(len(sequence)), 2):
                i, j = sequence[a], sequence[b]
                if b - a <= 10 and i != j and (within or (crosses and of[i] != of[j])):
                    add(i, j, gap_decay ** (b - a - 1))
                    add(j, i, gap_decay ** (b - a - 1))
    degree = {}
    for (i, _), x in weight.items():
        degree[i] = degree.get(i, 0) + x
    return {(i, j): x / math.sqrt(max(degree[i], 1) * max(degree[j], 1)) for (i, j), x in weight.items() if x}


def compare_texts(catalogue):
    """`[I, I]` cosines by sets of words and dictionaries of weights."""
    bags = [str(t).lower().split() + str(a).split() for t, a in zip(catalogue.text, catalogue.attributes, strict=True)]
    rows = []
    for i, bag in enumerate(bags):
        lo, hi = catalogue.offsets[catalogue.service[i]], catalogue.offsets[catalogue.service[i] + 1]
        row = {w: bag.count(w) * (math.log((1 + hi - lo) / (1 + sum(w in b for b in bags[lo:hi]))) + 1) for w in bag}
        length = math.sqrt(sum(x * x for x in row.values()))
        rows.append({w: x / length for w, x in row.items()})
    return [[sum(x * b.get(w, 0) for w, x in a.items()) for b in rows] for a in rows]


def score_by_hand(dataset, split_ids, histories, settings):
    history, decay, gap_decay, text_weight = settings
    of, n_items = dataset.catalogue.service, dataset.catalogue.n_items
    graph = build_graph(dataset, split_ids, history != OWN, gap_decay) if gap_decay is not None else {}
    cosine, found = compare_texts(dataset.catalogue), np.zeros((len(histories), n_items))
    for t in range(len(histories)):
        items = dataset.log.item[histories.slice(t, t + 1).rows].tolist()
        for j in range(n_items):
            for k, i in enumerate(items):
                later = items[k + 1 :]
                if history == OWN and of[i] != of[j]:
                    continue
                place = len(later) if history == JOINT else sum(of[x] == of[i] for x in later)
                found[t, j] += decay**place * (graph.get((i, j), 0) + text_weight * cosine[i][j])
    return found


@pytest.mark.parametrize("history", [OWN, ALL, JOINT])
@pytest.mark.parametrize(("gap_decay", "text_weight"), [(0.0, 0.3), (0.6, 0.0), (1.0, 0.1), (None, 1.0)])
def test_scores_equal_loops(history, gap_decay, text_weight):
    dataset = make_texts(make_world(1, 25, sizes=(6, 0, 5)), 1)
    split_ids, targets, histories = hold_out(dataset, per_service=True)
    settings = Settings(history, 0.7, gap_decay, text_weight)
    scores = baselines.fit_graph_text(dataset, split_ids, settings).score(dataset, targets, histories)
    assert scores.dtype == np.float32
    assert scores.any()
    np.testing.assert_allclose(scores, score_by_hand(dataset, split_ids, histories, settings), rtol=1e-4, atol=1e-6)


def measure_apart(inputs, settings):
    """What choosing compares, by the scorer and the ranking of any baseline."""
    data, config = inputs.data, inputs.config
    examples = make_valid_set(config, data)
    scorer = baselines.fit_graph_text(data.dataset, data.split_ids, settings)
    ranks = rank_by_scores(scorer, data.dataset, examples.targets, examples.histories, config.eval.mask_seen)
    table = metrics.build_table(ranks, examples.target_service, data.dataset.catalogue.services)
    if config.eval.selection == "union":
        return table["union"]["all"]["ndcg@10"]
    return float(np.mean([row["ndcg@10"] for row in table["in_service"].values()]))


@pytest.mark.parametrize("cells", [1, 50, 1 << 23])
@pytest.mark.parametrize("selection", ["in_service", "union"])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_the_best_of_all_settings_is_chosen(tmp_path, monkeypatch, selection, mask_seen, cells):
    monkeypatch.setattr(graph_text_choice, "MOST_CELLS", cells)
    inputs = make_inputs(tmp_path, 2, selection, mask_seen, sizes=(20, 15))
    parts = Parts(inputs.data.dataset, inputs.data.split_ids)
    chosen = choose_settings(inputs, parts, SMALL)
    score = {Settings(*values): measure_apart(inputs, Settings(*values)) for values in itertools.product(*SMALL)}
    assert len(set(score.values())) > 10
    assert chosen.score == pytest.approx(max(score.values()))
    assert chosen.score == pytest.approx(score[chosen.settings])
    assert chosen.n == (inputs.data.split_ids == splits.VALID).sum()


@pytest.mark.parametrize("selection", ["in_service", "union"])
def test_halving_chooses_what_trying_all_on_all_does(tmp_path, monkeypatch, selection):
    """With a third of the work; what is chosen is as good but for the noise of the first rounds."""
    inputs = make_inputs(tmp_path, 2, selection, n_users=400, chained=True, sizes=(40, 30))
    grid, parts, tried = (
        SMALL._replace(decay=(0.2, 0.5, 0.8, 1.0)),
        Parts(inputs.data.dataset, inputs.data.split_ids),
        [],
    )
    rank_block = graph_text_choice._rank_block

    def count(examples, which, services, parts, left):
        tried.append(len(which) * len(left))
        yield from rank_block(examples, which, services, parts, left)

    monkeypatch.setattr(graph_text_choice, "_rank_block", count)
    full = choose_settings(inputs, parts, grid, rounds=())
    n_full = sum(tried)
    tried.clear()
    fast = choose_settings(inputs, parts, grid, rounds=(60, 150))
    assert sum(tried) < n_full / 3
    assert fast.n == full.n > 300
    assert fast.score == pytest.approx(measure_apart(inputs, fast.settings))
    assert fast.score > 0.98 * full.score
    assert choose_settings(inputs, parts, grid, rounds=(full.n,)) == full


def test_the_first_targets_are_of_all_services_alike():
    service = np.random.default_rng(0).choice(3, 400, p=[0.8, 0.15, 0.05])
    order = graph_text_choice._order_targets(service, True, 0)
    assert sorted(order.tolist()) == list(range(400))
    fewest = np.bincount(service).min()
    assert np.bincount(service[order[: 3 * fewest]]).tolist() == [fewest] * 3
    plain = graph_text_choice._order_targets(service, False, 0)
    assert np.bincount(service[plain[:100]])[0] == pytest.approx(80, abs=12)


@pytest.mark.parametrize("name", ["graph_text", "graph_text_own"])
def test_it_is_left_out_where_there_is_nothing_to_go_by(tmp_path, capsys, name):
    inputs = make_inputs(tmp_path, 5)
    data, n_items = inputs.data, inputs.data.dataset.catalogue.n_items
    blank = np.full(n_items, "", object)
    catalogue = dataclasses.replace(data.dataset.catalogue, text=blank, attributes=blank)
    bare = dataclasses.replace(data, dataset=dataclasses.replace(data.dataset, catalogue=catalogue))
    assert BASELINES[name](inputs._replace(data=bare)) is not None  # there are transitions
    untrained = np.where(data.split_ids == splits.TRAIN, splits.UNUSED, data.split_ids)
    texts = dataclasses.replace(data, split_ids=untrained)
    assert BASELINES[name](inputs._replace(data=texts)) is not None  # there are texts
    assert capsys.readouterr().err == ""
    assert BASELINES[name](inputs._replace(data=dataclasses.replace(bare, split_ids=untrained))) is None
    said = capsys.readouterr().err
    assert said.startswith(f"baseline {name}: left out, since ")
    assert said.count("\n") == 1


def test_the_own_variant_is_left_out_where_it_is_the_other(tmp_path, capsys):
    inputs = make_inputs(tmp_path, 5, sizes=(12,))
    assert BASELINES["graph_text_own"](inputs) is not None  # it alone
    both = dataclasses.replace(inputs.config, baselines=("graph_text", "graph_text_own"))
    assert BASELINES["graph_text_own"](inputs._replace(config=both)) is None
    assert "graph_text_own: left out, since it is graph_text" in capsys.readouterr().err
    assert BASELINES["graph_text"](inputs._replace(config=both)) is not None


def test_far_pairs_are_left_out_where_there_are_too_many(monkeypatch):
    dataset = make_texts(make_world(7, 40, sizes=(8, 6)), 7)
    split_ids, targets, histories = hold_out(dataset)
    n_trained = int((split_ids == splits.TRAIN).sum())
    full = baselines.fit_graph_text(dataset, split_ids, Settings(text_weight=0.0)).score(dataset, targets, histories)
    monkeypatch.setattr(graph_text, "MOST_PAIRS", n_trained)
    parts = Parts(dataset, split_ids)
    assert parts.max_gap == 1
    near, first = (
        GraphText(Parts(dataset, split_ids), Settings(gap_decay=decay, text_weight=0.0)).score(
            dataset, targets, histories
        )
        for decay in (0.8, 0.0)
    )
    np.testing.assert_array_equal(near, first)
    assert (near != full).any()


@pytest.mark.parametrize("name", GRIDS)
def test_a_variant_is_ranked_by_what_was_chosen_for_it(tmp_path, name):
    inputs = make_inputs(tmp_path, 3)
    data, examples = inputs.data, inputs.examples
    found = BASELINES[name](inputs)
    chosen = choose_settings(inputs, Parts(data.dataset, data.split_ids), GRIDS[name])
    assert found.settings == {**chosen.settings._asdict(), "valid_ndcg@10": chosen.score, "n_valid": chosen.n}
    scorer = baselines.fit_graph_text(data.dataset, data.split_ids, chosen.settings)
    by_hand = rank_by_scores(scorer, data.dataset, examples.targets, examples.histories, mask_seen=True)
    for one, other in zip(found, by_hand, strict=True):
        np.testing.assert_array_equal(one.greater, other.greater)
        np.testing.assert_array_equal(one.equal, other.equal)
    settings = chosen.settings
    # What was tried beside it is not counted.
    scorer.score(data.dataset, examples.targets[:1], examples.histories.slice(0, 1))
    assert found.size["n_stored"] == scorer.n_stored > 0
    assert name != "graph_text_no_text" or settings.text_weight == 0
    assert name != "graph_text_no_graph" or (settings.gap_decay is None and settings.text_weight == 1)
    assert name != "graph_text_own" or settings.history == OWN


@pytest.mark.parametrize("name", GRIDS)
def test_no_test_event_reaches_what_is_chosen(tmp_path, name):
    """Other items at the test events change neither the settings nor their score on validation."""
    inputs = make_inputs(tmp_path, 4, sizes=(20, 15))
    dataset, split_ids = inputs.data.dataset, inputs.data.split_ids
    item, tests = dataset.log.item.copy(), np.flatnonzero(split_ids == splits.TEST)
    lo, hi = (dataset.catalogue.offsets[dataset.event_service[tests] + k] for k in (0, 1))
    item[tests] = lo + (item[tests] - lo + 1) % (hi - lo)
    other = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, item=item))
    changed = inputs._replace(data=dataclasses.replace(inputs.data, dataset=other))
    one, two = (choose_settings(x, Parts(x.data.dataset, split_ids), GRIDS[name]) for x in (inputs, changed))
    assert one == two


def test_without_validation_targets_the_defaults_are_taken(tmp_path):
    inputs = make_inputs(tmp_path, 5)
    split_ids = np.where(inputs.data.split_ids == splits.VALID, splits.UNUSED, inputs.data.split_ids)
    inputs = inputs._replace(data=dataclasses.replace(inputs.data, split_ids=split_ids))
    defaults = Settings()
    expected = {
        "graph_text": defaults,
        "graph_text_no_text": defaults._replace(text_weight=0),
        "graph_text_no_graph": defaults._replace(gap_decay=None, text_weight=1),
        "graph_text_own": defaults._replace(history=OWN),
    }
    for name, settings in expected.items():
        assert BASELINES[name](inputs).settings == {**settings._asdict(), "valid_ndcg@10": None, "n_valid": 0}


def test_texts_reach_items_that_nobody_has_had():
    dataset = make_texts(make_world(6, 30, sizes=(8,)), 6)
    split_ids, targets, histories = hold_out(dataset)
    dataset.catalogue.text[:] = "same"
    rare = int(np.argmin(np.bincount(dataset.log.item, minlength=8)))
    split_ids[(dataset.log.item == rare) & (split_ids == splits.TRAIN)] = splits.UNUSED
    parts = Parts(dataset, split_ids)
    graph, both = (GraphText(parts, Settings(text_weight=w)).score(dataset, targets, histories) for w in (0.0, 0.1))
    assert not graph[:, rare].any()
    assert both[histories.length > 0, rare].all()
