"""Checkpoints of a run: the last and the best state, by orbax, written in the background.

A state is saved as a flat dict of its leaves by path, so it can be restored onto another mesh, and read without our
classes. Beside it goes a small JSON record: the position of the data stream, and what decides early stopping.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moerec.config.value_types import describe_misfit, fits
from moerec.convert.paths import flatten, unflatten
from moerec.errors import InputError, WorkError
from moerec.files import require_plain_path
from moerec.nn.model import read_calibration


@dataclasses.dataclass
class TrainProgress:
    """What a resumed run must know besides its state.

    Attributes:
      best: the best validation score so far, at `best_step`; `evals_since_best` evaluations have passed since.
      wall_s: time so far, over all interrupted runs; train_s of it without validation and the first step of each, in
        which n_slots were trained.
      stream: position of the data stream.
      is_eval_due: the state is one that is to be evaluated, and the process ended before that was done.
      calibration: at `best_step`, as metrics of its validation (`moerec.nn.model.Calibration`).
    """

    best: float = -1.0
    best_step: int = 0
    evals_since_best: int = 0
    wall_s: float = 0.0
    train_s: float = 0.0
    n_slots: float = 0.0
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_eval_due: bool = False
    calibration: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def slots_per_s(self) -> float:
        return self.n_slots / self.train_s if self.train_s else 0.0


_PROGRESS_TYPES = typing.get_type_hints(TrainProgress)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns that what is opened for reading alone is read only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _told_if_damaged(folder: Path, step: int) -> Iterator[None]:
    """Raises: InputError, where orbax cannot read what is there."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{folder}: the checkpoint of step {step} cannot be read ({reason})") from error


_LOGGERS = ("absl", "asyncio")  # of orbax, and of the loops in which it writes


class _QuietFailure:
    """While a write may fail in the background: drops what is said of it, in hundreds of lines, besides the error that
    whoever waits for it gets.
    """

    def __init__(self) -> None:
        self._before = sys.unraisablehook
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._is_kept)
        sys.unraisablehook = self._hook

    def _is_kept(self, record: logging.LogRecord) -> bool:
        is_told_twice = "orbax" in record.pathname or "exception was never retrieved" in record.getMessage()
        return record.levelno < logging.ERROR or not is_told_twice

    def _hook(self, unraisable: Any) -> None:
        """Writes that are still under way tell an event loop that is no longer there."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)

    def close(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._is_kept)
        if sys.unraisablehook == self._hook:
            sys.unraisablehook = self._before


class Checkpoints:
    """`DIR/last/STEP` and `DIR/best/STEP`; a half-written one is never seen.

    Attributes:
      folder: `DIR`, absolute.
    """

    def __init__(self, folder: Path, read_only: bool = False, kind: str = "best"):
        """Args: `DIR`; read_only: nothing there is created, saved or tidied up, and only the one `kind` is read."""
        folder = folder.resolve()
        require_plain_path(folder)
        self.folder = folder
        with _quiet() if read_only else contextlib.nullcontext():
            self._last, self._best = (
                ocp.CheckpointManager(
                    folder / (kind if read_only else name),
                    # Named, or reading the shapes of a folder warns about items that no handler is known for.
                    item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
                    options=ocp.CheckpointManagerOptions(
                        max_to_keep=None if read_only else keep,
                        create=not read_only,
                        cleanup_tmp_directories=not read_only,
                        enable_async_checkpointing=not read_only,
                        read_only=read_only,
                    ),
                )
                for name, keep in (("last", 2), ("best", None))
            )
        self._named_best = 0  # the best step that the last state on disk names
        self._is_failed = False
        self._quiet_failure = None if read_only else _QuietFailure()

    @contextlib.contextmanager
    def _told_if_full(self) -> Iterator[None]:
        """Raises: WorkError, where a checkpoint cannot be written."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._is_failed = True
            of_system = re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error))  # TensorStore's are ValueErrors
            if not (of_system or isinstance(error, OSError)):
                raise  # a defect of ours, or of a library
            reason = os.strerror(int(of_system[1])) if of_system else str(error).split("\n")[0][:200]
            raise WorkError(
                f"{self.folder}: a checkpoint cannot be written ({reason}); what was saved before stays"
            ) from error

    def save_last(self, step: int, state, progress: TrainProgress) -> None:
        with self._told_if_full():
            self._save_last(step, state, progress)

    def _save_last(self, step: int, state, progress: TrainProgress) -> None:
        # The progress saved here names the best step, which must be on disk first; and an older best may go only when
        # the last state on disk does not name it.
        self._best.wait_until_finished()
        self._last.wait_until_finished()
        for stale in [s for s in self._best.all_steps() if s < self._named_best]:
            self._best.delete(stale)
        self._save(self._last, step, state, progress)
        self._named_best = progress.best_step

    def save_best(self, step: int, state, progress: TrainProgress) -> None:
        # A run that was killed before its first `save_last` starts anew, and comes by its own best again.
        with self._told_if_full():
            for stale in [s for s in self._best.all_steps() if s >= step]:
                self._best.delete(stale)
            self._save(self._best, step, state, progress)

    @staticmethod
    def _save(manager: ocp.CheckpointManager, step: int, state, progress: TrainProgress) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(flatten(state)), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
        )
        manager.save(step, args=arguments, force=True)

    def last_step(self) -> int | None:
        return self._last.latest_step()

    def best_step(self) -> int | None:
        return self._best.latest_step()

    def restore_last(self, like) -> tuple[Any, TrainProgress]:
        """The last state, placed as `like` (a tree of arrays or of `ShapeDtypeStruct` with shardings).

        What a run saved as best after that point is forgotten: the resumed run finds it again, bitwise.
        """
        step = self._last.latest_step()
        for later in [s for s in self._best.all_steps() if s > (step or 0)]:
            self._best.delete(later)
        state, progress = self._restore(self._last, like)
        self._named_best = progress.best_step
        return state, progress

    def restore_best(self, like) -> tuple[Any, TrainProgress]:
        return self._restore(self._best, like)

    def _restore(self, manager: ocp.CheckpointManager, like) -> tuple[Any, TrainProgress]:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{self.folder}: holds no checkpoint")
        abstract = flatten(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        with _told_if_damaged(self.folder, step):
            saved = manager.item_metadata(step)["state"]
            wanted, shapes = ({name: tuple(x.shape) for name, x in (tree or {}).items()} for tree in (abstract, saved))
            for name in {**wanted, **shapes} if saved is not None else ():
                if shapes.get(name) != wanted.get(name):
                    found = f"{name} is {shapes.get(name)}, not {wanted.get(name)}"
                    raise InputError(f"{self.folder}: was written with another model: {found}")
            restored = manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
            )
            progress = TrainProgress(**restored["progress"])
            for field in dataclasses.fields(progress):
                value, hint = getattr(progress, field.name), _PROGRESS_TYPES[field.name]
                if not fits(value, hint):
                    raise ValueError(describe_misfit(field.name, value, hint))
            read_calibration(progress.calibration)
        return unflatten(like, restored["state"]), progress

    def read_leaves(self, prefixes: tuple[str, ...], step: int | None = None) -> dict[str, np.ndarray]:
        """Leaves by path of what was opened for reading, those that begin with a prefix, as they were written.

        Args: step: the newest one by default.

        Raises:
          InputError: there is no checkpoint, or it cannot be read.
        """
        step = self._best.latest_step() if step is None else step
        if step not in self._best.all_steps():
            raise InputError(f"{self.folder}: holds no checkpoint" + (f" of step {step}" if step is not None else ""))
        with _told_if_damaged(self.folder, step):
            saved = self._best.item_metadata(step)["state"]
            if saved is None:
                raise InputError(f"{self.folder}: holds no checkpoint")
            # In the host's memory: the mesh that a state was written from may not be here, nor one device hold it.
            here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in saved.items()}
            restored = self._best.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return {name: np.asarray(x) for name, x in restored["state"].items() if name.startswith(prefixes)}

    def wait(self) -> None:
        """Until everything asked for is on disk. Raises: WorkError, where it cannot be written."""
        with self._told_if_full():
            self._last.wait_until_finished()
            self._best.wait_until_finished()

    def close(self) -> None:
        """Raises: WorkError, where what is asked for cannot be written, and nobody was told."""
        try:
            for manager in (self._last, self._best):
                # After a failure, which is told of already, orbax cannot end what it had begun.
                quiet = contextlib.suppress(Exception) if self._is_failed else contextlib.nullcontext()
                with quiet, self._told_if_full():
                    manager.close()
        finally:
            if self._quiet_failure:
                if self._is_failed:
                    gc.collect()  # a write that failed is told of when it is collected: now, while that is kept quiet
                self._quiet_failure.close()
