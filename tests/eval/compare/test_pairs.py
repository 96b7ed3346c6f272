"""The comparison over seeds: pairing, Student's t against a closed form, and what it refuses."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from experiments import compare as command
from moerec.config import cli
from moerec.errors import InputError
from moerec.eval.compare import compare, compare_interventions, render, render_interventions

FIRST = {1: (0.30, 0.5), 2: (0.34, 0.4), 3: (0.33, 0.6)}
SECOND = {1: (0.28, 0.5), 2: (0.33, 0.5), 3: (0.29, 0.55)}


def write_runs(folder, values, name="a", **changes):
    """A run directory for each seed; the values are the union's and the one service's."""
    paths = []
    for seed, (union, own) in values.items():
        test = {"union": {"all": {"ndcg@10": union, "n": 9}}, "in_service": {"food": {"ndcg@10": own}}}
        config = {"name": name, "seed": seed, "data": {"seed": seed + 10}}
        metrics = {"seed": seed, "config": config, "test": test, "dataset": {"n_events": 5}, "steps": 7, "wall_s": 3.0}
        path = folder / f"{name}{seed}"
        path.mkdir(parents=True)
        (path / "metrics.json").write_text(json.dumps({**metrics, "n_active_params": 100, **changes}))
        paths.append(path)
    return paths


def test_differences_are_those_of_the_paired_t_test(tmp_path):
    first, second = write_runs(tmp_path, FIRST), write_runs(tmp_path, SECOND, "b")
    result = compare(first, second[::-1])  # paired by seed, whatever the order
    assert result.seeds == [(1, 11), (2, 12), (3, 13)]
    assert result.names == ("a", "b")
    for row, column, n_better in zip(result.rows, (0, 1), (3, 1), strict=True):
        a, b = (np.array([values[s][column] for s in (1, 2, 3)]) for values in (FIRST, SECOND))
        expected = stats.ttest_rel(a, b)
        interval = expected.confidence_interval()
        assert row.p_value == pytest.approx(expected.pvalue)
        assert (row.difference, row.low, row.high) == pytest.approx(((a - b).mean(), interval.low, interval.high))
        assert (row.first, row.second, row.n_better) == (pytest.approx(a.mean()), pytest.approx(b.mean()), n_better)
    text = render(result)
    assert "union all" in text
    assert "3 of 3" in text
    assert text.splitlines()[-1].split() == ["seconds", "3", "3"]


def marked_cells(line):
    """The values of both sides in a line of the table, as written."""
    return re.findall(r"\d\.\d{4}\*?", line)[:2]


@pytest.mark.parametrize(("t", "is_starred"), [(0.0, False), (2.5, False), (3.1, False), (3.6, True), (9.0, True)])
def test_a_star_needs_a_p_value_that_is_low_after_correction(tmp_path, t, is_starred):
    """Student's t with four degrees of freedom is 2.78 at .05, and 3.50 at half of it, as one of two rows needs."""
    noise = 0.001 * np.arange(-2, 3)
    shift = t * noise.std(ddof=1) / np.sqrt(5)
    first = {s: (0.30 + shift + x, 0.5 + x) for s, x in zip(range(1, 6), noise.tolist(), strict=True)}
    second = dict.fromkeys(range(1, 6), (0.3, 0.5))
    runs = write_runs(tmp_path, first), write_runs(tmp_path, second, "b")
    for sides, marks in ((runs, [is_starred, False]), (runs[::-1], [False, is_starred])):
        result = compare(*sides)
        assert (result.rows[0].p_value < 0.05) == (t > 2.78)
        assert result.rows[0].p_holm == pytest.approx(min(1, 2 * result.rows[0].p_value))
        lines = render(result).splitlines()
        assert "p, Holm" in lines[1]
        assert [[cell.endswith("*") for cell in marked_cells(line)] for line in lines[2:4]] == [marks, [False, False]]
        assert lines[4] == "* p < 0.05 after Holm's correction for the number of rows, 2"


def test_equal_runs_differ_by_nothing(tmp_path):
    first, second = write_runs(tmp_path, FIRST), write_runs(tmp_path, FIRST, "b")
    row = compare(first, second).rows[0]
    assert (row.difference, row.low, row.high, row.p_value, row.p_holm, row.n_better) == (0, 0, 0, 1, 1, 0)


def test_equal_differences_that_are_not_zero_are_certain(tmp_path):
    first, second = (dict.fromkeys((1, 2), (u, 0.5)) for u in (0.75, 0.5))
    row = compare(write_runs(tmp_path, first), write_runs(tmp_path, second, "b")).rows[0]
    assert (row.difference, row.low, row.high, row.p_value) == (0.25, 0.25, 0.25, 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, b, c, d: (a, b[:2]), r"a3: no run with seed 3 and data\.seed 13 on the other side"),
        (lambda a, b, c, d: (a[:2], b), "b3: no run with seed 3"),
        (lambda a, b, c, d: ([*a, a[0]], b), "a1: the same seeds as"),
        (lambda a, b, c, d: (a[:1], b[:1]), "a1: a comparison needs at least two seeds"),
        (lambda a, b, c, d: ([*a[:2], c[2]], b), "c3: differs from .*a1 in more than its seeds: config\\."),
        (lambda a, b, c, d: (a, d), "a1: another data set than"),
        (lambda a, b, c, d: ([a[0].parent / "none"], b), "no such file; is the run finished"),
        (lambda a, b, c, d: ([a[0].parent / "empty"], b), "is no result of a run"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, spoil, message):
    runs = [write_runs(tmp_path, FIRST), write_runs(tmp_path, SECOND, "b"), write_runs(tmp_path, FIRST, "c")]
    runs.append(write_runs(tmp_path, SECOND, "d", dataset={"n_events": 6}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match=message) as refusal:
        compare(*spoil(*runs))
    assert "\n" not in str(refusal.value)


def test_the_command_prints_a_table_and_says_what_is_missing(tmp_path, capsys):
    first, second = write_runs(tmp_path, FIRST), write_runs(tmp_path, SECOND, "b")

    def run(*flags):
        code = cli.execute(command.main, ["compare", *flags], None, command.FLAGS, config_type=None, workdir=False)
        return code, capsys.readouterr()

    code, said = run(f"--first={','.join(map(str, first))}", f"--second={','.join(map(str, second))}", "--json")
    assert code == 0
    assert json.loads(said.out.splitlines()[-1])["rows"][0]["part"] == "union all"
    code, said = run(f"--second={first[0]}")
    assert (code, said.err.count("\n")) == (2, 1)
    assert "--first is missing" in said.err
    code, said = run(f"--first={','.join(map(str, first))}")
    assert (code, said.err.count("\n")) == (2, 1)
    assert "a1: measured no interventions" in said.err


def test_effects_over_seeds_and_what_is_attainable(tmp_path):
    folders = write_runs(tmp_path, {1: (0.5, 0.5), 2: (0.6, 0.5), 3: (0.7, 0.5)})
    for folder, other, known in zip(folders, (0.4, 0.45, 0.65), (0.9, 0.8, 1.0), strict=True):
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["probes"] = {"interventions": {"profile": {"empty": {"ndcg@10": other, "difference": 0, "p_value": 1}}}}
        metrics["probes"]["attainable"] = {"all": known, "window": known - 0.2, "no context": known - 0.1}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    interventions = compare_interventions(folders)
    (row,) = interventions.rows
    assert (row.part, row.n_better) == ("profile empty", 3)
    assert row.difference == pytest.approx((0.1 + 0.15 + 0.05) / 3)
    assert row.p_value == pytest.approx(stats.ttest_rel([0.5, 0.6, 0.7], [0.4, 0.45, 0.65]).pvalue)
    assert interventions.attainable == pytest.approx({"all": 0.9, "window": 0.7, "no context": 0.8})
    assert "all 0.9000, window 0.7000, no context 0.8000" in render_interventions(interventions)
    (folders[2] / "metrics.json").write_text(json.dumps({**metrics, "probes": {}}))
    with pytest.raises(InputError, match="a3: measured no interventions"):
        compare_interventions(folders)
