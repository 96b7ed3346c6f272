"""Weights of other types: whole numbers of a byte are near, and small; and all of a model's text parts are there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import MoEConfig
from moerec.convert.logits import compute_logits, make_text_batch
from moerec.errors import InputError
from moerec.nn.model import TEXT_SIZES
from moerec.serve.generate import Generator
from moerec.serve.generate.matmul import FEW_ROWS, Matrix, dequantize, product, quantize
from moerec.serve.generate.weights import make_weights
from tests.nn import test_text
from tests.serve.generate.test_equality import SHARED, TIED, decode_all, draw, make, score_whole
from tests.small_model import make_config, make_model

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n_rows", [1, 2, 5, FEW_ROWS + 1])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "inputs first"])
def test_a_product_is_that_of_its_weights(n_rows, kind):
    """Whole numbers cost the weights their precision, but not the rows."""
    x_RD, w_XD = (RNG.normal(size=shape).astype(np.float32) for shape in ((n_rows, 40), (24, 40)))
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    matrix = quantize(Matrix(jnp.asarray(w_XD))) if kind == "int8" else Matrix(jnp.asarray(w_XD, dtype))
    if kind == "inputs first":
        matrix = Matrix(matrix.w_XD.T, inputs_first=True)
    x = jnp.asarray(x_RD, dtype)
    found = np.asarray(jax.jit(product, static_argnames="dtype")(x, matrix, dtype="float32"))
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(matrix, jnp.float32), np.float64).T
    largest = np.abs(x_RD).max(axis=1, keepdims=True) * np.abs(w_XD).sum(axis=1)
    assert np.all(np.abs(found - wanted) <= largest * (2e-5 if kind == "int8" else 1e-6))


def test_whole_numbers_are_the_nearest_and_zeros_stay():
    w_XD = RNG.normal(size=(7, 30)).astype(np.float32) * 10.0 ** np.arange(-3, 4)[:, None]
    w_XD[3] = 0
    matrix = quantize(Matrix(jnp.asarray(w_XD)))
    gap = np.abs(np.asarray(dequantize(matrix, jnp.float32)) - w_XD)
    assert matrix.w_XD.dtype == jnp.int8
    assert np.all(gap <= np.abs(w_XD).max(axis=1, keepdims=True) / 254 * (1 + 1e-5))
    assert not gap[3].any()


@pytest.mark.parametrize("kind", ["grouped keys", "shared expert", "tied"])
def test_logits_of_whole_numbers_are_near(kind):
    """Of the rounded weights themselves they are nearly exact; that the rounding is small is another matter."""
    model = make(kind)
    rows = draw([14, 9])
    for row, found in zip(rows, decode_all(model, rows, 8, is_quantized=True), strict=True):
        wanted = score_whole(model, row)
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.05 * wanted.std()


def test_memory_is_saved():
    wide = make_config(text=TIED, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, d_ff=128)
    model = make_model(wide, sizes=TEXT_SIZES)
    n_bytes = {name: Generator(model, **options).n_bytes for name, options in OPTIONS.items()}
    assert n_bytes["bfloat16"] < 0.52 * n_bytes["float32"]
    assert n_bytes["int8"] < 0.29 * n_bytes["float32"]
    assert n_bytes["float32"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))


OPTIONS: dict[str, dict] = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"is_quantized": True}}


@pytest.mark.parametrize("kind", ["grouped keys", "shared expert"])
def test_bfloat16_is_as_near_as_the_models_own(kind):
    """Twice as far from float32 as the model in bfloat16 at most."""
    model = make(kind)
    narrow = make_model(dataclasses.replace(model.config, compute_dtype="bfloat16"), sizes=TEXT_SIZES)
    rows = draw([14, 9])
    for row, found in zip(rows, decode_all(narrow, rows, 8, dtype="bfloat16"), strict=True):
        wanted = score_whole(model, row)
        own = np.sqrt(np.mean((score_whole(narrow, row) - wanted) ** 2))
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 2 * own


def test_the_routers_biases_choose():
    model = make("shared expert")
    bias_LE = jnp.asarray(RNG.normal(size=(1, 5)) * 3, jnp.float32)
    (row,) = draw([12])
    state = model.encode(make_text_batch(row[None]), test_text.NO_ITEMS, router_bias_LE=bias_LE).state_BTD
    wanted = np.asarray(model.text_head.score(state, model.token_encoder))[0]
    (found,) = decode_all(model, [row], 6, router_bias_LE=bias_LE)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    assert np.abs(found - score_whole(model, row)).max() > 0.01


@pytest.mark.parametrize("kind", test_text.KINDS)
def test_of_a_model_with_events_text_is_what_is_left(kind):
    """Its experts of services, its profile and its hypotheses are none of text alone."""
    model = make_model(make_config(text=test_text.TEXT, **test_text.KINDS[kind]))
    row = np.random.default_rng(3).integers(0, test_text.V, 12).astype(np.int32)
    wanted = np.asarray(compute_logits(test_text.make_text_model(model), make_text_batch(row[None])))[0]
    (found,) = decode_all(model, [row], 6)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_without_a_cross_group_text_has_the_shared_expert_alone():
    moe = MoEConfig(layers=(1,), cross=False, n_per_group=2, n_active=2, d_expert=6, d_shared=5, tile=4)
    model = make_model(make_config(text=test_text.TEXT, moe=moe))
    row = np.random.default_rng(3).integers(0, test_text.V, 12).astype(np.int32)
    batch = test_text.of_events(make_text_batch(row[None]))
    state = model.encode(batch, test_text.TABLE).state_BTD
    wanted = np.asarray(model.text_head.score(state, model.token_encoder))[0]
    (found,) = decode_all(model, [row], 6)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_a_model_without_words_is_refused():
    with pytest.raises(InputError, match="no text head"):
        make_weights(make_model(make_config()))


def test_all_chosen_and_all_visited_experts_are_the_same():
    """A step visits the experts that are chosen, or each; with many rows they are grouped."""
    few = make_model(make_config(text=TIED, moe=dataclasses.replace(SHARED, n_per_group=16)), sizes=TEXT_SIZES)
    rows = draw([14, 23, 17, 9, 12, 20, 18, 11, 9])
    for some in (rows[:1], rows):
        for row, found in zip(some, decode_all(few, some, 4), strict=True):
            np.testing.assert_allclose(found, score_whole(few, row), rtol=0, atol=2e-5)
