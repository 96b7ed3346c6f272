import jax
import jax.numpy as jnp
import pytest

from moerec.train.plan.jaxpr_activations import count_activations

N_LAYERS, ROWS, SLOTS, WIDTH = 5, 3, 7, 4
X, W = jnp.ones((ROWS, SLOTS, WIDTH)), jnp.ones((N_LAYERS, WIDTH, WIDTH))
INPUTS = 4 * N_LAYERS * ROWS * SLOTS * WIDTH  # bytes of the layers' inputs


def loss(w, remat: bool):
    def layer(x, w):
        return jnp.sin(jnp.tanh(x @ w)), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, X, w)[0])


@pytest.mark.parametrize("jitted", [False, True])
def test_rematerialised_layers_keep_their_inputs(jitted):
    def step(w):
        return jax.grad(loss)(w, True)

    traced = jax.make_jaxpr(jax.jit(step) if jitted else step)(W)
    assert count_activations(traced, ROWS, SLOTS) == INPUTS


def test_others_keep_what_their_derivatives_need():
    """The input, the cosine of what goes into the sine, and the tanh or what makes its derivative."""
    found = count_activations(jax.make_jaxpr(jax.grad(lambda w: loss(w, False)))(W), ROWS, SLOTS)
    assert found in (3 * INPUTS, 4 * INPUTS)


def test_without_a_backward_pass_and_of_weights_nothing_is_kept():
    assert count_activations(jax.make_jaxpr(lambda w: loss(w, True))(W), ROWS, SLOTS) == 0
    assert count_activations(jax.make_jaxpr(jax.grad(lambda w: loss(w, True)))(W), WIDTH, WIDTH) == 4 * W.size


def test_of_microbatches_one_is_alive():
    def step(w):
        return jax.lax.scan(
            lambda total, _: (total + jax.grad(loss)(w, True), None), jnp.zeros_like(w), None, length=6
        )[0]

    assert count_activations(jax.make_jaxpr(step)(W), ROWS, SLOTS) == INPUTS
