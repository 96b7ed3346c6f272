"""The text table and the offline page, against the numbers they were made from."""

import html.parser
import json
import re

import pytest

from moerec.config import Config, cli
from moerec.errors import InputError
from moerec.eval.report import format_table, write_report
from moerec.files import to_plain

SERVICES = ("samokat", "megamarket", "kuper")


def result(scale, services=SERVICES):
    """Distinct numbers everywhere, so that a mix-up of cells shows."""

    def row(k):
        x = scale * (1 + 0.01 * k)
        return {
            "recall@5": x * 1.2,
            "recall@10": x * 1.9,
            "ndcg@5": x * 0.9,
            "ndcg@10": x,
            "mrr@10": x * 0.7,
            "mrr": x * 0.8,
            "n": 100 + k,
        }

    union = {name: row(20 + k) for k, name in enumerate(services)}
    return {"in_service": {name: row(k) for k, name in enumerate(services)}, "union": {**union, "all": row(30)}}


def add_tests(metrics, p_holm=0.004):
    """The tests of the best rows, all with this p-value or with that of their column (`(part, key, metric)`)."""
    rows = {None: metrics["test"], **metrics["baselines"]}
    best = {"union": {"all": {}}, "in_service": {name: {} for name in metrics["test"]["in_service"]}}
    for part, keys in best.items():
        for key, tests in keys.items():
            for metric in ("ndcg@10", "recall@10", "mrr@10")[: 3 if key == "all" else 2]:
                values = {name: row[part][key][metric] for name, row in rows.items()}
                first, second = sorted(values, key=lambda name: -values[name])[:2]
                p = p_holm if isinstance(p_holm, float) else p_holm[part, key, metric]
                tests[metric] = {"row": first, "next": second, "difference": 0.1, "p_value": p / 2, "p_holm": p}
    return {**metrics, "best": best}


def make_metrics(services=SERVICES):
    bare = {
        "config": to_plain(Config(name="demo")),
        "seed": 3,
        "steps": 2000,
        "wall_s": 301.0,
        "tokens_per_s": 38123.0,
        "n_params": 412345,
        "n_active_params": 412345,
        "test": result(0.1, services),
        "baselines": {"popularity": result(0.03, services), "item_knn": result(0.08, services)},
    }
    return bare


def full_metrics():
    metrics = make_metrics()
    metrics["ceiling"] = result(0.14)
    metrics["intervals"] = {"union": {"all": {"ndcg@10": [0.0981, 0.1099]}}, "in_service": {}}
    metrics["slices"] = {"history": {"5-9": {"ndcg@10": 0.0512, "n": 1234}, "10-19": {"ndcg@10": 0.0734, "n": 77}}}
    metrics["dataset"] = {"n_users": 1999, "n_events": 161234, "n_items": 1801, "services": list(SERVICES)}
    metrics["valid"] = {"step": 1600, "union/ndcg@10": 0.1}
    return metrics


LINES = [{"step": 100 * k, "loss": 9 - 0.1 * k, "learning_rate": 1e-3, "slots_per_s": 3e4} for k in range(1, 21)]
LINES += [{"step": 400 * k, "valid/union/ndcg@10": 0.02 * k, "valid/union/recall@10": 0.04 * k} for k in range(1, 6)]


def make_run(folder, metrics, lines=LINES):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps(metrics["config"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(html.parser.HTMLParser):
    """Cells of the tables, ids, and whether the tags are balanced."""

    VOID = ("meta", "path", "use", "rect", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.rows, self.bold = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "b", "small") and "tr" in self.open:
            self.rows[-1][-1] += data
            if self.open[-1] == "b":
                self.bold.append(data)


def four_digits(value):
    return f"{value:.4f}"[1:]


def test_the_text_table_holds_the_numbers_in_their_places():
    metrics = add_tests(full_metrics())
    lines = format_table(metrics).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split("  ")[0] for line in lines[2:6]] == ["demo", "popularity", "item kNN", "ceiling"]
    named = {"demo": metrics["test"], "ceiling": metrics["ceiling"], **metrics["baselines"]}
    for line, row in zip(lines[2:6], (named[k] for k in ("demo", "popularity", "item_knn", "ceiling")), strict=True):
        want = [row["union"]["all"][name] for name in ("ndcg@10", "recall@10", "mrr@10")]
        want += [row["in_service"][name][metric] for name in SERVICES for metric in ("ndcg@10", "recall@10")]
        assert re.findall(r"\.\d{4}", line) == [four_digits(value) for value in want]
    assert [line.count("*") for line in lines[2:6]] == [9, 0, 0, 0]
    assert lines[6].startswith("p, best to next")
    assert re.findall(r"\.\d{4}", lines[6]) == [".0040"] * 9
    low, reached, high = (0.03 * 1.3, 0.1 * 1.3, 0.14 * 1.3)
    assert f"{100 * (reached - low) / (high - low):.0f} % of the gap" in lines[-1]
    assert lines[-4:-1] == [
        "130 targets; seen items are no candidates",
        "p: best row except the oracle against the next best, paired over targets only (one seed); * p < .05",
        "   after Holm's correction for 9 columns",
    ]


def test_stars_and_bold_stand_where_the_test_is_below_the_level_alone(tmp_path):
    """Values that lie apart are no reason: .198 of the union's NDCG, and .05, are not below."""
    metrics = full_metrics()
    columns = [("union", "all", metric) for metric in ("ndcg@10", "recall@10", "mrr@10")]
    columns += [("in_service", name, metric) for name in SERVICES for metric in ("ndcg@10", "recall@10")]
    p_values = dict(zip(columns, (0.198, 0.0499, 0.05, 0.0009, 1.0, 0.051, 0.0333, 0.2, 0.3), strict=True))
    metrics["baselines"]["item_knn"]["in_service"]["kuper"]["recall@10"] = 0.9
    metrics["baselines"]["item_knn"]["in_service"]["megamarket"]["recall@10"] = 0.9
    p_values["in_service", "megamarket", "recall@10"] = 0.0123
    metrics = add_tests(metrics, p_values)
    demo, _, knn, ceiling, p_row = format_table(metrics).splitlines()[2:7]
    cells = {"demo": demo.split()[1:], "knn": knn.split()[2:]}
    assert [cell.endswith("*") for cell in cells["demo"]] == [p < 0.05 for p in p_values.values()][:6] + [False] * 3
    assert [cell.endswith("*") for cell in cells["knn"]] == [False] * 6 + [True, False, False]
    assert "*" not in ceiling
    assert [float(cell) for cell in p_row.split()[4:]] == list(p_values.values())
    page = Page(write_report(make_run(tmp_path / "run", metrics)).read_text())
    bold = {value.rstrip("*") for row in cells.values() for value in row if value.endswith("*")}
    assert bold == set(page.bold) - {demo.split()[1].rstrip("*")}  # the first sentence has the model's in bold
    row = next(row for row in page.rows if row[0] == "p, best to next")
    assert [float(cell) for cell in row[1:]] == list(p_values.values())


def test_a_run_that_is_older_than_its_tests_marks_nothing_and_says_so(tmp_path):
    metrics = full_metrics()
    for row in (metrics["test"], metrics["ceiling"], *metrics["baselines"].values()):
        del row["union"]["all"]["mrr@10"]
    text = format_table(metrics)
    assert "*" not in text
    assert "no row is marked: this run is older than the tests of the best row" in text
    assert four_digits(metrics["test"]["union"]["all"]["mrr"]) in text
    assert "MRR is not cut off" in text
    page = write_report(make_run(tmp_path / "run", metrics)).read_text()
    assert "No row is bold: this run is older than the tests of the best row." in page
    assert "MRR is not cut off." in page
    assert "MRR is not cut off" not in format_table(full_metrics())


def test_many_services_wrap_and_none_is_lost():
    services = [f"a service with a long name {k}" for k in range(9)]
    metrics = make_metrics(services)
    metrics["baselines"]["a_baseline_whose_name_is_much_too_long_for_the_table"] = result(0.2, services)
    text = format_table(metrics)
    assert max(map(len, text.splitlines())) <= 100
    for k in range(9):
        assert four_digits(metrics["test"]["in_service"][services[k]]["ndcg@10"]) in text
    assert text.count("demo") > 1
    assert "gap" not in text


def test_a_model_without_rivals_is_not_the_best():
    metrics = full_metrics()
    metrics["baselines"], metrics["best"] = {}, {}
    text = format_table(metrics)
    assert "*" not in text
    assert "p, best" not in text
    assert "marked" not in text
    assert "130 targets; seen items are no candidates" in text


def test_missing_numbers_are_dashes_and_so_are_tests_that_were_not_made():
    metrics = make_metrics()
    metrics["config"] = "demo"
    metrics["baselines"] = {"other": {"union": {"all": {"ndcg@10": 1.0}}}}
    test = {"row": "other", "next": None, "difference": 0.9, "p_value": 0.001, "p_holm": 0.001}
    metrics["best"] = {"union": {"all": {"ndcg@10": test}}}
    demo, other, p_row = format_table(metrics).splitlines()[2:5]
    assert "*" not in demo
    assert other.split()[1:] == ["1.000*", *["–"] * 8]
    assert p_row.split()[4:] == [".0010", *["–"] * 8]


def test_the_page_holds_the_same_numbers_and_marks_the_best(tmp_path):
    metrics = full_metrics()
    metrics["baselines"]["item_knn"]["in_service"]["kuper"]["ndcg@10"] = 0.5
    metrics["paired"] = {"item_knn": {"difference": 0.026, "p_value": 0.0321}, "popularity": {"p_value": 0.0001}}
    metrics = add_tests(metrics)
    text = write_report(make_run(tmp_path / "run", metrics)).read_text()
    page = Page(text)
    assert page.open == []
    rows = {row[0]: row[1:] for row in page.rows[2:6]}
    assert list(rows) == ["demo", "popularity", "item kNN", "ceiling"]
    assert rows["demo"][0] == ".1300.0981–.1099"
    assert rows["item kNN"][-2] == ".5000"
    assert rows["ceiling"][2] == four_digits(0.14 * 1.3 * 0.7)
    note = next(part for part in text.split("<p") if "attainable" in part)
    assert "no candidates. The last row has the p-value" in note
    assert (
        "item kNN, reaches .1040 (paired over the targets of this one seed, p = .0321, of this comparison alone)."
        in text
    )
    assert [len(row) for row in rows.values()] == [9] * 4
    assert ".5000" in page.bold
    assert four_digits(metrics["test"]["in_service"]["kuper"]["ndcg@10"]) not in page.bold
    for fact in (
        "2,000",
        "5m01s",
        "38k",
        "412k",
        "1,999",
        "161,234",
        "1,801",
        "64% of the gap closed",
        ".0512",
        "1,234",
    ):
        assert fact in text
    assert page.tags.count("svg") == 5  # three curves, one slice and the model
    assert "<section><h3>config.data.city</h3>" in text


def test_the_page_stands_alone(tmp_path):
    text = write_report(make_run(tmp_path / "run", full_metrics())).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "onload", "onclick")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href"))
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text)) <= set(page.ids)
    assert not re.search("#00000[1-5]", text)  # every drawn colour is one of the page
    assert str(tmp_path) not in text


def test_names_from_outside_are_text(tmp_path):
    evil = "<script>alert(1)</script>&$x^"
    metrics = full_metrics()
    metrics["config"]["name"] = evil
    metrics["config"]["data"]["tables"]["folder"] = evil
    metrics["test"]["in_service"][evil] = metrics["test"]["in_service"].pop("kuper")
    metrics["baselines"][evil] = result(0.01)
    metrics["slices"] = {evil: {evil: {"ndcg@10": 0.1, "n": 3}, "коты 猫": {"ndcg@10": 0.1, "n": 3}}}
    page = Page(write_report(make_run(tmp_path / "run", metrics)).read_text())
    assert "script" not in page.tags
    assert page.open == []
    assert page.rows[2][0] == evil


def test_rendering_again_changes_nothing(tmp_path):
    run = make_run(tmp_path / "run", full_metrics())
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "metrics.json",
        "metrics.jsonl",
        "report.html",
    ]


def test_a_bare_run_has_a_page_too(tmp_path):
    metrics = make_metrics()
    del metrics["baselines"]
    text = write_report(make_run(tmp_path / "run", metrics, lines=[{"step": 1, "loss": None}])).read_text()
    assert "of the gap closed" not in text
    assert text.count("<svg") == 1  # the model
    assert "best baseline" not in text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "config.json").unlink()
    assert write_report(tmp_path / "run").read_text() == text


def test_a_long_curve_keeps_its_end_and_stays_small(tmp_path):
    lines = [{"step": k, "loss": 1 + 1 / k} for k in range(1, 30_002)]
    text = write_report(make_run(tmp_path / "run", make_metrics(), lines)).read_text()
    assert len(text) < 120_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"metrics\.json: no such file"),
        ("{", r"metrics\.json: is no JSON file"),
        ("[]", r"metrics\.json: holds no JSON object"),
        ('{"test": {}}', r"metrics\.json: is no result of a run \(test\.union\.all\.ndcg@10 is missing\)"),
    ],
)
def test_a_defective_run_is_refused_with_the_field(content, words, tmp_path):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path, capsys):
    from experiments import report

    run = make_run(tmp_path / "run", full_metrics())
    assert cli.execute(report.main, ["report", f"--workdir={run}", "--json"], config_type=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run / "report.html")
    assert json.loads(lines[-1]) == {"report": str(run / "report.html")}
    assert cli.execute(report.main, ["report", f"--workdir={tmp_path}"], config_type=None) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/metrics.json: no such file")


def test_first_events_stand_beside_popularity(tmp_path):
    metrics = full_metrics()
    assert "First events" not in write_report(make_run(tmp_path / "without", metrics)).read_text()
    first = {"model": result(0.21), "popularity_by_hour": result(0.07), "difference": 0.0912, "p_value": 0.0006}
    metrics["probes"] = {"first_events": first}
    page = write_report(make_run(tmp_path / "with", metrics)).read_text()
    table = page[page.index("First events") :].split("</table>")[0]
    assert "+0.0912, p = 0.0006" in table
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    assert rows[0] == ["", "union", *SERVICES]
    for name, title, cells in (
        ("model", "demo", rows[1]),
        ("popularity_by_hour", "popularity by service and hour", rows[2]),
    ):
        found = [first[name]["union"]["all"], *(first[name]["in_service"][service] for service in SERVICES)]
        assert cells[0] == title
        assert [float(cell) for cell in cells[1:]] == pytest.approx([x["recall@10"] for x in found], abs=1e-4)


def test_services_that_vanish_from_the_union_are_named_under_the_table():
    metrics = full_metrics()
    first, second, *_ = metrics["test"]["in_service"]
    assert "no target of" not in format_table(metrics)
    metrics["test"]["union"] |= {first: {"n": 1234, "recall@10": 0.0}, second: {"n": 9, "recall@10": 0.001}}
    assert f"among all services' items no target of {first} (1,234) is among the first ten" in format_table(metrics)
