"""States of items' texts as a part of their vectors, against the same in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import ModelConfig
from moerec.convert.paths import flatten
from moerec.errors import InputError
from moerec.nn.embeddings import ItemEncoder, StatesEncoder
from tests.small_model import SIZES, fill, make_config, make_model, make_table, worst_gap

X, D_TEXT, D = 9, 6, 8
EMPTY = (3, 12)  # items without a text


def draw_states() -> np.ndarray:
    state = np.random.default_rng(4).standard_normal((SIZES.n_items, X)).astype(np.float32)
    state[list(EMPTY)] = 0
    return state


STATE_IX = draw_states()
TABLE = jax.tree.map(jnp.asarray, make_table()._replace(state_IX=STATE_IX))


def make_encoder(seed: int = 0) -> StatesEncoder:
    return fill(jax.eval_shape(lambda: StatesEncoder(jax.random.key(0), X, D_TEXT, D, 1e-6)), seed)


def encode_by_hand(leaves: dict[str, jax.Array], state: np.ndarray) -> np.ndarray:
    w_in, scale, gate, out = (
        np.asarray(leaves[name], np.float64) for name in ("in_XD", "norm/scale", "gate_DD", "out_DD")
    )
    found = []
    for row in state.astype(np.float64):
        narrow = row @ w_in
        narrow = scale * narrow / np.sqrt(np.mean(narrow**2) + 1e-6)
        gated = narrow @ gate
        found.append((narrow + gated / (1 + np.exp(-gated))) @ out)
    return np.array(found)


def test_states_are_made_narrow_gated_and_projected():
    encoder = make_encoder()
    found = encoder(jnp.asarray(STATE_IX))
    np.testing.assert_allclose(found, encode_by_hand(flatten(encoder), STATE_IX), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        encoder(jnp.asarray(STATE_IX[:4]).reshape(2, 2, X)), found[:4].reshape(2, 2, D), rtol=1e-5
    )
    # The size of the states is no matter.
    np.testing.assert_allclose(encoder(100 * jnp.asarray(STATE_IX)), found, rtol=1e-3, atol=1e-5)


def test_without_a_text_there_is_nothing_and_no_gradient():
    """Whatever the weights are, and the gradient is finite."""
    encoder, nothing = make_encoder(), jnp.zeros((2, X))
    pull = jax.jit(jax.grad(lambda module, state: jnp.sum(jnp.cos(module(state)) + module(state))))
    np.testing.assert_array_equal(encoder(nothing), np.zeros((2, D)))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(pull(encoder, nothing)))  # NaN is not zero, either
    assert all(np.any(leaf) for leaf in jax.tree.leaves(pull(encoder, jnp.asarray(STATE_IX))))


PARTS = [
    {"item_row": True, "item_text": False},
    {"item_row": True, "item_text": True},
    {"item_row": False, "item_text": True},
    {"item_row": False, "item_text": False},
]


def make_item_encoder(config: ModelConfig, seed: int = 0) -> ItemEncoder:
    shape = SIZES.n_items, SIZES.n_tokens, X
    return fill(jax.eval_shape(lambda: ItemEncoder(jax.random.key(0), config, *shape)), seed)


@pytest.mark.parametrize("parts", PARTS)
def test_an_items_vector_has_its_states_on_top_of_its_other_parts(parts):
    encoder = make_item_encoder(make_config(item_states=True, **parts))
    item = jnp.arange(SIZES.n_items)
    expected = encode_by_hand(
        {path.removeprefix("states/"): x for path, x in flatten(encoder).items() if path.startswith("states/")},
        STATE_IX,
    )
    if encoder.row_ID is not None:
        trained = np.asarray(TABLE.count_I)[:, None] > 0
        expected = expected + np.where(trained, encoder.row_ID[...], encoder.no_row_D[...])
    if encoder.text is not None:
        expected = expected + np.asarray(encoder.text(TABLE.token_IW))
    np.testing.assert_allclose(encoder(item, TABLE), expected, rtol=1e-4, atol=1e-5)


def test_an_event_needs_a_row_or_some_text():
    with pytest.raises(InputError, match=r"model\.item_row: an event needs the item's row or its text"):
        make_config(item_row=False, item_text=False)


def test_states_change_nothing_of_how_the_other_parts_begin():
    def init(item_states: bool):
        config = make_config(item_states=item_states)
        return flatten(ItemEncoder(jax.random.key(3), config, SIZES.n_items, SIZES.n_tokens, X))

    without, leaves = jax.jit(lambda: (init(False), init(True)))()
    assert {path.split("/")[0] for path in leaves.keys() - without.keys()} == {"states"}
    assert worst_gap({path: leaves[path] for path in without}, without) == 0


@pytest.mark.parametrize("tie", [True, False])
def test_inputs_and_candidates_have_them(tie):
    """Each with an encoder of its own, where the two are not tied."""
    config = make_config(n_layers=1, tie_items=tie, item_states=True)
    model = make_model(config, sizes=dataclasses.replace(SIZES, d_states=X))
    owners = {path.split("/states/")[0] for path in flatten(model) if "/states/" in path}
    assert owners == {"item_encoder", *(() if tie else ("head/encoder",))}
    vector_ID = model.bind(TABLE).vector_ID
    encoder = model.item_encoder if tie else model.head.encoder
    np.testing.assert_array_equal(vector_ID, encoder(jnp.arange(SIZES.n_items), TABLE))
    gap_ID = vector_ID - model.bind(TABLE._replace(state_IX=np.zeros_like(STATE_IX))).vector_ID
    assert np.flatnonzero(~np.any(gap_ID, axis=1)).tolist() == list(EMPTY)
