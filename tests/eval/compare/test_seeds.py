"""One configuration over several seeds: the means against Student's interval by another route, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import train
from moerec.config import Config, cli
from moerec.config.stored import store_config
from moerec.errors import InputError
from moerec.eval.compare.seed_table import describe_seeds, format_seeds, read_seeds
from moerec.eval.compare.seeds import plan_seeds
from moerec.eval.significance import student_interval
from moerec.files import write_json

VALUES = {3: (0.25, 0.5), 1: (0.30, 0.4), 2: (0.29, 0.6)}  # of NDCG@10: the union's, and a service's
CONFIG = "from moerec.config import Config\ndef get_config():\n    return Config(name='mine')\n"


def result(union, own):
    metrics = {"ndcg@10": union, "recall@10": union / 2, "mrr@10": union / 4, "n": 9}
    return {"union": {"all": metrics}, "in_service": {"food": {"ndcg@10": own, "recall@10": own / 2}}}


def write_runs(workdir, values=VALUES, config=None):
    """A finished run for each seed."""
    folders = []
    for seed, (union, own) in values.items():
        folder = Path(f"{workdir}_{seed}")
        folder.mkdir(parents=True)
        resolved = dataclasses.replace(config or Config(name="mine"), seed=seed)
        store_config(folder / "config.json", resolved)
        tables = {"test": result(union, own), "baselines": {"markov": result(0.1, own)}, "ceiling": result(0.5, 0.7)}
        metrics = {"config": dataclasses.asdict(resolved), "seed": seed, "dataset": {}, "gap_closed": union, **tables}
        write_json(folder / "metrics.json", metrics)
        folders.append(folder)
    return folders


def test_cells_are_means_with_students_interval(tmp_path):
    table = read_seeds(write_runs(tmp_path / "run"))
    found = describe_seeds(table)
    assert found["seeds"] == [3, 1, 2]
    for part, key, column in (("union", "all", 0), ("in_service", "food", 1)):
        values = [pair[column] for pair in VALUES.values()]
        expected = stats.ttest_1samp(values, 0).confidence_interval()
        cell = found["test"][part][key]["ndcg@10"]
        assert cell["values"] == values
        assert (cell["mean"], cell["low"], cell["high"]) == pytest.approx((np.mean(values), *expected))
    same = found["baselines"]["markov"]["union"]["all"]["ndcg@10"]
    assert same == {"mean": 0.1, "low": 0.1, "high": 0.1, "values": [0.1] * 3}
    assert found["ceiling"]["in_service"]["food"]["recall@10"]["mean"] == 0.35
    assert found["gap_closed"]["mean"] == pytest.approx(0.28)


def test_the_table_has_the_columns_of_a_run(tmp_path):
    lines = format_seeds(read_seeds(write_runs(tmp_path / "run"))).splitlines()
    assert lines[0].split() == ["union", "food"]
    assert lines[1].split() == ["@10", "NDCG", "Recall", "MRR", "NDCG", "Recall"]
    half = stats.sem([0.25, 0.3, 0.29]) * stats.t.ppf(0.975, 2)
    assert lines[2].split()[:3] == ["mine", ".2800", f"±{half:.4f}".replace("0.", ".")]
    assert lines[3].split()[:3] == ["Markov", ".1000", ".0500"]  # no interval: all seeds give the same
    assert lines[4].split()[0] == "ceiling"
    assert "3 seeds (3, 1, 2)" in lines[6]
    assert lines[7].startswith("28.0 ± 6.6 % of the gap")
    one = format_seeds(read_seeds(write_runs(tmp_path / "one", {7: (0.2, 0.3)})))
    assert "±" not in one
    assert "means over 1 seed (7)" in one


def test_one_run_says_nothing_of_its_spread():
    assert student_interval([0.5]) == (0.5, -np.inf, np.inf)


def test_runs_on_text(tmp_path):
    figures = {1: (3.0, 20.1, 1.5), 2: (3.2, 24.5, 1.6)}
    for seed, (nats, perplexity, bits) in figures.items():
        told = {"nats_per_token": nats, "perplexity": perplexity, "bits_per_byte": bits, "n_tokens": 5}
        metrics = {"config": {"name": "lm", "seed": seed, "data": {"seed": 0}}, "seed": seed, "tasks": {"lm": told}}
        (tmp_path / str(seed)).mkdir()
        write_json(tmp_path / str(seed) / "metrics.json", metrics)
    table = read_seeds([tmp_path / "1", tmp_path / "2"])
    low, high = stats.ttest_1samp([1.5, 1.6], 0).confidence_interval()
    found = describe_seeds(table)["tasks"]["lm"]["bits_per_byte"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((1.55, low, high))
    lines = format_seeds(table).splitlines()
    assert lines[1].split() == ["nats", "a", "token", "perplexity", "bits", "a", "byte"]
    assert lines[2].split()[:2] == ["lm", "3.100"]


def test_runs_of_two_configurations_have_no_mean(tmp_path):
    first = write_runs(tmp_path / "a", {1: (0.2, 0.3)})
    other = write_runs(tmp_path / "b", {2: (0.2, 0.3)}, Config(name="mine", tasks=("next_event", "more")))
    with pytest.raises(InputError, match=r"b_2: differs from .*a_1 in more than its seeds: config\.tasks"):
        read_seeds([*first, *other])


def test_folders_are_named_by_the_seed_and_checked_before_anything_runs(tmp_path):
    config = Config(name="mine")
    runs = plan_seeds(config, tmp_path / "run", ["5", "0"])
    assert [run.folder for run in runs] == [tmp_path / "run_5", tmp_path / "run_0"]
    assert [run.config for run in runs] == [Config(name="mine", seed=5), Config(name="mine", seed=0)]
    write_runs(tmp_path / "run", {0: (0.2, 0.3)}, Config(name="other"))
    with pytest.raises(InputError, match=r"run_0/config\.json: this directory holds another run: config\.name"):
        plan_seeds(config, tmp_path / "run", ["5", "0"])


@pytest.fixture
def command(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(CONFIG)

    def run(*args):
        argv = ["train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run", *args]
        return cli.execute(train.main, argv, None, train.FLAGS), capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--seeds=1,2,1",), "--seeds: 1 is there twice"),
        (("--seeds=1,01",), "--seeds: 1 is there twice"),
        (("--seeds=1,b",), "--seeds: 'b' is no whole number in [0, 2^32)"),
        (("--seeds=-1",), "--seeds: '-1' is no whole number in [0, 2^32)"),
        (("--seeds=4294967296",), "config.seed: must lie in [0, 2^32)"),
        (("--seeds=",), "--seeds: is empty; write --seeds=1,2,3"),
        (("--seeds=1,2", "--config.seed=3"), "--config.seed: is set by --seeds; give one of them"),
        (("--seeds=1,2", "--parallel=0"), "--parallel: must be at least 1"),
        (("--parallel=2",), "--parallel: belongs to --seeds"),
    ],
)
def test_what_cannot_be_meant_is_refused(args, told, command, tmp_path):
    code, said = command(*args)
    assert (code, said.out, said.err) == (2, "", f"error: {told}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_finished_runs_are_read_and_failed_ones_told(command, tmp_path):
    """The third seed has no folder, and its data are missing: its process says why, and the two others count."""
    missing = ("--config.data.source=prepared", "--config.data.prepared=absent")
    config = Config(name="mine")
    config.data.source, config.data.prepared = "prepared", "absent"
    folders = write_runs(tmp_path / "run", {1: (0.2, 0.3), 2: (0.4, 0.3)}, config)
    before = [(folder / "metrics.json").read_bytes() for folder in folders]
    code, said = command("--seeds=1,2", "--json", *missing)
    assert code == 0
    assert json.loads(said.out.splitlines()[-1])["test"]["union"]["all"]["ndcg@10"]["values"] == [0.2, 0.4]
    assert f"seed 1: {folders[0]}: is finished\n" in said.err
    shutil.rmtree(folders[1])
    code, said = command("--seeds=1,2,3", "--parallel=2", "--json", *missing)
    found = json.loads(said.out.splitlines()[-1])
    names = [f"{tmp_path}/run_{seed}" for seed in (1, 2, 3)]
    assert (code, found["exit_code"], found["seeds"]) == (2, 2, [1])
    assert found["folders"] == dict(zip(names, (0, 2, 2), strict=True))
    for seed, folder in zip((2, 3), names[1:], strict=True):
        assert f"seed {seed}: {folder}: ended with exit code 2 (absent" in said.err
        assert "absent" in Path(folder, "train.log").read_text()
    assert (folders[0] / "metrics.json").read_bytes() == before[0]
