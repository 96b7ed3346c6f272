"""The training loop, from a config and its data to the parameters that did best on validation."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from moerec.config import Config
from moerec.config.cli.malloc import keep_freed_memory
from moerec.config.terminal import announce, printable
from moerec.data.load import RunData, make_reader
from moerec.data.pipeline.events import PackedStream, StreamOptions
from moerec.data.pipeline.mixture import MixedStream, make_mixed_stream
from moerec.data.text.corpus import Corpus
from moerec.data.text.stream import TextStream
from moerec.errors import InputError, Terminated, WorkError
from moerec.nn.model import (
    TEXT_SIZES,
    Predictor,
    count_active_params,
    count_params,
    count_params_by_part,
    pick_calibration,
    read_calibration,
)
from moerec.nn.sharding import batch_sharding, make_mesh, mesh_of, param_shardings, replicated
from moerec.tasks import make_tasks
from moerec.tasks.base import STREAM_OF, Task, render_targets
from moerec.train.base_model.warm_start import warm_start
from moerec.train.checkpoint import Checkpoints, TrainProgress
from moerec.train.metric_writer import MetricWriter
from moerec.train.process.termination import StopRequest
from moerec.train.run_dir import bind_catalog, make_sizes
from moerec.train.state import TrainState, init_state, make_predictor, pack_state, spread_state
from moerec.train.step import Constants, TrainStep, make_train_step
from moerec.types import Batch, Catalog
from pallas_kernels.attention import LIBRARIES

BITS = "valid/lm/bits_per_byte"  # of all held-out documents; of one corpus its name follows, behind a slash
_MOST_SHOWN = 6  # corpora whose figures the progress line has room for


class TrainResult(NamedTuple):
    """What training gives.

    Attributes:
      predictor: what did best on validation. catalog: what it needs of the items, bound to it.
      step: the step it is from. steps: steps done. wall_s: time of training and validation, set-up aside.
      slots_per_s: trained slots per second of training; neither a process's first step, which is compiled, nor
        validation counts. 0 where there was no other step.
      valid: validation metrics at `step`.
    """

    predictor: Predictor
    catalog: Catalog
    step: int
    steps: int
    wall_s: float
    slots_per_s: float
    valid: dict[str, float]

    def describe(self, config: Config) -> dict[str, Any]:
        """What `metrics.json` begins with, whatever was trained on."""
        params = self.predictor.params
        return {
            "config": dataclasses.asdict(config),
            "seed": config.seed,
            "steps": self.steps,
            "best_step": self.step,
            "wall_s": self.wall_s,
            "tokens_per_s": self.slots_per_s,
            "n_params": count_params(params),
            "n_active_params": count_active_params(params),
            "n_params_by_part": count_params_by_part(params),
        }


# Scores what is trained: the number that picks the best step, and the metrics of the validation; among these what the
# predictor has been calibrated to (`Calibration.list_metrics`).
Evaluator = Callable[[Predictor, Catalog], tuple[float, dict[str, float]]]


class Trainer(NamedTuple):
    """What is fixed before the first step: compiled functions and the data stream."""

    state: TrainState
    train_step: TrainStep
    catalog: Catalog
    constants: Constants
    stream: grain.IterDataset

    def begin(self, state: TrainState, config: Config) -> TrainState:
        """The state as the steps pass it on: on one CPU device moments and average are vectors."""
        (device, *others) = state.step.devices()
        is_cpu = device.platform == "cpu" and not others
        return pack_state(state, config, state.step.sharding) if is_cpu else state

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """The compiled step, dispatched."""
        return self.train_step(state, batch, self.catalog, self.constants)


def make_trainer(config: Config, data: RunData | Corpus) -> Trainer:
    """Makes the state straight into its shards, and the stream of batches onto the mesh."""
    if jax.process_count() > 1:
        raise InputError("training runs in one process so far (config.train.mesh_data splits it over its devices)")
    keep_freed_memory()
    tasks = make_tasks(config)
    mesh = make_mesh(config.train.mesh_data, config.train.mesh_expert, config.train.mesh_model)
    _tell_of_attention(config, mesh.devices.flat[0].platform)
    sizes = TEXT_SIZES if isinstance(data, Corpus) else make_sizes(config, data)

    def init() -> TrainState:
        return init_state(config, sizes)

    placed = param_shardings(jax.eval_shape(init), mesh) if mesh.size > 1 else replicated(mesh)
    state = _compile_once(jax.jit(init, out_shardings=placed).lower(), mesh.devices.flat[0].platform)()
    constants = {task.name: task.constants(data.catalog, config) for task in tasks}
    catalog, constants = jax.device_put((data.catalog, constants), replicated(mesh))
    # Without the placement of the results the second step would be compiled anew, for another placement.
    out = (placed, replicated(mesh))
    train_step = jax.jit(make_train_step(config, tasks), donate_argnums=0, out_shardings=out)
    rows = batch_sharding(mesh)

    def to_device(batch: Batch) -> Batch:
        return jax.device_put(batch, rows)

    batches = make_stream(config, data, tasks).map(to_device)
    return Trainer(state, train_step, catalog, constants, ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))


def _tell_of_attention(config: Config, platform: str) -> None:
    """Whoever measures what was asked for by name should know when it is another one."""
    name = config.model.attention
    wanted = LIBRARIES.get(name, platform)
    if wanted != platform:
        told = f"model.attention={name} is for {wanted.upper()}s; on this {platform.upper()} it is as auto"
        announce(config.name, told)


def _compile_once(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """A program that runs once: for a CPU it is hardly optimised, so that compiling it takes a fifth of the time."""
    if platform != "cpu":
        return lowered.compile()
    quick: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    try:
        return lowered.compile({**quick, "xla_cpu_use_fusion_emitters": False})
    except jax.errors.JaxRuntimeError:  # JAX 0.12 has no such option
        return lowered.compile(quick)


def make_stream(config: Config, data: RunData | Corpus, tasks: list[Task]) -> PackedStream | TextStream | MixedStream:
    """The packed batches that a config trains on, on the host."""
    options = StreamOptions(
        n_rows=config.train.batch_size,
        row_len=config.data.seq_len,
        history_len=config.data.history_len,
        seed=config.seed,
        first_event=config.data.first_event,
    )
    render = functools.partial(render_targets, tasks)
    if isinstance(data, Corpus):
        return TextStream(data, render, options)
    if config.data.mix.has_words:
        renders = {
            name: functools.partial(render_targets, [task for task in tasks if STREAM_OF.get(task.name, name) == name])
            for name in config.data.mix.shares
        }
        return make_mixed_stream(config, data, renders, options)
    return PackedStream(make_reader(config.data, data), data.dataset.catalogue, render, options)


def _resume(
    config: Config, data: RunData | Corpus, checkpoints: Checkpoints, state: TrainState, stream
) -> tuple[TrainState, TrainProgress]:
    if checkpoints.last_step() is None:
        return warm_start(state, config, data) if config.train.init_from else state, TrainProgress()
    state, progress = checkpoints.restore_last(state)
    try:
        stream.set_state(progress.stream)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoints.folder}: its position in the data cannot be read ({error!r})") from None
    return state, progress


class MetricLogger:
    """Writes the metrics of log steps one step late, when the next step is already under way.

    The rate of slots begins after the first step: its time is mostly that of the compilation.
    """

    def __init__(self, writer: MetricWriter, progress: TrainProgress, config: Config):
        self._writer, self._progress, self._log_every = writer, progress, config.train.log_every
        self._is_mixed = config.data.mix.has_words
        self._slots: list[jax.Array] = []
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock: float | None = None
        self.shown: dict[str, float] = {}

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has been dispatched, without waiting for it (but for the first one)."""
        self._flush()
        # Of a mixture the targets of all tasks, each of which has slots of its own.
        of_tasks = [value for name, value in metrics.items() if name.endswith("/slots")] if self._is_mixed else []
        if self._clock is None:
            jax.block_until_ready(metrics["slots"])
            self.pause()
        else:
            self._slots += [metrics["slots"], *of_tasks]
        if step % self._log_every == 0:
            self._pending = (step, metrics)

    def sync(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the step, so that what is evaluated or saved after it is whole and finite."""
        self._flush(is_shown=False)
        self._count_slots()
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise WorkError(f"step {step}: the loss is {loss}")
        self.shown.update(loss=loss, **self._rate())

    def show(self, step: int, is_last: bool) -> None:
        """The progress line of a step that was waited for, with the figures of the validation after it."""
        self._writer.progress(step, self.shown, is_last)

    def pause(self) -> None:
        """Leaves out the time so far, or since `sync`, in which nothing was trained."""
        self._clock = time.monotonic()

    def _count_slots(self) -> None:
        self._progress.n_slots += float(sum(float(x) for x in jax.device_get(self._slots)))
        self._slots = []
        now = time.monotonic()
        self._progress.train_s += now - (now if self._clock is None else self._clock)
        self._clock = now

    def _rate(self) -> dict[str, float]:
        """Empty until there is one."""
        return {"slots_per_s": self._progress.slots_per_s} if self._progress.n_slots else {}

    def _flush(self, is_shown: bool = True) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        self._count_slots()
        values = {name: float(x) for name, x in metrics.items() if name != "slots" or self._is_mixed}
        if not np.isfinite(values["loss"]):
            raise WorkError(f"step {step}: the loss is {values['loss']}")
        self.shown.update(loss=values["loss"], **self._rate())
        if self._is_mixed:
            told = {name: value for name, value in values.items() if name.endswith(("/loss", "share"))}
            self.shown.update({name.replace("/", " "): value for name, value in told.items()})
        self._writer.write(step, {**values, **self._rate()})
        if is_shown:
            self._writer.progress(step, self.shown)


def fit(config: Config, data: RunData | Corpus, workdir: Path, evaluate: Evaluator) -> TrainResult:
    """Trains until `train.steps`, or until validation stops improving; goes on from the last checkpoint there is.

    The same command after a kill gives the same result bitwise: every random number is a function of the seed and
    the step, and the position of the data stream is part of the checkpoint.

    Raises:
      WorkError: the loss is not finite, or the disk is full. InputError: `workdir` holds checkpoints of another model.
      Terminated: SIGTERM came, and the state is saved.
    """
    trainer, stop = make_trainer(config, data), StopRequest()
    with (
        stop.catch(config.train.grace_s),
        contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints,
        contextlib.closing(iter(trainer.stream)) as stream,
    ):
        state, progress = _resume(config, data, checkpoints, trainer.state, stream)
        state = trainer.begin(state, config)
        with MetricWriter(workdir, config.train.steps, int(state.step), config.name) as writer, mesh_of(state):
            state = _run_steps(config, trainer, evaluate, state, progress, stream, checkpoints, writer, stop)
        checkpoints.wait()
        if stop.is_made:
            is_saved = checkpoints.last_step() is not None
            told = f"saved at step {int(state.step)}" if is_saved else "before the first step, with nothing to save"
            raise Terminated(f"{workdir}: terminated, {told}; the same command goes on from there")
        best, at_best = checkpoints.restore_best(spread_state(state))
    if at_best.best_step != progress.best_step:
        raise WorkError(f"{workdir}: the best step is {progress.best_step}, but {at_best.best_step} was kept")
    predictor = make_predictor(best)
    with mesh_of(best):
        catalog = bind_catalog(predictor, trainer.catalog)
        _, valid = evaluate(predictor, catalog)
    predictor = read_calibration(valid).apply(predictor)
    return TrainResult(
        predictor, catalog, at_best.best_step, int(state.step), progress.wall_s, progress.slots_per_s, valid
    )


def _run_steps(
    config: Config,
    trainer: Trainer,
    evaluate: Evaluator,
    state: TrainState,
    progress: TrainProgress,
    stream: grain.DatasetIterator,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    stop: StopRequest,
) -> TrainState:
    options, step = config.train, int(state.step)
    started, earlier_s, saved_step = time.monotonic(), progress.wall_s, step
    logger = MetricLogger(writer, progress, config)
    stopped = bool(options.patience) and progress.evals_since_best >= options.patience
    if step < options.steps and not stopped:
        announce(config.name, "compiles the training step")
    while progress.is_eval_due or (step < options.steps and not stopped):
        if stop.is_made and step == saved_step:
            break
        if not progress.is_eval_due:
            state, metrics = trainer.step(state, next(stream))
            step += 1
            logger.add(step, metrics)
            is_due = bool(options.eval_every) and step % options.eval_every == 0
            progress.is_eval_due = is_due or step == options.steps
            if not (progress.is_eval_due or step % options.save_every == 0 or stop.is_made):
                continue
            logger.sync(step, metrics)
            progress.stream = stream.get_state()
            progress.wall_s = earlier_s + time.monotonic() - started
        # What is given up, because the process is to end, is done by the one that goes on.
        found = (
            stop.unless_made(functools.partial(_validate, trainer, evaluate, state)) if progress.is_eval_due else None
        )
        if found is not None:
            score, valid = found
            writer.write(step, valid)
            is_ndcg = "valid/union/ndcg@10" in valid  # an evaluator of one's own measures anything
            of_words = pick_shown(valid)
            if is_ndcg or (valid and not of_words):
                logger.shown["valid/ndcg@10" if is_ndcg else "valid/score"] = score
            logger.shown |= of_words
            progress.wall_s, progress.is_eval_due = earlier_s + time.monotonic() - started, False
            if score > progress.best:
                progress.best, progress.best_step, progress.evals_since_best = score, step, 0
                progress.calibration = pick_calibration(valid)
                checkpoints.save_best(step, spread_state(state), progress)
            else:
                progress.evals_since_best += 1
                stopped = bool(options.patience) and progress.evals_since_best >= options.patience
        last = step == options.steps or stopped
        # One that was saved before its validation is not replaced: whoever goes on from there validates it again.
        if step != saved_step and (last or step % options.save_every == 0 or stop.is_made):
            checkpoints.save_last(step, spread_state(state), progress)
            saved_step = step
        logger.show(step, last)
        logger.pause()
    return state


def pick_shown(valid: Mapping[str, float]) -> dict[str, float]:
    """What the progress line shows of a validation on text: bits per byte, of all corpora and of each of a few."""
    head = f"{BITS}/"
    found = {"bits_per_byte": valid[BITS]} if BITS in valid else {}
    each = {printable(name.removeprefix(head)): x for name, x in valid.items() if name.startswith(head)}
    return found | (each if 1 < len(each) <= _MOST_SHOWN else {})


def _validate(trainer: Trainer, evaluate: Evaluator, state: TrainState) -> tuple[float, dict[str, float]]:
    predictor = make_predictor(state)
    return evaluate(predictor, bind_catalog(predictor, trainer.catalog))
