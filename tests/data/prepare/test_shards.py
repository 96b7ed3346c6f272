"""A prepared folder gives back exactly the data set that was written, and never reads as whole when it is not."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog, ItemTable
from moerec.data.prepare.shards import Meta, load_dataset, open_source, read_users, replace_folder, write_dataset
from moerec.errors import InputError, WorkError
from tests.full_disk import file_size_limit
from tests.random_dataset import make_dataset

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=5)


@st.composite
def datasets(draw):
    n_items = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    n_context = draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n, items = sum(lengths), sum(n_items)

    def texts(k):
        return np.array(draw(st.lists(TEXT, min_size=k, max_size=k)), dtype=np.str_)

    time = rng.integers(-(2**52), 2**52, n)
    time[rng.random(n) < 0.2] = UNKNOWN_TIME
    return Dataset(
        catalogue=ItemTable(
            tuple(f"service {z}" for z in range(len(n_items))),
            np.concatenate([[0], np.cumsum(n_items)]),
            texts(items),
            texts(items),
            texts(items),
        ),
        log=EventLog(
            np.concatenate([[0], np.cumsum(lengths)]),
            rng.integers(0, items, n).astype(np.int32),
            rng.integers(0, 3, n).astype(np.int16),
            time,
            rng.integers(0, 4, (n, n_context)).astype(np.int16),
            900 * rng.integers(-40, 40, n).astype(np.int32),
        ),
        users=texts(len(lengths)),
        actions=("view", "купить", "buy"),
        context={f"c{k}": ("a", "б", "") for k in range(n_context)},
        profile={name: texts(len(lengths)) for name in ("id", "n_events")[: rng.integers(3)]},
    )


def assert_same(a: Dataset, b: Dataset):
    assert (a.catalogue.services, a.actions, a.context) == (b.catalogue.services, b.actions, b.context)
    for part, names in (("catalogue", ("offsets", "ids", "text", "attributes")), ("log", EventLog.__annotations__)):
        for name in names:
            x, y = getattr(getattr(a, part), name), getattr(getattr(b, part), name)
            if name not in ("ids", "text", "attributes"):
                assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)
    np.testing.assert_array_equal(a.users, b.users)
    assert list(a.profile) == list(b.profile)
    for name in a.profile:
        np.testing.assert_array_equal(a.profile[name], b.profile[name])


@settings(max_examples=40)
@given(dataset=datasets(), n_shards=st.integers(1, 10))
def test_round_trip_is_exact(tmp_path_factory, dataset, n_shards):
    folder = tmp_path_factory.mktemp("shards") / "prepared"
    write_dataset(dataset, folder, n_shards)
    assert_same(load_dataset(folder), dataset)
    meta = Meta.load(folder)
    assert meta.extra == {}
    assert len(meta.shards) == min(n_shards, dataset.log.n_users)
    users = [shard["n_users"] for shard in meta.shards]
    assert max(users) - min(users) <= 1


@settings(max_examples=20)
@given(dataset=datasets(), seed=st.integers(0, 9))
def test_users_are_read_in_any_order(tmp_path_factory, dataset, seed):
    folder = tmp_path_factory.mktemp("shards") / "prepared"
    write_dataset(dataset, folder, 3)
    source = pickle.loads(pickle.dumps(open_source(folder)))  # noqa: S301, as grain's workers get it
    indices = np.random.default_rng(seed).integers(0, len(source), 5)
    events, lengths = read_users(source, indices)
    log = dataset.log
    spans = [slice(log.offsets[p], log.offsets[p + 1]) for p in indices]
    for name in ("item", "action", "time_us", "context", "utc_offset"):
        np.testing.assert_array_equal(events[name], np.concatenate([getattr(log, name)[span] for span in spans]))
    assert lengths.tolist() == [span.stop - span.start for span in spans]
    np.testing.assert_array_equal(source[int(indices[0])]["item"], log.item[spans[0]])


@pytest.fixture
def prepared(tmp_path):
    log = EventLog(
        np.array([0, 2, 5]),
        *(np.arange(5, dtype=kind) for kind in (np.int32, np.int16, np.int64)),
        np.zeros((5, 0), np.int16),
    )
    names = np.array(list("abcde"))
    dataset = Dataset(
        ItemTable(("s",), np.array([0, 5]), names, names, names), log, np.array(["p", "q"]), tuple("01234")
    )
    write_dataset(dataset, tmp_path / "prepared", 2)
    return tmp_path / "prepared"


@pytest.mark.parametrize("file", ["meta.json", "items.parquet", "users.parquet", "events-00001-of-00002.array_record"])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_folder_that_is_not_whole_is_refused(prepared, file, keep):
    data = (prepared / file).read_bytes()
    (prepared / file).unlink()
    if keep:
        (prepared / file).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=file):
        load_dataset(prepared)
    with pytest.raises(InputError, match=file):
        open_source(prepared)


def damages(data: bytes, rng) -> list[bytes]:
    """What disks and copies do: a flipped bit, a block of zeros, two blocks in each other's place, another end."""
    at, size = int(rng.integers(len(data))), int(rng.integers(4, 64))
    flipped = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    zeros = (data[:at] + bytes(size) + data[at + size :])[: len(data)]
    moved = data[at:] + data[:at]
    found = [flipped, zeros, moved, data[:-size] + bytes(size), data + bytes(size), data[:at], b"", bytes(len(data))]
    return [other for other in found if other != data]


@pytest.mark.parametrize("file", ["meta.json", "items.parquet", "users.parquet", "events-00000-of-00002.array_record"])
def test_damage_is_found_wherever_it_is_and_told_in_one_line(prepared, file):
    data, rng = (prepared / file).read_bytes(), np.random.default_rng(0)
    for damaged in [other for _ in range(12) for other in damages(data, rng)]:
        (prepared / file).write_bytes(damaged)
        for opened in (load_dataset, open_source):
            with pytest.raises(InputError) as error:
                opened(prepared)
            assert str(error.value).startswith(f"{prepared / file}: ")
            assert "\n" not in str(error.value)
    (prepared / file).write_bytes(data)
    assert load_dataset(prepared).log.n_events == 5


def test_files_are_read_for_their_checksums_once(prepared, monkeypatch):
    load_dataset(prepared)
    monkeypatch.setattr("moerec.data.prepare.checksums.compute_crc32", None)
    load_dataset(prepared)
    assert len(open_source(prepared)) == 2


@pytest.mark.parametrize("name", ["../prepared/items.parquet", "/dev/null", "", "a/b"])
def test_a_description_names_files_of_the_folder_alone(prepared, name):
    meta = Meta.load(prepared)
    (prepared / "meta.json").write_text(
        dataclasses.replace(meta, shards=({**meta.shards[0], "file": name}, meta.shards[1])).to_json()
    )
    with pytest.raises(InputError, match=r"meta\.json: .* is no name of a file in the folder"):
        load_dataset(prepared)


@pytest.mark.parametrize(
    ("n_bytes", "file"),
    [(100_000, r"events-00000-of-00002\.array_record"), (800_000, r"items\.parquet"), (2_500_000, r"users\.parquet")],
)
def test_a_full_disk_leaves_the_old_folder_and_is_told_in_one_line(prepared, n_bytes, file):
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    n, rng = 50_000, np.random.default_rng(0)
    log = EventLog(np.array([0, n // 2, n]), *(np.zeros(n, kind) for kind in (np.int32, np.int16, np.int64)),
                   np.zeros((n, 0), np.int16))  # fmt: skip
    ids, users = (np.array([rng.bytes(size).hex() for _ in range(k)]) for k, size in ((1000, 300), (2, 1_500_000)))
    dataset = Dataset(ItemTable(("s",), np.array([0, len(ids)]), ids, ids, ids), log, users)
    message = rf"/{file}: cannot be written: .*File too large"
    with pytest.raises(WorkError, match=message) as error, file_size_limit(n_bytes):
        write_dataset(dataset, prepared, 2)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    assert [path.name for path in prepared.parent.iterdir()] == ["prepared"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_replaced(prepared, tmp_path, there):
    target = prepared if there else tmp_path / "new"
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to(f"../{target.name}")
    (link.parent / f"link.replaced-{2**22 + 1}").symlink_to(prepared)  # an earlier version moved its link aside
    (target.parent / f"{target.name}.replaced-{2**22 + 1}").symlink_to(prepared)
    for _ in range(2):
        with replace_folder(link) as partial:
            (partial / "meta.json").write_text("new")
    assert os.readlink(link) == f"../{target.name}"
    assert [path.name for path in target.iterdir()] == ["meta.json"]
    assert not list(tmp_path.glob("*-*"))


def test_a_name_with_wildcards_is_a_name(tmp_path):
    (tmp_path / f"other.partial-{2**22 + 1}").mkdir()
    for name in ("*", "a[1]", "50% #1? a|b"):
        (tmp_path / f"{name}.partial-{2**22 + 1}").mkdir()
        with replace_folder(tmp_path / name) as partial:
            (partial / "meta.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "*", "50% #1? a|b", "a[1]", f"other.partial-{2**22 + 1}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"format_version": 99}, {"n_users": 3}, {"n_events": 4}, {"n_items": 4}, {"shards": None}]
)
def test_a_description_that_does_not_fit_is_refused(prepared, change):
    meta = json.loads((prepared / "meta.json").read_text()) | change
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"meta\.json"):
        load_dataset(prepared)


def test_a_failed_run_leaves_the_old_folder_and_no_other(prepared):
    before = sorted(path.read_bytes() for path in prepared.iterdir())
    with pytest.raises(ZeroDivisionError), replace_folder(prepared) as partial:
        (partial / "meta.json").write_bytes(1 / 0)
    assert [path.name for path in prepared.parent.iterdir()] == ["prepared"]
    assert sorted(path.read_bytes() for path in prepared.iterdir()) == before


def test_only_a_prepared_or_empty_folder_is_replaced(prepared, tmp_path):
    for name in ("papers", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "papers/thesis.txt").write_text("years of work")
    (tmp_path / "a_file").write_text("x")
    for name in ("papers", "a_file"):
        with (
            pytest.raises(InputError, match=f"{name}: exists and is not a prepared folder"),
            replace_folder(tmp_path / name),
        ):
            pass
    for name in ("empty", "prepared", "new/deeper"):
        with replace_folder(tmp_path / name) as partial:
            (partial / "meta.json").write_text("new")
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == ["new"]
    assert (tmp_path / "papers/thesis.txt").exists()


def test_what_dead_runs_left_is_removed_and_what_they_moved_aside_comes_back(prepared, tmp_path):
    alive, dead = os.getppid(), 2**22 + 1  # no process has such an id
    for pid in (alive, dead):
        (tmp_path / f"prepared.partial-{pid}").mkdir()
    prepared.rename(tmp_path / f"prepared.replaced-{dead}")
    with pytest.raises(RuntimeError), replace_folder(prepared):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", f"prepared.partial-{alive}"]
    assert load_dataset(prepared).log.n_events == 5


@pytest.mark.parametrize("name", ["../up", "~", "gs:", "file:", "50% %41", "a?b#c", "a|b", "[0:1]", "a@2", "*", " é\n"])
def test_a_folder_may_be_called_anything(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dataset = make_dataset([2, 3])
    write_dataset(dataset, Path(name), 2)
    assert_same(load_dataset(Path(name)), dataset)
    events, lengths = read_users(open_source(Path(name)), [1])
    assert lengths.tolist() == [3]
    assert events["item"].tolist() == dataset.log.item[2:].tolist()


def test_a_folder_whose_name_is_no_utf8_is_told(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    for call in (lambda: write_dataset(make_dataset([2]), path, 1), lambda: load_dataset(path)):
        with pytest.raises(InputError, match="the name of this folder must be UTF-8"):
            call()
    assert not list(tmp_path.iterdir())
