"""What is written into a cache: the slot that is meant, and no other, whichever axis and type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.serve.generate.cache import SLOT_AXIS, keep_prompt, write

N_SLOTS = 8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [SLOT_AXIS.k, SLOT_AXIS.v])
def test_one_slot_is_written(axis, dtype):
    rng = np.random.default_rng(0)
    prompt_BTKH = jnp.asarray(rng.standard_normal((2, N_SLOTS, 3, 4)), dtype)
    new_BTKH = jnp.asarray(rng.standard_normal((2, 1, 3, 4)), jnp.float32)
    new_BTKH = new_BTKH.at[0, 0, 0, 0].set(jnp.nan).at[1, 0, 0, 0].set(-0.0)  # all bits are kept
    written = jax.jit(write, static_argnums=3)(keep_prompt(prompt_BTKH, N_SLOTS, axis), new_BTKH, 5, axis)
    expected = prompt_BTKH.at[:, 5].set(new_BTKH[:, 0].astype(dtype))
    assert written.dtype == dtype
    got = np.asarray(jnp.moveaxis(written, axis, 1), np.float32)
    np.testing.assert_array_equal(got, np.asarray(expected, np.float32))
    assert np.signbit(got[1, 5, 0, 0])


@pytest.mark.parametrize("axis", [SLOT_AXIS.k, SLOT_AXIS.v])
@pytest.mark.parametrize("n_slots", [2, 8, 16])
def test_a_place_of_a_prompt_is_in_the_slot_of_its_number(axis, n_slots):
    prompt_BTKH = np.arange(8.0)[None, :, None, None] * np.ones((1, 8, 2, 3))
    kept_KHS = np.moveaxis(np.asarray(keep_prompt(jnp.asarray(prompt_BTKH), n_slots, axis)), axis, -1)[0]
    assert kept_KHS.shape == (2, 3, n_slots)
    for place in range(8 - min(n_slots, 8), 8):
        np.testing.assert_array_equal(kept_KHS[..., place % n_slots], place)
