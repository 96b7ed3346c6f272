"""The documentation: the site builds without a warning, and what the pages name is there."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from moerec.config import Config
from moerec.types import Batch, Request, Target

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "results").rglob("*.md"))]
OURS = ("experiments", "moerec", "pallas_kernels")
COMMON_FLAGS = {"config", "workdir", "json", "help", "helpfull", "plugin", "print_config", "compile_cache"}
FILE = re.compile(r"\.(json|jsonl|log|npz|html|py|parquet)$")


def name_page(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: pathlib.Path) -> str:
    return page.read_text(encoding="utf-8")


def list_fields(group, place: str = "") -> set[str]:
    """Names of all fields and groups of a config: `model`, `model.moe`, `model.moe.layers`."""
    found = set()
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        found.add(place + field.name)
        if dataclasses.is_dataclass(value):
            found |= list_fields(value, f"{place}{field.name}.")
    return found


def list_commands(text: str) -> list[tuple[str, str]]:
    """Of every command `python -m MODULE …` of ours on a page the module and its arguments; a backslash joins lines."""
    found = re.findall(r"python -m ([\w.]+)([^\n`]*)", re.sub(r"\\\n\s*", "", text))
    return [(name, rest) for name, rest in found if name.split(".")[0] in OURS and not name.endswith(".NAME")]


FIELDS = list_fields(Config())
each_page = pytest.mark.parametrize("page", PAGES, ids=name_page)


def test_the_site_builds_without_a_warning(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice of the theme's, about later releases
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


def test_every_page_is_in_the_navigation():
    # Read as text, since YAML tags of plugins need a loader of their own.
    navigation = re.search(r"^nav:\n((?:  .*\n)+)", read(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert navigation
    named = re.findall(r": (\S+\.md)$", navigation[1], re.MULTILINE)
    files = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    assert sorted(named) == sorted(str(path.relative_to(ROOT / "docs")) for path in files)


@each_page
def test_commands_are_there_and_have_the_flags(page):
    breaches = []
    for module, arguments in list_commands(read(page)):
        path = ROOT / (module.replace(".", "/") + ".py")
        if not path.is_file():
            breaches.append(f"{module}: no such module")
            continue
        source = read(path)
        if "NEW_TABLES" in source:
            source += read(ROOT / "moerec" / "serve" / "__init__.py")
        for flag in re.findall(r"(?<=\s)--(\w+)", arguments.split(" #")[0]):
            is_there = flag in COMMON_FLAGS or f'"{flag}"' in source or f'"--{flag}"' in source
            breaches += [] if is_there else [f"{module}: no flag --{flag}"]
    for module in re.findall(r"\bexperiments\.([a-z]\w*)", read(page)):
        breaches += [] if (ROOT / "experiments" / f"{module}.py").is_file() else [f"experiments.{module}"]
    assert not breaches


@each_page
def test_fields_on_the_command_line_are_of_the_config(page):
    named = re.findall(r"--(?:no)?config\.([a-z_][\w.]*)", read(page))
    groups = {field.rpartition(".")[0] for field in FIELDS}
    assert not [name for name in named if name not in FIELDS or name in groups]


@pytest.mark.parametrize("page", DOCS, ids=name_page)
def test_fields_in_the_text_are_of_the_config(page):
    tops = {field.split(".")[0] for field in FIELDS}
    named = re.findall(r"`([a-z]+(?:\.[a-z]\w*)+)(?:\.\*|=[^`]*)?`", read(page))
    wrong = [name for name in named if name.split(".")[0] in tops and not FILE.search(name) and name not in FIELDS]
    assert not wrong


@pytest.mark.parametrize("page", DOCS, ids=name_page)
def test_python_in_the_text_compiles(page):
    for block in re.findall(r"^```python\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE):
        assert compile(block, page.name, "exec")


def test_the_constants_of_own_data_are_those_of_its_config():
    told = re.findall(r"^ *\| `([A-Z_]+)` \|", read(ROOT / "docs/own_data.md"), re.MULTILINE)
    assert told == re.findall(r"^([A-Z_]+) = ", read(ROOT / "configs/own_data.py"), re.MULTILINE)


def test_the_batch_of_the_text_is_the_batch():
    rows = re.findall(r"^\| ((?:`[\w.\[\]]+_B\w+`(?:, )?)+) \|", read(ROOT / "docs/architecture.md"), re.MULTILINE)
    own = [name for name in Batch._fields if name not in ("request", "targets")]
    nested = [*(f"request.{name}" for name in Request._fields), *(f"targets[task].{name}" for name in Target._fields)]
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted([*own, *nested])
