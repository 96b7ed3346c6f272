"""The training state and one training step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moerec.config import Config, LossConfig, MoEConfig
from moerec.nn.model import ModelSizes, SequenceModel
from moerec.nn.moe.balance import update_bias
from moerec.tasks.losses import (
    Candidates,
    Sums,
    all_candidates,
    sample_in_service,
    sample_negatives,
    sum_losses,
    total_loss,
)
from moerec.train.optim import make_optimizer, make_schedule
from moerec.types import Batch, Catalog, Routing


class TrainState(NamedTuple):
    """Everything that a step reads and writes. Randomness is a function of `step` and the seed, so none is stored.

    Attributes:
      step: int32 number of steps done.
      model: parameters. opt_state: optax's. average: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    model: SequenceModel
    opt_state: optax.OptState
    average: SequenceModel | None


def init_state(config: Config, sizes: ModelSizes) -> TrainState:
    """A fresh state; under `jax.jit` with `out_shardings` the parameters are made straight into their shards."""
    model = SequenceModel(jax.random.key(config.seed), config.model, sizes)
    optimizer = make_optimizer(config.optim, config.train.steps)
    average = jax.tree.map(jnp.copy, model) if config.optim.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), average)


def evaluated_model(state: TrainState) -> SequenceModel:
    """The averaged parameters where there are some, else the last ones."""
    return state.model if state.average is None else state.average


def _candidates(key: jax.Array, config: LossConfig, cdf_I: jax.Array, batch: Batch, table: Catalog) -> Candidates:
    if config.kind == "full_softmax":
        return all_candidates(cdf_I.shape[0])
    if config.kind == "sampled_softmax":
        return sample_negatives(key, cdf_I, config.n_negatives)
    if config.scope == "union":
        return sample_negatives(key, cdf_I, batch.target_BT.size)
    item_S = sample_in_service(key, cdf_I, table.service_I, batch.target_BT.reshape(-1))
    return Candidates(item_S, jnp.zeros(item_S.shape, jnp.float32))  # cross-entropy of pairs has no correction


def _microbatches(batch: Batch, candidates: Candidates, config: Config) -> tuple[Batch, Candidates | None]:
    """Splits the rows into microbatches; one negative a slot goes with its slot, shared ones stay shared."""
    n = config.train.n_microbatches

    def split(x):
        # Row r goes to microbatch r % n, so that every device keeps its own rows.
        return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)

    if config.loss.kind != "one_negative":
        return jax.tree.map(split, batch), None
    rows, slots = batch.item_BT.shape
    own = jax.tree.map(lambda x: split(x.reshape(rows, slots)).reshape(n, -1), candidates)
    return jax.tree.map(split, batch), own


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _divide(grads: SequenceModel, weight: jax.Array) -> SequenceModel:
    return jax.tree.map(lambda g: g / jnp.maximum(weight, 1), grads)


def _steer(model: SequenceModel, routing: Routing, config: MoEConfig) -> SequenceModel:
    """Moves the biases of the routers, which have no gradient."""

    def move(bias_LE, first):
        layers = jax.tree.map(lambda x: x[first : first + bias_LE.shape[0]], routing)
        return update_bias(bias_LE, layers, config)

    return model.with_router_biases(move)


def _differentiate(
    config: Config, model: SequenceModel, batch: Batch, table: Catalog, shared: Candidates, dropout_key: jax.Array
) -> tuple[SequenceModel, dict[str, jax.Array], Sums]:
    """Gradients of the mean loss of the global batch, the parts of the loss, and its sums."""
    batches, own = _microbatches(batch, shared, config)
    parts = (batches, own, jax.random.split(dropout_key, config.train.n_microbatches))

    def sum_part(model, part):
        microbatch, negatives, k = part
        return sum_losses(model, microbatch, table, shared if negatives is None else negatives, config.loss, k)

    def finish(sums):
        return total_loss(sums, config.loss, config.model.moe)

    if config.train.n_microbatches == 1:
        whole = jax.tree.map(lambda x: x[0], parts)
        sums, pull = jax.vjp(lambda m: sum_part(m, whole), model)
        d_sums, metrics = jax.grad(finish, has_aux=True)(sums)
        return _divide(pull(d_sums)[0], sums.weight), metrics, sums

    first = jax.tree.map(lambda x: x[0], parts)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sum_part, model, first))
    sums = empty._replace(weight=jnp.sum(batch.weight_BT))
    if empty.routing is not None:
        # Balance is no sum over slots: how a microbatch pulls depends on the load of the global batch.
        sums, _ = jax.lax.scan(lambda carry, part: (_add(carry, sum_part(model, part)), None), empty, parts)
    d_sums, _ = jax.grad(finish, has_aux=True)(sums)

    def accumulate(carry, part):
        sums, pull = jax.vjp(lambda m: sum_part(m, part), model)
        return _add(carry, (sums, pull(d_sums)[0])), None

    (sums, grads), _ = jax.lax.scan(accumulate, (empty, jax.tree.map(jnp.zeros_like, model)), parts)
    return _divide(grads, sums.weight), finish(sums)[1], sums


def make_train_step(
    config: Config, cdf_I: jax.Array
) -> Callable[[TrainState, Batch, Catalog], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step on the global batch.

    The loss is a function of sums over the slots of the global batch, so microbatches of any number give the gradient
    of the whole batch, however unevenly padding falls (with a capacity, each drops on its own).
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)

    def train_step(state: TrainState, batch: Batch, table: Catalog):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        k_candidates, k_dropout = jax.random.split(key)
        candidates = _candidates(k_candidates, config.loss, cdf_I, batch, table)
        grads, metrics, sums = _differentiate(config, state.model, batch, table, candidates, k_dropout)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        if sums.routing is not None and config.model.moe.bias_rate:
            model = _steer(model, sums.routing, config.model.moe)
        average = state.average
        if average is not None:
            # The warm-up of the average forgets the initial parameters as fast as the plain mean would.
            rate = jnp.maximum(1 - config.optim.ema_decay, 1 / (state.step + 1.0))
            average = jax.tree.map(lambda a, p: a + rate * (p - a), average, model)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, model, opt_state, average), metrics

    return train_step
