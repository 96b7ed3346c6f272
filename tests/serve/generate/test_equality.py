"""With a cache a model says at every position what it says without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import MoEConfig, TextConfig
from moerec.convert.logits import compute_logits, make_text_batch
from moerec.nn.model import TEXT_SIZES
from moerec.serve.generate.cache import merge_recent, round_up, size_cache
from moerec.serve.generate.decoder import run_prompt, run_slot, score_tokens, start_recent
from moerec.serve.generate.weights import make_weights
from tests.small_model import make_config, make_model

V = 19
TIED, UNTIED = TextConfig(vocab_size=V), TextConfig(vocab_size=V, tie_head=False)
RECENT = 7  # slots beside the cache
MOE = MoEConfig(layers=(1,), services=False, reads_domain=False, n_per_group=5, n_active=2, d_expert=6, tile=4)
SHARED = dataclasses.replace(MOE, d_shared=5, shared_gate=True, renormalise=False)
KINDS = {
    "tied": {"text": TIED, "n_kv_heads": 4},
    "untied": {"text": UNTIED, "n_kv_heads": 4},
    "grouped keys": {"text": UNTIED},
    "one key head": {"text": TIED, "n_kv_heads": 1, "qkv_bias": False},
    "window": {"text": TIED, "window": 5},
    "window of a power of two": {"text": TIED, "window": 8},
    "mixture": {"text": TIED, "moe": MOE},
    "shared expert": {"text": UNTIED, "moe": SHARED},
    "mixture and window": {"text": TIED, "moe": SHARED, "window": 3},
    "six layers": {"text": TIED, "n_layers": 6, "group_starts": (3,)},
}


@functools.cache
def make(kind: str):
    return make_model(make_config(**KINDS[kind]), sizes=TEXT_SIZES)


@functools.partial(jax.jit, static_argnames=("config", "n_slots"))
def _read(weights, token_BT, n_padded_B, *, config, n_slots):
    cache, x_BTD = run_prompt(weights, config.value, token_BT, n_padded_B, n_slots)
    return cache, score_tokens(weights, config.value, x_BTD)


@functools.partial(jax.jit, static_argnames=("config",))
def _step(weights, caches, token_B, start, place, n_padded_B, *, config):
    recent, x_BTD = run_slot(weights, config.value, *caches, token_B, start, place, n_padded_B)
    return (caches[0], recent), score_tokens(weights, config.value, x_BTD)[:, 0]


_merge = jax.jit(merge_recent)


class Held:
    """A config as an argument of a program: the same where it is the same object."""

    def __init__(self, value):
        self.value = value


def decode_all(model, rows: list[np.ndarray], n_read: int, **options) -> list[np.ndarray]:
    """Logits `[n, V]` at every position of each row: those of prompts, then token by token what was given.

    Args: tokens of each sequence; how many at the end of each are given one by one.
    """
    weights, config = make_weights(model, **options), Held(model.config)
    prompts = [row[: len(row) - n_read] for row in rows]
    n_places = round_up(max(map(len, prompts)), 4)
    token_BT = np.zeros((len(rows), n_places), np.int32)
    for row, prompt in enumerate(prompts):
        token_BT[row, n_places - len(prompt) :] = prompt
    n_padded_B = np.array([n_places - len(prompt) for prompt in prompts], np.int32)
    n_slots = size_cache(n_places + n_read, model.config.window)
    cache, logits_BTV = _read(weights, token_BT, n_padded_B, config=config, n_slots=n_slots)
    found = [[row[n:]] for row, n in zip(np.asarray(logits_BTV), n_padded_B, strict=True)]
    start, recent = jnp.int32(n_places), start_recent(cache, RECENT)
    for step in range(n_read):
        place = jnp.int32(n_places + step)
        if step and step % RECENT == 0:
            cache = _merge(cache, recent, start, place)
            start, recent = place, start_recent(cache, RECENT)
        token_B = np.array([row[len(row) - n_read + step] for row in rows], np.int32)
        (_, recent), logits_BV = _step(weights, (cache, recent), token_B, start, place, n_padded_B, config=config)
        for own, logits_V in zip(found, np.asarray(logits_BV), strict=True):
            own.append(logits_V[None])
    return [np.concatenate(own) for own in found]


def draw(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).astype(np.int32) for n in lengths]


def score_whole(model, row: np.ndarray) -> np.ndarray:
    """`[n, V]` by the whole sequence at once."""
    return np.asarray(compute_logits(model, make_text_batch(row[None])))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_prompt", [1, 7, 8, 9])
def test_every_position_is_that_of_the_whole_sequence(kind, n_prompt):
    """Prompts around a bucket's border, so long after it that a ring comes around."""
    model = make(kind)
    (row,) = draw([n_prompt + 12])
    (found,) = decode_all(model, [row], 12)
    np.testing.assert_allclose(found, score_whole(model, row), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["grouped keys", "window", "shared expert"])
def test_prompts_of_unequal_lengths_are_as_alone(kind):
    model = make(kind)
    rows = draw([14, 23, 17, 9])
    for row, found in zip(rows, decode_all(model, rows, 8), strict=True):
        np.testing.assert_allclose(found, score_whole(model, row), rtol=0, atol=2e-5)
