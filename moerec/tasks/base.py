"""What a task is: what it wants of packed slots, its loss, and how tasks are put together from a config."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moerec.config import Config
from moerec.config.registry import Registry
from moerec.data.packing import Packed
from moerec.data.pipeline.shares import RowShares
from moerec.errors import InputError
from moerec.nn.model import SequenceModel
from moerec.types import Array, Batch, Catalog, Outputs, Target


class Draws(NamedTuple):
    """What a task draws at random, once a step and for the global batch.

    Attributes:
      shared: the same for all microbatches. by_row: arrays with a leading axis of the batch's rows, which go with them.
    """

    shared: Any = None
    by_row: Any = None


class TaskSums(NamedTuple):
    """Sums over the slots of a batch; those of microbatches and devices add up to the global batch's.

    Attributes:
      total: what is minimised, weighted. weight: the sum of the targets' weights; the loss is the quotient of the two.
      parts: further sums by name, reported divided by the weight.
    """

    total: jax.Array
    weight: jax.Array
    parts: dict[str, jax.Array]


class Task(Protocol):
    """What is learned from slots. Everything but `render` and `constants` runs inside the compiled step."""

    name: str  # the one that it is registered under

    def check(self, config: Config) -> None:
        """Raises: InputError, where the config does not go with the task."""
        ...

    def render(self, packed: Packed) -> Target:
        """The targets of packed slots; NumPy, in the input pipeline."""
        ...

    def constants(self, catalog: Catalog, config: Config) -> Any:
        """Arrays that the step needs beside the catalogue, made once; NumPy."""
        ...

    def binds_catalog(self, config: Config) -> bool:
        """Whether the loss wants the vectors of all items at once."""
        ...

    def domains(self, target: Target, catalog: Catalog) -> jax.Array | None:
        """`[B, T]` int32, under which domain a slot's routing is counted, -1 for none; or nothing, for another task."""
        ...

    def draw(self, key: jax.Array, batch: Batch, catalog: Catalog, constants: Any, config: Config) -> Draws:
        """What is drawn at random for a step."""
        ...

    def loss(
        self, model: SequenceModel, outputs: Outputs, batch: Batch, catalog: Catalog, draws: Draws, config: Config
    ) -> TaskSums:
        """The sums of a microbatch.

        `TaskSums.weight` has to be the sum of the target's weights. Names of `parts` become names of metrics; `loss` is
        the one that is shown, and `total` stands for it where there is none.
        """
        ...


TASKS: Registry[type[Task]] = Registry("task", "tasks")
register_task = TASKS.register  # a class without arguments, under the name that configs give


def make_tasks(config: Config) -> list[Task]:
    """The tasks that a config names.

    Raises:
      InputError: a name is not known or given twice, or a task refuses the config.
    """
    tasks = [TASKS[name]() for name in config.tasks]
    for name, task in zip(config.tasks, tasks, strict=True):
        if config.tasks.count(name) > 1:
            raise InputError(f"config.tasks: {name!r} is given twice")
        if task.name != name:
            raise InputError(f"config.tasks: {name!r} is a task that calls itself {task.name!r}")
        task.check(config)
    if config.model.is_asked and "next_event" not in config.tasks:
        raise InputError("config.tasks: where services are asked (model.ask.from_layer), next_event tells whom")
    return tasks


def render_targets(tasks: list[Task], packed: Packed) -> dict[str, Target]:
    """`{task: Target}`, what all tasks want of packed slots `[B, T]`."""
    return {task.name: task.render(packed) for task in tasks}


def find_domains(tasks: list[Task], batch: Batch, catalog: Catalog) -> Array | None:
    """`[B, T]` int32 domains under which slots are counted, -1 for none: a slot's is that of the first task that gives
    it one. None where no task has domains.
    """
    found = (task.domains(batch.targets[task.name], catalog) for task in tasks)
    each = [domain_BT for domain_BT in found if domain_BT is not None]
    return functools.reduce(lambda first, more: jnp.where(first >= 0, first, more), each) if each else None


# Of which of the streams of `data.mix` a task's targets are; those of a task of one's own may be anywhere.
STREAM_OF = {
    "next_event": "events",
    "text_to_item": "item_texts",
    "item_to_text": "item_texts",
    "lm": "documents",
}


def find_rows(name: str, config: Config, n_rows: int) -> slice:
    """The rows of a microbatch that may have targets of a task: all, where the batch is not mixed of several streams.

    Args: the task; rows of the microbatch, whose r-th is the batch's r n-th or one of the n - 1 behind it.
    """
    shares, stream = config.data.mix.shares, STREAM_OF.get(name, "")
    if len(shares) < 2 or stream not in shares:
        return slice(0, n_rows)
    return RowShares.of(shares, config.train.batch_size).span(stream, config.train.batch_size // n_rows)
