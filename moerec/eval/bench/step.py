"""How fast the parts of a run are, measured one after the other in one process on an otherwise idle machine."""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.data.load import load_data
from moerec.errors import InputError
from moerec.eval.ranking import make_test_set, rank_batch, rank_targets
from moerec.nn.model import SequenceModel, count_active_params
from moerec.nn.moe.router import count_groups
from moerec.nn.profile import Event, ProfileRequest, count_profile_slots, make_personalizer
from moerec.nn.profile.recurrence import Writes, chunked_exclusive_scan, exclusive_scan
from moerec.nn.sharding import mesh_of
from moerec.tasks import make_tasks
from moerec.train.base_model.item_states import load_all
from moerec.train.loop import Trainer, make_stream, make_trainer
from moerec.train.plan.jaxpr_flops import count_flops
from moerec.train.run_dir import bind_catalog
from moerec.train.state import make_predictor
from moerec.types import Batch
from pallas_kernels.bench import time_in_turns


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of `run`, whose result is waited for; the first call, which compiles, is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def measure_matmul(repeats: int, n: int = 1024) -> float:
    """Floating-point operations a second of the product of two float32 matrices `[n, n]`."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return 2.0 * n**3 / median_seconds(lambda: multiply(x, x), repeats)


def count_compilations(jitted: Any) -> float:
    """How many programs a jitted function has been compiled to."""
    return float(jitted._cache_size())


class _Steps:
    """Training steps over one batch; a call makes the next, from the state that the one before it left."""

    def __init__(self, config: Config, trainer: Trainer, batch: Batch):
        self.trainer, self.batch, self.state = trainer, batch, trainer.begin(trainer.state, config)

    def __call__(self) -> jax.Array:
        with mesh_of(self.state):
            self.state, metrics = self.trainer.step(self.state, self.batch)
        return metrics["loss"]

    def count_flops(self) -> float:
        """Floating-point operations of the matmuls of a step."""
        train_step: Any = self.trainer.train_step
        with mesh_of(self.state):
            traced = train_step.trace(self.state, self.batch, self.trainer.catalog, self.trainer.constants)
        (device, *_) = self.state.step.devices()
        return count_flops(traced.jaxpr, device.platform).total

    def temporary_bytes(self) -> int:
        """What the compiled step holds beside its arguments and results."""
        train_step: Any = self.trainer.train_step
        with mesh_of(self.state):
            arguments = (self.state, self.batch, self.trainer.catalog, self.trainer.constants)
            compiled = train_step.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes


def measure_experts(config: Config, workdir: Path, sizes: Sequence[int], repeats: int = 9) -> list[dict[str, Any]]:
    """Rows of `{n_experts, n_active_params, step_ms, ratio}`: the step by the experts of a layer, each of them alike.

    A slot goes to as many experts of the same width whatever their number, so that the useful work is the same, but for
    the router's. The steps take turns; the ratio is to the first of the sizes.

    Args:
      sizes: experts of a layer, multiples of the number of groups.

    Raises:
      InputError: the model has no mixture, or a size is no multiple.
    """
    if not config.model.moe.layers:
        raise InputError("config.model.moe.layers: a dense model has no experts to count")
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--sizes: {', '.join(map(str, sizes))}: a size is named twice")
    data = load_all(config, workdir)
    n_groups, steps, rows = count_groups(config.model.moe, data.dataset.catalogue.n_services), {}, []
    for size in sizes:
        if size < n_groups or size % n_groups:
            raise InputError(f"--sizes: {size} experts cannot be split evenly over {n_groups} groups")
        moe = dataclasses.replace(config.model.moe, n_per_group=size // n_groups)
        trainer = make_trainer(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), data)
        rows.append({"n_experts": size, "n_active_params": count_active_params(trainer.state.params)})
        with contextlib.closing(iter(trainer.stream)) as stream:
            steps[str(size)] = _Steps(config, trainer, next(stream))
    return _with_times(rows, time_in_turns(steps, repeats))


def measure_asking(config: Config, workdir: Path, repeats: int = 9) -> list[dict[str, Any]]:
    """Rows of `{asked_from, n_active_params, step_ms, ratio}`: the step of the config's model in which nothing is asked
    (layer 0), and of one in which every service is; all else is the same, and the steps take turns.

    Services are asked from the config's layer on, or from the second one where it asks none.
    """
    data, rows, steps = load_all(config, workdir), [], {}
    for layer in (0, config.model.ask.from_layer or 1):
        ask = dataclasses.replace(config.model.ask, from_layer=layer)
        has_time = layer > 0 and config.model.pointer_time_bias
        model = dataclasses.replace(config.model, ask=ask, pointer_time_bias=has_time)
        trainer = make_trainer(dataclasses.replace(config, model=model), data)
        rows.append({"asked_from": layer, "n_active_params": count_active_params(trainer.state.params)})
        with contextlib.closing(iter(trainer.stream)) as stream:
            steps[str(layer)] = _Steps(config, trainer, next(stream))
    return _with_times(rows, time_in_turns(steps, repeats))


def _with_times(rows: list[dict[str, Any]], times: dict[str, float]) -> list[dict[str, Any]]:
    """Args: the rows, and their milliseconds in the same order; ratios are to the first."""
    first_ms = next(iter(times.values()))
    return [{**row, "step_ms": ms, "ratio": ms / first_ms} for row, ms in zip(rows, times.values(), strict=True)]


HISTORIES: dict[str, dict[str, Any]] = {
    "all weights at once": {"window": 0, "memory": "null", "attention": "reference"},
    "in blocks": {"window": 0, "memory": "null", "attention": "xla_blocks"},
    "window": {"memory": "null", "attention": "xla_blocks"},
    "window and profile": {"attention": "xla_blocks"},
}


def measure_histories(config: Config, workdir: Path, lengths: Sequence[int], repeats: int = 5) -> list[dict[str, Any]]:
    """Rows of `{n_slots, arm, step_ms, temporary_mb, ratio, memory_ratio}`: the step by the slots of a row, and by what
    sees them; ratios are to the first arm.

    A batch has `data.seq_len * train.batch_size` slots whatever their rows' length, and each row is the history of one
    user, who has more events than fit. The arms (`HISTORIES`) take turns.

    Raises:
      InputError: the model has no profile or no window, or the data are not the built-in world's.
    """
    if not count_profile_slots(config.model) or not config.model.window or config.data.source != "city":
        raise InputError("config: a model with a profile and a window, on the built-in world, is needed")
    rows = []
    for length in lengths:
        n_rows = max(config.data.seq_len * config.train.batch_size // length, 1)
        city = dataclasses.replace(config.data.city, n_users=8 * n_rows, events_per_user=4 * length)
        data_config = dataclasses.replace(config.data, city=city, seq_len=length, history_len=length)
        data, steps, held = load_data(data_config, workdir), {}, {}
        for name, change in HISTORIES.items():
            fields = dict(change)
            memory = fields.pop("memory", config.model.personal.memory)
            personal = dataclasses.replace(config.model.personal, memory=memory)
            model = dataclasses.replace(config.model, personal=personal, **fields)
            train = dataclasses.replace(config.train, batch_size=n_rows)
            trainer = make_trainer(dataclasses.replace(config, model=model, data=data_config, train=train), data)
            with contextlib.closing(iter(trainer.stream)) as stream:
                steps[name] = _Steps(config, trainer, next(stream))
            held[name] = steps[name].temporary_bytes()
        rows += _list_arms(length, time_in_turns(steps, repeats), held)
    return rows


def _list_arms(length: int, times: dict[str, float], held: dict[str, int]) -> list[dict[str, Any]]:
    """Args: milliseconds, and bytes of temporaries, by arm."""
    first = next(iter(times))
    return [
        {
            "n_slots": length,
            "arm": name,
            "step_ms": times[name],
            "temporary_mb": held[name] / 1e6,
            "ratio": times[name] / times[first],
            "memory_ratio": held[name] / held[first],
        }
        for name in times
    ]


def measure_recurrences(config: Config, lengths: Sequence[int], repeats: int = 5) -> list[dict[str, Any]]:
    """Rows as those of `measure_histories`: the recurrence under the memory alone, all its states and their gradients.

    The associative scan against chunks of several sizes, over batches of as many slots as in `measure_histories`.
    """
    forms = {"associative scan": exclusive_scan}
    for chunk in sorted({16, 64, config.model.personal.chunk}):
        forms[f"chunks of {chunk}"] = partial(chunked_exclusive_scan, chunk=chunk)
    rows = []
    for length in lengths:
        operands = _draw_writes(config, max(config.data.seq_len * config.train.batch_size // length, 1), length)
        compiled = {name: _slopes_of(form).lower(*operands).compile() for name, form in forms.items()}
        calls = {name: partial(program, *operands) for name, program in compiled.items()}
        held = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
        rows += _list_arms(length, time_in_turns(calls, repeats), held)
    return rows


def _slopes_of(form: Callable[[Writes], jax.Array]) -> Any:
    """Gradients of what `_draw_writes` returns, but for the times and starts."""

    def total(log_keep_BTM, gain_BTM, value_BTP, rate_M, elapsed_BT, first_BT):
        def of_row(elapsed_T, log_keep_TM, gain_TM, value_TP, first_T):
            return jnp.sum(jnp.square(form(Writes(elapsed_T, rate_M, log_keep_TM, gain_TM, value_TP, first_T))))

        return jnp.sum(jax.vmap(of_row)(elapsed_BT, log_keep_BTM, gain_BTM, value_BTP, first_BT))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))


def _draw_writes(config: Config, n_rows: int, length: int) -> tuple[jax.Array, ...]:
    personal, rng = config.model.personal, np.random.default_rng(0)
    m, shape = count_profile_slots(config.model) - 1, (n_rows, length)
    floats = (-rng.random((*shape, m)), rng.random((*shape, m)), rng.standard_normal((*shape, personal.d_memory)))
    elapsed = np.cumsum(rng.integers(0, 100_000, shape), axis=1).astype(np.uint32)
    first = np.broadcast_to(np.arange(length) == 0, shape)
    rate = np.geomspace(1e-4, 1, m)
    return *(jnp.asarray(x, jnp.float32) for x in (*floats, rate)), jnp.asarray(elapsed), jnp.asarray(first)


def measure_profiles(model: SequenceModel, n_users: int = 4096, repeats: int = 9) -> dict[str, float]:
    """Users per second whose profile takes in an event, and whose profile conditions a request; batches of users."""
    personalizer = make_personalizer(model.config, model.field_sizes)
    rng = np.random.default_rng(0)
    x_UD = jnp.asarray(rng.standard_normal((n_users, model.config.d_model)), jnp.float32)
    time_U = jnp.asarray(rng.integers(0, 10**9, n_users), jnp.int32)
    n_fields = len(model.field_sizes) if model.config.personal.fields else 0
    request = ProfileRequest(time_U, jnp.zeros((n_users, n_fields), jnp.int32))
    states = jax.vmap(lambda _: personalizer.init_user())(time_U)
    over_users, profile = (None, 0, 0), model.profile
    events = Event(x_UD, time_U, jnp.ones(n_users, bool))
    update = jax.jit(lambda s: jax.vmap(personalizer.update, over_users)(profile, s, events))
    read = jax.jit(lambda s: jax.vmap(personalizer.read, over_users)(profile, s, request))
    states = update(states)
    seconds = {"update": lambda: update(states), "read": lambda: read(states)}
    found = {f"{name}_users_per_s": n_users / median_seconds(run, repeats) for name, run in seconds.items()}
    return {**found, "profile_bytes": float(sum(x.nbytes for x in jax.tree.leaves(states)) / n_users)}


def measure(config: Config, workdir: Path, repeats: int = 20, n_targets: int = 4000) -> dict[str, float]:
    """Slots per second of the step and of the loader, their ratio, targets per second of evaluation, peak memory; the
    operations of the step's matmuls, and which share of the rate of one large matmul it comes to.

    With a profile also the users per second whose state takes in an event, and its bytes.
    """
    started = time.perf_counter()
    data = load_all(config, workdir)
    load_s = time.perf_counter() - started
    trainer = make_trainer(config, data)
    stream = iter(trainer.stream)
    batch = next(stream)
    slots = float(batch.targets[config.tasks[0]].weight_BT.sum())
    steps = _Steps(config, trainer, batch)
    step_s, n_flops, matmul_rate = median_seconds(steps, repeats), steps.count_flops(), measure_matmul(repeats)
    loader = iter(make_stream(config, data, make_tasks(config)))
    loader_s = median_seconds(lambda: next(loader).item_BT, 5 * repeats)
    some = dataclasses.replace(config, eval=dataclasses.replace(config.eval, n_test=n_targets))
    examples = make_test_set(some, data)
    predictor = make_predictor(steps.state)
    catalog = bind_catalog(predictor, trainer.catalog)
    eval_s = median_seconds(lambda: rank_targets(predictor, examples, catalog).in_service.greater, 3)
    n_rows = config.train.batch_size * config.data.seq_len
    return {
        "load_s": load_s,
        "step_ms": 1e3 * step_s,
        "step_slots_per_s": slots / step_s,
        "step_matmul_gflop": n_flops / 1e9,
        "matmul_gflop_per_s": matmul_rate / 1e9,
        "step_share_of_matmul_rate": n_flops / step_s / matmul_rate,
        "packing": slots / n_rows,
        "loader_slots_per_s": slots / loader_s,
        "loader_over_step": step_s / loader_s,
        "eval_targets_per_s": len(examples.targets) / eval_s,
        "eval_scores_per_s": len(examples.targets) * data.dataset.catalogue.n_items / eval_s,
        **(measure_profiles(predictor.params) if count_profile_slots(config.model) else {}),
        "step_compilations": count_compilations(trainer.train_step),
        "eval_compilations": count_compilations(rank_batch),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
