"""Pointers to the neighbors of events: what the table of transitions owes to a training target's user is no answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import AskConfig, Config, DataConfig
from moerec.nn.heads.item import TargetItems
from moerec.nn.model import SequenceModel
from moerec.tasks import Draws, NextEvent
from moerec.train.step import sum_losses
from moerec.types import EVENT, NearItems
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table

Z, N = SIZES.n_services, SIZES.n_items
TABLE = make_table()
SERVICE = np.asarray(TABLE.service_I)
ASK = AskConfig(from_layer=1, analyser_layers=1, d_analyser=6)
ROWS, WIDTH = [[13], [6, 7], [2, 1, 9]], 14


def make_histories() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Training histories of others, and those in the rows of a batch; the last event of each stands in no slot."""
    rng = np.random.default_rng(2)
    rows = [[rng.integers(0, N, length + 1) for length in row] for row in ROWS]
    return [rng.integers(0, N, 9) for _ in range(12)], rows


OTHERS, HISTORIES = make_histories()


def make_slots():
    """The batch of the histories: each event but the last is a slot, whose target is the next one."""
    batch = make_batch(3, ROWS, WIDTH)
    item, label = np.zeros(batch.item_BT.shape, np.int32), np.zeros(batch.item_BT.shape, np.int32)
    service = np.full(item.shape, Z, np.int32)
    for row, histories in enumerate(HISTORIES):
        start = 0
        for history in histories:
            n = len(history) - 1
            item[row, start : start + n], label[row, start : start + n] = history[:-1], history[1:]
            service[row, start : start + n] = SERVICE[history[:-1]]
            start += n
    assert np.array_equal(service < Z, batch.kind_BT == EVENT)
    weight = (batch.segment_BT > 0).astype(np.float32)
    target = batch.targets["next_event"]._replace(label_BT=label, weight_BT=weight)
    return batch._replace(item_BT=item, service_BT=service, targets={"next_event": target}), label


BATCH, LABEL = make_slots()


def count_pairs(histories: list[np.ndarray], crosses: bool = False) -> np.ndarray:
    """`[I, I]`, pairs both ways: .8^n with n < 10 events between them. Of one service and among its events; or
    of two, and among all.
    """
    weight_II = np.zeros((N, N))
    for history in histories:
        for z in range(1 if crosses else Z):
            own = [int(i) for i in history if crosses or SERVICE[i] == z]
            for a in range(len(own)):
                for b in range(a + 1, min(a + 11, len(own))):
                    weight_II[own[a], own[b]] += 0.8 ** (b - a - 1)
                    weight_II[own[b], own[a]] += 0.8 ** (b - a - 1)
    np.fill_diagonal(weight_II, 0)
    return np.where(SERVICE[:, None] != SERVICE, weight_II, 0) if crosses else weight_II


def make_catalog(histories: list[np.ndarray], n: int = N, kept: list[np.ndarray] | None = None):
    """The catalogue with its tables, of `n` neighbors; whichever they are by the histories `kept`."""
    near = {}
    for name in ("transitions", "crossings"):
        weight_II = count_pairs(histories, name == "crossings")
        most = weight_II if kept is None else count_pairs(kept, name == "crossings")
        order = np.argsort(-most, axis=1, kind="stable")[:, :n]
        weight_IX = np.take_along_axis(weight_II, order, axis=1).astype(np.float32)
        near[name] = NearItems(np.where(weight_IX > 0, order, -1).astype(np.int32), weight_IX)
    return jax.tree.map(jnp.asarray, TABLE._replace(near=near))


@jax.jit
def encode(model, catalog, hypothesis_BT, known_next_BT):
    """The targets' log-probabilities, as a training step has them."""
    asked = {"hypothesis_BT": hypothesis_BT} if model.config.is_asked else {}
    outputs = model.encode(BATCH, catalog, known_next_BT=known_next_BT, **asked)
    if not model.config.is_asked:
        outputs = outputs._replace(log_domain_BTZ=jnp.zeros((*LABEL.shape, Z)))
    weight_S = jnp.ones(LABEL.size)
    bound = model.bind(catalog)
    targets = TargetItems(
        model.head, model.item_encoder, outputs, BATCH, bound, jnp.asarray(LABEL).reshape(-1), weight_S, False, 8, True
    )
    return targets.log_prob(None).reshape(LABEL.shape)


def drop_rows(catalog):
    """Two items are without their rows for a step."""
    return catalog._replace(has_row_I=(catalog.count_I > 0) & (jnp.arange(N) % 7 != 3))


@pytest.mark.parametrize("pointer", ["transition_pointer", "crossing_pointer"])
@pytest.mark.parametrize(
    ("kind", "n", "change"),
    [
        ("asked", N, lambda x: x),
        ("dense", N, lambda x: x),
        ("asked", 3, drop_rows),
        ("dense", 3, drop_rows),
    ],
)
def test_a_target_is_predicted_as_if_the_table_had_been_counted_without_it_and_what_follows(kind, n, change, pointer):
    """With whole rows and with the nearest three: then without what the own user has given to those that are kept."""
    asked = {"ask": ASK, "pointer": "services"} if kind == "asked" else {}
    model = make_model(make_config(n_layers=2, **{pointer: True}, **asked), 1)
    service, known = (np.where(BATCH.segment_BT > 0, x, -1) for x in (SERVICE[LABEL], LABEL))
    everyone = [history for row in HISTORIES for history in row]
    whole = change(make_catalog(OTHERS + everyone, n))
    with_all = np.asarray(encode(model, whole, service, known))
    assert np.all(with_all < 1e-5)
    moved = 0.0
    for row, histories in enumerate(HISTORIES):
        start = 0
        for history in histories:
            rest = [other for other in everyone if other is not history]
            for place in range(len(history) - 1):
                truncated = change(make_catalog([*OTHERS, *rest, history[: place + 1]], n, OTHERS + everyone))
                alone = np.asarray(encode(model, truncated, service, None))
                slot = row, start + place
                np.testing.assert_allclose(with_all[slot], alone[slot], rtol=2e-4, atol=2e-5)
                told = np.asarray(encode(model, whole, service, None))
                moved = max(moved, abs(told[slot] - alone[slot]))
            start += len(history) - 1
    assert moved > 0.01  # what would be told otherwise


def test_a_training_step_takes_it_out():
    """The loss is that of the targets' log-probabilities without what the tables owe to them."""
    model = make_model(make_config(n_layers=2, transition_pointer=True, crossing_pointer=True, ask=ASK), 1)
    config = Config(model=model.config, data=DataConfig(transition_neighbors=N, crossing_neighbors=N))
    catalog = make_catalog([*OTHERS, *(history for row in HISTORIES for history in row)])
    service, known = (np.where(BATCH.segment_BT > 0, x, -1) for x in (SERVICE[LABEL], LABEL))
    sums = jax.jit(lambda m: sum_losses(m, BATCH, catalog, [NextEvent()], {"next_event": Draws()}, config))(model)
    expected, told = (
        -np.sum(encode(model, catalog, service, next_item)[BATCH.segment_BT > 0]) for next_item in (known, None)
    )
    assert float(sums.tasks["next_event"].total) == pytest.approx(float(expected), rel=1e-4)
    assert told < expected - 0.01


@pytest.mark.parametrize("ask", [ASK, AskConfig()])
def test_pointers_to_neighbors_and_no_others_begin_without_queries(ask):
    config = make_config(n_layers=2, transition_pointer=True, crossing_pointer=True, ask=ask, pointer="services")
    model = SequenceModel(jax.random.key(0), config, SIZES)
    query_DGH = np.asarray(model.head.aggregator.query_DGH[...])
    assert not query_DGH[:, -2:].any()
    assert query_DGH[:, :-2].all()


def test_gradients_are_finite_where_nothing_is_known():
    """Only the target's own user has ever had the pairs, or nobody has."""
    model = make_model(make_config(n_layers=2, transition_pointer=True, crossing_pointer=True, ask=ASK), 1)
    service, known = (np.where(BATCH.segment_BT > 0, x, -1) for x in (SERVICE[LABEL], LABEL))
    for histories in ([], [HISTORIES[0][0]]):
        catalog = make_catalog(histories)
        gradient = jax.jit(jax.grad(lambda m, c=catalog: jnp.sum(encode(m, c, service, known))))(model)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_items_without_their_rows_for_a_step_are_not_reached_by_transitions():
    model = make_model(make_config(n_layers=2, transition_pointer=True, ask=ASK), 1)
    catalog = make_catalog(OTHERS)
    gone = int(LABEL[0, 5])
    without = catalog._replace(has_row_I=(catalog.count_I > 0).at[gone].set(False))
    weight_II = count_pairs(OTHERS)
    weight_II[gone] = weight_II[:, gone] = 0
    service = np.where(BATCH.segment_BT > 0, SERVICE[LABEL], -1)

    def share(catalog):
        outputs = model.encode(BATCH, catalog, hypothesis_BT=service)
        near = outputs.pointers.near["transitions"]
        return near.share_BSX, outputs.pointers.log_weight_BTX

    shares, log_weight = map(np.asarray, jax.jit(share)(without))
    neighbor = np.asarray(catalog.near["transitions"].item_IX)[BATCH.item_BT]
    assert np.all(shares[neighbor == gone] == 0)
    assert np.all(shares[BATCH.item_BT == gone] == 0)
    is_event = (BATCH.kind_BT == EVENT) & (BATCH.item_BT != gone) & (weight_II.sum(axis=1)[BATCH.item_BT] > 0)
    np.testing.assert_allclose(shares.sum(axis=-1)[is_event], 1, rtol=1e-5)
    assert np.isfinite(log_weight).all()
