"""The training state: everything that a step reads and writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moerec.config import Config
from moerec.nn.block import zero_router_bias
from moerec.nn.model import ModelSizes, Predictor, SequenceModel
from moerec.train.optim import find_layout, is_packed, lay_out, make_optimizer, pack, unpack


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


def pack_state(state: TrainState, config: Config, sharding: jax.sharding.Sharding) -> TrainState:
    """The state with moments and average as vectors (`optim.PackedTree`), as the step is fastest on one CPU.

    Groups of parameters (`optim.groups`) are updated apart: their state stays as it is.
    """
    if config.optim.groups:
        return state
    layout = lay_out(state.params, config.optim)

    def is_like_params(x: Any) -> bool:
        return jax.tree.structure(x) == layout.treedef

    def join(x):
        # On the host: the shapes are many, and each would be compiled.
        return jax.device_put(pack(jax.tree.map(np.asarray, x), layout), sharding) if is_like_params(x) else x

    opt_state, average = jax.tree.map(join, (state.opt_state, state.average), is_leaf=is_like_params)
    return state._replace(opt_state=opt_state, average=average)


def spread_state(state: TrainState) -> TrainState:
    """The state that `pack_state` packed, leaf by leaf, as it is stored and evaluated; any other one as it is."""
    if find_layout(state.opt_state) is None:
        return state

    def split(x):
        if not is_packed(x):
            return x
        (sharding,) = {vector.sharding for vector in x.vectors.values()}
        # Copies: the next step is given the memory of the vectors.
        return jax.device_put(unpack(jax.tree.map(np.array, x)), sharding)

    return jax.tree.map(split, state, is_leaf=is_packed)


def make_predictor(state: TrainState) -> Predictor:
    """What is evaluated: the averaged parameters where there are some, else the last ones."""
    average = spread_state(state).average
    return Predictor(state.params if average is None else average, state.router_bias_LE)
