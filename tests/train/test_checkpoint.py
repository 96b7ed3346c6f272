"""A checkpoint gives back every bit, on any mesh, and tells what does not fit."""

import dataclasses
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.convert.paths import flatten, unflatten
from moerec.errors import InputError, WorkError
from moerec.nn.model import ModelSizes
from moerec.nn.sharding import make_mesh, param_shardings
from moerec.train.checkpoint import Checkpoints, TrainProgress
from moerec.train.state import init_state
from tests.tiny import make_config

ROOT = Path(__file__).resolve().parents[2]
SIZES = ModelSizes(n_items=16, n_tokens=9, n_services=2, n_actions=2, context_sizes=(3,))
PROGRESS = TrainProgress(0.1 + 0.2, 4, 1, 1 / 3, 1e9, 7.0, {"epoch": 3, "window": 2**40})


def make_state(sizes=SIZES):
    """A state in which every leaf has random bits of its own; of the model only parts, since files cost time."""
    config = make_config()
    config.model = dataclasses.replace(config.model, item_text=False, request_time=False, action=False)
    shapes = jax.eval_shape(lambda: init_state(config, sizes))
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 1000, leaf.shape).astype(leaf.dtype))
        return jnp.asarray(rng.standard_normal(leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, shapes)


def place(model, mesh):
    return jax.device_put(model, param_shardings(model, mesh))


def shift(state, by=1):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.asarray(by, x.dtype)), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture
def small():
    """For what does not depend on the state."""
    return {"a": jnp.arange(6.0).reshape(2, 3), "b": {"step": jnp.asarray(3)}}


@pytest.fixture
def checkpoints(tmp_path):
    opened = []

    def open_folder(name="checkpoints"):
        opened.append(Checkpoints(tmp_path / name))
        return opened[-1]

    yield open_folder
    for one in opened:
        one.close()


def test_round_trip_is_exact_and_leaves_only_whole_checkpoints(state, checkpoints, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    writer = checkpoints()
    best = shift(state)
    writer.save_best(4, best, dataclasses.replace(PROGRESS, best_step=3))
    writer.save_last(6, state, PROGRESS)
    writer.wait()
    reader = checkpoints()
    assert (reader.last_step(), reader.best_step()) == (6, 4)
    like = shift(state, 5)
    restored, progress = reader.restore_last(like)
    assert_same(restored, state)
    assert progress == PROGRESS
    restored, progress = reader.restore_best(like)
    assert_same(restored, best)
    assert progress.best_step == 3
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if "tmp" in path.name]
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"], "starts like a pickle"


def test_restores_onto_other_meshes(state, checkpoints):
    writer = checkpoints()
    writer.save_last(1, place(state.params, make_mesh(2, 1, 2)), PROGRESS)
    writer.wait()
    for shape in ((2, 1, 4), (4, 1, 1), (1, 1, 1)):
        like = place(shift(state.params), make_mesh(*shape))
        restored, _ = writer.restore_last(like)
        assert_same(restored, state.params)
        for (path, x), y in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(like), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), jax.tree_util.keystr(path)
        assert any(not x.is_fully_replicated for x in jax.tree.leaves(restored)) == (shape != (1, 1, 1))


def test_restores_into_shapes_alone(state, checkpoints):
    writer = checkpoints()
    writer.save_last(1, state, PROGRESS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    writer.wait()
    assert_same(writer.restore_last(shapes)[0], state)


def test_a_state_given_away_after_saving_is_saved_as_it_was(checkpoints):
    state = make_state()
    kept = jax.tree.map(lambda x: np.array(x, copy=True), state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    step(jax.tree.map(jnp.copy, state))  # compiled beforehand, so that it overtakes the writing
    writer = checkpoints()
    writer.save_last(1, state, PROGRESS)
    for _ in range(5):
        state = step(state)
    writer.wait()
    assert_same(jax.tree.map(np.asarray, writer.restore_last(state)[0]), kept)


def test_another_model_is_refused_by_the_name_of_its_weight(state, checkpoints):
    writer = checkpoints()
    writer.save_last(1, state, PROGRESS)
    writer.wait()
    other = make_state(dataclasses.replace(SIZES, n_items=24))
    with pytest.raises(InputError, match=r"checkpoints: .*head/bias_I.*\(16,\).*\(24,\)"):
        writer.restore_last(other)
    without_average = state._replace(average=None)
    writer.save_last(2, without_average, PROGRESS)
    writer.wait()
    with pytest.raises(InputError, match=r"another model: average/.* is None, not"):
        writer.restore_last(state)


def test_weights_that_nobody_asked_for_are_refused_by_name(small, checkpoints):
    writer = checkpoints()
    writer.save_last(1, small, PROGRESS)
    writer.wait()
    with pytest.raises(InputError, match=r"another model: b/step is \(\), not None"):
        writer.restore_last({"a": small["a"]})


def test_paths_name_every_leaf_once(state):
    flat = flatten(state)
    assert len(flat) == len(jax.tree.leaves(state))
    assert flat["step"] is state.step
    assert [name for name in flat if name.startswith("params/") and "row_ID" in name] == ["params/item_encoder/row_ID"]
    assert flat["params/groups/0/attention/q_DNH"] is state.params.groups[0].attention.q_DNH[...]
    assert_same(unflatten(shift(state), flat), state)


def test_what_was_best_after_the_last_checkpoint_is_forgotten(small, checkpoints):
    writer = checkpoints()
    writer.save_last(4, small, PROGRESS)
    writer.save_best(6, shift(small), PROGRESS)
    writer.wait()
    reader = checkpoints()
    assert reader.best_step() == 6
    reader.restore_last(small)
    assert reader.best_step() is None
    reader.save_best(6, shift(small, 2), PROGRESS)  # the resumed run comes there again
    reader.wait()
    assert_same(reader.restore_best(small)[0], shift(small, 2))


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_without_a_last_checkpoint_replaces_the_best_of_the_killed_one(small, checkpoints, step):
    writer = checkpoints()
    writer.save_best(6, small, PROGRESS)
    writer.wait()
    again = checkpoints()
    assert again.last_step() is None
    again.save_best(step, shift(small), PROGRESS)
    again.wait()
    reader = checkpoints()
    assert reader.best_step() == step
    assert_same(reader.restore_best(small)[0], shift(small))


def test_what_was_best_by_the_last_checkpoint_is_kept(small, checkpoints):
    writer = checkpoints()
    for step in (2, 4):
        writer.save_best(step, shift(small, step), PROGRESS)
        writer.save_last(step, small, PROGRESS)
    writer.save_last(8, small, PROGRESS)
    writer.wait()
    reader = checkpoints()
    reader.restore_last(small)
    assert reader.best_step() == 4
    assert_same(reader.restore_best(small)[0], shift(small, 4))


def test_the_newest_and_the_best_that_they_name_are_kept(small, checkpoints, tmp_path):
    writer = checkpoints()
    for step in range(1, 9):
        writer.save_best(step, small, PROGRESS)
        if step % 4 == 0:
            writer.save_last(step, small, dataclasses.replace(PROGRESS, best_step=step))
    for step in (9, 10, 11):  # not yet named by a last one: the run may be killed here, and go on from 8
        writer.save_best(step, small, PROGRESS)
    writer.wait()
    writer.close()
    kept = {
        name: {int(path.name) for path in (tmp_path / "checkpoints" / name).iterdir() if path.is_dir()}
        for name in ("last", "best")
    }
    assert kept["last"] == {4, 8}
    assert 8 in kept["best"]
    assert not kept["best"] & {1, 2, 3}
    reader = checkpoints()
    reader.restore_last(small)
    assert reader.best_step() == 8


def test_half_written_ones_are_not_seen(small, checkpoints, tmp_path):
    writer = checkpoints()
    writer.save_last(3, small, PROGRESS)
    writer.wait()
    half = tmp_path / "checkpoints" / "last" / "5.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    reader = checkpoints()
    assert reader.last_step() == 3
    assert_same(reader.restore_last(shift(small))[0], small)


def test_an_empty_folder_holds_no_checkpoint(state, checkpoints):
    empty = checkpoints("run")
    assert empty.last_step() is None
    assert empty.best_step() is None
    for restore in (empty.restore_last, empty.restore_best):
        with pytest.raises(InputError, match="run: holds no checkpoint"):
            restore(state)


FULL_DISK = """
import contextlib, logging, resource, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from moerec.config import cli
from moerec.train.checkpoint import Checkpoints, TrainProgress

def save(config, flags):
    before = sys.unraisablehook
    try:
        fill(flags)
    finally:
        print(*(logging.getLogger(name).filters for name in ("absl", "asyncio")), sys.unraisablehook == before)

def fill(flags):
    with contextlib.closing(Checkpoints(Path(flags.workdir))) as checkpoints:
        noise = np.random.default_rng(0)
        for step, size in ((3, 9), (6, 40_000)):
            leaves = {f"a{k}": jnp.asarray(noise.standard_normal(size), jnp.float32) for k in range(20)}
            checkpoints.save_last(step, leaves, TrainProgress(best_step=step))
            checkpoints.save_best(step, leaves, TrainProgress(best_step=step))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

cli.run(save, config_type=None)
"""


def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path):
    """A limit on the size of files fails as a full disk does: in the background, in the middle of a file."""
    command = [sys.executable, "-c", FULL_DISK, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == (
        f"error: {tmp_path}: a checkpoint cannot be written (File too large); what was saved before stays\n"
    )
    assert (done.returncode, done.stdout) == (1, "[] [] True\n")  # nothing else is kept quiet afterwards
    noise = np.random.default_rng(0)
    leaves = {f"a{k}": jnp.asarray(noise.standard_normal(9), jnp.float32) for k in range(20)}
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.last_step(), checkpoints.best_step()) == (3, 3)
    assert_same(checkpoints.restore_last(leaves)[0], leaves)
    assert_same(checkpoints.restore_best(leaves)[0], leaves)
    checkpoints.save_last(6, leaves, PROGRESS)  # and once there is room, it goes on
    checkpoints.wait()
    assert checkpoints.last_step() == 6
    checkpoints.close()


@pytest.mark.parametrize(("error", "is_told"), [(RuntimeError("a defect"), False), (OSError(28, "no space"), True)])
def test_only_what_the_machine_refuses_is_told_as_such(small, tmp_path, monkeypatch, error, is_told):
    """A defect is not said to be a full disk; either way the checkpoints are closed."""
    writer = Checkpoints(tmp_path)
    monkeypatch.setattr(writer, "_save_last", lambda *arguments: (_ for _ in ()).throw(error))
    kind, message = (WorkError, "a checkpoint cannot be written") if is_told else (RuntimeError, "a defect")
    with pytest.raises(kind, match=message):
        writer.save_last(3, small, PROGRESS)
    monkeypatch.setattr(writer._last, "close", lambda: (_ for _ in ()).throw(RuntimeError("no loop")))
    writer.close()
    filters = [x for name in ("absl", "asyncio") for x in logging.getLogger(name).filters]
    assert writer._quiet_failure not in [getattr(x, "__self__", None) for x in filters]


@pytest.mark.parametrize("record", ["{", '{"best": "high"}', '{"step_of_old": 3}', '{"stream": [1]}', "[]"])
def test_a_damaged_record_is_named(small, checkpoints, tmp_path, record):
    writer = checkpoints()
    writer.save_last(3, small, PROGRESS)
    writer.wait()
    (tmp_path / "checkpoints" / "last" / "3" / "progress" / "metadata").write_text(record)
    with pytest.raises(InputError, match=r"checkpoints: the checkpoint of step 3 cannot be read \("):
        checkpoints().restore_last(small)
