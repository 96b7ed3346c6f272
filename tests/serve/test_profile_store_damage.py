"""Damaged and hostile folders of a profile store: one line each, and nothing outside a store is ever written."""

import contextlib
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest

from moerec.errors import InputError, WorkError
from moerec.serve.profile_store import ProfileStore
from tests.full_disk import file_size_limit

TEMPLATE = {"memory": np.zeros((2, 3), np.float32), "seen": np.zeros((), np.int32)}
NAMES = list("abcde")


def make_states(n):
    return {"memory": np.ones((n, 2, 3), np.float32), "seen": np.arange(n, dtype=np.int32)}


@pytest.fixture
def folder(tmp_path):
    store = ProfileStore.create(tmp_path / "store", TEMPLATE, users_per_shard=2)
    store.update(NAMES, make_states(5))
    return tmp_path / "store"


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_told(call, *arguments):
    """Bad input or failing work, in one line."""
    with pytest.raises((InputError, WorkError)) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


FILES = ["users.bin", "ids.bin", "states/c.0.0", "states/zarr.json", "profile_store.json", "lock", "queue"]
LEFT = ["journal", "journal.tmp", "states/c.9.0.tmp", "states/zarr.json.__lock", "states/anything"]


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("name", [*FILES, *LEFT])
def test_a_link_in_a_store_is_refused_and_never_written_through(folder, tmp_path, name, kind):
    store = ProfileStore.open(folder)  # before the link is there
    victim = tmp_path / "victim"
    if name in FILES:
        (folder / name).rename(victim)
    else:
        victim.write_bytes(b"precious" * 1000)
    if kind == "hard":
        (folder / name).hardlink_to(victim)
    else:
        (folder / name).symlink_to(victim)
    before = victim.read_bytes()
    assert f"{folder / name}: is a link" in assert_told(ProfileStore.open, folder)
    for work in (
        lambda: store.update(["a", "f"], make_states(2)),
        lambda: store.delete(["b"]),
        lambda: store.read(["a"]),
    ):
        with contextlib.suppress(InputError):
            work()
    assert victim.read_bytes() == before


@pytest.mark.parametrize("name", ["lock", "queue", "journal.tmp", "states/c.3.0.tmp", "states/zarr.json.tmp"])
def test_a_dangling_link_makes_no_file_elsewhere(folder, tmp_path, name):
    store = ProfileStore.open(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "new")
    assert_told(ProfileStore.open, folder)
    assert_told(store.update, list("fghi"), make_states(4))
    assert not (tmp_path / "new").exists()


def test_a_linked_folder_of_states_is_refused(folder, tmp_path):
    store = ProfileStore.open(folder)
    (folder / "states").rename(tmp_path / "states")
    (folder / "states").symlink_to(tmp_path / "states")
    before = read_all(tmp_path / "states")
    assert assert_told(ProfileStore.open, folder).startswith(f"{folder}/states: is a link")
    for ids in (["a"], list("fghi")):
        assert_told(store.update, ids, make_states(len(ids)))
    assert read_all(tmp_path / "states") == before


@pytest.mark.parametrize("name", ["users.bin", "states/c.0.0", "journal", "lock"])
def test_a_pipe_is_no_file_and_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{folder / name}: is a link, or no file" in assert_told(ProfileStore.open, folder)


def write_journal(folder, header, body: bytes, magic=b"moerec journal 1", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = magic + struct.pack("<Q", len(header) if length is None else length) + header + body
    (folder / "journal").write_bytes(data + struct.pack("<I", zlib.crc32(data)))


def test_a_journal_that_names_a_link_overwrites_nothing(folder, tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (folder / "states/c.1.0").unlink()
    (folder / "states/c.1.0").symlink_to(tmp_path / "victim")
    write_journal(folder, [["states/c.1.0", 1, 3]], np.array([0, 3], "<i8").tobytes() + b"bad")
    assert f"{folder}/states/c.1.0: is a link" in assert_told(ProfileStore.open, folder)
    assert (tmp_path / "victim").read_bytes() == b"precious"


HUGE = 1 << 62
PIECES = {
    "far away": ("users.bin", [HUGE], [8], 8),
    "behind the end of a shard": ("states/c.0.0", [89], [8], 8),
    "behind what is appended": ("ids.bin", [6], [8], 8),
    "before the beginning": ("users.bin", [-8], [8], 8),
    "a negative length": ("users.bin", [0, 16], [16, -8], 8),
    "lengths whose sum overflows": ("users.bin", [0, 8, 16], [HUGE, HUGE, 8 - 2 * HUGE + (1 << 64) - (1 << 63)], 8),
    "an end that overflows": ("users.bin", [(1 << 63) - 1], [8], 8),
    "another sum of lengths": ("users.bin", [0], [4], 8),
    "pieces in each other": ("users.bin", [0, 4], [8, 8], 16),
    "its description": ("profile_store.json", [0], [8], 8),
    "the description of the array": ("states/zarr.json", [0], [8], 8),
    "another name of a shard": ("states/c.00.0", [0], [8], 8),
    "outside": ("states/../../victim", [0], [8], 8),
    "the whole path": ("/victim", [0], [8], 8),
    "a shard that is not there": ("states/c.7.0", [0], [8], 8),
}


@pytest.mark.parametrize("what", PIECES)
def test_a_journal_writes_where_batches_write_alone(folder, tmp_path, what):
    name, offsets, lengths, n_bytes = PIECES[what]
    (tmp_path / "victim").write_bytes(b"precious")
    good = [["ids.bin", 1, 1], np.array([0, 1], "<i8").tobytes() + b"a"]  # is not carried out either
    body = np.array([offsets, lengths], "<i8").tobytes() + bytes(n_bytes)
    write_journal(folder, [good[0], [name, len(offsets), n_bytes]], good[1] + body)
    before = read_all(tmp_path)
    for _ in range(2):
        with pytest.raises((WorkError, FileNotFoundError), match=str(folder)) as error:
            ProfileStore.open(folder)
        assert "\n" not in str(error.value)
        assert read_all(tmp_path) == before


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"[]", 1 << 60),
        (b"[]", (1 << 64) - 1),
        (b"[" * 100_000, None),
        (b"\xff", None),
        (b"", None),
        (b"7", None),
        (b"[7]", None),
        ([["users.bin", 1]], None),
        ([["users.bin", -1, 0]], None),
        ([["users.bin", 0, 0]], None),
        ([["users.bin", 1 << 70, 0]], None),
        ([["users.bin", 1 << 59, 1 << 59]], None),
        ([["users.bin", 1.5, "x"]], None),
        ([[7, 1, 0]], None),
        ({"users.bin": 1}, None),
    ],
)
def test_a_journal_without_sense_is_damaged(folder, header, length):
    write_journal(folder, header, bytes(16), length=length)
    assert assert_told(ProfileStore.open, folder) == (
        f"{folder}/journal: is damaged; the batch in it cannot be finished"
    )


HEAD = {"sequence": 0, "n_rows": 8, "n_id_bytes": 16}
ROW = {"version": 0, "birth": 8, "start": 16, "length": 24, "room": 28}


@pytest.mark.parametrize("value", [1 << 31, 1 << 36, 1 << 62, (1 << 64) - 1])
@pytest.mark.parametrize("field", [*HEAD, *(f"row {name}" for name in ROW)])
def test_numbers_that_cannot_be_are_told_and_ask_for_no_memory(folder, field, value):
    is_row = field.startswith("row ")
    place = 64 + 2 * 32 + ROW[field[4:]] if is_row else HEAD[field]
    n_bytes = 4 if field in ("row length", "row room") else 8
    data = bytearray((folder / "users.bin").read_bytes())
    data[place : place + n_bytes] = (min(value, (1 << 8 * n_bytes) - 1)).to_bytes(n_bytes, "little")
    (folder / "users.bin").write_bytes(data)
    if field == "sequence" and value <= HUGE:  # as good as any
        assert sorted(ProfileStore.open(folder).ids()) == NAMES
        return
    message = assert_told(ProfileStore.open, folder)
    assert message.startswith((f"{folder}/users.bin: is ", f"{folder}/ids.bin: is cut short"))


def test_ids_that_are_no_text_or_the_same_are_told(folder):
    (folder / "ids.bin").write_bytes(b"ab\xffde")
    assert assert_told(ProfileStore.open, folder) == f"{folder}/ids.bin: is damaged: an id is not UTF-8"
    (folder / "ids.bin").write_bytes(b"abbde")
    assert assert_told(ProfileStore.open, folder) == f"{folder}/users.bin: is damaged: two users have one id"


@pytest.mark.parametrize("file", FILES[:5])
def test_whatever_byte_is_damaged_there_is_no_traceback(folder, tmp_path, file):
    rng, n_told, n_well = np.random.default_rng(0), 0, 0
    data = (folder / file).read_bytes()
    for k in range(60):
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 9))
        damaged = data[:at] + rng.bytes(size) + data[at + size :] if k % 3 else data[:at]
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / file).write_bytes(damaged)
        try:
            store = ProfileStore.open(tmp_path / "copy")
            store.read([*NAMES, "nobody"])
            store.delete(["c"])
            store.export(tmp_path / "all.npz")
        except (InputError, WorkError) as error:
            n_told += "\n" not in str(error)
            continue
        n_well += 1
    assert n_told + n_well == 60
    assert n_told > 15


LEAVES = ["../../x", "a/../b", "/etc/x", "a//b", "", ".", "a\\b", "C:x", "x\n", "x\0", "\ud800", "x" * 2000]


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_not_called_like_a_way_out(folder, tmp_path, name):
    if name:  # the name of a state that is one leaf
        with pytest.raises(InputError, match=r"leaf .* of the template: such a name cannot be stored"):
            ProfileStore.create(tmp_path / "other", {"good": np.zeros(2), name: np.zeros(2)})
        assert not (tmp_path / "other").exists()
    fields = json.loads((folder / "profile_store.json").read_text())
    fields["leaves"][0]["name"] = name
    (folder / "profile_store.json").write_text(json.dumps(fields))
    assert "not a description of a profile store" in assert_told(ProfileStore.open, folder)


@pytest.mark.parametrize(
    "change",
    [{"users_per_shard": 1 << 60}, {"users_per_shard": True}, {"users_per_chunk": 2.0}, {"label": 7},
     {"leaves": [{"name": "x", "shape": [1 << 40, 1 << 40], "dtype": "bool"}]},
     {"leaves": [{"name": "x", "shape": [2], "dtype": []}]},
     {"leaves": [{"name": "x", "shape": [2], "dtype": "bool"}] * 2}],
    ids=str,
)  # fmt: skip
def test_a_description_that_cannot_be_is_refused(folder, change):
    fields = json.loads((folder / "profile_store.json").read_text())
    (folder / "profile_store.json").write_text(json.dumps(fields | change))
    assert "not a description of a profile store" in assert_told(ProfileStore.open, folder)


def test_a_full_disk_is_told_and_nothing_is_half_written(folder, tmp_path):
    store, before = ProfileStore.open(folder), read_all(folder)
    many = [f"user {k}" for k in range(400)]
    with file_size_limit(10_000):
        message = assert_told(store.update, many, make_states(400))
    assert message == f"{folder}/journal.tmp: cannot be written: File too large"
    assert read_all(folder).items() >= {name: data for name, data in before.items() if name.name != "zarr.json"}.items()
    assert sorted(ProfileStore.open(folder).ids()) == NAMES
    assert store.update(many, make_states(400)).tolist() == [1] * 400
    with file_size_limit(10_000):
        message = assert_told(store.export, tmp_path / "all.npz")
    assert message == f"{tmp_path}/all.npz: cannot be written: File too large"
    with file_size_limit(10):
        assert_told(ProfileStore.create, tmp_path / "new", TEMPLATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize(
    "name",
    ["../up/store", "a/../b", "./c/.", "50% %41", "x?y#z", "a|b:c", " a b ", "~", "a&b;$c", "[*]", "имя", "x\ny"],
)
def test_a_store_may_be_called_anything(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "up").mkdir()
    (tmp_path / "here/a").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = ProfileStore.create(name, TEMPLATE, users_per_shard=2)
    store.update(NAMES, make_states(5))
    assert ProfileStore.open(name).read(["e"])[0]["seen"].tolist() == [4]
    assert os.path.isfile(f"{name}/users.bin")


def test_a_link_to_a_store_is_a_way_to_it(folder, tmp_path):
    (tmp_path / "link").symlink_to("store")
    ProfileStore.open(tmp_path / "link").update(["f"], make_states(1))
    (tmp_path / "target").mkdir()
    (tmp_path / "other").symlink_to("target")
    ProfileStore.create(tmp_path / "other", TEMPLATE).update(["f"], make_states(1))
    assert (tmp_path / "other").is_symlink()
    assert len(ProfileStore.open(tmp_path / "target")) == 1
    assert len(ProfileStore.open(folder)) == 6
    (tmp_path / "all.npz").symlink_to("exported.npz")
    ProfileStore.open(folder).export(tmp_path / "all.npz")
    assert (tmp_path / "all.npz").is_symlink()
    with np.load(tmp_path / "exported.npz") as found:
        assert found["id_bytes"].tobytes().decode() == "".join([*NAMES, "f"])


def test_a_path_that_is_no_utf8_is_told(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert "the name of this folder must be UTF-8" in assert_told(ProfileStore.create, path, TEMPLATE)
