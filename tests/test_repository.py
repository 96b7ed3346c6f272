"""The rules of the repository: installed is what is locked, the tools are content, files are small and plain."""

import ast
import importlib.metadata
import inspect
import io
import json
import pathlib
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import moerec

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_BYTES = 1_000_000
MAX_LINES = 400
MAX_FUNCTION = 60
MAX_LOOP = 120
MAX_COMMAND = 60  # lines of a file of experiments/
MAX_CELL_DEFINITION = 10  # lines of a definition in a notebook
LOOP = ("moerec/train/loop.py", "_run_steps")
MEDIAN_LINES = 150
OURS = {"moerec", "experiments", "configs", "pallas_kernels"}
UNFINISHED = {"TODO", "FIXME", "XXX", "HACK"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = ROOT / "requirements.lock"


def list_files(*suffixes: str) -> list[str]:
    """Paths of all files that git has or would add, of those suffixes."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: no list of the repository's files")
    names = sorted(set(listing.stdout.split("\0")) - {""})
    return [name for name in names if (ROOT / name).is_file() and name.endswith(suffixes or "")]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_pins(python: str) -> dict[str, list[Requirement]]:
    """The pins of the lock that hold on Linux under `python` ("3.11"), by canonical name."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    pins: dict[str, list[Requirement]] = {}
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


def list_installed(requirements: list[str]) -> dict[str, Version]:
    """Distributions that the requirements lead to and that are installed here, by canonical name."""
    found: dict[str, Version] = {}
    seen = set()
    todo = [(Requirement(line), "") for line in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            found[name] = Version(distribution.version)
            todo += [(Requirement(line), wanted) for line in distribution.requires or ()]
    return found


def test_what_is_installed_is_what_is_locked():
    extras = PROJECT["optional-dependencies"]
    installed = list_installed(PROJECT["dependencies"] + [line for lines in extras.values() for line in lines])
    needed = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"] + extras["dev"]}
    assert not needed - installed.keys(), "not installed"
    pins = read_pins("{}.{}".format(*sys.version_info))
    assert not installed.keys() - pins.keys(), "in no line of the lock"
    # A local build (1.0+cpu) is its public version.
    wrong = {name: str(v) for name, v in installed.items() if not pins[name][0].specifier.contains(v, prereleases=True)}
    assert not wrong, "other versions than the lock's"


def test_every_package_that_the_code_imports_is_asked_for():
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + extras["tokamax"] + extras["hf"]
    asked = {canonicalize_name(Requirement(line).name) for line in lines}
    holders = importlib.metadata.packages_distributions()
    breaches = set()
    for name in list_files(".py"):
        if not name.startswith(("moerec/", "experiments/", "configs/", "pallas_kernels/")):
            continue
        for node in ast.walk(ast.parse(read(name))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {module.split(".")[0] for module in modules} - OURS - sys.stdlib_module_names:
                if not asked & {top, *map(canonicalize_name, holders.get(top, []))}:
                    breaches.add(f"{name}: {top}")
    assert not breaches


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_has_one_exact_version_of_everything_asked_for(python: str):
    pins = read_pins(python)
    assert all(len(rows) == 1 and str(rows[0].specifier).startswith("==") for rows in pins.values())
    asked = PROJECT["dependencies"] + [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, asked):
        (pin,) = pins[canonicalize_name(requirement.name)]
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), requirement
    (jax,) = pins["jax"][0].specifier
    assert (Version(jax.version) == Version("0.10.2")) == (python == "3.11")


def test_lock_has_the_libtpu_of_its_jax():
    (pin,) = read_pins("{}.{}".format(*sys.version_info))["libtpu"]
    (version,) = pin.specifier
    lines = [Requirement(line) for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu")]
    wanted = [line for line in lines if line.marker and line.marker.evaluate({"extra": "tpu"})]
    assert wanted
    assert all(line.specifier.contains(version.version) for line in wanted)


def test_lock_names_no_place():
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*( ; [^/@]*)?", line), line
            assert "://" not in line


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_tools_are_content(command: str):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_small():
    big = {name: (ROOT / name).stat().st_size for name in list_files() if (ROOT / name).stat().st_size > MAX_BYTES}
    assert not big


def test_code_is_in_small_pieces():
    breaches = []
    for name in list_files(".py"):
        if name.startswith(("pallas_kernels/", "tests/")):
            continue
        n_lines = read(name).count("\n")
        if n_lines > (MAX_COMMAND if name.startswith("experiments/") else MAX_LINES):
            breaches.append(f"{name}: {n_lines} lines")
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > (MAX_LOOP if (name, node.name) == LOOP else MAX_FUNCTION):
                    breaches.append(f"{name}:{node.lineno}: {node.name} is {size} lines long")
    assert not breaches


def test_the_median_file_is_short():
    lines = sorted(read(name).count("\n") for name in list_files(".py") if name.startswith("moerec/"))
    assert lines[len(lines) // 2] <= MEDIAN_LINES


def test_one_name_is_one_thing():
    """No two public classes of the library share a name."""
    places: dict[str, str] = {}
    for name in list_files(".py"):
        if not name.startswith(("moerec/", "pallas_kernels/")):
            continue
        for node in ast.parse(read(name)).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in places, f"{node.name}: {places[node.name]} and {name}"
                places[node.name] = name


def test_nothing_is_left_unfinished():
    breaches = []
    for name in list_files(".py"):
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
                breaches.append(f"{name}:{node.lineno}: NotImplementedError")
        for token in tokenize.generate_tokens(io.StringIO(read(name)).readline):
            if token.type == tokenize.COMMENT and UNFINISHED & set(re.findall(r"\w+", token.string)):
                breaches.append(f"{name}:{token.start[0]}: {token.string}")
    for name in list_files(".md", ".toml", ".yml", ".yaml", "Makefile"):
        breaches += [f"{name}: {word}" for word in UNFINISHED & set(re.findall(r"\w+", read(name)))]
        breaches += [f"{name}: {place}" for place in re.findall(r"<!--.*?-->", read(name))]
    assert not breaches


def test_no_path_of_a_machine():
    place = re.compile(r"(?<![\w.*$}])/(?:work|farm|root|home|tmp|opt|mnt|Users)/")
    breaches = []
    for name in list_files():
        try:
            lines = read(name).splitlines()
        except UnicodeDecodeError:
            continue
        breaches += [f"{name}:{n}: {line.strip()[:80]}" for n, line in enumerate(lines, 1) if place.search(line)]
    assert not breaches


def test_notebooks_are_stripped_and_define_little():
    for name in list_files(".ipynb"):
        for cell in json.loads(read(name))["cells"]:
            if cell["cell_type"] != "code":
                continue
            assert not cell["outputs"], f"{name} has outputs: run nbstripout"
            assert cell["execution_count"] is None, f"{name} has counts: run nbstripout"
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    size = (node.end_lineno or node.lineno) - node.lineno + 1
                    assert size <= MAX_CELL_DEFINITION, f"{name}: {node.name} belongs into moerec"


def test_configs_say_how_to_run_them():
    for name in list_files(".py"):
        if not name.startswith("configs/") or name.endswith("__init__.py"):
            continue
        text = ast.get_docstring(ast.parse(read(name))) or ""
        assert re.search(rf"python -m experiments\.\w+ .*--config={re.escape(name)}\b", text), f"{name}: no command"
        assert re.search(r"^Hardware: \S", text, re.MULTILINE), f"{name}: no line 'Hardware: …'"
        assert re.search(r"^Result: \S", text, re.MULTILINE), f"{name}: no line 'Result: …'"


def test_changelog_has_a_place_for_the_next_change():
    headings = [line for line in read("CHANGELOG.md").splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"


def test_continuous_integration_is_the_two_commands():
    lines = [line for line in read(".ci/run").splitlines() if line and not line.startswith("#")]
    assert lines[-2:] == ["make test", "make test-hf"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_actions_of_continuous_integration_are_fixed_by_commit():
    """A tag can be moved to other code; the version stands in a comment."""
    uses = [line.split("uses:")[1].strip() for line in read(".github/workflows/ci.yml").splitlines() if "uses:" in line]
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_every_package_that_is_asked_for_is_imported():
    """What nothing imports is only one more package to install, and one more that may be attacked."""
    names = {re.split(r"[\[<>=]", line)[0] for line in PROJECT["dependencies"]}
    code = "".join(read(name) for name in list_files(".py") if name.startswith(("moerec/", "experiments/")))
    imported = {canonicalize_name(name) for name in re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE)}
    modules = {"orbax-checkpoint": "orbax", "absl-py": "absl", "tzdata": "zoneinfo"}
    assert not {name for name in names if canonicalize_name(modules.get(name, name)) not in imported}


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_of_the_pages_calls_what_there_is(page):
    """Names that the blocks take from the library, methods of a recommender, and what these are called with."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moerec":
                assert hasattr(moerec, node.attr), node.attr
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "recommender":
                    taken = inspect.signature(getattr(moerec.Recommender, node.func.attr)).parameters
                    assert {word.arg for word in node.keywords} <= taken.keys()
