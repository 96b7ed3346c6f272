"""The share of training events that repeat an item, against a loop; and what is suggested of it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import CityConfig, Config, DataConfig, EvalConfig, SchemaConfig, TablesConfig
from moerec.data.load import load_data
from moerec.data.splits import TRAIN
from moerec.eval.ranking import repeats
from moerec.eval.ranking.repeats import measure_repeats, suggest_masking


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    city = CityConfig(n_users=20, events_per_user=12, items_per_service=10)
    return load_data(DataConfig(city=city), tmp_path_factory.mktemp("city"))


def count_by_loop(data) -> float:
    had, n, n_repeats = set(), 0, 0
    for row, (user, item) in enumerate(zip(data.dataset.log.user, data.dataset.log.item, strict=True)):
        if data.split_ids[row] == TRAIN:
            n, n_repeats = n + 1, n_repeats + ((user, item) in had)
            had.add((user, item))
    return n_repeats / n if n else 0.0


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from((0, 0.2, 0.7, 1)))
def test_the_share_is_that_of_a_loop(data, seed, held_out):
    is_held_out = np.random.default_rng(seed).random(len(data.split_ids)) < held_out
    found = dataclasses.replace(data, split_ids=np.where(is_held_out, TRAIN + 1, TRAIN).astype(np.int8))
    assert measure_repeats(found) == pytest.approx(count_by_loop(found))


@pytest.mark.parametrize(
    ("share", "mask_seen", "told"),
    [
        (0.34, True, "34.0% of training events repeat an item that the user had: set eval.mask_seen=false"),
        (0.34, False, "34.0% of training events repeat an item that the user had: eval.mask_seen=false, as set"),
        (0.002, True, "0.2% of training events repeat an item that the user had: eval.mask_seen=true, as set"),
        (0.002, False, "0.2% of training events repeat an item that the user had: eval.mask_seen=true would"),
    ],
)
def test_the_share_is_told_and_what_fits_it(data, monkeypatch, share, mask_seen, told):
    monkeypatch.setattr(repeats, "measure_repeats", lambda data: share)
    tables = DataConfig(source="tables", tables=TablesConfig("data"), schema=SchemaConfig())
    found = suggest_masking(Config(data=tables, eval=EvalConfig(mask_seen=mask_seen)), data)
    assert [line.startswith(told) for line in found] == [True]
    assert suggest_masking(Config(eval=EvalConfig(mask_seen=mask_seen)), data) == []  # the built-in world
