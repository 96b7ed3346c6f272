"""One training step, and the same lowered from shapes alone."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moerec.config import Config
from moerec.convert.paths import flatten
from moerec.nn.heads.near_pointers import told_names
from moerec.nn.model import ModelSizes, SequenceModel
from moerec.nn.moe.balance import balance_losses, update_bias, weigh_losses
from moerec.nn.moe.hypotheses import followed_services
from moerec.nn.sharding import ROW_AXES, param_shardings
from moerec.tasks import NextEvent, TextToItem
from moerec.tasks.base import Draws, Task, TaskSums, find_domains, find_rows, make_tasks
from moerec.train.optim import find_layout, find_rates, make_optimizer, make_schedule, pack, unpack
from moerec.train.state import TrainState, init_state
from moerec.types import Batch, Catalog, NearItems, Request, Routing, Target

Constants = dict[str, Any]  # what each task's loss needs beside the catalogue, by the task's name
TrainStep = Callable[[TrainState, Batch, Catalog, Constants], tuple[TrainState, dict[str, jax.Array]]]


class StepSums(NamedTuple):
    """Sums over the slots of a batch; those of microbatches and devices add up to the global batch's.

    Attributes:
      tasks: by name. routing: of the mixture layers, or None in a dense model.
      n_slots: of several tasks, the slots of rows that have a target of each, by name, and of all rows by "".
    """

    tasks: dict[str, TaskSums]
    routing: Routing | None
    n_slots: dict[str, jax.Array] = {}  # noqa: RUF012, nobody writes to it


def total_loss(sums: StepSums, config: Config) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What is minimised, from the sums of a global batch, and its parts by name.

    `loss` is the first task's mean; those of further tasks have the task's name before theirs. Each mean is over the
    task's own targets, whatever others there are, and has the weight of `loss.task_weights` in the sum.
    """
    weights = config.loss.weight_of
    total = jnp.zeros(())
    metrics: dict[str, jax.Array] = {}
    for place, name in enumerate(config.tasks):  # a dict that JAX has rebuilt is in the order of its keys
        task = sums.tasks[name]
        weight = jnp.maximum(task.weight, 1)
        total += weights.get(name, 1.0) * task.total / weight
        prefix = "" if place == 0 else f"{name}/"
        metrics |= {f"{prefix}{part}": value / weight for part, value in task.parts.items()}
        metrics.setdefault(f"{prefix}loss", task.total / weight)
        metrics[f"{prefix}slots"] = task.weight
        if sums.n_slots:
            metrics[f"{prefix}share"] = sums.n_slots[name] / jnp.maximum(sums.n_slots[""], 1)
    if sums.routing is not None:
        losses = balance_losses(sums.routing, config.model.moe, config.model.is_asked)
        total += weigh_losses(losses, config.loss)
        metrics |= losses | {"dropped": jnp.sum(sums.routing.dropped_L3)}
    return total, metrics


def sum_losses(
    params: SequenceModel,
    batch: Batch,
    catalog: Catalog,
    tasks: list[Task],
    draws: dict[str, Draws],
    config: Config,
    router_bias_LE: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> StepSums:
    """Everything that the training loss is made of, over all slots of the batch."""
    if any(task.binds_catalog(config) for task in tasks):
        catalog = params.bind(catalog)
    domain_BT = find_domains(tasks, batch, catalog)
    asked = {}
    if config.model.is_asked:
        # The service that a slot asks in training is that of its next event, or of its item; a slot without a target,
        # before an event of its sequence, asks as the past does at a request.
        of_items = [task for task in tasks if task.name in (NextEvent.name, TextToItem.name)]
        wanted_BT, followed_BT = find_domains(of_items, batch, catalog), followed_services(batch, params.n_services)
        asked_BT = followed_BT if wanted_BT is None else jnp.where(wanted_BT < 0, followed_BT, wanted_BT)
        asked = {"hypothesis_BT": asked_BT}
    options: dict[str, Any] = {**asked, "router_bias_LE": router_bias_LE}
    if told_names(config.model):  # whose tables have been counted on these very targets
        target = batch.targets[NextEvent.name]
        options["known_next_BT"] = jnp.where(target.weight_BT > 0, target.label_BT, -1)
    outputs = params.encode(batch, catalog, dropout_key, domain_BT=domain_BT, **options)
    # Split over devices, each has rows of its own, and of the streams what falls to it.
    is_split = not jax.sharding.get_abstract_mesh().empty
    sums = {}
    for task in tasks:
        parts = (outputs._replace(routing=None), batch, draws[task.name].by_row)
        if not is_split:
            rows = find_rows(task.name, config, batch.kind_BT.shape[0])
            parts = _take_rows(parts, rows)
        seen, own, by_row = parts
        sums[task.name] = task.loss(params, seen, own, catalog, Draws(draws[task.name].shared, by_row), config)
    return StepSums(sums, outputs.routing, _count_slots(batch) if config.data.mix.has_words else {})


def _take_rows(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda x: x if rows == slice(0, x.shape[0]) else x[rows], tree)


def _count_slots(batch: Batch) -> dict[str, jax.Array]:
    """`StepSums.n_slots`; padding is none."""
    n_B = jnp.sum(batch.segment_BT > 0, axis=1).astype(jnp.float32)
    found = {name: jnp.sum(n_B * jnp.any(target.weight_BT > 0, axis=1)) for name, target in batch.targets.items()}
    return found | {"": jnp.sum(n_B)}


def _split_rows(tree: Any, n: int) -> Any:
    """Microbatches `[n, rows / n, ...]`; row r goes to microbatch r % n, so that every device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0), tree)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _differentiate(
    config: Config,
    tasks: list[Task],
    state: TrainState,
    batch: Batch,
    catalog: Catalog,
    draws: dict[str, Draws],
    dropout_key: jax.Array,
) -> tuple[SequenceModel, dict[str, jax.Array], StepSums]:
    """Gradients of the mean loss of the global batch, the parts of the loss, and its sums."""
    n = config.train.n_microbatches
    by_row = {name: draw.by_row for name, draw in draws.items()}
    parts = (*_split_rows((batch, by_row), n), jax.random.split(dropout_key, n))

    def sum_part(params, part):
        microbatch, own, key = part
        drawn = {name: Draws(draw.shared, own[name]) for name, draw in draws.items()}
        return sum_losses(params, microbatch, catalog, tasks, drawn, config, state.router_bias_LE, key)

    finish = functools.partial(total_loss, config=config)
    if n == 1:
        whole = jax.tree.map(lambda x: x[0], parts)
        sums, pull = jax.vjp(lambda params: sum_part(params, whole), state.params)
        d_sums, metrics = jax.grad(finish, has_aux=True)(sums)
        return pull(d_sums)[0], metrics, sums

    first = jax.tree.map(lambda x: x[0], parts)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sum_part, state.params, first))
    # How a microbatch pulls depends on the weights of the global batch and, since balance is no sum over slots, on the
    # load of the global batch.
    if empty.routing is not None:
        sums, _ = jax.lax.scan(lambda carry, part: (_add(carry, sum_part(state.params, part)), None), empty, parts)
    else:
        weights = {name: jnp.sum(batch.targets[name].weight_BT) for name in empty.tasks}
        sums = empty._replace(tasks={name: x._replace(weight=weights[name]) for name, x in empty.tasks.items()})
    d_sums, _ = jax.grad(finish, has_aux=True)(sums)

    def accumulate(carry, part):
        sums, pull = jax.vjp(lambda params: sum_part(params, part), state.params)
        return _add(carry, (sums, pull(d_sums)[0])), None

    (sums, grads), _ = jax.lax.scan(accumulate, (empty, jax.tree.map(jnp.zeros_like, state.params)), parts)
    return grads, finish(sums)[1], sums


def make_train_step(config: Config, tasks: list[Task]) -> TrainStep:
    """One optimiser step on the global batch.

    The loss is a function of sums over the slots of the global batch, so microbatches of any number give the gradient
    of the whole batch, however unevenly padding falls (with a capacity, each drops on its own).
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)

    def train_step(state: TrainState, batch: Batch, catalog: Catalog, constants: Constants):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        k_draws, k_dropout = jax.random.split(key)
        # The first task's key is that of the step, so that a further task changes nothing of what the first one draws.
        keys = [k_draws, *(jax.random.fold_in(k_draws, place) for place in range(1, len(tasks)))]
        draws = {
            task.name: task.draw(k, batch, catalog, constants[task.name], config)
            for task, k in zip(tasks, keys, strict=True)
        }
        catalog = _drop_rows(catalog, jax.random.fold_in(k_draws, len(tasks)), config)
        grads: Any
        grads, metrics, sums = _differentiate(config, tasks, state, batch, catalog, draws, k_dropout)
        layout = find_layout(state.opt_state)
        params: Any = state.params
        if layout is not None:
            grads, params = pack(grads, layout), pack(params, layout)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        bias_LE = state.router_bias_LE
        if bias_LE is not None and config.model.moe.bias_rate:
            assert sums.routing is not None
            bias_LE = update_bias(bias_LE, sums.routing, config.model.moe, config.model.is_asked)
        average = state.average
        if average is not None:
            # The warm-up of the average forgets the initial parameters as fast as the plain mean would.
            rate = jnp.maximum(1 - config.optim.ema_decay, 1 / (state.step + 1.0))
            average = jax.tree.map(lambda a, p: a + rate * (p - a), average, params)
        if layout is not None:
            params = unpack(params)
        metrics |= {"grad_norm": _trained_norm(grads, config), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, opt_state, bias_LE, average), metrics

    return train_step


def _drop_rows(catalog: Catalog, key: jax.Array, config: Config) -> Catalog:
    """The catalogue in which a share of the items is without row and bias, so that their texts have to speak."""
    if not config.model.row_dropout:
        return catalog
    kept_I = jax.random.bernoulli(key, 1 - config.model.row_dropout, catalog.count_I.shape)
    return catalog._replace(has_row_I=kept_I & (catalog.count_I > 0))


def _trained_norm(grads: SequenceModel, config: Config) -> jax.Array:
    """The global norm of the gradients of what is trained."""
    if not config.optim.groups:
        return optax.tree.norm(grads)
    rates = find_rates(grads, config.optim)
    return optax.tree.norm([leaf for path, leaf in flatten(grads).items() if rates[path]])


def abstract_batch(config: Config, sizes: ModelSizes, tasks: list[Task]) -> Batch:
    """Shapes and types of a global batch."""
    shape = config.train.batch_size, config.data.seq_len
    ids, real = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)

    def codes(n: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, n), jnp.int32)

    request = Request(ids, ids, codes(len(sizes.context_sizes)), codes(len(sizes.field_sizes)))
    targets = {task.name: Target(ids, real) for task in tasks}
    columns = dict.fromkeys(Batch._fields[:-3], ids)
    has_words = config.data.source == "text" or config.data.mix.has_words
    return Batch(**columns, request=request, targets=targets, token_BT=ids if has_words else None)


def lower_train_step(config: Config, sizes: ModelSizes, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """The whole training step from shapes alone: no data, no parameters, and devices only if `mesh` has some.

    With the mesh of a topology description it can be compiled for accelerators that are not there.
    """
    tasks = make_tasks(config)
    state = jax.eval_shape(lambda: init_state(config, sizes))
    n = sizes.n_items
    catalog = Catalog(np.zeros(n, np.int32), np.zeros((n, config.data.item_width), np.int32), np.ones(n, np.float32))
    near = {
        name: NearItems(np.zeros((n, width), np.int32), np.zeros((n, width), np.float32))
        for name, width in config.data.neighbor_widths.items()
    }
    state_IX = np.zeros((n, sizes.d_states), np.float32) if sizes.d_states else None
    catalog = catalog._replace(near=near, state_IX=state_IX)
    constants = {task.name: task.constants(catalog, config) for task in tasks}
    arguments = (state, abstract_batch(config, sizes, tasks), jax.eval_shape(lambda: (catalog, constants)))
    step = make_train_step(config, tasks)
    if mesh is None:
        return jax.jit(step, donate_argnums=0).lower(arguments[0], arguments[1], *arguments[2])
    placed, rows, whole = param_shardings(state, mesh), PartitionSpec(ROW_AXES), NamedSharding(mesh, PartitionSpec())

    def at(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    shaped = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))
    with jax.set_mesh(mesh):
        return jitted.lower(shaped, at(arguments[1], NamedSharding(mesh, rows)), *at(arguments[2], whole))
