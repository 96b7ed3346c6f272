"""The configuration that a run keeps: its format, and what of another version's file is read, named or refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from moerec.config import Config
from moerec.config.stored import FORMAT, list_differences, read_config, read_stored, store_config
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.files import to_plain
from moerec.serve.explained import recommend
from moerec.serve.request import RecommendRequest
from moerec.train.checkpoint import Checkpoints
from moerec.train.run_dir import load_run
from tests.tiny import make_config

NEW = {"item_tokens", "item_tokenizer", "max_attributes"}  # fields of data that format 1 did not have


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.json"


def change(path, **values) -> None:
    """Rewrites the file with other values; None deletes."""
    stored = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def test_a_configuration_is_read_back(path):
    config = make_config()
    config.optim.groups, config.train.init_from = ("head=0.5", "groups/*=frozen"), "runs/other"
    store_config(path, config)
    assert json.loads(path.read_text())["format"] == FORMAT
    assert read_config(path) == config
    assert read_stored(path) == to_plain(dataclasses.asdict(config))
    assert not list(list_differences(read_stored(path), to_plain(dataclasses.asdict(config)), "config"))


def test_a_file_without_a_format_is_of_earlier_runs_which_cannot_be_read(path):
    store_config(path, make_config())
    change(path, format=None)
    assert refusal(path) == "has no format number; runs from before format 1 cannot be read"
    path.write_text("{}")
    assert "has no format number" in refusal(path)
    for text in ("[]", "3", '"x"'):
        path.write_text(text)
        assert refusal(path) == "holds no JSON object"


def test_a_run_of_format_1_has_its_items_as_it_was_trained_on_them(path):
    """Its attributes stood behind the words, in the same slots; a file that says more than its format is believed."""
    config = make_config()
    store_config(path, config)
    stored = json.loads(path.read_text())
    data = {name: value for name, value in stored["data"].items() if name not in NEW}
    change(path, format=1, data=data)
    expected = dataclasses.replace(config, data=dataclasses.replace(config.data, item_tokens="plain_words"))
    assert read_config(path) == expected
    path.write_text(json.dumps({"format": 1}))
    assert read_config(path).data.item_tokens == "plain_words"
    change(path, data={"item_tokens": "words"})
    assert read_config(path).data.item_tokens == "words"
    change(path, data=3)
    assert "config.data: 3 is no group of fields" in refusal(path)


@pytest.mark.parametrize("number", [0, FORMAT + 1, "1", 1.5, True])
def test_another_format_is_refused_with_both_numbers(path, number):
    store_config(path, make_config())
    change(path, format=number)
    assert refusal(path) == f"is of format {number!r}, and this version reads 1 and {FORMAT}"


def test_a_missing_field_takes_its_default(path):
    config = make_config()
    store_config(path, config)
    values = json.loads(path.read_text())
    del values["seed"], values["audit"], values["train"]["steps"], values["model"]["moe"]["tile"]
    path.write_text(json.dumps(values))
    expected, defaults = make_config(), Config()
    expected.seed, expected.train.steps, expected.model.moe.tile = 0, defaults.train.steps, defaults.model.moe.tile
    assert read_config(path) == expected
    path.write_text(json.dumps({"format": FORMAT}))
    assert read_config(path) == Config()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"extra": 1}, "config.extra: no such field; the run is of another version"),
        ({"model": {"depth": 3}}, "config.model.depth: no such field"),
        ({"data": {"city": {"n_people": 3}}}, "config.data.city.n_people: no such field"),
        ({"model": 3}, "config.model: 3 is no group of fields"),
        ({"seed": "x"}, "config.seed: 'x' is not of type int"),
        ({"baselines": "markov"}, "config.baselines: 'markov' is not of type tuple[str, ...]; write (\"markov\",)"),
        ({"train": {"steps": "many"}}, "config.train.steps: 'many' is not of type int"),
        ({"model": {"dropout": 2.0}}, "config.model.dropout: must lie in"),
    ],
)
def test_what_is_not_known_or_of_another_type_is_named(path, values, words):
    store_config(path, make_config())
    change(path, **values)
    assert refusal(path).startswith(words)


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_nothing_and_no_number_are_no_values(path, value):
    store_config(path, make_config())
    path.write_text(re.sub(r'"seed": \d+', f'"seed": {value}', path.read_text()))
    assert ("config.seed: " if value == "null" else "is no JSON file (NaN is no JSON number)") in refusal(path)
    path.write_text(json.dumps({"format": FORMAT, "baselines": None}))
    assert refusal(path).startswith("config.baselines: None is not of type")


def test_what_is_no_json_and_what_is_not_there_is_told(path):
    assert "no such file" in refusal(path)
    path.write_text("{")
    assert "is no JSON file" in refusal(path)


def test_a_run_of_an_older_field_set_goes_on_and_answers(tmp_path, monkeypatch):
    """Interrupted, and begun when some fields were not there yet: it ends as the same run does undisturbed."""
    config = make_config(steps=4, eval_every=2, save_every=2)
    config.baselines = ()
    whole = run_experiment(config, tmp_path / "whole")
    save_last = Checkpoints.save_last

    def save_and_fail(self, step, state, progress):
        save_last(self, step, state, progress)
        self.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_last", save_and_fail)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, tmp_path / "parts")
    monkeypatch.setattr(Checkpoints, "save_last", save_last)
    stored = tmp_path / "parts" / "config.json"
    values = json.loads(stored.read_text())
    del values["tasks"], values["audit"], values["optim"]["groups"], values["data"]["first_event"]
    for name in [name for name in values["train"] if name.startswith("init_")]:
        del values["train"][name]
    stored.write_text(json.dumps(values))
    found = run_experiment(config, tmp_path / "parts")
    assert (found["steps"], found["test"], found["valid"]) == (4, whole["test"], whole["valid"])
    del values["model"]["group_starts"]
    stored.write_text(json.dumps(values))
    opened, other = load_run(tmp_path / "parts"), load_run(tmp_path / "whole")
    assert opened.config == config
    for one, two in zip(*(jax.tree.leaves(x.predictor) for x in (opened, other)), strict=True):
        np.testing.assert_array_equal(one, two)
    user = str(opened.data.dataset.users[0])
    answers = [recommend(x, user, RecommendRequest(), 5) for x in (opened, other)]
    np.testing.assert_array_equal(*(answer.item for answer in answers))
