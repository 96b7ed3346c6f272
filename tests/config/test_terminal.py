"""What reaches a terminal, a page or a JSON line from names in the data, and how wide the one function's reach is."""

import io
import json
import logging
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.config import cli
from moerec.config.terminal import SafeStream, printable, safe_output
from moerec.data.prepare.tables_to_shards import PrepareReport, describe_report
from moerec.errors import InputError
from moerec.eval.audit.report import AuditReport, AuditRow
from moerec.eval.compare import Difference, format_rows
from moerec.eval.report import format_table, write_report
from moerec.serve.profile_card import Aspect, ContextEffect, ProfileCard, render_card
from tests.eval.test_report import full_metrics, make_run

NASTY = "\x1b[31m\x07\x9b2J\u2028\u202e\u2066\x7f\r\nx\ud800\U000e0041"
# Categories of Unicode that a terminal obeys: controls, separators of lines, halves of surrogate pairs.
OBEYED = {"Cc", "Zl", "Zp", "Cs"}
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # of directions, in Unicode's bidi classes


def is_safe(text: str) -> bool:
    return not any(
        (unicodedata.category(c) in OBEYED and c not in "\n\t") or unicodedata.bidirectional(c) in TURNS for c in text
    )


@given(st.text(st.characters()))
def test_nothing_that_a_terminal_obeys_is_left_and_json_means_the_same(text):
    shown = printable(text)
    assert is_safe(shown)
    assert not set(shown) & set("\n\t")
    assert printable(shown) == shown
    whole = json.dumps({"text": text}, ensure_ascii=False)
    assert json.loads(printable(whole)) == {"text": text}


@given(st.text(st.sampled_from("aé中𝄞 —'\u0301\u200d")))
def test_text_stays(text):
    assert printable(text) == text


def test_what_an_encoding_lacks_is_written_out():
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="latin-1"))
    print("é中𝄞", file=stream, flush=True)
    assert raw.getvalue() == b"\xe9\\u4e2d\\ud834\\udd1e\n"


def test_a_carriage_return_alone_stays():
    out = io.StringIO()
    stream = SafeStream(out)
    for part in ("\r", "step 1", "\r", "step\r2\n"):
        stream.write(part)
    assert out.getvalue() == "\rstep 1\rstep\\u000d2\n"


def test_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with safe_output():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_logs_of_libraries_are_safe_though_they_hold_on_to_their_stream(monkeypatch):
    out, factory = io.StringIO(), logging.getLogRecordFactory()
    handler, logger = logging.StreamHandler(out), logging.getLogger("a.library")
    logger.addHandler(handler)
    try:
        with safe_output():
            logger.warning("read %s: %d", NASTY, 3)
            logger.warning("100 % of it")
            monkeypatch.setattr(logging, "raiseExceptions", False)
            logger.warning("read %d", NASTY)  # logging's own way with it: it is left out
    finally:
        logger.removeHandler(handler)
    assert is_safe(out.getvalue())
    assert out.getvalue().count("\n") == 2 + NASTY.count("\n")
    assert logging.getLogRecordFactory() is factory


def test_a_command_prints_messages_results_and_errors_safely(capsys):
    def main(config, flags):
        print(NASTY)
        print(NASTY, file=sys.stderr)
        return {"name": "\x9b\u2028\u202e\x1b"}

    assert cli.execute(main, ["command", "--json"], config_type=None, workdir=False) == 0
    out, err = capsys.readouterr()
    assert is_safe(out)
    assert is_safe(err)
    assert json.loads(out.splitlines()[-1]) == {"name": "\x9b\u2028\u202e\x1b"}

    def fail(config, flags):
        raise InputError(f"events.csv:3: {NASTY}")

    assert cli.execute(fail, ["command"], config_type=None, workdir=False) == 2
    err = capsys.readouterr().err
    assert is_safe(err)
    assert err.count("\n") == 1


def test_a_long_name_does_not_fill_the_screen(capsys):
    def fail(config, flags):
        raise InputError(f"events.csv:3: {'x' * 100_000}: no such user")

    assert cli.execute(fail, ["command"], config_type=None, workdir=False) == 2
    err = capsys.readouterr().err
    assert len(err) < 2000
    assert err.startswith("error: events.csv:3: xxx")
    assert err.endswith("xxx: no such user\n")


def make_card(text: str) -> ProfileCard:
    effect = ContextEffect(text, text, text, {text: 1}, {text: 0.5})
    aspect = Aspect(0, 1.0, [2.0], {text: 1.5}, [0.5])
    times = ["Sat 2024-05-04 20:00"]
    return ProfileCard(text, {text: text}, {text: 3}, times, {text: text}, [aspect], [0.5], text, [effect])


def make_audit(text: str) -> AuditReport:
    return AuditReport((AuditRow("repeats", text, 0.1, 0.2, False, text),))


def make_prepared(text: str) -> PrepareReport:
    counts = {"users": 1, "items": 1, "events": 1}
    return PrepareReport("out", 1, 1, 1, {text: counts}, {text: {"empty user": 1}}, {}, 0.1, False, notes=(text,))


def test_names_do_not_change_the_lines_of_a_table():
    metrics = full_metrics()
    metrics["config"]["name"] = NASTY
    for part in ("in_service", "union"):
        for table in (metrics["test"], metrics["ceiling"], *metrics["baselines"].values()):
            table[part] = {NASTY if name == "samokat" else name: row for name, row in table[part].items()}
    row, other = (Difference(name, 0.1, 0.2, 0.1, 0.0, 0.2, 0.5, 1) for name in (NASTY, "a"))
    for shown, plain in (
        (format_table(metrics), format_table(full_metrics())),
        tuple("\n".join(format_rows([x], (x.part, x.part), [2], "better")) for x in (row, other)),
        (render_card(make_card(NASTY)), render_card(make_card("a"))),
        (make_audit(NASTY).to_text(), make_audit("a").to_text()),
        (describe_report(make_prepared(NASTY)), describe_report(make_prepared("a"))),
    ):
        assert is_safe(shown)
        assert shown.count("\n") == plain.count("\n")


def test_a_page_holds_no_control_characters(tmp_path):
    metrics = full_metrics()
    metrics["config"]["name"] = NASTY.replace("\ud800", "")
    metrics["slices"]["service"] = {NASTY.replace("\ud800", ""): {"ndcg@10": 0.5, "n": 3}}
    page = write_report(make_run(tmp_path, metrics)).read_text()
    assert is_safe(page)
    assert "\\u001b[31m" in page


@pytest.mark.parametrize("text", ["a\tb", "a\nb"])
def test_line_ends_and_tabs_stay_where_they_are_ours(text):
    assert printable(text, keep="\n\t") == text
    assert printable(text) in ("a\\u0009b", "a\\u000ab")
