"""New tables for a trained run: what is new is answered as it would be by hand, and all else stays as it was."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import observe, recommend
from moerec.config import AskConfig, PersonalConfig, cli
from moerec.data.neighbors import find_text_neighbors, load_neighbors
from moerec.data.neighbors.table import NEIGHBOR_FILES
from moerec.errors import InputError
from moerec.serve.new_data import extend_run
from moerec.serve.recommender import Recommender, UserEvent, UserHistory
from tests.small_model import fill
from tests.tiny import make_config, make_untrained, replace_parts

TIME = "2031-05-01T20:00"  # after all events
HEADER = "user,item,service,time,weather\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = make_config()
    data = dataclasses.replace(config.data, text_neighbors=4, transition_neighbors=5)
    personal = PersonalConfig(layers=(1,), n_aspects=2, n_scales=1, d_memory=4)
    asked = dataclasses.replace(
        config.model, ask=AskConfig(from_layer=1, d_analyser=8), personal=personal, pointer="all", text_pointer=True,
        transition_pointer=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    run = make_untrained(folder, dataclasses.replace(config, data=data, model=asked), lambda x: fill(x, stddev=0.3))
    return replace_parts(run, metrics={})


@pytest.fixture(scope="module")
def known(run):
    """A user of the run, and two items of it as a table names them."""
    catalogue = run.data.dataset.catalogue
    items = [(catalogue.services[catalogue.service[i]], str(catalogue.ids[i])) for i in (3, 40)]
    return str(run.data.dataset.users[7]), items


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_events(folder, known):
    user, ((service, item), (other, another)) = known
    return write(
        folder / "new.csv",
        HEADER
        + f"{user},{item},{service},2031-04-01T10:00:00,rain\n"
        + f"somebody,{another},{other},2031-04-01T10:00:00,\n"
        + f"somebody,brand-new,{other},2031-04-02T10:00:00,hail\n"
        + "somebody,x,elsewhere,2031-04-02T11:00:00,\n",
    )


def write_items(folder):
    rows = "kuper,tea-1,Чай «Заря» / Tea Zarya, family pack,tea family\n".replace(" / Tea Zarya,", " / Tea Zarya")
    return write(folder / "items.csv", "service,item,text,attributes\n" + rows + "nowhere,y,Something,\n")


def test_events_since_training_are_history(run, known, tmp_path):
    user, ((service, item), _) = known
    extended, added = extend_run(run, interactions=write_events(tmp_path, known))
    assert (added.events, added.users, added.items, added.undescribed) == (3, 1, 1, 1)
    assert added.left_out == {"events of services that the run does not have (elsewhere 1)": 1}
    assert "left out: 1 event of services that the run does not have (elsewhere 1)" in added.describe()
    assert added.unseen == {"weather": ("hail",)}
    assert len(extended.data.dataset.log.item) == len(run.data.dataset.log.item) + 3
    # The same history, given by hand to the run as it was.
    log, dataset = run.data.dataset.log, run.data.dataset
    events = []
    for row in range(*log.offsets[7:9]):
        i = log.item[row]
        codes = zip(dataset.context.items(), log.context[row].tolist(), strict=True)
        context = {name: values[code - 1] for (name, values), code in codes if 0 < code <= len(values)}
        of_item = str(dataset.catalogue.ids[i]), dataset.catalogue.services[dataset.catalogue.service[i]]
        events.append(UserEvent(*of_item, int(log.time_us[row]) / 1e6, context=context))
    events.append(UserEvent(item, service, "2031-04-01T10:00:00", context={"weather": "rain"}))
    fields = {name: str(values[7]) for name, values in dataset.profile.items() if values[7]}
    by_hand = Recommender(run).recommend(histories=[UserHistory(events, fields)], time=TIME, k=8).to_table()
    one_item_more = extended.data.dataset.catalogue.n_items
    assert one_item_more == dataset.catalogue.n_items + 1
    found = Recommender(extended).recommend([user], time=TIME, k=9).to_table().to_pylist()
    old = [row for row in found if row["item"] != "brand-new"][:8]
    assert [row["item"] for row in old] == by_hand["item"].to_pylist()
    # The new item takes its share of all others of its service, and of no others.
    ratio = {row["item"]: row["p"] / p for row, p in zip(old, by_hand["p"].to_pylist(), strict=True)}
    of_other = [ratio[row["item"]] for row in old if row["service"] != known[1][1][0]]
    np.testing.assert_allclose(of_other, 1, rtol=1e-4)


def test_what_is_left_out_is_named_the_most_frequent_first(run, tmp_path):
    rows = [f"u,x{k},{service},2031-04-01T10:00:00,\n" for k, service in enumerate(("a", *"bb", "c", *"ddd", "f"))]
    _, added = extend_run(run, interactions=write(tmp_path / "new.csv", HEADER + "".join(rows)))
    told = "left out: 8 events of services that the run does not have (d 3, b 2, a 1 and 2 more)"
    assert told in added.describe()


def test_a_new_item_has_what_its_text_and_service_say(run, tmp_path):
    extended, added = extend_run(run, items=write_items(tmp_path))
    assert (added.items, added.undescribed, added.events) == (1, 0, 0)
    assert any(
        "left out: 1 item of services that the run does not have (nowhere 1)" in line for line in added.describe()
    )
    catalogue, model = extended.data.dataset.catalogue, extended.predictor.params
    (new,) = np.flatnonzero(catalogue.ids == "tea-1")
    assert catalogue.services[catalogue.service[new]] == "kuper"
    assert catalogue.attributes[new] == "tea family"
    tokens = run.data.item_tokens.encode([catalogue.text[new]], ["tea family"])
    encoder, head = run.predictor.params.item_encoder, run.predictor.params.head
    by_hand = encoder.no_row_D[...] + encoder.text(tokens)[0]
    np.testing.assert_allclose(extended.catalog.vector_ID[new], by_hand, atol=1e-5)
    kuper = catalogue.services.index("kuper")
    np.testing.assert_allclose(extended.catalog.bias_I[new], head.no_row_bias_Z[...][kuper], rtol=1e-6)
    old = np.setdiff1d(np.arange(catalogue.n_items), [new])
    np.testing.assert_array_equal(catalogue.ids[old], run.data.dataset.catalogue.ids)
    np.testing.assert_allclose(extended.catalog.vector_ID[old], run.catalog.vector_ID, atol=1e-6)
    np.testing.assert_array_equal(extended.catalog.count_I[old], run.catalog.count_I)
    assert model.service_offsets == tuple(catalogue.offsets.tolist())
    shapes = [leaf.shape for leaf in jax.tree.leaves(run.predictor.params.profile)]
    assert [leaf.shape for leaf in jax.tree.leaves(model.profile)] == shapes


def test_neighbors_of_new_items_are_those_of_a_table_made_of_all(run, tmp_path):
    extended, _ = extend_run(run, items=write_items(tmp_path))
    catalogue = extended.data.dataset.catalogue
    counts = load_neighbors(run.folder / NEIGHBOR_FILES["text"]).counts
    by_hand = find_text_neighbors(catalogue, 4, counts)
    np.testing.assert_array_equal(extended.data.neighbors["text"].item_IX, by_hand.item_IX)
    (new,) = np.flatnonzero(catalogue.ids == "tea-1")
    assert (extended.data.neighbors["transitions"].item_IX[new] == -1).all()
    old = np.setdiff1d(np.arange(catalogue.n_items), [new])
    here = extended.data.neighbors["transitions"].item_IX[old]
    there = run.data.neighbors["transitions"].item_IX
    names = np.append(run.data.dataset.catalogue.ids, "none")
    np.testing.assert_array_equal(np.append(catalogue.ids, "none")[here], names[there])


def test_a_user_without_events_is_answered_by_the_fields_of_the_user_table(run, tmp_path):
    name, values = next(iter(run.data.dataset.profile.items()))
    value = next(x for x in values.tolist() if x)
    columns = [name, *(other for other in run.data.dataset.profile if other != name)]
    table = write(tmp_path / "users.csv", f"user,{','.join(columns)}\nnobody,{value}" + "," * (len(columns) - 1) + "\n")
    extended, added = extend_run(run, users=table)
    assert (added.users, added.events) == (1, 0)
    known = Recommender(extended).recommend(["nobody"], time=TIME)
    by_hand = Recommender(run).recommend(histories=[UserHistory((), {name: value})], time=TIME)
    np.testing.assert_array_equal(known.item, by_hand.item)
    np.testing.assert_array_equal(known.log_p, by_hand.log_p)
    np.testing.assert_array_equal(extended.data.dataset.profile_codes[0][:60], run.data.dataset.profile_codes[0])


def test_events_that_the_run_has_count_once(run, tmp_path):
    dataset, log = run.data.dataset, run.data.dataset.log
    lines = []
    for row in range(*log.offsets[4:6]):
        i = log.item[row]
        time = np.datetime64(int(log.time_us[row]), "us")
        service = dataset.catalogue.services[dataset.catalogue.service[i]]
        lines.append(f"{dataset.users[4]},{dataset.catalogue.ids[i]},{service},{time},\n")
    path = write(tmp_path / "again.csv", HEADER + "".join(lines))
    extended, added = extend_run(run, interactions=path)
    assert (added.events, added.known_events) == (0, len(lines))
    np.testing.assert_array_equal(extended.data.dataset.log.item, log.item)
    np.testing.assert_array_equal(extended.data.dataset.log.offsets, log.offsets)


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"interactions": "user,item\n"}, "column service: no such column"),
        ({"interactions": "user,item,service,time\na,b,kuper,soon\n"}, "new.csv, row 1, column time"),
        ({"items": "service,item\n"}, "column text: no such column"),
        ({"interactions": None}, "there is no"),
    ],
)
def test_bad_tables_are_named_by_file_row_and_column(run, tmp_path, tables, told):
    ((kind, text),) = tables.items()
    path = tmp_path / "new.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=told):
        extend_run(run, **{kind: path})


def test_a_table_without_rows_adds_nothing(run, tmp_path):
    """There are days without news."""
    for kind, text in (("interactions", HEADER), ("items", "service,item,text,attributes\n"), ("users", "user,x\n")):
        extended, added = extend_run(run, **{kind: write(tmp_path / f"{kind}.csv", text)})
        assert (added.events, added.items, added.users) == (0, 0, 0)
        assert extended.data.dataset.log.n_events == run.data.dataset.log.n_events


def test_times_that_are_far_off_are_told(run, known, tmp_path):
    user, ((service, item), _) = known
    path = write(tmp_path / "new.csv", HEADER + f"{user},{item},{service},5138-11-16T09:46:39,rain\n")
    _, added = extend_run(run, interactions=path)
    assert any("far-off times" in line for line in added.describe())


def test_the_commands_take_new_tables(run, known, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moerec.serve.new_data.extend.load_run", lambda _: run)
    flags = [f"--interactions={write_events(tmp_path, known)}", f"--items={write_items(tmp_path)}", "--workdir=x"]
    asked = [*flags, "--user=somebody", f"--user={known[0]}", f"--time={TIME}", "--json"]
    assert cli.execute(recommend.main, ["test", *asked], None, recommend.FLAGS, config_type=None) == 0
    printed = capsys.readouterr()
    assert "new: 1 user, 3 events, 2 items" in printed.err
    assert "somebody: 2 events before the request; the last of them (UTC):" in printed.out
    first, second = json.loads(printed.out.splitlines()[-1])["users"]
    assert (first["user"], second["user"]) == ("somebody", known[0])
    assert [event["id"] for event in first["history"]["events"]] == [known[1][1][1], "brand-new"]
    assert first["history"]["events"][0]["time"] == "2031-04-01T10:00:00"
    assert any(name.startswith("aspect 0 (") for name in first["relevance"])
    store = ["--recent=0", f"--profiles={tmp_path / 'store'}", "--json"]
    assert cli.execute(observe.main, ["test", *flags, *store], None, observe.FLAGS, config_type=None) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["n_events"] == run.data.dataset.log.n_events + 3
    assert found["n_stored"] == 61
