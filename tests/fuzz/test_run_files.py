"""Damaged JSON in a run directory: whatever the bytes are, it is read or refused in one line, never with a traceback.

The tests try a few; this tries 10,000 in all, fresh ones each time, in about ten minutes:

    MOEREC_FUZZ=10000 .venv/bin/python -m pytest tests/fuzz/test_run_files.py -n 0
"""

import copy
import json
import os
import warnings
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from moerec.config.stored import read_config, store_config
from moerec.data.load import read_digests
from moerec.errors import InputError, WorkError
from moerec.eval.compare import compare, compare_interventions, render, render_interventions
from moerec.eval.report import format_table, write_report
from moerec.eval.report.result import read_result
from moerec.tasks import make_tasks
from moerec.train.metric_writer import read_metric_lines
from moerec.train.run_dir import load_run
from tests.eval.test_report import LINES, full_metrics, result
from tests.tiny import make_config

N_EXAMPLES = int(os.environ.get("MOEREC_FUZZ", "0"))


def fuzz(share: float, few: int) -> hypothesis.settings:
    """Of a long search the share of its inputs; in the tests a few, the same ones every time."""
    return hypothesis.settings(
        max_examples=max(int(share * N_EXAMPLES), 1) if N_EXAMPLES else few,
        deadline=None,
        derandomize=not N_EXAMPLES,
        phases=[hypothesis.Phase.generate],  # making a failure smaller takes longer than to find it
        suppress_health_check=list(hypothesis.HealthCheck),
    )


NUMBERS = [0, 1, -1, 2, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**53, 2**63 - 1, -(2**63), 10**400]
WORDS = ["", "word", "NaN", "\x1b[31m", "\ud800", "a\0b", "../..", "x" * 5000, "ndcg@10", "all", "é\u2028"]
VALUES = st.sampled_from([None, True, False, *NUMBERS, *WORDS, [], {}, [[]], [1, "a"], {"a": 1}, {"all": None}])


def list_places(value, place=()):
    """Every place in a JSON value, as a tuple of keys."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from list_places(inner, (*place, key))


def change(value, place, draw):
    """Replaces, drops, doubles, renames or moves what stands at a place."""
    if not place:
        return copy.deepcopy(draw(VALUES))
    group = value
    for key in place[:-1]:
        group = group[key]
    key, kind = place[-1], draw(st.sampled_from(("replace", "drop", "rename", "copy", "wrap")))
    if kind == "replace":
        group[key] = copy.deepcopy(draw(VALUES))
    elif kind == "drop":
        group.pop(key)
    elif kind == "rename" and isinstance(group, dict):
        group[draw(st.sampled_from(WORDS))] = group.pop(key)
    elif kind == "copy":
        other = draw(st.sampled_from(list(list_places(value))))
        found = value
        for step in other:
            found = found[step]
        group[key] = copy.deepcopy(found)
    else:
        group[key] = [group[key]] if draw(st.booleans()) else {"x": group[key]}
    return value


@st.composite
def damaged(draw, value) -> bytes:
    """The JSON of a value, up to three changes of its structure and three of its bytes later."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 3))):
        places = list(list_places(value))
        value = change(value, draw(st.sampled_from(places)), draw)
    content = bytearray(json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "delete", "nest", "spare")))
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = draw(
                st.sampled_from([b"\0", b"\xff", b"NaN", b"-Infinity", b"{", b"]", b",", b'"', b"1e999"])
            )
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 50))]
        elif kind == "nest":
            content[at:at] = b"[" * draw(st.sampled_from((90, 110, 5000, 20_000)))
    return bytes(content)


def make_metrics() -> dict:
    """As a run writes them, with every probe that a report shows."""
    metrics = full_metrics()
    n = len(metrics["dataset"]["services"])
    gain = {"difference": 0.1, "p_value": 0.5}
    metrics["config"]["eval"]["interventions"] = True
    metrics["routing"] = {
        "load": [[0.25] * (n + 1)] * n,
        "max_over_mean": 1.2,
        "dropped": 0,
        "analyser": {"macro_f1": 0.5, "ece": 0.1, "temperature": 1.0, "exact_macro_f1": 0.6},
    }
    metrics["probes"] = {
        "mixture_weights": [[0.5] * (n + 2)] * n,
        "profile_aspects": {"found": 0.4, "chance": 0.3, "best": 0.5, "p_value": 0.01},
        "first_events": {"model": result(0.2), "popularity_by_hour": result(0.1), "difference": 0.1, "p_value": 0.5},
        "interventions": {"profile": {"swapped": {"ndcg@10": 0.1, **gain}}},
        "attainable": {"everything": 0.5},
        "transfer": {
            name: {"n": 9, "gain": gain, **{part: {"ndcg@10": 0.1} for part in ("all", "own", "others", "popularity")}}
            for name in metrics["dataset"]["services"]
        },
    }
    return metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    store_config(folder / "config.json", make_config())
    return folder


def read_or_refuse(*readers) -> bool:
    """Whether one of them refused, as it may, in one line."""
    is_refused = False
    for read in readers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of matplotlib, about ranges that no run has
                read()
        except (InputError, WorkError):
            is_refused = True
    return is_refused


@fuzz(0.3, 30)
@hypothesis.given(data=st.data())
def test_config(run, data):
    store_config(run / "config.json", make_config())
    content = data.draw(damaged(json.loads((run / "config.json").read_text())))
    (run / "config.json").write_bytes(content)
    (run / "metrics.json").write_text("{}")
    read_or_refuse(lambda: make_tasks(read_config(run / "config.json")), lambda: load_run(run))
    assert (run / "config.json").read_bytes() == content  # here and below: nothing is written over


@fuzz(0.1, 20)
@hypothesis.given(content=damaged({"sha256": "0" * 64, "items_sha256": "1" * 64}))
def test_digests(run, content):
    (run / "data.json").write_bytes(content)
    read_or_refuse(lambda: read_digests(run))
    assert (run / "data.json").read_bytes() == content


@fuzz(0.3, 30)
@hypothesis.given(content=damaged(make_metrics()))
def test_metrics(run, content):
    other, third = run / "other", run / "third"
    for folder, seed in ((other, 1), (third, 3)):
        folder.mkdir(exist_ok=True)
        metrics = make_metrics()
        metrics["seed"] = metrics["config"]["seed"] = seed
        (folder / "metrics.json").write_text(json.dumps(metrics))
    damaged_run = run / "damaged"
    damaged_run.mkdir(exist_ok=True)
    (damaged_run / "metrics.json").write_bytes(content)
    for read in (
        lambda: format_table(read_result(damaged_run / "metrics.json")),
        lambda: render(compare([damaged_run, other], [damaged_run, other])),
        lambda: render_interventions(compare_interventions([other, damaged_run, third])),
    ):
        read_or_refuse(read)
    assert (damaged_run / "metrics.json").read_bytes() == content


@fuzz(0.1, 8)
@hypothesis.given(content=damaged(make_metrics()))
def test_report(run, content):
    folder = run / "reported"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_bytes(content)
    (folder / "report.html").unlink(missing_ok=True)
    is_refused = read_or_refuse(lambda: write_report(folder))
    assert (folder / "report.html").exists() != is_refused
    assert (folder / "metrics.json").read_bytes() == content


@fuzz(0.2, 20)
@hypothesis.given(lines=st.lists(st.sampled_from(LINES).flatmap(damaged), min_size=1, max_size=3), whole=st.booleans())
def test_metric_lines(run, lines, whole):
    folder = run / "lines"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(full_metrics()))
    content = b"\n".join(lines) + b"\n" * whole
    (folder / "metrics.jsonl").write_bytes(content)
    if not read_or_refuse(lambda: read_metric_lines(folder / "metrics.jsonl")) and N_EXAMPLES:
        read_or_refuse(lambda: write_report(folder))  # takes a while
    assert (folder / "metrics.jsonl").read_bytes() == content
