"""What is drawn: only what the filters leave, as often as its probability says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.errors import InputError
from moerec.serve.generate.sampling import GREEDY, Draw, Sampling, choose_tokens, keep_probable

V = 23
LOGITS = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32) * 2
KEEP = jax.jit(keep_probable)


def keep_sorted(logit_V: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The tokens that stay, by sorting: the first k, of these the first that together have p."""
    order = np.argsort(-logit_V)[: top_k or None]
    probability = np.exp(logit_V[order].astype(np.float64))
    before = np.cumsum(probability / probability.sum()) - probability / probability.sum()
    return set(order[before < top_p].tolist()) if top_p < 1 else set(order.tolist())


@pytest.mark.parametrize("n_vocab", [1, 40, 64, 128, 200])
def test_greedily_the_first_of_the_largest_is_chosen(n_vocab):
    logit_BV = np.random.default_rng(1).integers(-3, 4, (50, n_vocab)).astype(np.float32)
    logit_BV[0] = -np.inf
    logit_BV[1, n_vocab // 2 :] = np.inf
    draw = Draw(np.float32(1), np.int32(0), np.float32(1), np.uint32(0), np.zeros(50, np.uint32))
    choose = jax.jit(choose_tokens, static_argnums=3)
    chosen = choose(logit_BV, draw, np.zeros(50, np.int32), GREEDY)
    assert chosen.dtype == np.int32
    np.testing.assert_array_equal(chosen, np.argmax(logit_BV, axis=-1))
    broken = choose(logit_BV * np.nan, draw, np.zeros(50, np.int32), GREEDY)
    assert np.all((np.asarray(broken) >= 0) & (np.asarray(broken) < n_vocab))  # a token all the same


@pytest.mark.parametrize("top_k", [0, 1, 4, V, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_the_filters_keep_what_sorting_keeps(top_k, top_p):
    kept = np.asarray(KEEP(LOGITS, np.int32(top_k), np.float32(top_p)))
    for row, logit_V in zip(kept, LOGITS, strict=True):
        assert set(np.flatnonzero(np.isfinite(row)).tolist()) == keep_sorted(logit_V, top_k, top_p)
        np.testing.assert_array_equal(row[np.isfinite(row)], logit_V[np.isfinite(row)])


def test_equals_stay_together():
    logits = np.array([[1, 3, 3, -2, 3, 0]], np.float32)
    kept = np.asarray(KEEP(logits, np.int32(2), np.float32(1)))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [1, 2, 4]


@pytest.mark.parametrize("top_k", [0, 3])
def test_tokens_are_drawn_as_often_as_their_probability_says(top_k):
    sampling = Sampling(0.8, top_k=top_k, seed=5)
    n = 4000
    logit_BV = jnp.broadcast_to(LOGITS[0], (n, V))
    draw = Draw(*(jnp.asarray(x) for x in (0.8, top_k, 1.0)), jnp.uint32(5), jnp.arange(n, dtype=jnp.uint32))
    token = np.asarray(choose_tokens(logit_BV, draw, jnp.zeros(n, jnp.int32), sampling.kind))
    wanted = np.where(np.isin(np.arange(V), list(keep_sorted(LOGITS[0], top_k, 1.0))), np.exp(LOGITS[0] / 0.8), 0)
    wanted /= wanted.sum()
    deviation = np.sqrt(wanted * (1 - wanted) / n)
    assert np.all(np.abs(np.bincount(token, minlength=V) / n - wanted) <= 4.5 * deviation)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_values_out_of_range_are_refused(fields, line):
    with pytest.raises(InputError, match=line):
        Sampling(**fields)
