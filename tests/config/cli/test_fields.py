"""The fields of a configuration for readers: `--print_config`, `--helpfull`, and what a wrong name may have meant."""

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from moerec.config import Config, DataConfig, MoEConfig, OptimConfig, SchemaConfig, cli
from tests.own_tables import write_own_tables

ROOT = Path(__file__).resolve().parents[3]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
ODD = """import dataclasses
from moerec.config import Config, DataConfig, OptimConfig, SchemaConfig
from tests.own_tables import write_own_tables
def get_config():
    schema = SchemaConfig(text=('say "a"', "it's", "back\\\\slash", "a, b"), context=("#1",))
    optim = OptimConfig(learning_rate=1e-05, groups=("groups/0=frozen", "$HOME=.5"))
    return Config(name="two 'words' \\"here\\" # $HOME é", data=DataConfig(schema=schema), optim=optim)
"""


def print_config(capsys, path, *args):
    """What the command prints; it must neither run nor ask for a workdir."""

    def main(config, flags):
        raise AssertionError("it runs")

    assert cli.execute(main, ["command", f"--config={path}", *args]) == 0
    return capsys.readouterr().out.rstrip("\n").split("\n")


def read_back(lines, other):
    """The configuration that another one becomes when all lines are pasted behind it."""
    seen = []
    code = cli.execute(lambda config, _: seen.append(config), ["command", f"--config={other}", *lines], workdir=False)
    assert code == 0
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_of_every_config_give_it_back(name, capsys, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()  # the tables that configs/own_data.py counts
    write_own_tables(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    lines = print_config(capsys, ROOT / "configs" / f"{name}.py", "--print_config")
    arguments = [argument for line in lines for argument in shlex.split(line, comments=True)]
    assert len(arguments) == len(lines)
    assert read_back(arguments, ROOT / "configs" / "city_dense.py") == cli.load_config(f"{ROOT}/configs/{name}.py")


def test_a_shell_takes_what_is_quoted_as_it_is(capsys, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    lines = print_config(capsys, tmp_path / "odd.py", "--print_config")
    script = "".join(f"printf '%s\\0' {line}\n" for line in lines)
    arguments = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    schema = SchemaConfig(text=('say "a"', "it's", "back\\slash", "a, b"), context=("#1",))
    optim = OptimConfig(learning_rate=1e-05, groups=("groups/0=frozen", "$HOME=.5"))
    want = Config(name="two 'words' \"here\" # $HOME é", data=DataConfig(schema=schema), optim=optim)
    assert read_back(arguments, ROOT / "configs" / "city_dense.py") == want


def test_overrides_are_in_it_and_defaults_are_marked(capsys):
    options = ("--config.model.moe.n_per_group=3", "--config.model.moe.layers=(1,2)", "--config.model.n_layers=3")
    lines = print_config(capsys, ROOT / "configs" / "city_moe.py", *options, "--print_config=model.moe.")
    comments = {
        "layers": "which layers are mixtures, from 0; the dense ones before them are the trunk",
        "cross": "whether there is a group across all services",
    }
    assert f"--config.model.moe.layers='(1, 2)'  # default (); {comments['layers']}" in lines
    assert f"--config.model.moe.cross=true  # {comments['cross']}" in lines
    assert len(lines) == len(dataclasses.fields(MoEConfig))
    assert print_config(capsys, ROOT / "configs" / "city_moe.py", "--print_config=config.seed") == ["--config.seed=0"]


def test_the_dict_of_a_part(capsys):
    (line,) = print_config(capsys, ROOT / "configs" / "demo.py", "--print_config=config.train.eval", "--json")
    assert json.loads(line) == {"train": {"eval_every": 150}}
    (line,) = print_config(capsys, ROOT / "configs" / "demo.py", "--print_config", "--json")
    config = cli.load_config(str(ROOT / "configs" / "demo.py"))
    assert json.loads(line) == json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    ("prefix", "meant"),
    [
        ("model.mue", "the group config.model.moe?"),
        ("config.trian.steps", "config.train.steps?"),
        ("n_layers", "config.model.n_layers?"),
    ],
)
def test_a_beginning_of_nothing_is_refused(prefix, meant, capsys):
    args = ["command", f"--config={ROOT}/configs/demo.py", f"--print_config={prefix}"]
    assert cli.execute(lambda *_: None, args) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: --print_config={prefix}: no field begins so; did you mean {meant}\n")


def test_help_has_the_values_of_the_config(capsys, tmp_path):
    path = ROOT / "configs" / "demo.py"

    def help_lines(*args, **options):
        assert cli.execute(lambda *_: None, ["x", "--helpfull", *args], **options) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.startswith("  --config.")]

    own, plain = cli.load_config(str(path)), Config()
    assert f"--config.train.steps={own.train.steps}" in help_lines(f"--config={path}")
    assert f"--config.train.steps={own.train.steps}" in help_lines(default_config=str(path))
    assert "--config.train.steps=7" in help_lines(f"--config={path}", "--config.train.steps=7")
    assert f"--config.train.steps={plain.train.steps}" in help_lines()
    assert f"--config.train.steps={plain.train.steps}" in help_lines(default_config=str(tmp_path / "elsewhere.py"))
    assert cli.execute(lambda *_: None, ["x", "--helpfull", f"--config={path}", "--config.train.stepz=7"]) == 2


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("config.modle.n_layers", "config.model.n_layers"),
        ("config.modle", "the group config.model"),
        ("config.modl.moee.layrs", "config.model.moe.layers"),
        ("config.train.stepz", "config.train.steps"),
        ("config.model.moe.layer", "config.model.moe.layers"),
        ("config.n_layers", "config.model.n_layers"),
        ("config.moe.layers", "config.model.moe.layers"),
        ("config.rank", "config.model.personal.rank"),
    ],
)
def test_a_wrong_name_is_compared_with_those_of_its_level_first(wrong, meant, capsys):
    assert cli.execute(lambda *_: None, ["x", f"--config={ROOT}/configs/demo.py", f"--{wrong}=4"], workdir=False) == 2
    assert capsys.readouterr().err == f"error: --{wrong}: no such field; did you mean {meant}?\n"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("Config(modle=1)", "Config has no field 'modle'; did you mean model?"),
        ("Config(train=TrainConfig(stepz=1))", "TrainConfig has no field 'stepz'; did you mean steps?"),
        ("Config(n_layers=1)", "Config has no field 'n_layers'; did you mean config.model.n_layers?"),
    ],
)
def test_a_wrong_keyword_is_compared_with_the_fields_of_its_class_first(call, told, capsys, tmp_path):
    (tmp_path / "x.py").write_text(f"from moerec.config import *\ndef get_config():\n    return {call}\n")
    assert cli.execute(lambda *_: None, ["x", f"--config={tmp_path}/x.py"], workdir=False) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/x.py:3: {told}\n"
