"""The training state and one training step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moerec.config import Config, LossConfig
from moerec.losses import Candidates, all_candidates, draw_candidates, draw_in_service, next_item_loss
from moerec.nn.model import SequenceModel, Sizes
from moerec.optim import make_optimizer, make_schedule
from moerec.shapes import Batch, ItemTable


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


def init_state(config: Config, sizes: Sizes) -> TrainState:
    """A fresh state; under `jax.jit` with `out_shardings` the parameters are made straight into their shards."""
    model = SequenceModel(jax.random.key(config.seed), config.model, sizes)
    optimizer = make_optimizer(config.optim, config.train.steps)
    average = jax.tree.map(jnp.copy, model) if config.optim.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), average)


def evaluated_model(state: TrainState) -> SequenceModel:
    """The averaged parameters where there are some, else the last ones."""
    return state.model if state.average is None else state.average


def _candidates(key: jax.Array, config: LossConfig, cdf_I: jax.Array, batch: Batch, table: ItemTable) -> Candidates:
    if config.kind == "full_softmax":
        return all_candidates(cdf_I.shape[0])
    if config.kind == "sampled_softmax":
        return draw_candidates(key, cdf_I, config.n_negatives)
    if config.scope == "union":
        return draw_candidates(key, cdf_I, batch.target_BT.size)
    item_S = draw_in_service(key, cdf_I, table.service_I, batch.target_BT.reshape(-1))
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


def make_train_step(
    config: Config, cdf_I: jax.Array
) -> Callable[[TrainState, Batch, ItemTable], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step on the global batch.

    The loss and its gradients are sums over slots divided once by the global weight, so microbatches of any number
    give the gradient of the whole batch, however unevenly padding falls.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)

    def sum_of_losses(model, batch, table, candidates, dropout_key):
        return next_item_loss(model, batch, table, candidates, config.loss, dropout_key)

    def train_step(state: TrainState, batch: Batch, table: ItemTable):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        k_candidates, k_dropout = jax.random.split(key)
        shared = _candidates(k_candidates, config.loss, cdf_I, batch, table)
        batches, own = _microbatches(batch, shared, config)

        def accumulate(carry, xs):
            microbatch, negatives, k = xs
            value_and_grad = jax.value_and_grad(sum_of_losses, has_aux=True)
            negatives = shared if negatives is None else negatives
            (loss, weight), grads = value_and_grad(state.model, microbatch, table, negatives, k)
            return jax.tree.map(jnp.add, carry, (loss, weight, grads)), None

        n = config.train.n_microbatches
        keys = jax.random.split(k_dropout, n)
        if n == 1:
            first = jax.tree.map(lambda x: x[0], (batches, own, keys))
            (loss, weight), grads = jax.value_and_grad(sum_of_losses, has_aux=True)(
                state.model, first[0], table, shared if own is None else first[1], first[2]
            )
        else:
            zero = jnp.zeros((), jnp.float32)
            start = (zero, zero, jax.tree.map(jnp.zeros_like, state.model))
            (loss, weight, grads), _ = jax.lax.scan(accumulate, start, (batches, own, keys))
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        average = state.average
        if average is not None:
            # The warm-up of the average forgets the initial parameters as fast as the plain mean would.
            rate = jnp.maximum(1 - config.optim.ema_decay, 1 / (state.step + 1.0))
            average = jax.tree.map(lambda a, p: a + rate * (p - a), average, model)
        metrics = {
            "loss": loss / jnp.maximum(weight, 1),
            "slots": weight,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, model, opt_state, average), metrics

    return train_step
