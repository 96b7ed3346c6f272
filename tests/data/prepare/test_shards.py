"""A prepared folder gives back exactly the data set that was written, and never reads as whole when it is not."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog, ItemTable
from moerec.data.prepare.shards import Meta, load_dataset, open_source, read_users, replace_folder, write_dataset
from moerec.errors import InputError

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
    if not file.endswith(".parquet"):
        with pytest.raises(InputError, match=file):
            open_source(prepared)


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
