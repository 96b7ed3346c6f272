"""The shell around the commands: overrides, refusals, exit codes and the JSON line."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from moerec.config import Config, cli
from moerec.errors import InputError, WorkError

ROOT = Path(__file__).resolve().parents[2]

HEAD = "from moerec.config import Config, ModelConfig\ndef get_config():\n"
GOOD = HEAD + "    return Config(name='good')\n"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    return path


@pytest.fixture
def seen():
    return []


def call(seen, *args, result=None, error=None, **options):
    def main(config, flags):
        seen.append((config, flags))
        if error is not None:
            raise error
        return result

    return cli.execute(main, ["command", *map(str, args)], **options)


def test_overrides_reach_the_config_typed_and_rebuilt(config_file, seen, tmp_path):
    code = call(
        seen,
        "--config.seed=7",  # before --config, too
        f"--config={config_file}",
        f"--workdir={tmp_path}",
        "--config.model.n_layers",
        "4",
        "--config.optim.learning_rate=3",
        "--noconfig.model.item_row",
        "--config.model.remat",
        '--config.baselines=("markov","item_knn")',
        "--config.data.schema.text=title",
    )
    config, flags = seen[0]
    want = Config(name="good", seed=7, baselines=("markov", "item_knn"))
    want.model.n_layers, want.model.item_row, want.model.remat = 4, False, True
    want.optim.learning_rate = 3.0
    want.data.schema.text = ("title",)
    assert code == 0
    assert config == want
    assert isinstance(config.optim.learning_rate, float)
    assert flags.workdir == str(tmp_path)


def test_the_last_of_two_overrides_holds_and_the_file_is_not_changed(config_file, seen):
    for _ in range(2):
        call(seen, f"--config={config_file}", "--config.seed=1", "--config.seed=2", workdir=False)
    call(seen, f"--config={config_file}", workdir=False)
    assert [config.seed for config, _ in seen] == [2, 2, 0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.model.n_layer=4"], "--config.model.n_layer: no such field; did you mean config.model.n_layers?"),
        (["--config.modle.n_layers=4"], "did you mean config.model.n_layers?"),
        (["--config.n_layers=4"], "did you mean config.model.n_layers?"),
        (["--model.n_layers=4"], "--model.n_layers: no such flag; did you mean --config.model.n_layers?"),
        (["--noconfig.model.item_rows"], "did you mean config.model.item_row?"),
        (["--config.seed.x=4"], "config.seed.x: no such field"),
        (["--config.baselines[0]=markov"], "no such field; did you mean config.baselines?"),
        (["--config.model=4"], "config.model: is a group; set one of its fields: n_layers, "),
        (["--config.model.n_layers=four"], "config.model.n_layers=four: is no whole number"),
        (["--config.model.n_layers=1.5"], "config.model.n_layers=1.5: is no whole number"),
        (["--config.model.remat=7"], "config.model.remat=7: is neither true nor false"),
        (["--config.baselines=1,2"], "config.baselines: (1, 2) is not of type tuple[str, ...]"),
        (["--config.optim.learning_rate=inf"], "config.optim.learning_rate: inf is no finite number"),
        (["--config.optim.final_rate=nan"], "config.optim.final_rate: nan is no finite number"),
        (["--config.model.n_layers=0"], "config.model.n_layers: must be at least 1"),
        (["--config.model.n_heads=3"], "config.model.n_kv_heads: must divide"),
        (
            ["--config.model.ask.from_layer=1", "--config.model.pointer_time_bias=true", "--config.model.pointer=none"],
            "config.model.pointer_time_bias: needs pointers",
        ),
        (
            ["--config.model.ask.from_layer=1", "--config.model.moe.n_open_groups=1"],
            "config.model.moe.n_open_groups: must be 0 where services are asked (own group and cross)",
        ),
        (
            ["--config.model.ask.from_layer=1", "--config.model.moe.layers=(1,)", "--config.model.moe.n_active=5"],
            "config.model.moe.n_active: a service that is asked opens 4 experts (own group and cross)",
        ),
        (["--config.model.ask.from_layer=2"], "config.model.ask.from_layer: must be below model.n_layers, which is 2"),
        (
            ["--config.model.ask.from_layer=1", "--config.model.personal.layers=(0,)"],
            "config.model.personal.layers: [0] lie below the first that may be personal, 1",
        ),
        (["--config.train.steps"], "Missing value for flag --config.train.steps"),
        (["--config.foo=4"], "--config.foo: no such field\n"),
        (["--top_q=3"], "--top_q: no such flag; did you mean --top_k?"),
        (["--top_k=x"], "--top_k=x: is no whole number"),
        (["stray"], "'stray' is no flag"),
        (["--flagfile=absent"], "absent"),
        (["--workdir="], "--workdir is missing"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(args, words, config_file, seen, capsys, tmp_path):
    extra = {"top_k": (10, "items of a list")}
    code = call(seen, f"--config={config_file}", f"--workdir={tmp_path}", *args, extra_flags=extra)
    out, err = capsys.readouterr()
    assert (code, out, seen) == (2, "", [])
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n    pass\n", "x.py:1: SyntaxError: invalid syntax"),
        ("a = 1\nb = a + c\n", "x.py:2: NameError: name 'c' is not defined"),
        ("a = 1\n", "x.py: defines no get_config()"),
        ("def get_config():\n    return {}\n", "x.py: get_config() returned dict, not Config"),
        (
            HEAD + "\n    return Config(model=ModelConfig(n_layer=4))\n",
            "x.py:4: ModelConfig has no field 'n_layer'; did you mean n_layers?",
        ),
        (
            HEAD + "    c = Config()\n    c.model.n_layer = 4\n    return c\n",
            "x.py: config.model.n_layer: no such field; did you mean n_layers?",
        ),
        (
            HEAD + "    return Config(model=ModelConfig(n_layers=0))\n",
            "x.py:3: config.model.n_layers: must be at least 1",
        ),
        (
            HEAD + "    return Config(seed='three')\n",
            "config.seed: 'three' is not of type int",
        ),
    ],
)
def test_a_defect_of_the_config_file_is_named_with_its_line(text, words, seen, capsys, tmp_path):
    (tmp_path / "x.py").write_text(text)
    assert call(seen, f"--config={tmp_path}/x.py", workdir=False) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_missing_config_is_refused_and_a_default_one_used(config_file, seen, capsys):
    assert call(seen, "--workdir=w") == 2
    assert "--config is missing" in capsys.readouterr().err
    assert call(seen, f"--confg={config_file}") == 2
    assert "--confg: no such flag; did you mean --config?" in capsys.readouterr().err
    assert call(seen, f"--config={config_file.with_name('goood.py')}") == 2
    assert f"no such file; did you mean {config_file}?" in capsys.readouterr().err
    assert call(seen, "--workdir=w", "--config.seed=3", default_config=str(config_file)) == 0
    assert (seen[0][0].name, seen[0][0].seed) == ("good", 3)


def test_a_command_without_config(seen, capsys):
    assert call(seen, "--workdir=w", config_type=None) == 0
    assert seen[0][0] is None
    assert call(seen, "--config=x.py", "--workdir=w", config_type=None) == 2
    assert "--config: no such flag" in capsys.readouterr().err


@dataclasses.dataclass
class Inner:
    rate: float | None = None
    sizes: tuple[int, int] = (1, 2)


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    n: int | None = None


def test_optional_fields_and_tuples_of_fixed_length(tmp_path, seen, capsys):
    absl_flags.FLAGS.mark_as_parsed()
    file = tmp_path / "outer.py"
    file.write_text(f"import sys\ndef get_config():\n    return sys.modules[{__name__!r}].Outer()\n")
    sys.modules.setdefault(__name__, sys.modules[Outer.__module__])
    options = {"config_type": Outer, "workdir": False}
    assert call(seen, f"--config={file}", **options) == 0
    assert seen[0][0] == Outer()
    code = call(
        seen, f"--config={file}", "--config.n=3", "--config.inner.rate=.5", "--config.inner.sizes=4,5", **options
    )
    assert code == 0
    assert seen[1][0] == Outer(n=3, inner=Inner(rate=0.5, sizes=(4, 5)))
    assert call(seen, f"--config={file}", "--config.inner.sizes=4,5,6", **options) == 2
    assert "config.inner.sizes: (4, 5, 6) is not of type tuple[int, int]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            InputError("items.tsv:3: column day: 'x' is no number"),
            2,
            "error: items.tsv:3: column day: 'x' is no number\n",
        ),
        (WorkError("the loss is nan\nat step 3"), 1, "error: the loss is nan at step 3\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (PermissionError(13, "Permission denied", "runs/x"), 1, "error: runs/x: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (OSError(5, "Input/output error"), 1, "error: Input/output error\n"),
        (OSError(24, "Too many open files"), 1, "error: Too many open files\n"),
        (MemoryError(), 1, "error: out of memory\n"),
    ],
)
def test_an_end_without_traceback(error, code, words, config_file, seen, capsys):
    assert call(seen, f"--config={config_file}", workdir=False, error=error) == code
    assert capsys.readouterr().err == words


def test_a_defect_of_ours_keeps_its_traceback(config_file, seen):
    with pytest.raises(ZeroDivisionError):
        call(seen, f"--config={config_file}", workdir=False, error=ZeroDivisionError())


def test_the_result_may_set_the_exit_code(config_file, seen):
    assert call(seen, f"--config={config_file}", workdir=False, result={"exit_code": 1}) == 1


def test_json_is_the_last_line_and_free_of_nan(config_file, capsys):
    def main(config, flags):
        print("a table")
        return {"x": math.nan, "y": [1.5, -math.inf], "name": "é", "path": Path("a/b")}

    assert cli.execute(main, ["command", f"--config={config_file}", "--json"], workdir=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a table"
    assert json.loads(lines[-1]) == {"x": None, "y": [1.5, None], "name": "é", "path": "a/b"}


def test_extra_flags_take_the_type_of_their_default(config_file, seen):
    extra = {"k": (10, "n"), "rate": (0.5, "r"), "dry": (False, "d"), "names": (["a"], "l"), "out": ("x", "o")}
    args = ["--k=3", "--rate=2", "--dry", "--names=b,c", "--out=y"]
    call(seen, f"--config={config_file}", *args, workdir=False, extra_flags=extra)
    flags = seen[0][1]
    assert [flags.k, flags.rate, flags.dry, flags.names, flags.out] == [3, 2.0, True, ["b", "c"], "y"]


def test_a_home_behind_the_equals_sign_is_the_user_s(config_file, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    extra = {"out": ("", "a folder"), "user": ("", "a name"), "runs": ([], "folders")}
    options = [f"--config=~/{config_file.name}", "--workdir=~/run", "--out=a~/b", "--user=~", "--runs=~/a,b/~/c,~/d"]
    assert call(seen, *options, extra_flags=extra) == 0
    flags = seen[0][1]
    assert (flags.workdir, flags.out, flags.user) == (f"{tmp_path}/run", "a~/b", "~")
    assert flags.runs == [f"{tmp_path}/a", "b/~/c", f"{tmp_path}/d"]


def test_help_shows_the_docstring_and_the_own_flags_only(seen, capsys):
    assert call(seen, "--help", extra_flags={"top_k": (10, "items of a list")}) == 0
    out = capsys.readouterr().out
    assert out.startswith(__doc__)
    assert "--top_k: items of a list (default: 10)" in out
    assert "--verbosity" not in out
    assert call(seen, "--helpfull") == 0
    assert "--config.model.n_layers=2" in capsys.readouterr().out


def test_as_a_process(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "from moerec.config import cli\n"
        "def main(config, flags):\n"
        "    print('work')\n"
        "    return {'n': config.model.n_layers, 'exit_code': 1}\n"
        "cli.run(main)\n"
    )
    (tmp_path / "good.py").write_text(GOOD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*args):
        command = [sys.executable, str(script), f"--config={tmp_path}/good.py", "--workdir=w", *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    done = start("--config.model.n_layers=5", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == ["work", '{"n": 5, "exit_code": 1}']
    refused = start("--config.model.n_layer=5")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --config.model.n_layer: no such field; did you mean config.model.n_layers?\n"


# Children of a shell's background job would ignore interruptions.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def test_an_interruption_ends_a_process_at_once(tmp_path):
    """Even one that hits a callback of the garbage collector, which ignores it, and beside an endless thread."""
    script = tmp_path / "command.py"
    script.write_text(
        HEED + "import gc, os, threading, time, weakref\n"
        "from moerec.config import cli\n"
        "class Thing: pass\n"
        "def main(config, flags):\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    thing = Thing()\n"
        "    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
        "    del thing\n"
        "    time.sleep(60)\n"
        "cli.run(main, config_type=None, workdir=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_an_interruption_while_importing_is_one_line():
    code = HEED + "import experiments, os; os.kill(os.getpid(), signal.SIGINT)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=40)
    assert (done.returncode != 0, done.stderr) == (True, "error: interrupted\n")


def test_help_says_what_fields_mean(capsys):
    cli.execute(lambda config, values: None, ["x", "--helpfull"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("  --config.model.personal.rank=")]
    assert line == "  --config.model.personal.rank=4  # of a low_rank memory"
