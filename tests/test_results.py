"""Figures of the results pages, of the configs' `Result:` lines and of the README's table are in the JSON of a page."""

import ast
import json
import pathlib
import re
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
STEMS = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "README")
TEMPLATE = "own_data"  # to be copied; it is of no data that a page could tell of
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", TEMPLATE))
ABOUT = ("commit", "machine", "commands", "seeds")
MAX_README = 140
P_ROW = "p, best to next"  # of the demo's table: a best row has a star where its p-value is below .05
# Not part of a name, a path or a cutoff (amazon3, @10); a sign only where nothing stands before it.
FIGURE = re.compile(r"(?<![\w.@])[-+]?(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(?!\w)")


def load(stem: str) -> dict[str, Any]:
    """The JSON of a page, with its fractions as they are written."""
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"), parse_float=Decimal)


def list_numbers(tree: Any) -> Iterator[Decimal]:
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from list_numbers(branch)
    elif not isinstance(tree, str | bool | None):
        yield Decimal(tree)


def find_figures(text: str) -> list[str]:
    """The figures of a text, as written; code is none of it."""
    return FIGURE.findall(re.sub(r"`[^`]*`|\S+/\S+\.\w+|\*", "", text))


def is_known(figure: str, numbers: list[Decimal]) -> bool:
    """Whether one of the numbers is `figure`, once it is rounded to as many digits."""
    shown = Decimal(figure.replace(",", ""))
    return any(number.quantize(shown, ROUND_HALF_UP) == shown for number in numbers)


def list_rows(text: str) -> list[list[str]]:
    """The cells of the Markdown tables' rows, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [n for n, line in enumerate(lines) if set(line) <= set("|-")]
    heads = {m for n in rules for m in (n - 1, n)}
    return [[cell.strip() for cell in line[1:-1].split("|")] for n, line in enumerate(lines) if n not in heads]


def read_result(config: str) -> str:
    """The paragraph `Result: …` of a config's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{config}.py").read_text(encoding="utf-8"))) or ""
    return re.search(r"^Result: (.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize(
    ("figure", "known"),
    [
        (".2369", True),
        (".237", True),
        ("+.2369", True),
        (".2368", False),
        ("-.2369", False),
        ("1,200", True),
        ("1,201", False),
    ],
)
def test_a_figure_is_known_by_the_digits_that_it_shows(figure, known):
    assert is_known(figure, [Decimal(".2369"), Decimal(1200)]) == known


def test_figures_are_told_from_names_and_signs_from_dashes():
    text = "amazon3 `--n=7` recall@10 .5 – -.25, 1,200 of 60–71 (results/city2.json), < .0001, **+3**"
    assert find_figures(text) == [".5", "-.25", "1,200", "60", "71", ".0001", "+3"]


@pytest.mark.parametrize("stem", STEMS)
def test_each_section_says_how_it_was_measured(stem):
    page = load(stem)
    assert set(page) == {*ABOUT, "numbers"}
    for key in ABOUT:
        assert set(page[key]) == set(page["numbers"]), key
        assert all(page[key].values()), key
    assert all(re.fullmatch(r"[0-9a-f]{7,40}", commit) for commit in page["commit"].values())
    assert all(any(list_numbers([section])) for section in page["numbers"].values())


@pytest.mark.parametrize("stem", STEMS)
def test_tables_of_a_page_are_in_its_json(stem):
    numbers = list(list_numbers(load(stem)["numbers"]))
    rows = list_rows((RESULTS / f"{stem}.md").read_text(encoding="utf-8"))
    figures = [(row[0], figure) for row in rows for cell in row[1:] for figure in find_figures(cell)]
    assert figures
    assert [(name, figure) for name, figure in figures if not is_known(figure, numbers)] == []


def test_every_page_has_a_json_and_a_place_in_the_index():
    assert [path.stem for path in sorted(RESULTS.glob("*.json"))] == STEMS
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert [stem for stem in STEMS if f"({stem}.md)" not in index] == []


@pytest.mark.parametrize("config", CONFIGS)
def test_the_result_of_a_config_is_in_the_json_that_it_names(config):
    result = read_result(config)
    named = re.search(r"\(results/(\w+)\.json\)\.$", result)
    assert named, f"configs/{config}.py: the result does not end with (results/PAGE.json)."
    figures, numbers = find_figures(result), list(list_numbers(load(named[1])["numbers"]))
    assert figures
    assert [figure for figure in figures if not is_known(figure, numbers)] == []


def test_the_table_of_the_readme_is_that_of_the_demo():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = load("demo")["numbers"]["table"]
    expected = {name: [f"{x:.4f}"[1:] for x in row.values()] for name, row in numbers.items() if isinstance(row, dict)}
    attained = [row for name, row in expected.items() if name not in ("ceiling", P_ROW)]
    is_sure = [p < 0.05 for p in numbers[P_ROW].values()] if P_ROW in numbers else [True] * len(attained[0])
    best = [max(column) if sure else None for column, sure in zip(zip(*attained, strict=True), is_sure, strict=True)]
    (block,) = re.findall(r"```\n([^`]*@10 .*?)```", text, re.DOTALL)
    shown = {}
    for line in block.splitlines():
        if re.search(r"(?: \.\d{4}\*? *){2}", line):
            name, *cells = re.split(r"\s{2,}|(?<=\*)\s+", line.strip())
            shown[name] = [cell.removesuffix("*") for cell in cells]
            stars = [
                name not in ("ceiling", P_ROW) and cell == top for cell, top in zip(shown[name], best, strict=True)
            ]
            assert [cell.endswith("*") for cell in cells] == stars
    assert shown == expected
    assert f"{numbers['targets']:,} targets" in block
    assert f"{numbers['gap_closed_percent']} % of the gap" in block


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README


@pytest.mark.parametrize("page", ["README.md", *(f"results/{stem}.md" for stem in ("README", *STEMS))])
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#:]+)\)", text) if not target.startswith("docs/")]
    assert [target for target in targets if not ((ROOT / page).parent / target).is_file()] == []
