"""Sizes that follow from counts: never smaller for more data, within their bounds, and near those that were tuned."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.config import DataConfig, SchemaConfig, checked
from moerec.config.cli import load_config
from moerec.config.sizes import TableCounts, size_config
from moerec.errors import InputError

SHOPS = DataConfig(schema=SchemaConfig(service="shop", time="when", context=("weather",), text=("title",)))
BARE = DataConfig()
GROWTH = (1, 3, 30, 1_000, 5_000, 20_000, 160_000, 660_000, 1_000_000, 5_000_000, 1_000_000_000)


def count(n_events: int, **more: int) -> TableCounts:
    """Counts whose users have ten events and whose items have twenty, or less where there are not so many."""
    usual = {"n_users": n_events // 10 or 1, "n_items": n_events // 20 or 1, "n_services": 1, "long_history": 10}
    return TableCounts(n_events=n_events, **{**usual, **more})


big = st.integers(0, 30).flatmap(lambda k: st.integers(1 << k, (2 << k) - 1))


@given(big, big, big, st.integers(1, 300), big, st.sampled_from((SHOPS, BARE)), st.booleans())
def test_any_counts_give_a_valid_config(n_users, n_events, n_items, n_services, long_history, data, mask_seen):
    counts = TableCounts(n_users, n_events, n_items, n_services, long_history)
    config = checked(size_config(data, counts, mask_seen=mask_seen))
    model, train = config.model, config.train
    slots = train.batch_size * config.data.seq_len
    assert 1024 <= slots <= 4096
    assert model.d_model == model.n_heads * model.d_head
    assert 0 < train.eval_every <= train.steps
    assert config.optim.warmup_steps < train.steps
    assert config.eval.batch_size == 16 or config.eval.batch_size * n_items <= 1 << 25
    seen = train.steps * slots
    assert train.steps == 200 or 2 * (n_events + n_users) - slots <= seen <= 6 * (n_events + n_users) + slots
    assert model.is_asked == bool(model.moe.layers) == (1 < n_services <= 64)
    assert (model.moe.d_shared + 2 * model.moe.d_expert == model.d_ff) or not model.is_asked
    assert model.has_copies is not mask_seen
    assert model.event_time == model.request_context == model.item_text == (data is SHOPS)
    assert model.text_pointer == (data is SHOPS and n_items >= 100)


def test_more_events_never_give_smaller_sizes():
    configs = [size_config(SHOPS, count(n, n_services=3, n_items=1_000), mask_seen=False) for n in GROWTH]
    for less, more in itertools.pairwise(configs):
        for of in (
            lambda c: c.model.d_model,
            lambda c: c.model.n_layers,
            lambda c: c.model.d_ff,
            lambda c: c.model.moe.d_expert,
            lambda c: c.train.batch_size,
            lambda c: c.train.n_valid,
            lambda c: c.train.steps * c.train.batch_size * c.data.seq_len,
            lambda c: -c.model.dropout,
            lambda c: -c.optim.weight_decay,
        ):
            assert of(less) <= of(more)


@pytest.mark.parametrize("long_history", range(1, 400, 7))
def test_a_history_holds_what_nearly_all_users_have(long_history):
    data = size_config(BARE, count(4_000, long_history=long_history), mask_seen=True).data
    expected = min(max(2 ** math.ceil(math.log2(long_history)), 32), 256)
    assert (data.history_len, data.seq_len) == (expected, max(128, expected))


def test_a_large_catalogue_is_sampled_and_scored_in_small_batches():
    small, large = (size_config(BARE, count(10**6, n_items=n), mask_seen=True) for n in (10_000, 1_000_000))
    assert (small.loss.kind, small.eval.batch_size) == ("full_softmax", 256)
    assert (large.loss.kind, large.eval.batch_size) == ("sampled_softmax", 32)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("city_asked", TableCounts(2_000, 160_000, 1_800, 3, 90)),
        ("amazon3_past", TableCounts(72_682, 662_436, 42_382, 3, 22)),
        ("amazon6_half", TableCounts(5_379, 188_165, 55_035, 6, 106)),
    ],
)
def test_sizes_are_near_those_that_were_tuned_on_like_data(name, counts):
    tuned = load_config(f"configs/{name}.py")
    sized = size_config(tuned.data, counts, mask_seen=tuned.eval.mask_seen)
    for field in ("n_layers", "d_model", "d_head", "dropout", "pointer", "repeat_bias", "row_dropout"):
        if not (name == "city_asked" and field == "row_dropout"):  # all of its items are trained
            assert getattr(sized.model, field) == getattr(tuned.model, field), field
    assert abs(sized.model.d_ff - tuned.model.d_ff) <= 16
    assert (sized.loss.kind, sized.optim.learning_rate) == (tuned.loss.kind, tuned.optim.learning_rate)
    assert sized.optim.weight_decay == tuned.optim.weight_decay
    slots = [c.train.steps * c.train.batch_size * c.data.seq_len for c in (sized, tuned)]
    assert 0.4 < slots[0] / slots[1] < 2.5


def test_no_count_may_be_zero():
    for field in dataclasses.fields(TableCounts):
        with pytest.raises(InputError, match=field.name):
            TableCounts(**{**dataclasses.asdict(count(100)), field.name: 0})
