"""Data of a run: the same events under new item numbers, from wherever they come, and prepared once."""

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter

import numpy as np
import pytest

from moerec.config import CityConfig, DataConfig, SchemaConfig, SplitConfig, TablesConfig
from moerec.data import city
from moerec.data.dataset import Dataset
from moerec.data.load import RunData, load_data, make_reader, reload_data
from moerec.data.pipeline.events import MemoryReader, PackedStream, ShardReader, StreamOptions
from moerec.data.prepare.shards import load_dataset
from moerec.data.splits import TEST, TRAIN, VALID
from moerec.data.text.item_tokens import ITEM_TOKENS
from moerec.errors import InputError
from moerec.tasks.base import render_targets
from moerec.tasks.next_event import NextEvent
from tests.small_model import target_of

CITY = CityConfig(n_users=15, events_per_user=9, items_per_service=20)

INTERACTIONS = """\
user\tservice\titem\ttime
u1\tfood\ta\t10
u1\tfood\tb\t20
u1\tbooks\ta\t30
u1\tbooks\tc\t40
u2\tfood\tb\t5
u2\tbooks\tc\t7
u2\tfood\tc\t7
u2\tfood\ta\t7
u3\tbooks\ta\t1
"""
ITEMS = """\
item_id\tservice\ttitle\tbrand
a\tfood\tGreen tea\tacme
b\tfood\tBlack tea\tacme
c\tfood\tBlack bread\tzeta
d\tfood\tNever bought\tzeta
a\tbooks\tBlack book\tpress
c\tbooks\tGreen book\tpress
"""


def write_tables(folder):
    folder.mkdir()
    (folder / "interactions.tsv").write_text(INTERACTIONS)
    (folder / "items.tsv").write_text(ITEMS)


def table_config(folder, **more) -> DataConfig:
    return DataConfig(
        source="tables",
        tables=TablesConfig(str(folder), "interactions.tsv", items="items.tsv"),
        schema=SchemaConfig(service="service", time="time", item_id="item_id", item_service="service", text=("title",)),
        **more,
    )


def named_events(dataset: Dataset) -> dict[str, list[tuple]]:
    """User -> their events in words."""
    catalogue, log = dataset.catalogue, dataset.log
    events = [
        (catalogue.services[catalogue.service[i]], str(catalogue.ids[i]), int(a), int(t), int(o), *c.tolist())
        for i, a, t, o, c in zip(log.item, log.action, log.time_us, log.utc_offset, log.context, strict=True)
    ]
    return {
        str(user): events[lo:hi] for user, lo, hi in zip(dataset.users, log.offsets[:-1], log.offsets[1:], strict=True)
    }


def described_items(dataset: Dataset) -> set[tuple]:
    catalogue = dataset.catalogue
    columns = (x.tolist() for x in (catalogue.service, catalogue.ids, catalogue.text, catalogue.attributes))
    return {(catalogue.services[z], *x) for z, *x in zip(*columns, strict=True)}


def assert_same_data(a: RunData, b: RunData):
    np.testing.assert_array_equal(a.dataset.catalogue.ids, b.dataset.catalogue.ids)
    assert named_events(a.dataset) == named_events(b.dataset)
    np.testing.assert_array_equal(a.split_ids, b.split_ids)
    np.testing.assert_array_equal(a.tokens.ids, b.tokens.ids)
    assert a.item_tokens.digest == b.item_tokens.digest


@pytest.fixture(scope="module")
def plain_city():
    return city.generate(CITY, 3)[0]


def test_city_is_the_generated_world_under_new_numbers(plain_city, tmp_path):
    data = load_data(DataConfig(city=CITY, seed=3), tmp_path)
    assert named_events(data.dataset) == named_events(plain_city)
    assert described_items(data.dataset) == described_items(plain_city)
    assert len(described_items(plain_city)) == plain_city.catalogue.n_items
    np.testing.assert_array_equal(data.dataset.catalogue.offsets, plain_city.catalogue.offsets)
    assert (data.dataset.catalogue.ids != plain_city.catalogue.ids).mean() > 0.5, "not permuted"
    assert data.world is not None
    np.testing.assert_array_equal(data.world.catalogue.ids, plain_city.catalogue.ids)
    assert not list(tmp_path.iterdir()), "memory needs no files"
    random = load_data(DataConfig(city=dataclasses.replace(CITY, random_services=True), seed=3), tmp_path)
    assert random.world is None, "the oracle would know the services"
    assert sorted(random.dataset.catalogue.ids) == sorted(plain_city.catalogue.ids)
    assert named_events(random.dataset) != named_events(plain_city)


def test_the_digest_is_that_of_seconds_where_all_are_whole_and_of_microseconds_elsewhere(tmp_path):
    """Directories of earlier runs stay readable, and times that differ within a second are other data."""
    data = load_data(DataConfig(city=CITY, seed=3), tmp_path)
    log, catalogue, found = data.dataset.log, data.dataset.catalogue, hashlib.sha256()
    codes, _ = data.dataset.profile_codes
    time = np.array([t // 10**6 for t in log.time_us.tolist()], np.int64)
    for array in (log.offsets, log.item, log.action, time, log.context, data.split_ids, catalogue.offsets):
        found.update(np.ascontiguousarray(array).tobytes())
    found.update(data.tokens.ids.tobytes() + codes.tobytes())
    found.update("\0".join(catalogue.services).encode() + "\0".join(catalogue.ids.tolist()).encode())
    assert data.digest == found.hexdigest()
    digests = {data.digest}
    for micros in (1, 2):
        time_us = log.time_us.copy()
        time_us[5] += micros
        moved = dataclasses.replace(data.dataset, log=dataclasses.replace(log, time_us=time_us))
        digests.add(dataclasses.replace(data, dataset=moved).digest)
    assert len(digests) == 3


def test_the_seed_decides(tmp_path):
    first, again, other = (load_data(DataConfig(city=CITY, seed=seed), tmp_path) for seed in (3, 3, 4))
    assert_same_data(first, again)
    assert (first.dataset.catalogue.ids != other.dataset.catalogue.ids).any()
    assert named_events(first.dataset) != named_events(other.dataset)


def test_city_from_shards_trains_on_the_same_events(tmp_path):
    memory, shards = (load_data(DataConfig(city=CITY, seed=3, reader=x), tmp_path / x) for x in ("memory", "shards"))
    assert_same_data(memory, shards)
    from_memory = make_reader(DataConfig(city=CITY, seed=3), memory)
    from_shards = make_reader(DataConfig(city=CITY, seed=3, reader="shards"), shards)
    assert isinstance(from_memory, MemoryReader)
    assert isinstance(from_shards, ShardReader)
    users = np.arange(15)[::-1]
    logs = [reader.fetch(users) for reader in (from_memory, from_shards)]
    for k, user in enumerate(users):
        n = from_memory.lengths[user]
        assert n == from_shards.lengths[user]
        for name in ("item", "action", "time_us", "context", "utc_offset"):
            x, y = (getattr(log, name)[start[k] : start[k] + n] for log, start in logs)
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_the_catalogue_counts_training_events(tmp_path):
    data = load_data(DataConfig(city=CITY, seed=3), tmp_path)
    count = Counter(
        int(item) for item, role in zip(data.dataset.log.item, data.split_ids, strict=True) if role == TRAIN
    )
    table = data.catalog
    assert data.catalog is table, "counted anew"
    assert (table.vector_ID, table.bias_I) == (None, None)
    assert table.count_I.tolist() == [count[i] for i in range(60)]
    assert table.service_I.tolist() == [z for z in range(3) for _ in range(20)]
    assert table.token_IW is data.tokens.ids
    for user, events in zip(range(15), named_events(data.dataset).values(), strict=True):
        lo = data.dataset.log.offsets[user]
        assert data.split_ids[lo : lo + len(events)].tolist() == [TRAIN] * (len(events) - 2) + [VALID, TEST]


def test_tables(tmp_path):
    write_tables(tmp_path / "tables")
    data = load_data(table_config(tmp_path / "tables", item_tokens="words"), tmp_path / "run")
    assert data.world is None
    assert data.folder == tmp_path / "run" / "data"
    events = {p: [(*e[:2], e[3] // 10**6) for e in x] for p, x in named_events(data.dataset).items()}
    assert events == {
        "u1": [("food", "a", 10), ("food", "b", 20), ("books", "a", 30), ("books", "c", 40)],
        "u2": [("food", "b", 5), ("books", "c", 7), ("food", "c", 7), ("food", "a", 7)],
        "u3": [("books", "a", 1)],
    }
    assert {x[:3] for x in described_items(data.dataset)} == {
        (service, item, title) for item, service, title, _ in (row.split("\t") for row in ITEMS.splitlines()[1:])
    }
    words = {w: k + 2 for k, w in enumerate(data.item_tokens.words)}
    assert set(words) == {"green", "tea", "black", "book"}
    for text, ids in zip(data.dataset.catalogue.text, data.tokens.ids, strict=True):
        assert ids.tolist()[:2] == [words.get(w, 1) for w in text.lower().split()]


@pytest.mark.parametrize("kind", ["subwords", "words"])
def test_a_run_encodes_its_items_by_the_vocabulary_that_it_keeps(tmp_path, kind):
    """And refuses another one, or none; other vocabularies are other data."""
    config = DataConfig(city=CITY, seed=3, item_tokens=kind)
    data, path = load_data(config, tmp_path), tmp_path / ITEM_TOKENS
    data.keep_item_tokens(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(data.digests))
    assert_same_data(reload_data(config, tmp_path), data)
    assert_same_data(load_data(config, tmp_path), data)
    kept = json.loads(path.read_text())
    for change in ({"attributes": kept["attributes"][::-1]}, {"attributes": [*kept["attributes"], "new=1"]}):
        path.write_text(json.dumps({**kept, **change}))
        for load in (load_data, reload_data):
            with pytest.raises(InputError, match=r"other data|is not the vocabulary"):
                load(config, tmp_path)
    path.unlink()
    for load in (load_data, reload_data):
        with pytest.raises(InputError, match=rf"{ITEM_TOKENS}: no such file; without it the items of this run"):
            load(config, tmp_path)
    others = {"item_tokens": "plain_words"}, {"max_tokens": 2}, {"max_attributes": 1}
    digests = {load_data(dataclasses.replace(config, **other), tmp_path / "other").digest for other in ({}, *others)}
    assert len(digests) == 4


def test_plain_words_are_kept_nowhere_and_their_digests_are_those_of_earlier_runs(tmp_path):
    data = load_data(DataConfig(city=CITY, seed=3, item_tokens="plain_words"), tmp_path)
    data.keep_item_tokens(tmp_path)
    assert not list(tmp_path.iterdir())
    assert set(data.digests) == {"sha256", "items_sha256"}


def test_neighbors_by_text_are_refused_where_no_texts_are(tmp_path):
    write_tables(tmp_path / "tables")
    config = table_config(tmp_path / "tables", text_neighbors=2)
    load_data(config, tmp_path / "run")
    config.schema.text = ()
    with pytest.raises(InputError, match=r"data\.text_neighbors: .*\(data\.schema\.text, attributes\)"):
        load_data(config, tmp_path / "other")


def test_a_second_load_reuses_the_prepared_folder(tmp_path):
    write_tables(tmp_path / "tables")
    config = table_config(tmp_path / "tables")
    first = load_data(config, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").iterdir()}
    second = load_data(config, tmp_path / "run")
    assert_same_data(first, second)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").iterdir()} == before
    prepared = load_data(dataclasses.replace(config, source="prepared", prepared=str(first.folder)), tmp_path / "other")
    assert_same_data(first, prepared)
    assert not (tmp_path / "other").exists()
    (tmp_path / "tables" / "interactions.tsv").unlink()  # what it was made from is gone, so it is not current
    with pytest.raises(InputError, match=r"interactions\.tsv"):
        load_data(config, tmp_path / "run")


def test_a_folder_made_from_other_tables_is_made_anew(tmp_path):
    write_tables(tmp_path / "tables")
    config = table_config(tmp_path / "tables")
    first = load_data(config, tmp_path / "run")
    lines = INTERACTIONS.splitlines(keepends=True)
    (tmp_path / "tables" / "interactions.tsv").write_text("".join(lines[:-1]))
    second = load_data(config, tmp_path / "run")
    assert second.dataset.log.n_events == first.dataset.log.n_events - 1


def test_where_a_run_is_other_tables_are_refused_and_nothing_is_touched(tmp_path):
    write_tables(tmp_path / "tables")
    config, run = table_config(tmp_path / "tables"), tmp_path / "run"
    first = load_data(config, run)
    interactions = tmp_path / "tables" / "interactions.tsv"
    os.utime(interactions, (1, 1))  # the same rows, from another file
    (run / "data.json").write_text(json.dumps({"sha256": first.digest}))
    assert_same_data(load_data(config, run), first)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    interactions.write_text("".join(INTERACTIONS.splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="holds a run on other data"):
        load_data(config, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_item_numbers_are_those_of_the_prepared_folders_items(tmp_path):
    write_tables(tmp_path / "tables")
    config = table_config(tmp_path / "tables", seed=2)
    data = load_data(config, tmp_path / "run")
    source, number = load_dataset(data.folder), data.item_number
    assert sorted(number.tolist()) == list(range(6))
    assert number.tolist() != list(range(6)), "not permuted"
    catalogue, stored = data.dataset.catalogue, source.catalogue
    for k, new in enumerate(number.tolist()):
        assert catalogue.service[new] == stored.service[k]
        assert (catalogue.ids[new], catalogue.text[new]) == (stored.ids[k], stored.text[k])
    assert data.dataset.log.item.tolist() == [number[i] for i in source.log.item]
    prepared = dataclasses.replace(config, source="prepared", prepared=str(data.folder))
    assert load_data(prepared, tmp_path / "other").item_number.tolist() == number.tolist()


def test_what_is_derived_from_the_data_is_made_once(tmp_path):
    data = load_data(DataConfig(city=CITY, seed=3), tmp_path)
    for owner, name in (
        (data, "digest"),
        (data, "catalog"),
        (data.dataset, "profile_codes"),
        (data.dataset.log, "user"),
    ):
        assert getattr(owner, name) is getattr(owner, name), name


def test_a_folder_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a prepared folder"):
        load_data(DataConfig(source="prepared", prepared=str(tmp_path / "nothing")), tmp_path)


def test_tables_from_shards_train_on_the_same_events(tmp_path):
    write_tables(tmp_path / "tables")
    config = table_config(tmp_path / "tables", n_shards=2)
    data = load_data(config, tmp_path / "run")
    readers = [make_reader(dataclasses.replace(config, reader=x), data) for x in ("memory", "shards")]
    assert isinstance(readers[1], ShardReader)
    log, start = readers[1].fetch(np.array([1, 0]))
    names = data.dataset.catalogue.ids
    assert [names[log.item[r : r + 2]].tolist() for r in start] == [["b", "c"], ["a", "b"]]
    memory, rows = readers[0].fetch(np.array([1, 0]))
    assert [names[memory.item[r : r + 2]].tolist() for r in rows] == [["b", "c"], ["a", "b"]]


def test_shuffled_ties_change_only_the_order_within_a_time(tmp_path):
    write_tables(tmp_path / "tables")
    published = load_data(table_config(tmp_path / "tables"), tmp_path / "run")
    orders = set()
    for seed in range(12):
        config = table_config(tmp_path / "tables", split=SplitConfig(shuffle_ties=True), seed=seed)
        data = load_data(config, tmp_path / "run")
        events, plain = named_events(data.dataset), named_events(published.dataset)
        assert events["u1"] == plain["u1"]
        assert events["u2"][0] == plain["u2"][0]
        assert sorted(events["u2"]) == sorted(plain["u2"])
        orders.add(tuple(event[:2] for event in events["u2"][1:]))
    assert len(orders) > 2


@pytest.mark.parametrize(
    ("first_event", "codes"), [(False, [5, 2, 5, 2, 2, 0, 5, 5]), (True, [1, 2, 5, 2, 2, 0, 5, 1])]
)
def test_context_values_of_held_out_events_alone_are_unseen(tmp_path, first_event, codes):
    """The last two events of a user are held out. Of the others the first is a request only to a control slot: without
    it nothing predicts it.
    """
    (tmp_path / "tables").mkdir()
    sky = {"u": ["fog", "sun", "rain", "sun"], "v": ["sun", "", "hail", "fog"]}
    rows = [f"{user}\t{'ab'[k % 2]}\t{k}\t{value}" for user, values in sky.items() for k, value in enumerate(values)]
    lines = ["user\titem\ttime\tsky", *rows]
    (tmp_path / "tables" / "interactions.tsv").write_text("\n".join(lines) + "\n")
    config = DataConfig(
        source="tables",
        tables=TablesConfig(str(tmp_path / "tables"), "interactions.tsv"),
        schema=SchemaConfig(time="time", context=("sky",)),
        first_event=first_event,
    )
    for reader in ("memory", "shards"):
        own = dataclasses.replace(config, reader=reader)
        data = load_data(own, tmp_path / "run")
        assert data.dataset.context == {"sky": ("fog", "sun", "rain", "hail")}
        assert data.dataset.log.context[:, 0].tolist() == codes
        options = StreamOptions(1, 16, 8, 0, first_event)
        render = functools.partial(render_targets, [NextEvent()])
        batch = next(iter(PackedStream(make_reader(own, data), data.dataset.catalogue, render, options)))
        asked = batch.request.context_BTC[target_of(batch).weight_BT > 0]
        assert set(asked.ravel().tolist()) == ({0, 1, 2} if first_event else {0, 2})
