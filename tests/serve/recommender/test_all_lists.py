"""Everybody's lists in a file: the same whether or not the work was interrupted."""

import dataclasses
import json

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from experiments import recommend_all as command
from moerec.config import SchemaConfig, cli
from moerec.errors import InputError
from moerec.serve.recommender import ListOptions, Recommender, all_lists, read_exclusions, read_users, recommend_all
from moerec.serve.recommender.batched import Recommender as Batched
from tests.tiny import make_config, make_untrained, replace_parts

OPTIONS = ListOptions(k=3, time="2024-05-01T20:00")


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text("{}")
    return Recommender(replace_parts(make_untrained(folder, make_config()), metrics={"best_step": 1}))


@pytest.fixture
def users(recommender):
    return recommender.run.data.dataset.users.tolist()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(all_lists, "PART", 16)


def test_an_interrupted_call_goes_on_and_gives_the_same_file(recommender, users, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.parquet", tmp_path / "lists.parquet"
    done = recommend_all(recommender, users, whole, OPTIONS)
    assert (done.n_users, done.n_rows, done.n_resumed) == (60, 180, 0)
    calls = []
    original = Batched.recommend

    def fail_at_third(self, own, **options):
        calls.append(len(own))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, own, **options)

    monkeypatch.setattr(Batched, "recommend", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        recommend_all(recommender, users, out, OPTIONS)
    assert not out.exists()
    done = recommend_all(recommender, users, out, OPTIONS)
    assert (done.n_resumed, calls) == (32, [16, 16, 16, 16, 12])
    assert pq.read_table(out).equals(pq.read_table(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists.parquet", "whole.parquet"]


def test_parts_of_other_options_are_not_taken(recommender, users, tmp_path, monkeypatch):
    out = tmp_path / "lists.csv"
    monkeypatch.setattr(all_lists, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recommend_all(recommender, users, out, OPTIONS)
    monkeypatch.undo()
    done = recommend_all(recommender, users, out, OPTIONS._replace(services=("kuper",)))
    assert done.n_resumed == 0
    assert set(pyarrow.csv.read_csv(out)["service"].to_pylist()) == {"kuper"}


def test_rows_are_the_lists_of_the_library(recommender, users, tmp_path):
    recommend_all(recommender, users[::-1], tmp_path / "lists.parquet", OPTIONS)
    found = pq.read_table(tmp_path / "lists.parquet")
    assert found["user"].to_pylist() == [user for user in users[::-1] for _ in range(3)]
    direct = recommender.recommend(users[::-1], time=OPTIONS.time, k=3)
    np.testing.assert_allclose(found["p"].to_numpy(), np.exp(direct.log_p).ravel(), rtol=1e-6)


def test_the_command_takes_users_and_exclusions_from_files(recommender, users, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moerec.serve.new_data.extend.load_run", lambda _: recommender.run)
    names, banned, out = tmp_path / "users.txt", tmp_path / "banned.csv", tmp_path / "lists.parquet"
    names.write_text("\n".join(users[5:9]) + "\n")
    best = recommender.recommend(users[5:6], k=1).to_table().to_pylist()[0]
    banned.write_text(f"service,item\n{best['service']},{best['item']}\n")
    flags = [f"--out={out}", f"--users={names}", f"--exclude={banned}", "--k=2", "--json", "--workdir=x"]
    assert cli.execute(command.main, ["test", *flags], None, command.FLAGS, config_type=None) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_rows"] == 8
    rows = pq.read_table(out).to_pylist()
    assert {row["user"] for row in rows} == set(users[5:9])
    assert best["item"] not in {row["item"] for row in rows}


@pytest.mark.parametrize(
    ("content", "told"), [("", "names nobody"), ("a\nb\na\n", "row 3: 'a' is there twice"), (None, "there is no file")]
)
def test_bad_files_of_users_are_named(tmp_path, content, told):
    path = tmp_path / "users.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=told):
        read_users(path)


def test_a_call_that_is_refused_leaves_the_parts_alone(recommender, users, tmp_path, monkeypatch):
    out, written = tmp_path / "lists.csv", []
    original = all_lists._write_part

    def fail_at_third(path, table):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        original(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(all_lists, "_write_part", fail_at_third)
        with pytest.raises(KeyboardInterrupt):
            recommend_all(recommender, users, out, OPTIONS)
    for wrong in ({"k": 0}, {"services": ("kupr",)}, {"time": "soon"}, {"exclude": (("kuper", "none"),)}):
        with pytest.raises(InputError):
            recommend_all(recommender, users, out, OPTIONS._replace(**wrong))
    assert all(path.is_file() for path in written)
    with pytest.raises(InputError):
        recommend_all(recommender, users, tmp_path / "other.csv", OPTIONS._replace(k=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists.csv.partial"]
    written[0].write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-000000\.parquet: is damaged"):
        recommend_all(recommender, users, out, OPTIONS)
    written[0].unlink()
    assert recommend_all(recommender, users, out, OPTIONS).n_resumed == 44


def test_parts_without_their_description_are_removed_and_strange_files_are_not(recommender, users, tmp_path):
    out, folder = tmp_path / "lists.csv", tmp_path / "lists.csv.partial"
    folder.mkdir()
    (folder / "part-000000.parquet").write_bytes(b"")
    assert recommend_all(recommender, users[:3], out, OPTIONS).n_resumed == 0
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        recommend_all(recommender, users[:3], out, OPTIONS)
    assert (folder / "notes.txt").is_file()


def test_nobody_to_answer_is_said_in_one_line(tmp_path):
    config = make_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, first_event=False))
    (tmp_path / "config.json").write_text("{}")
    asked = Recommender(replace_parts(make_untrained(tmp_path, config), metrics={}))
    users = asked.run.data.dataset.users.tolist()
    with pytest.raises(InputError, match="nobody has an event before the request"):
        recommend_all(asked, users, tmp_path / "lists.csv", OPTIONS._replace(time="1999-01-01"))
    assert not list(tmp_path.glob("lists*"))
    assert recommend_all(asked, users, tmp_path / "lists.csv", OPTIONS).n_left_out == 40


def test_exclusions_may_have_the_columns_of_the_tables(tmp_path):
    schema = SchemaConfig(service="shop", item="product", item_service="store", item_id="sku")
    path = tmp_path / "banned.csv"
    for header in ("service,item", "shop,product", "store,sku", "shop,sku"):
        path.write_text(f"{header}\na,01\n")
        assert read_exclusions(path, ("a", "b"), schema) == (("a", "01"),)
    path.write_text("sku\n01\n")
    assert read_exclusions(path, ("a",), schema) == (("a", "01"),)


def test_bad_exclusions_and_outputs_are_named(recommender, users, tmp_path):
    path = tmp_path / "banned.csv"
    path.write_text("id\n1\n")
    with pytest.raises(InputError, match="header, column service or shop: no such column; there are id"):
        read_exclusions(path, ("a", "b"), SchemaConfig(service="shop"))
    for out, told in ((tmp_path / "lists.txt", "ends neither in"), (tmp_path / "no" / "lists.csv", "is not there")):
        with pytest.raises(InputError, match=told):
            recommend_all(recommender, users, out, OPTIONS)
