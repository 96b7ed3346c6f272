"""The training loop, from a config and its data to the parameters that did best on validation."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from moerec.checkpoint import Checkpoints, Progress
from moerec.config import Config
from moerec.data.load import Prepared, make_reader
from moerec.data.pipeline import PackedStream, StreamOptions
from moerec.data.splits import VALID, select_targets
from moerec.errors import InputError, WorkError
from moerec.evaluate import EvaluationSet, rank_targets
from moerec.losses import sampling_cdf
from moerec.memory import keep_freed_memory
from moerec.metrics import per_target_metrics
from moerec.nn.model import SequenceModel, Sizes
from moerec.shapes import Batch, ItemTable
from moerec.sharding import batch_sharding, make_mesh, param_shardings, replicated
from moerec.state import TrainState, evaluated_model, init_state, make_train_step
from moerec.writer import MetricWriter


class Fitted(NamedTuple):
    """What training gives.

    Attributes:
      model: the parameters that did best on validation. table: what they need of the catalogue.
      step: the step they are from. steps: steps done. wall_s: time of training and validation, set-up aside.
      slots_per_s: trained slots per second of that time. valid: validation metrics at `step`.
    """

    model: SequenceModel
    table: ItemTable
    step: int
    steps: int
    wall_s: float
    slots_per_s: float
    valid: dict[str, float]


class Setup(NamedTuple):
    """What is fixed before the first step: compiled functions, the data stream, the validation targets."""

    state: TrainState
    train_step: Callable[[TrainState, Batch, ItemTable], tuple[TrainState, dict[str, jax.Array]]]
    table: ItemTable
    stream: grain.IterDataset
    valid: EvaluationSet


def make_sizes(data: Prepared) -> Sizes:
    """What the data fixes about the model."""
    dataset = data.dataset
    return Sizes(
        n_items=dataset.catalogue.n_items,
        n_tokens=data.tokens.n_tokens,
        n_services=dataset.catalogue.n_services,
        n_actions=len(dataset.actions),
        context_sizes=tuple(len(values) + 1 for values in dataset.context.values()),
    )


def set_up(config: Config, data: Prepared) -> Setup:
    """Makes the state straight into its shards, and the stream of batches onto the mesh."""
    keep_freed_memory()
    mesh = make_mesh(config.train.mesh_data, config.train.mesh_model)
    sizes = make_sizes(data)

    def init() -> TrainState:
        return init_state(config, sizes)

    placed = param_shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=placed)()
    table = jax.device_put(data.item_table, replicated(mesh))
    cdf_I = jax.device_put(jnp.asarray(sampling_cdf(data.item_table.count_I, config.loss.sampling_power)))
    # Without the placement of the results the second step would be compiled anew, for another placement.
    out = (placed, replicated(mesh))
    train_step = jax.jit(make_train_step(config, cdf_I), donate_argnums=0, out_shardings=out)
    rows = batch_sharding(mesh)

    def to_device(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    options = StreamOptions(
        n_rows=config.train.batch_size // jax.process_count(),
        row_len=config.data.seq_len,
        history_len=config.data.history_len,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batches = PackedStream(make_reader(config.data, data), options).map(to_device)
    stream = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
    targets = select_targets(data.dataset, data.roles, VALID)
    if not len(targets):
        raise InputError("data: the split leaves no validation target")
    sample = np.random.default_rng(config.data.seed).permutation(targets)[: config.train.n_valid]
    return Setup(state, train_step, table, stream, EvaluationSet(data.dataset, np.sort(sample), config))


def validate(model: SequenceModel, setup: Setup, selection: str) -> tuple[float, dict[str, float]]:
    """The score that picks the best step, and the validation metrics."""
    in_service, union = (per_target_metrics(x) for x in rank_targets(model, setup.valid, setup.table))
    services = setup.valid.dataset.catalogue.services
    metrics = {f"valid/union/{name}": float(union[name].mean()) for name in ("ndcg@10", "recall@10")}
    own = {}
    for code, service in enumerate(services):
        rows = setup.valid.target_service == code
        if rows.any():
            own[service] = float(in_service["ndcg@10"][rows].mean())
            metrics[f"valid/in_service/{service}/ndcg@10"] = own[service]
    score = metrics["valid/union/ndcg@10"] if selection == "union" else float(np.mean(list(own.values())))
    return score, metrics


def _resume(checkpoints: Checkpoints, state: TrainState, stream) -> tuple[TrainState, Progress]:
    if checkpoints.last_step() is None:
        return state, Progress()
    state, progress = checkpoints.restore_last(state)
    stream.set_state(progress.stream)
    return state, progress


def fit(config: Config, data: Prepared, workdir: Path) -> Fitted:
    """Trains until `train.steps`, or until validation stops improving; goes on from the last checkpoint there is.

    The same command after a kill gives the same result to the bit: every random number is a function of the seed and
    the step, and the position of the data stream is part of the checkpoint.

    Raises:
      WorkError: the loss is not finite. InputError: `workdir` holds checkpoints of another model.
    """
    setup = set_up(config, data)
    checkpoints = Checkpoints(workdir / "checkpoints")
    stream = iter(setup.stream)
    state, progress = _resume(checkpoints, setup.state, stream)
    first_step, options = int(state.step), config.train
    valid: dict[str, float] = {}
    started, earlier_s = time.monotonic(), progress.wall_s
    pending: tuple[int, dict[str, jax.Array]] | None = None
    shown: dict[str, float] = {}

    def report(step: int, metrics: dict[str, jax.Array], writer: MetricWriter) -> None:
        values = {name: float(x) for name, x in metrics.items()}
        if not np.isfinite(values["loss"]):
            raise WorkError(f"step {step}: the loss is {values['loss']}")
        progress.n_slots += values.pop("slots") * options.log_every
        progress.wall_s = earlier_s + time.monotonic() - started
        shown.update(loss=values["loss"], slots_per_s=progress.n_slots / progress.wall_s)
        writer.write(step, {**values, "slots_per_s": shown["slots_per_s"]})
        writer.progress(step, shown)

    with contextlib.closing(stream), MetricWriter(workdir, options.steps, first_step) as writer:
        step = first_step
        stopped = bool(options.patience) and progress.n_worse >= options.patience
        while step < options.steps and not stopped:
            state, metrics = setup.train_step(state, next(stream), setup.table)
            step += 1
            if pending is not None:  # read one step late, when the next one is already under way
                report(*pending, writer)
                pending = None
            if step % options.log_every == 0:
                pending = (step, metrics)
            last = step == options.steps
            if last or (options.eval_every and step % options.eval_every == 0):
                if pending is not None:
                    report(*pending, writer)
                    pending = None
                score, valid = validate(evaluated_model(state), setup, config.eval.selection)
                writer.write(step, valid)
                shown["valid/ndcg@10"] = score
                progress.stream = stream.get_state()
                if score > progress.best:
                    progress.best, progress.best_step, progress.n_worse = score, step, 0
                    checkpoints.save_best(step, state, progress)
                else:
                    progress.n_worse += 1
                    stopped = bool(options.patience) and progress.n_worse >= options.patience
            if last or stopped or step % options.save_every == 0:
                progress.stream = stream.get_state()
                progress.wall_s = earlier_s + time.monotonic() - started
                checkpoints.save_last(step, state, progress)
    checkpoints.wait()
    best, at_best = checkpoints.restore_best(state)
    checkpoints.close()
    model = evaluated_model(best)
    wall_s, n_slots = progress.wall_s, progress.n_slots
    if not valid or at_best.best_step != step:
        _, valid = validate(model, setup, config.eval.selection)
    return Fitted(model, setup.table, at_best.best_step, step, wall_s, n_slots / max(wall_s, 1e-9), valid)
