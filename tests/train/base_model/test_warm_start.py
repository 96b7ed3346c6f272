"""Training that begins with the parameters of another run: every leaf is accounted for, layer by layer."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from moerec.config import Config, MoEConfig, TrainConfig
from moerec.config.stored import store_config
from moerec.convert.paths import flatten
from moerec.data.dataset import permute_items
from moerec.data.load import DIGEST, load_data
from moerec.errors import InputError
from moerec.eval.ranking import make_evaluator
from moerec.files import write_json
from moerec.train.base_model.warm_start import (
    join_groups,
    list_other_functions,
    match_leaves,
    read_parameters,
    split_groups,
    warm_start,
)
from moerec.train.checkpoint import Checkpoints
from moerec.train.loop import fit, make_trainer
from moerec.train.run_dir import make_sizes
from moerec.train.state import init_state, make_predictor
from tests.tiny import make_config

MOE = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8, bias_rate=0.01)


def make_own(source: str = "", moe: MoEConfig | None = None, n_layers: int = 2, ema: float = 0.9, **train) -> Config:
    """The tiny configuration without dropout, so that a loss is a function of parameters and batch."""
    config = make_config(**{"steps": 3, "eval_every": 3, "init_from": str(source), **train})
    model = dataclasses.replace(config.model, dropout=0.0, n_layers=n_layers, moe=moe or MoEConfig())
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, ema_decay=ema))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(make_own().data, tmp_path_factory.mktemp("data"))


def train(config: Config, data, folder):
    folder.mkdir(exist_ok=True)
    store_config(folder / "config.json", config)
    write_json(folder / DIGEST, {"sha256": data.digest, "items_sha256": data.items_digest})
    return fit(config, data, folder, make_evaluator(config, data))


@pytest.fixture(scope="module")
def dense(tmp_path_factory, data):
    """The folder of a dense run of two layers in one group, whose parameters are averaged."""
    folder = tmp_path_factory.mktemp("dense")
    train(make_own(), data, folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, data):
    """The folder of a run whose second layer is a mixture, without an average."""
    folder = tmp_path_factory.mktemp("mixture")
    train(make_own(moe=MOE, ema=0.0), data, folder)
    return folder


def start(config: Config, data):
    return jax.jit(lambda: init_state(config, make_sizes(config, data)))()


def best_state(folder, config: Config, data):
    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
        return checkpoints.restore_best(start(config, data))[0]


def by_layer(params, config: Config) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in split_groups(flatten(params), config.model).items()}


def assert_same(one, other):
    for (path, a), b in zip(flatten(one).items(), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_layers_taken_apart_and_put_together_are_what_they_were(data):
    config = make_own(moe=dataclasses.replace(MOE, layers=(1, 2)), n_layers=4)
    leaves = flatten(start(config, data).params)
    layers = split_groups(leaves, config.model)
    for layer in range(4):
        assert ("ffn/router_ED" in {path.removeprefix(f"layers/{layer}/") for path in layers}) == (layer in (1, 2))
    np.testing.assert_array_equal(layers["layers/2/attention/q_DNH"], leaves["groups/1/attention/q_DNH"][1])
    joined = join_groups(layers, config.model, leaves)
    assert list(joined) == list(leaves)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(joined[path], leaf)


def test_a_run_begins_with_the_averaged_parameters_of_another(dense, data, capsys):
    config = make_own(dense)
    state, before = start(config, data), start(config, data)
    source = best_state(dense, make_own(), data)
    best = dense / "checkpoints" / "best"
    for folder in (dense, dense / "checkpoints", best, best / "3", dense / "checkpoints" / "last"):
        config.train.init_from = str(folder)
        begun = warm_start(state, config, data)
        assert_same(begun.params, source.average)
        assert_same(begun.average, source.average)
        assert_same((begun.step, begun.opt_state), (before.step, before.opt_state))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (source.average, source.params)), strict=True))
    assert capsys.readouterr().err.splitlines()[0] == f"{len(by_layer(begun.params, config))} parameters from {dense}"


def test_without_an_average_the_last_parameters_are_taken_and_router_biases_with_them(mixture, data):
    source = best_state(mixture, make_own(moe=MOE, ema=0.0), data)
    assert np.any(source.router_bias_LE)
    begun = warm_start(start(make_own(mixture, MOE), data), make_own(mixture, MOE), data)
    assert_same(begun.params, source.params)
    assert_same(begun.average, source.params)
    assert_same(begun.router_bias_LE, source.router_bias_LE)


def test_biases_go_to_their_layer_whatever_place_it_has_among_the_mixtures(mixture, data):
    """Layer 0 becomes a mixture, too: its biases are new, and layer 1's stand in the second row."""
    config = make_own(mixture, dataclasses.replace(MOE, layers=(0, 1)))
    config.train.init_fresh, config.train.init_drop = ("layers/0/ffn",), ("layers/0/ffn",)
    begun = warm_start(start(config, data), config, data)
    source = best_state(mixture, make_own(moe=MOE, ema=0.0), data)
    np.testing.assert_array_equal(begun.router_bias_LE[1], source.router_bias_LE[0])
    assert not np.any(begun.router_bias_LE[0])


def test_the_first_loss_is_that_of_the_old_parameters(dense, data):
    """Even where the same layers stand in other groups."""
    old, new = make_trainer(make_own(), data), make_own(dense)
    new.model.group_starts = (1,)
    trainer = make_trainer(new, data)
    begun = warm_start(trainer.state, new, data)
    assert len(begun.params.groups) == 2
    with contextlib.closing(iter(trainer.stream)) as stream:
        batch = next(stream)
    fresh = float(trainer.step(jax.tree.map(lambda x: x.copy(), trainer.state), batch)[1]["loss"])
    found = float(trainer.step(begun, batch)[1]["loss"])
    source = make_predictor(best_state(dense, make_own(), data)).params
    expected = float(old.step(old.state._replace(params=source), batch)[1]["loss"])
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found - fresh) > 1e-3


def test_a_mixture_finds_the_layers_of_a_dense_model(dense, data, capsys):
    config = make_own(dense, MOE)
    config.train.init_fresh, config.train.init_drop = ("layers/1/ffn", "analyser"), ("layers/1/ffn",)
    state = start(config, data)
    begun = warm_start(state, config, data)
    source = by_layer(best_state(dense, make_own(), data).average, make_own())
    fresh, found = by_layer(state.params, config), by_layer(begun.params, config)
    assert "layers/1/attention/q_DNH" in found
    for path, leaf in found.items():
        is_fresh = path.startswith(("layers/1/ffn/", "analyser/"))
        np.testing.assert_array_equal(leaf, (fresh if is_fresh else source)[path], err_msg=path)
    told = capsys.readouterr().err
    assert "as initialised (" in told
    assert "3 left out (layers/1/ffn/" in told
    for field, words in (
        ("init_fresh", r"config\.train\.init_from: (analyser|layers/1/ffn)/\S+ is not there; init_fresh lets it"),
        ("init_drop", r"config\.train\.init_from: layers/1/ffn/\S+ is not here; init_drop leaves it out"),
    ):
        other = dataclasses.replace(config.train, **{field: ()})
        with pytest.raises(InputError, match=words):
            warm_start(state, dataclasses.replace(config, train=other), data)


def test_what_is_new_stays_as_initialised(dense, data):
    config = make_own(dense, n_layers=3)
    with pytest.raises(InputError, match=r"layers/2/\S+ is not there; init_fresh"):
        warm_start(start(config, data), config, data)
    config.train.init_fresh = ("layers/[2-9]",)
    state = start(config, data)
    found = by_layer(warm_start(state, config, data).params, config)
    fresh, source = by_layer(state.params, config), by_layer(best_state(dense, make_own(), data).average, make_own())
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, (source if path in source else fresh)[path], err_msg=path)


def test_layers_move_where_they_are_renamed_and_are_left_out_where_they_are_dropped(dense, data, capsys):
    """A model of one layer, which is the other one's second."""
    config = make_own(dense, n_layers=1)
    with pytest.raises(InputError, match=r"layers/1/\S+ is not here; init_drop"):
        warm_start(start(config, data), config, data)
    config.train.init_rename, config.train.init_drop = ("layers/1=layers/0",), ("layers/0",)
    found = by_layer(warm_start(start(config, data), config, data).params, config)
    source = by_layer(best_state(dense, make_own(), data).average, make_own())
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, source[path.replace("layers/0/", "layers/1/")], err_msg=path)
    told = capsys.readouterr().err
    assert "renamed (layers/0/" in told
    assert "left out (layers/0/" in told


HERE = {"a/x": (2,), "a/y": (3,), "b/x": (2,)}


def match(there: dict[str, tuple[int, ...]], **options):
    arrays = {path: np.full(shape, n, np.float32) for n, (path, shape) in enumerate(there.items())}
    names = {f"init_{name}": value for name, value in options.items()}
    return match_leaves(HERE, arrays, TrainConfig(init_from="somewhere", **names))


def test_every_leaf_is_told_of():
    found = match({"old/x": (2,), "old/y": (3,), "c": (9,)}, rename=("old=a",), fresh=("b",), drop=("c",))
    assert {path: leaf[0] for path, leaf in found.leaves.items()} == {"a/x": 0, "a/y": 1}
    assert found.renamed == {"a/x": "old/x", "a/y": "old/y"}
    assert (found.fresh, found.dropped) == (["b/x"], ["c"])


@pytest.mark.parametrize(
    ("there", "options", "words"),
    [
        ({"a/x": (2,), "a/y": (3,)}, {}, "init_from: b/x is not there; init_fresh"),
        ({**HERE, "c": (1,)}, {}, "init_from: c is not here; init_drop"),
        ({**HERE, "a/y": (4,)}, {}, r"init_from: a/y is \(4,\) there, \(3,\) here"),
        ({**HERE, "a/y": (3, 1)}, {}, r"init_from: a/y is \(3, 1\) there, \(3,\) here"),
        (HERE, {"fresh": ("c",)}, "init_fresh: 'c' is no path"),
        (HERE, {"fresh": ("b",)}, "init_fresh: 'b' is no path"),  # it is there: nothing stays as it is initialised
        (HERE, {"drop": ("c/*",)}, r"init_drop: 'c/\*' is no path"),
        (HERE, {"rename": ("c=d",)}, "init_rename: 'c' begins no path there, such as a/x"),
        ({**HERE, "c/x": (2,)}, {"rename": ("c=a",)}, "init_rename: (c/x and a/x|a/x and c/x) would both be a/x"),
        (HERE, {"rename": ("a=d",), "fresh": ("a",)}, "init_from: a/x is not here; init_drop"),
    ],
)
def test_what_does_not_fit_is_named(there, options, words):
    with pytest.raises(InputError, match=f"config.train.{words}") as error:
        match(there, **options)
    assert "\n" not in str(error.value)


def test_a_part_of_a_name_is_not_the_name():
    found = match({"old/x": (2,), "older": (3,), "b/x": (2,)}, rename=("old=a", "older=a/y"))
    assert found.renamed == {"a/x": "old/x", "a/y": "older"}


def test_a_run_of_another_width_is_refused_by_the_leaf(dense, data):
    config = make_own(dense)
    config.model.d_ff = 28
    with pytest.raises(InputError, match=r"layers/0/ffn/\S+ is \(\S+, \S+\) there, \(\S+, \S+\) here"):
        warm_start(start(config, data), config, data)


def test_options_without_a_run_are_refused():
    for field in ("init_rename", "init_fresh", "init_drop"):
        with pytest.raises(InputError, match=r"config\.train\.init_from: "):
            TrainConfig(**{field: ("a=b",)})
    with pytest.raises(InputError, match=r"config\.train\.init_rename: entries are of the form"):
        TrainConfig(init_from="x", init_rename=("a",))


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_leaves(folder):
    for path in (folder / "checkpoints" / "best").rglob("*"):
        if path.is_file() and path.parent.name == "d":  # where the arrays are
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "is no run and no checkpoint"),
        (damage_config, "is no JSON file"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "holds no checkpoint"),
        (lambda folder: shutil.rmtree(next((folder / "checkpoints" / "best").iterdir())), "holds no checkpoint"),
    ],
    ids=["missing", "config", "no checkpoints", "no best"],
)
def test_a_run_that_is_not_whole_is_refused_in_a_line(dense, tmp_path, damage, words):
    folder = tmp_path / "run"
    shutil.copytree(dense, folder)
    damage(folder)
    with pytest.raises(InputError, match=words) as error:
        read_parameters(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


READ = """
import sys
from pathlib import Path
from moerec.errors import InputError
from moerec.train.run_dir import Run
from moerec.train.base_model.warm_start import read_parameters
for read in (read_parameters, lambda folder: Run(folder).predictor):
    try:
        read(Path(sys.argv[1]))
    except InputError as error:
        print(error)
"""


def test_a_damaged_checkpoint_is_refused_in_a_line(dense, tmp_path):
    """In a process of its own: threads of a read that fails midway go on, and complain later about its event loop."""
    folder = tmp_path / "run"
    shutil.copytree(dense, folder)
    damage_leaves(folder)
    done = subprocess.run([sys.executable, "-c", READ, folder], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2  # nor does the run itself go on, or answer
    assert all(str(folder) in line and "cannot be read" in line for line in lines)


def test_only_a_first_start_begins_there_and_the_config_keeps_the_name(dense, data, tmp_path, capsys):
    """A resumed run goes on with what it has itself, even when the other run has gone."""
    shutil.copytree(dense, tmp_path / "other")
    config = make_own(tmp_path / "other", steps=2, eval_every=1, save_every=1, log_every=1)
    first = train(config, data, tmp_path / "run")
    assert "parameters from" in capsys.readouterr().err
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "other")
    again = train(config, data, tmp_path / "run")
    assert "parameters from" not in capsys.readouterr().err
    assert (first.step, first.valid) == (again.step, again.valid)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["init_from"] == config.train.init_from
    assert losses[0] < 0.99 * float(np.log(data.dataset.catalogue.n_items))


def test_it_works_on_a_mesh(dense, data):
    config = make_own(dense, mesh_data=2)
    trainer = make_trainer(config, data)
    begun = warm_start(trainer.state, config, data)
    assert_same(begun.params, best_state(dense, make_own(), data).average)
    for one, other in zip(jax.tree.leaves(begun), jax.tree.leaves(trainer.state), strict=True):
        assert one.sharding == other.sharding


def test_a_folder_that_is_no_checkpoint_is_refused(dense, data):
    config = make_own(dense)
    for inside in ("tensorboard", "checkpoints/best/4", "checkpoints/worst", "checkpoints/best/3/state"):
        config.train.init_from = str(dense / inside)
        with pytest.raises(InputError, match=r"is no run and no checkpoint|holds no checkpoint of step 4"):
            warm_start(start(config, data), config, data)


def test_rows_of_items_are_not_taken_from_a_run_whose_items_are_others(dense, data):
    """Items that are numbered otherwise: every row would stand for another item, and no shape would tell."""
    other = dataclasses.replace(data, dataset=permute_items(data.dataset, 5)[0])
    config = make_own(dense)
    with pytest.raises(InputError, match=r"(head/bias_I|item_encoder/\w+) is of other items there"):
        warm_start(start(config, other), config, other)
    tables = ("item_encoder", "head/bias_I")
    config.train = dataclasses.replace(config.train, init_fresh=tables, init_drop=tables)
    before = by_layer(start(config, other).params, config)
    found = by_layer(warm_start(start(config, other), config, other).params, config)
    np.testing.assert_array_equal(found["item_encoder/row_ID"], before["item_encoder/row_ID"])
    assert np.any(found["layers/0/attention/q_DNH"] != before["layers/0/attention/q_DNH"])


def test_fields_that_decide_what_weights_compute_are_told(tmp_path):
    config = make_config()
    moe = dataclasses.replace(config.model.moe, layers=(1,))
    there = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    store_config(tmp_path / "config.json", there)
    here = dataclasses.replace(there.model, rope_theta=1e6, moe=dataclasses.replace(moe, renormalise=False))
    assert list_other_functions(there.model, tmp_path) == []
    told = list_other_functions(here, tmp_path)
    assert told == ["model.rope_theta was 10000.0 and is 1000000.0", "model.moe.renormalise was True and is False"]
