"""The training state: everything that a step reads and writes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moerec.config import Config
from moerec.nn.block import zero_router_bias
from moerec.nn.model import ModelSizes, Predictor, SequenceModel
from moerec.train.optim import make_optimizer


class TrainState(NamedTuple):
    """Randomness is a function of `step` and the seed, so none is stored.

    Attributes:
      step: int32 number of steps done.
      params: the model. opt_state: optax's.
      router_bias_LE: float32 biases of the mixture layers' routers, which have no gradient; None in a dense model.
      average: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    params: SequenceModel
    opt_state: optax.OptState
    router_bias_LE: jax.Array | None
    average: SequenceModel | None


def start_state(config: Config, params: SequenceModel) -> TrainState:
    """The state before any step."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    average = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else None
    bias_LE = zero_router_bias(config.model, params.n_services)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), bias_LE, average)


def init_state(config: Config, sizes: ModelSizes) -> TrainState:
    """A fresh state; under `jax.jit` with `out_shardings` the parameters are made straight into their shards."""
    return start_state(config, SequenceModel(jax.random.key(config.seed), config.model, sizes))


def make_predictor(state: TrainState) -> Predictor:
    """What is evaluated: the averaged parameters where there are some, else the last ones."""
    return Predictor(state.params if state.average is None else state.average, state.router_bias_LE)
