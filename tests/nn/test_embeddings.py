"""Vectors of items and slots against NumPy sums, and each switch of the config: off, its input changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import TimeConfig
from moerec.nn.embeddings import ItemEncoder, SlotEncoder, TextEncoder
from moerec.nn.layers import sum_rows
from moerec.nn.temporal import N_WAVES, TimeEmbedding
from moerec.types import EVENT, NO_TIME, PADDING, RECOMMEND
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, fill, make_batch, make_config, make_table, random_like, with_request

TABLE = make_table()
BATCH = make_batch(1, [[4, 3], [6]], 8)
CONTROL = make_batch(1, [[4, 3], [6]], 8, control=True)
ITEM = np.random.default_rng(8).standard_normal((2, 8, 8)).astype(np.float32)  # vectors of the slots' items
SWITCHES = ("service", "action", "event_time", "request_time", "request_context")
EPS = 1e-6


def make_text() -> TextEncoder:
    return fill(jax.eval_shape(lambda: TextEncoder(jax.random.key(0), SIZES.n_tokens, 6, 8, EPS)))


@functools.cache
def make_items(row: bool, text: bool) -> ItemEncoder:
    config = make_config(item_row=row, item_text=text)
    return fill(jax.eval_shape(lambda: ItemEncoder(jax.random.key(0), config, SIZES.n_items, SIZES.n_tokens)))


@functools.cache
def make_slots(*on: str, time: tuple[tuple[str, object], ...] = ()) -> SlotEncoder:
    config = make_config(**{name: name in on for name in SWITCHES}, time=TimeConfig(**dict(time)))
    sizes = (SIZES.n_services, SIZES.n_actions, SIZES.context_sizes, SIZES.field_sizes, SIZES.has_control)
    return fill(jax.eval_shape(lambda: SlotEncoder(jax.random.key(0), config, *sizes)))


def slot_vectors(weights, batch, item_BTD, harmonics=None) -> np.ndarray:
    """The oracle's vectors of all slots."""
    shape, sizes = batch.item_BT.shape, SIZES.context_sizes
    rows = [oracle.slot_vector(weights, batch, TABLE, *bt, sizes, harmonics, item_BTD[bt]) for bt in np.ndindex(shape)]
    return np.stack([row + np.zeros(8) for row in rows]).reshape(*shape, -1)


def check_gradients(module, function, expected):
    """Values of `function(module)`, and its gradients under a cotangent, against the oracle `expected(weights)`."""
    weights = oracle.read_weights(module)
    value = expected(weights)
    cotangent = random_like(value, 3)

    def weighted(module):
        out = function(module)
        return jnp.sum(out * cotangent), out

    gradients, out = jax.jit(jax.grad(weighted, has_aux=True))(module)
    np.testing.assert_allclose(out, value, atol=1e-5, rtol=1e-5)
    oracle.assert_slopes(lambda w: np.sum(expected(w) * cotangent), weights, oracle.read_weights(gradients), 1e-5)


def test_text_is_a_normed_bag_of_tokens():
    tokens = TABLE.token_IW

    def expected(weights):
        return np.stack([oracle.text_vector(weights, row, EPS) for row in tokens])

    # The item without text is left out: at 0 the norm is too steep for differences.
    tokens = tokens[:-1]
    check_gradients(make_text(), lambda text: text(tokens), expected)


def test_text_ignores_padding_and_order():
    text = make_text()
    same = np.array([[3, 5, 3, 0, 0, 0], [0, 3, 0, 3, 0, 5], [5, 0, 0, 0, 3, 3]])
    vectors = np.asarray(text(same))
    np.testing.assert_allclose(vectors[1:], vectors[:1].repeat(2, 0), atol=1e-6)
    np.testing.assert_allclose(text(same[0, :3]), vectors[0], atol=1e-6)
    assert np.abs(text(np.array([3, 5])) - vectors[0]).max() > 1e-3
    changed = jax.tree_util.tree_map_with_path(
        lambda path, w: w.at[0].set(99.0) if "table" in jax.tree_util.keystr(path) else w, text
    )
    np.testing.assert_array_equal(changed(same), vectors)


def test_items_without_text_share_a_finite_vector_with_finite_gradients():
    text = make_text()
    nothing = np.zeros((2, 4), np.int32)
    vectors, gradients = text(nothing), jax.grad(lambda t: jnp.sum(t(nothing) ** 2 + t(nothing)))(text)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.isfinite(vectors).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("row", "text"), [(True, True), (True, False), (False, True)])
def test_item_vector_is_the_sum_of_its_parts(row, text):
    items = np.array([[0, 3, 3], [5, 7, 11]])

    def expected(weights):
        return np.stack([[oracle.item_vector(weights, i, TABLE, EPS) for i in line] for line in items])

    check_gradients(make_items(row, text), lambda encoder: encoder(items, TABLE), expected)


def test_text_counts_only_with_its_switch_on():
    everything, other = np.arange(SIZES.n_items), TABLE._replace(token_IW=np.roll(TABLE.token_IW, 1, axis=0))
    without, only = make_items(True, False), make_items(False, True)
    np.testing.assert_array_equal(without(everything, TABLE), without(everything, other))
    assert np.abs(only(everything, TABLE) - only(everything, other)).max() > 1e-3


def test_an_item_without_a_row_has_the_vector_of_its_text():
    only = make_items(False, True)
    assert only.row_ID is None
    twin = TABLE.token_IW.copy()
    twin[9] = twin[2]
    table = TABLE._replace(token_IW=twin)
    vectors = np.asarray(only(np.array([2, 9, 4]), table))
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3
    # Indices past every trained row are none here: the catalogue may grow by items that only have text.
    longer = TABLE._replace(token_IW=np.concatenate([TABLE.token_IW, TABLE.token_IW[2:3]]))
    np.testing.assert_allclose(only(np.array([SIZES.n_items]), longer)[0], only(np.array([2]), TABLE)[0], atol=1e-7)


BATCHES = pytest.mark.parametrize("batch", [BATCH, CONTROL], ids=["events", "control slots"])


@BATCHES
@pytest.mark.parametrize("on", [SWITCHES, *((name,) for name in SWITCHES)], ids=lambda on: "+".join(on))
def test_slot_vector_is_the_sum_of_what_is_switched_on(on, batch):
    check_gradients(
        make_slots(*on), lambda encoder: encoder(batch, ITEM, TABLE), lambda weights: slot_vectors(weights, batch, ITEM)
    )


@BATCHES
@pytest.mark.parametrize("kind", ["table", "fourier"])
def test_slot_vector_with_every_feature_of_times(kind, batch):
    time = (("kind", kind), ("month_day", True), ("service_gap", True))
    check_gradients(
        make_slots("event_time", "request_time", time=time),
        lambda encoder: encoder(batch, ITEM, TABLE),
        lambda weights: slot_vectors(weights, batch, ITEM, N_WAVES),
    )


@BATCHES
def test_with_all_switches_off_an_event_is_its_item_and_a_control_slot_its_token(batch):
    slots = make_slots()
    kind_BT1 = batch.kind_BT[..., None]
    fields = np.zeros((*batch.item_BT.shape, 8), np.float32)
    for b, t, y in np.ndindex(batch.request.field_BTY.shape):
        code = batch.request.field_BTY[b, t, y]
        fields[b, t] += slots.field[...][sum(SIZES.field_sizes[:y]) + code] if code else 0
    control = slots.control_D[...] + fields
    expected = np.where(kind_BT1 == EVENT, ITEM, 0) + np.where(kind_BT1 == RECOMMEND, control, 0)
    np.testing.assert_allclose(slots(batch, ITEM, TABLE), expected, atol=1e-6)
    # And the item has a gradient where there is an event, alone.
    pulled = jax.grad(lambda item: jnp.sum(slots(batch, item, TABLE)))(jnp.asarray(ITEM))
    np.testing.assert_array_equal(pulled, np.broadcast_to(kind_BT1 == EVENT, ITEM.shape))


def test_what_an_event_has_says_nothing_in_a_control_slot_or_in_padding():
    """Item, action, service, the event's own offset: whatever stands there, slots that are no event are the same."""
    slots, empty = make_slots(*SWITCHES), CONTROL.kind_BT != EVENT
    assert {PADDING, RECOMMEND} <= set(CONTROL.kind_BT.ravel())
    changed = CONTROL._replace(
        item_BT=np.where(empty, 5, CONTROL.item_BT),
        action_BT=np.where(empty, 2, CONTROL.action_BT),
        utc_offset_BT=np.where(empty, 7200, CONTROL.utc_offset_BT),
    )
    other = np.where(empty[..., None], ITEM + 1, ITEM)
    np.testing.assert_array_equal(slots(changed, other, TABLE), slots(CONTROL, ITEM, TABLE))


def test_without_control_slots_in_the_data_there_is_no_vector_for_them():
    encoder = SlotEncoder(jax.random.key(0), make_config(), 3, 3, (3, 4))
    assert encoder.control_D is None


CHANGES = {
    "service": lambda batch, table: (batch, table._replace(service_I=(table.service_I + 1) % SIZES.n_services)),
    "action": lambda batch, table: (batch._replace(action_BT=(batch.action_BT + 1) % SIZES.n_actions), table),
    "event_time": lambda batch, table: (batch._replace(time_BT=np.full_like(batch.time_BT, 12_345_678)), table),
    "request_time": lambda batch, table: (
        with_request(batch, time_BT=np.full_like(batch.time_BT, 12_345_678)),
        table,
    ),
    "request_context": lambda batch, table: (
        with_request(batch, context_BTC=(batch.request.context_BTC + 1) % np.array(SIZES.context_sizes)),
        table,
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_an_input_counts_exactly_where_its_switch_is_on(switch):
    batch, table = CHANGES[switch](BATCH, TABLE)
    on = make_slots(switch)
    assert np.abs(on(batch, ITEM, table) - on(BATCH, ITEM, TABLE)).max(axis=-1).mean() > 0.1
    # The gap of the request counts from the event's time, so that switching off the event's time needs both off.
    others = [name for name in SWITCHES if name not in {switch, "request_time" if switch == "event_time" else switch}]
    off = make_slots(*others)
    np.testing.assert_array_equal(off(batch, ITEM, table), off(BATCH, ITEM, TABLE))


def test_times_not_known_and_contexts_missing_are_finite_and_have_their_own_rows():
    slots = make_slots("event_time", "request_time", "request_context")
    unknown = np.full_like(BATCH.time_BT, NO_TIME)
    missing = BATCH._replace(time_BT=unknown)
    missing = with_request(missing, time_BT=unknown, context_BTC=np.zeros_like(BATCH.request.context_BTC))
    gradient = jax.grad(lambda s: jnp.sum(s(missing, ITEM, TABLE)))(slots)
    n, n_events = missing.time_BT.size, np.sum(missing.kind_BT == EVENT)
    rows = oracle.read_weights(gradient)
    for name in ("hour", "weekday", "season", "gap"):
        for time, n_slots in (("event_time", n_events), ("request_time", n)):
            counts = rows[f"{time}.{name}"][:, 0]
            assert counts[-1] == n_slots
            assert counts[:-1].sum() == 0
    np.testing.assert_array_equal(rows["context"][:, 0], [n, 0, 0, n, 0, 0, 0, 0, 0])
    assert np.isfinite(slots(missing, ITEM, TABLE)).all()


def test_context_codes_of_all_features_have_rows_of_their_own():
    slots = make_slots("request_context")
    gradient = jax.grad(lambda s: jnp.sum(s(BATCH, ITEM, TABLE)))(slots).context[:, 0]
    sizes = SIZES.context_sizes
    counts = [np.bincount(BATCH.request.context_BTC[..., c].ravel(), minlength=n + 1) for c, n in enumerate(sizes)]
    unseen = [count[-1] for count in counts]
    assert min(unseen) > 0
    np.testing.assert_array_equal(gradient, np.concatenate([*(count[:-1] for count in counts), unseen]))


def test_contexts_are_hidden_at_the_rate_as_missing_and_as_unseen():
    config = make_config(request_time=False, event_time=False, service=False, action=False, context_dropout=0.3)
    encoder = fill(jax.eval_shape(lambda: SlotEncoder(jax.random.key(0), config, 3, 3, (3, 4))))
    codes = np.broadcast_to(np.array([1, 2]), (64, 128, 2))
    batch = jax.tree.map(lambda x: np.zeros((64, 128, *x.shape[2:]), x.dtype), BATCH)
    batch, item = with_request(batch, context_BTC=codes), np.zeros((64, 128, 8))

    def count(key):
        return np.asarray(jax.grad(lambda e: jnp.sum(e(batch, item, TABLE, key)))(encoder).context[:, 0]) / (64 * 128)

    np.testing.assert_array_equal(count(None), [0, 1, 0, 0, 0, 1, 0, 0, 0])
    shares = count(jax.random.key(1))
    # Over 8,192 draws four standard deviations of the largest share are .020.
    np.testing.assert_allclose(shares, [0.15, 0.7, 0, 0.15, 0, 0.7, 0, 0.15, 0.15], atol=0.021)
    np.testing.assert_array_equal(shares, count(jax.random.key(1)))
    both = encoder(batch, item, TABLE, jax.random.key(1))
    assert len(np.unique(np.asarray(both)[..., 0])) == 9  # each feature on its own


def test_the_gap_before_an_event_does_not_reach_into_the_sequence_before():
    slots = make_slots("event_time")
    later = BATCH.time_BT.copy()
    later[0, 3] += 40_000_000  # the last slot of the first segment of the row
    changed = np.abs(slots(BATCH._replace(time_BT=later), ITEM, TABLE) - slots(BATCH, ITEM, TABLE)).max(axis=-1) > 0
    assert changed[0, 3]
    changed[0, 3] = False
    assert not changed.any()


def test_what_no_event_trains_adds_nothing_at_first():
    encoder = SlotEncoder(jax.random.key(0), make_config(), 3, 3, (3, 4))
    rows = np.abs(encoder.context[...]).max(axis=1) > 0
    assert rows.tolist() == [False, *[True] * 2, False, *[True] * 3, False, False]


@pytest.mark.parametrize("kind", ["table", "fourier"])
def test_a_time_that_is_not_known_adds_nothing_at_first(kind):
    config = TimeConfig(kind=kind, month_day=True, service_gap=True)
    embedding = TimeEmbedding(jax.random.key(0), 8, 0.02, config, n_services=2)
    nothing = np.full((1, 2), NO_TIME, np.int32)
    added = embedding(nothing, np.zeros_like(nothing), nothing, np.full((1, 2, 2), NO_TIME, np.int32))
    np.testing.assert_array_equal(added, np.zeros((1, 2, 8)))
    known = embedding(nothing * 0 + 5, np.zeros_like(nothing), nothing, np.full((1, 2, 2), NO_TIME, np.int32))
    assert np.abs(known).min() > 0


def test_sums_of_rows_and_their_gradient_are_those_of_loops():
    rng, n_rows, d, width = np.random.default_rng(6), 7, 5, 6
    table, pull = rng.normal(size=(n_rows, d)), rng.normal(size=(2, 3, d))
    rows, is_there = rng.integers(0, n_rows, (2, 3, width)), rng.random((2, 3, width)) < 0.7
    rows[0, 0] = n_rows - 1  # one row, again and again
    expected, slopes = np.zeros((2, 3, d)), np.zeros((n_rows, d))
    for place in np.ndindex(2, 3, width):
        expected[place[:2]] += is_there[place] * table[rows[place]]
        slopes[rows[place]] += is_there[place] * pull[place[:2]]

    @jax.jit
    def total(table):
        found = sum_rows(table, rows, is_there)
        return jnp.sum(found * pull), found

    gradient, found = jax.grad(total, has_aux=True)(table.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, slopes, atol=1e-5)
