"""A profile store against a dict; killed, deleted from, raced for: nothing is lost, torn, or left behind."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.errors import InputError, WorkError
from moerec.serve.profile_store import ProfileStore, VersionConflict, journal, shards
from moerec.serve.profile_store.bench import measure_store

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = {"memory": np.zeros((2, 3), np.float32), "seen": np.zeros((), np.int32), "on": np.zeros(5, bool)}
POOL = ["a", "", "человек", "x" * 50, "a b\n", "0", "00", "é", "e\u0301", "z"]


def make_states(values, template=None):
    """States of users in which every byte depends on the user's value."""
    values = np.asarray(values)

    def fill(leaf):
        grid = values.reshape(-1, *[1] * leaf.ndim) * 7 + np.arange(leaf.size).reshape(leaf.shape)
        return (grid % 2 == 0) if leaf.dtype == bool else grid.astype(leaf.dtype)

    return jax.tree.map(fill, template or TEMPLATE)


def assert_same(states, others):
    assert jax.tree.structure(states) == jax.tree.structure(others)
    for one, other in zip(jax.tree.leaves(states), jax.tree.leaves(others), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def assert_holds(store, model, pool=POOL):
    """`model` is {id: (value, version)}."""
    states, versions, found = store.read(pool)
    assert found.tolist() == [name in model for name in pool]
    assert versions.tolist() == [model.get(name, (0, 0))[1] for name in pool]
    wanted = make_states([model.get(name, (0, 0))[0] for name in pool])
    for name, leaf in wanted.items():
        leaf[~found] = 0
        np.testing.assert_array_equal(states[name], leaf)
    assert len(store) == len(model)
    assert set(store.ids()) == set(model)


def list_files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def search(folder, pattern: bytes):
    return [path.name for path in list_files(folder) if pattern in path.read_bytes()]


@pytest.fixture
def store(tmp_path):
    return ProfileStore.create(tmp_path / "store", TEMPLATE, users_per_shard=3)


OPERATION = st.tuples(
    st.sampled_from(["update", "update", "expect", "delete", "reopen"]),
    st.lists(st.sampled_from(POOL), unique=True, max_size=6),
    st.integers(0, 1),
)


@settings(max_examples=40)
@given(operations=st.lists(OPERATION, max_size=12), users_per_shard=st.sampled_from([1, 2, 4, 100]))
def test_two_open_stores_agree_with_a_dict(tmp_path_factory, operations, users_per_shard):
    folder = tmp_path_factory.mktemp("store") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # nobody pulls the plug
        stores = [ProfileStore.create(folder, TEMPLATE, users_per_shard), ProfileStore.open(folder)]
        model: dict = {}
        for value, (kind, ids, which) in enumerate(operations, 1):
            store = stores[which]
            values = value * 100 + np.arange(len(ids))
            if kind == "reopen":
                stores[which] = ProfileStore.open(folder, TEMPLATE)
            elif kind == "delete":
                assert store.delete(ids).tolist() == [name in model for name in ids]
                model = {name: entry for name, entry in model.items() if name not in ids}
            else:
                versions = [model.get(name, (0, 0))[1] for name in ids]
                expected = versions if kind == "expect" else None
                assert store.update(ids, make_states(values), expected).tolist() == [v + 1 for v in versions]
                model |= {name: (x, v + 1) for name, x, v in zip(ids, values, versions, strict=True)}
            for store in stores:
                assert_holds(store, model)
        n_rows = -(-len({name for _, ids, _ in operations for name in ids}) // users_per_shard)
        assert len(list(folder.glob("states/c.*"))) <= n_rows  # rows of deleted users are used again


def test_places_of_deleted_users_are_used_again_and_other_stores_notice(store, tmp_path):
    folder = tmp_path / "store"
    store.update(list("abc"), make_states([1, 2, 3]))
    other = ProfileStore.open(folder)
    sizes = {path: path.stat().st_size for path in list_files(folder)}
    for one, two in ("ax", "xy", "yz"):  # the same row and length, while the other store does not look
        store.delete([one])
        store.update([two], make_states([4]))
    assert_holds(other, {"z": (4, 1), "b": (2, 1), "c": (3, 1)}, list("abcxyz"))
    assert {path: path.stat().st_size for path in list_files(folder)} == sizes


def test_opening_reads_no_states_and_a_batch_writes_no_more_than_itself(tmp_path, monkeypatch):
    store = ProfileStore.create(tmp_path / "s", TEMPLATE, users_per_shard=8)
    names = [f"p{k}" for k in range(400)]
    store.update(names, make_states(np.arange(400)))
    written = []
    write, read = os.pwrite, shards.Shards.read
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: written.append(len(data)) or write(handle, data, at))
    monkeypatch.setattr(shards.Shards, "read", None)
    store = ProfileStore.open(tmp_path / "s")
    assert len(store) == 400
    before = {path: path.stat().st_ino for path in list_files(tmp_path)}
    store.update(["p7", "p390"], make_states([1, 2]))
    assert sum(written) < 500
    assert {path: path.stat().st_ino for path in list_files(tmp_path)} == before  # no file is made anew
    monkeypatch.setattr(shards.Shards, "read", read)
    store = ProfileStore.open(tmp_path / "s")
    assert_same(store.read(["p390", "p8", "p7"])[0], make_states([2, 8, 1]))


def test_tensorstore_reads_the_array_as_it_is(store, tmp_path):
    store.update(list("abcdefg"), make_states(np.arange(7)))
    store.update(["c"], make_states([9]))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/store/states/"}}
    array = tensorstore.open(spec).result()
    assert array.shape == (9, 33)
    assert array.chunk_layout.write_chunk.shape == (3, 33)
    values = array[:7].read().result()
    wanted = make_states([0, 1, 9, 3, 4, 5, 6])
    parts = [np.ascontiguousarray(wanted[name]).reshape(7, -1).view(np.uint8) for name in ("memory", "on", "seen")]
    np.testing.assert_array_equal(values, np.concatenate(parts, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    memory: jax.Array
    times: dict


def test_states_are_trees_like_the_template(tmp_path):
    template = State(jax.ShapeDtypeStruct((2, 2), jnp.bfloat16), {"last": np.zeros(3, np.int64), "on": np.uint8(0)})
    store = ProfileStore.create(tmp_path / "s", template)
    states = State(
        jnp.arange(8, dtype=jnp.bfloat16).reshape(2, 2, 2) / 3,
        {"last": np.arange(6).reshape(2, 3) - 2**40, "on": np.array([3, 255], np.uint8)},
    )
    store.update(["a", "b"], states)
    found, _, _ = ProfileStore.open(tmp_path / "s", template).read(["a", "b"])
    assert_same(found, jax.tree.map(np.asarray, states))
    flat, _, _ = ProfileStore.open(tmp_path / "s").read(["a", "b"])
    assert list(flat) == ["memory", "times/last", "times/on"]
    assert ProfileStore.open(tmp_path / "s").update(["a", "b"], flat).tolist() == [2, 2]


def test_one_array_is_a_state(tmp_path):
    store = ProfileStore.create(tmp_path / "s", np.zeros(2, np.float64))
    store.update(["a"], np.ones((1, 2)))
    np.testing.assert_array_equal(store.read(["b", "a", "a"])[0], [[0, 0], [1, 1], [1, 1]])


def test_an_unexpected_version_stops_the_whole_batch(store):
    assert store.update(["a", "b"], make_states([1, 2]), expected_versions=[0, 0]).tolist() == [1, 1]
    assert store.update(["b"], make_states([3])).tolist() == [2]
    with pytest.raises(VersionConflict, match=r"^user 'b': the version is 2, not the expected 1$"):
        store.update(["c", "a", "b"], make_states([4, 4, 4]), expected_versions=[0, 1, 1])
    with pytest.raises(VersionConflict, match="user 'd': the version is 0, not the expected 1"):
        store.update(["a", "d"], make_states([4, 4]), expected_versions=[1, 1])
    assert_holds(store, {"a": (1, 1), "b": (3, 2)})


def test_deleted_states_and_ids_are_in_no_file(store, tmp_path):
    folder = tmp_path / "store"
    secret, old = np.float32(1.2345678), np.float32(7.6543217)
    states = make_states([1] * 5)
    states["memory"][2] = old
    names = ["somebody", "else", "the user", "more", "users"]
    store.update(names, states)
    assert search(folder, old.tobytes())
    states["memory"][2] = secret
    store.update(names, states)
    assert not search(folder, old.tobytes())  # nor is what was overwritten
    assert search(folder, secret.tobytes())
    assert search(folder, b"the user")
    (folder / "journal.tmp").write_bytes(secret.tobytes() + b"the user")  # of a writer that was killed
    assert store.delete(["nobody", "the user"]).tolist() == [False, True]
    assert not search(folder, secret.tobytes())
    assert not search(folder, b"the user")
    assert_holds(store, {name: (1, 2) for name in names if name != "the user"}, names)


def test_opening_removes_what_dead_writers_left(store, tmp_path):
    folder = tmp_path / "store"
    store.update(["a"], make_states([1]))
    whole = set(list_files(folder))
    for name in ("journal.tmp", "states/c.5.0.tmp", "states/zarr.json.__lock"):
        (folder / name).write_bytes(b"left")
    ProfileStore.open(folder)
    assert set(list_files(folder)) == whole


class Killed(BaseException):
    pass


def kill_at(patch, step):
    """From the `step`th call on that changes a file, nothing happens any more."""
    calls = 0

    def guard(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return function(*arguments, **options)

        return call

    for name in ("fsync", "pwrite", "rename", "unlink"):
        patch.setattr(os, name, guard(getattr(os, name)))
    patch.setattr(Path, "unlink", lambda path, missing_ok=False: os.unlink(path))


@pytest.mark.parametrize("kind", ["update", "delete"])
def test_whatever_the_moment_a_killed_batch_is_whole_or_absent(tmp_path, kind, monkeypatch):
    before = {name: (k, 1) for k, name in enumerate(POOL[:5])}
    ids = POOL[3:]
    if kind == "update":
        after = before | {name: (50 + k, before.get(name, (0, 0))[1] + 1) for k, name in enumerate(ids)}
    else:
        after = {name: entry for name, entry in before.items() if name not in ids}
    monkeypatch.setattr(journal, "_THREADS", 1)  # else a kill among threads stops at no certain place
    outcomes = []
    for step in range(100):
        folder = tmp_path / str(step)
        store = ProfileStore.create(folder, TEMPLATE, users_per_shard=2)
        other = ProfileStore.open(folder)
        store.update(list(before), make_states([value for value, _ in before.values()]))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            try:
                store.update(ids, make_states(50 + np.arange(len(ids)))) if kind == "update" else store.delete(ids)
                outcomes.append("returned")
            except Killed:
                outcomes.append("absent" if not (folder / "journal").exists() else "whole")
        for reader in (other, store, ProfileStore.open(folder)):
            assert_holds(reader, before if outcomes[-1] == "absent" else after)
        other.update(ids, make_states(70 + np.arange(len(ids))))  # and work goes on
        other.delete(POOL[:3])
        assert set(ProfileStore.open(folder).ids()) == set(ids)
        if outcomes[-1] == "returned":
            break
    assert outcomes == sorted(outcomes, key=["absent", "whole", "returned"].index)
    assert outcomes.count("absent") >= 2
    assert outcomes.count("whole") > 5
    assert outcomes[-1] == "returned"


# Imports once, and for every line (a first batch) starts a process that writes until it is killed.
WRITER = """
import os, sys
import numpy as np
from moerec.serve.profile_store import ProfileStore

def tell(*words):  # in one piece: what is printed without a buffer may be cut by the kill
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def write(folder, batch):
    store = ProfileStore.open(folder)
    while True:  # a group of users, their batch's number everywhere, and someone new with them
        group = [f"{batch % 3}/{k}" for k in range(40)] + [f"batch {batch}"]
        store.update(group, {"x": np.full((41, 64), batch, np.float32)})
        tell(batch)
        if batch % 5 == 4:
            store.delete([f"batch {batch - 4}"])
        batch += 1

for line in sys.stdin:
    child = os.fork()
    if not child:
        write(sys.argv[1], int(line))
    tell("process", child)
    os.waitpid(child, 0)
    tell("dead")
"""


def start(code, folder):
    command = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def kill_writer(process, batch, delay_s):
    """Starts a writer at `batch`, kills it `delay_s` after its first batch, returns the last one it told of."""
    process.stdin.write(f"{batch}\n")
    lines = [process.stdout.readline() for _ in range(2)]  # they come in either order
    (child,) = [int(line.split()[1]) for line in lines if line.startswith("process")]
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    while lines[-1] != "dead\n":
        lines.append(process.stdout.readline())
        assert lines[-1], "the process that starts the writers has gone"
    return max(int(line) for line in lines if line[0].isdigit())


def test_batches_of_a_killed_writer_are_whole_and_the_acknowledged_ones_are_there(tmp_path):
    folder = tmp_path / "s"
    reader = ProfileStore.create(folder, {"x": np.zeros(64, np.float32)}, users_per_shard=16)
    rng = np.random.default_rng(time.time_ns())
    batch = 0
    process = start(WRITER, folder)
    for _ in range(8):
        acknowledged = kill_writer(process, batch, rng.uniform(0, 0.2))
        print("killed after", acknowledged)
        for store in (reader, ProfileStore.open(folder)):
            last = []
            for group in range(3):
                states, versions, found = store.read([f"{group}/{k}" for k in range(40)])
                assert len(np.unique(states["x"])) == len(set(versions.tolist())) == len(set(found.tolist())) == 1
                last.append(int(states["x"][0, 0]) if found[0] else -1)
            newest = max(last)
            assert acknowledged <= newest <= acknowledged + 1
            assert sorted(last) == [k if k >= 0 else -1 for k in range(newest - 2, newest + 1)]
            states, versions, found = store.read([f"batch {k}" for k in range(newest + 2)])
            assert not found[-1]
            gone = [k for k in range(newest + 1) if not found[k]]
            assert set(gone) <= {k for k in range(newest + 1) if k % 5 == 0}
            np.testing.assert_array_equal(states["x"][found][:, 0], np.flatnonzero(found))
            assert versions[found].tolist() == [1] * int(found.sum())
        assert not [path for path in list_files(folder) if path.name.startswith("journal")]
        batch = newest + 1
    process.communicate()
    assert process.returncode == 0


RACERS = """
import os, sys
import numpy as np
from moerec.serve.profile_store import ProfileStore, VersionConflict

child = os.fork()
me = "one" if child else "two"
store, tries = ProfileStore.open(sys.argv[1]), 0
for k in range(20):
    while True:
        states, versions, _ = store.read(["a", "b", "c"])
        tries += 1
        try:
            store.update(["a", "b", "c"], {"x": states["x"] + 1}, expected_versions=versions)
            break
        except VersionConflict:
            pass
    store.update([f"{me} {k}"], {"x": np.full((1, 4), k, np.int32)})
    if k % 4 == 3:
        store.delete([f"{me} {k - 3}"])
print(me, tries, flush=True)
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_two_writers_lose_nothing_and_a_reader_sees_whole_batches(tmp_path):
    store = ProfileStore.create(tmp_path / "s", {"x": np.zeros(4, np.int32)}, users_per_shard=2)
    process, seen = start(RACERS, tmp_path / "s"), set()
    while process.poll() is None:
        states, versions, _ = store.read(["a", "b", "c"])
        assert len(np.unique(states["x"])) == len(set(versions.tolist())) == 1
        assert states["x"][0, 0] == versions[0]
        seen.add(int(versions[0]))
        time.sleep(0.001)
    print(process.communicate()[0], "versions seen:", len(seen))
    assert process.returncode == 0
    assert store.read(["a", "b", "c"])[1].tolist() == [40] * 3
    kept = [k for k in range(20) if k % 4]
    states, versions, _ = store.read([f"{me} {k}" for me in ("one", "two") for k in kept])
    assert states["x"][:, 0].tolist() == kept * 2
    assert set(versions.tolist()) == {1}
    assert len(store) == 3 + 2 * len(kept)


def test_readers_who_overlap_do_not_keep_a_writer_out(store, tmp_path):
    folder, order = tmp_path / "store", []

    def work(name, exclusive):
        with journal.hold(folder, exclusive):
            order.append(name)

    threads = [
        threading.Thread(target=work, args=("writer", True)),
        threading.Thread(target=work, args=("reader", False)),
    ]
    with journal.hold(folder, exclusive=False):
        threads[0].start()
        with open(folder / "queue") as queue, contextlib.suppress(BlockingIOError):
            while True:  # until the writer stands in the queue
                fcntl.flock(queue, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(queue, fcntl.LOCK_UN)
        threads[1].start()
        time.sleep(0.05)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["writer", "reader"]


def read_ids(found) -> list[str]:
    """Of an export, as the documentation says."""
    text, offsets = found["id_bytes"].tobytes(), found["id_offsets"]
    return [text[lo:hi].decode() for lo, hi in itertools.pairwise(offsets)]


def test_one_long_id_costs_an_export_its_own_length_only(tmp_path):
    store = ProfileStore.create(tmp_path / "s", {"m": np.zeros(1, np.float32)})
    names = ["x" * 12_000, *(str(k) for k in range(1000))]
    store.update(names, {"m": np.zeros((1001, 1), np.float32)})
    store.export(tmp_path / "all.npz")
    assert (tmp_path / "all.npz").stat().st_size < 50_000
    with np.load(tmp_path / "all.npz") as found:
        assert read_ids(found) == names


def test_export_holds_everything_without_pickle(tmp_path, monkeypatch):
    template = {"m": np.zeros((2, 2), jnp.bfloat16), "deep": {"t": np.zeros(3, np.int16)}}
    store = ProfileStore.create(tmp_path / "s", template, users_per_shard=2)
    store.export(tmp_path / "empty.npz")
    states = {"m": np.arange(28).reshape(7, 2, 2).astype(jnp.bfloat16) / 3, "deep": {"t": make_times(7)}}
    names = [f"человек {k}" for k in range(7)]
    store.update(names, states)
    store.update(names[2:3], jax.tree.map(lambda leaf: leaf[2:3], states))
    store.delete(names[4:5])
    monkeypatch.setattr("moerec.serve.profile_store.export._BLOCK_BYTES", 30)  # two users
    store.export(tmp_path / "all.npz")
    with np.load(tmp_path / "empty.npz", allow_pickle=False) as empty:
        assert {name: empty[name].shape for name in empty.files} == {
            "id_bytes": (0,),
            "id_offsets": (1,),
            "versions": (0,),
            "states/deep/t": (0, 3),
            "states/m": (0, 2, 2),
        }
    kept = [0, 1, 2, 3, 5, 6]
    with np.load(tmp_path / "all.npz", allow_pickle=False) as found:
        assert read_ids(found) == [names[k] for k in kept]
        assert found["versions"].tolist() == [1, 1, 2, 1, 1, 1]
        assert found["states/m"].dtype == np.float32
        np.testing.assert_array_equal(found["states/m"], states["m"][kept].astype(np.float32))
        assert found["states/deep/t"].dtype == np.int16
        np.testing.assert_array_equal(found["states/deep/t"], states["deep"]["t"][kept])
    with pytest.raises(InputError, match="is inside the store"):
        store.export(tmp_path / "s" / "all.npz")


def make_times(n):
    return np.arange(3 * n, dtype=np.int16).reshape(n, 3)


def with_leaf(name, value):
    return {**make_states([1, 2]), name: value}


INFINITE = with_leaf("memory", np.full((2, 2, 3), [[[0.0]], [[np.inf]]], np.float32))


@pytest.mark.parametrize(
    ("ids", "states", "message"),
    [
        (["a", "b", "a"], make_states([1, 2, 3]), "user 'a' is twice in the batch"),
        (["a", 7], make_states([1, 2]), "user 7: an id must be a string, not int"),
        (["a", "b\0"], make_states([1, 2]), "must not contain a NUL character"),
        (["a", "\ud800"], make_states([1, 2]), r"user '\\ud800': the id is no valid Unicode text"),
        ("ab", make_states([1, 2]), "ids must be a sequence of strings, not the one string 'ab'"),
        (["a"], make_states([1, 2]), r"leaf memory is float32\[2, 2, 3\], not float32\[1, 2, 3\] for 1 users"),
        (["a", "b"], with_leaf("seen", np.zeros(2)), r"leaf seen is float64\[2\], not int32\[2\]"),
        (["a", "b"], with_leaf("more", np.zeros(2)), "leaf more of the states is not in the store"),
        (["a", "b"], {"memory": make_states([1, 2])["memory"]}, "leaf on of the store is not in the states"),
        (["a", "b"], INFINITE, "user 'b': leaf memory of the state is not finite"),
        (["a", "b"], with_leaf("memory", np.full((2, 2, 3), np.nan, np.float32)), "user 'a': leaf memory"),
    ],
)
def test_what_cannot_be_stored_is_refused(store, ids, states, message):
    store.update(["a"], make_states([1]))
    with pytest.raises(InputError, match=message) as error:
        store.update(ids, states)
    assert "\n" not in str(error.value)
    assert_holds(store, {"a": (1, 1)})


@pytest.mark.parametrize("expected", [[0], [[0, 0]], [0.0, 0.0], 0])
def test_expected_versions_must_be_one_a_user(store, expected):
    with pytest.raises(InputError, match=r"expected_versions is .* not whole numbers for 2 users"):
        store.update(["a", "b"], make_states([1, 2]), expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({}, "the template has no leaves"),
        ({"a": 3.0}, "leaf a of the template is float, not an array"),
        ({"a": np.zeros((2, 0))}, "leaf a of the template is .* it has no elements"),
        ({"a": np.zeros(2, complex)}, "leaf a of the template is complex128, which is none of bool"),
        ({"a": np.array(["x"])}, "leaf a of the template is str"),
        ({"a": np.array([{}])}, "leaf a of the template is object"),
        ({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, "two leaves of the state are called a/b"),
    ],
)
def test_templates_that_cannot_be_stored_are_refused(tmp_path, template, message):
    with pytest.raises(InputError, match=message):
        ProfileStore.create(tmp_path / "s", template)
    assert not list(tmp_path.iterdir())


def test_another_template_is_refused(store, tmp_path):
    for change, message in (
        ({"memory": np.zeros((3, 2), np.float32)}, r"leaf memory is float32\[2, 3\] in the store, float32\[3, 2\] in"),
        ({"seen": np.zeros((), np.int64)}, r"leaf seen is int32\[\] in the store, int64\[\] in the template"),
        ({"more": np.zeros(1)}, "leaf more of the template is not in the store"),
    ):
        with pytest.raises(InputError, match=message) as error:
            ProfileStore.open(tmp_path / "store", TEMPLATE | change)
        assert str(tmp_path / "store") in str(error.value)
    with pytest.raises(InputError, match="leaf on of the store is not in the template"):
        ProfileStore.open(tmp_path / "store", {"memory": TEMPLATE["memory"], "seen": TEMPLATE["seen"]})


def test_folders_that_are_no_stores_are_refused(store, tmp_path):
    with pytest.raises(InputError, match=r"not a profile store: it has no profile_store\.json"):
        ProfileStore.open(tmp_path)
    for folder in (tmp_path, tmp_path / "store"):
        with pytest.raises(InputError, match="exists and is not empty"):
            ProfileStore.create(folder, TEMPLATE)
    with pytest.raises(InputError, match="users_per_shard is 0"):
        ProfileStore.create(tmp_path / "none", TEMPLATE, 0)
    path = tmp_path / "store" / "profile_store.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format_version": 2}))
    with pytest.raises(InputError, match=r"profile_store\.json: format version 2 is unknown"):
        ProfileStore.open(tmp_path / "store")
    for broken in ("{", "[]", json.dumps(fields | {"users_per_chunk": 2}), json.dumps(fields | {"leaves": []})):
        path.write_text(broken)
        with pytest.raises(InputError, match="not a description of a profile store"):
            ProfileStore.open(tmp_path / "store")


@pytest.mark.parametrize("name", ["states/c.1.0", "users.bin", "ids.bin"])
def test_files_that_are_cut_are_named(store, tmp_path, name):
    store.update(list("abcdef"), make_states(np.arange(6)))
    path = tmp_path / "store" / name
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(WorkError, match=path.name):
        ProfileStore.open(tmp_path / "store")


def test_a_damaged_journal_is_named(store, tmp_path):
    (tmp_path / "store" / "journal").write_bytes(b"moerec journal 1" + bytes(40))
    with pytest.raises(WorkError, match="journal: is damaged"):
        store.read(["a"])


def leave_journal(folder, file, offsets, lengths, data: bytes):
    """What a writer leaves that is killed after the commit, of a batch that no writer would make."""
    write = journal.FileWrite(file, np.array(offsets), np.array(lengths), np.frombuffer(data, np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_check_writes", "_carry_out"):
            patch.setattr(journal, name, lambda *arguments: None)
        journal.commit(folder, [write])


def test_a_journal_writes_nowhere_else(store, tmp_path):
    (tmp_path / "victim").write_bytes(b"untouched")
    leave_journal(tmp_path / "store", "../victim", [0], [3], b"bad")
    with pytest.raises(WorkError, match=r"writes to \.\./victim, which is not in the store"):
        store.read(["a"])
    assert (tmp_path / "victim").read_bytes() == b"untouched"


def test_the_benchmark_measures_what_it_says(tmp_path):
    figures = measure_store(tmp_path / "s", n_users=300, batch_size=100, n_read=50)
    assert (figures["users"], figures["state_bytes"]) == (300, 4096)
    assert all(value > 0 for value in figures.values()), figures
    assert len(ProfileStore.open(tmp_path / "s")) == 300
