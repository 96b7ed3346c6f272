"""The folders are the layers: a file imports only from folders above its own in this list, and never in a circle."""

import ast
import graphlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP_LEVEL = ("moerec", "pallas_kernels", "configs", "experiments")

# From the ground up. Of moerec these are its own files and its folders, with all that is in them.
FILES = ("moerec", "moerec.errors", "moerec.files", "moerec.types")
FOLDERS = ("config", "data", "nn", "tasks", "convert", "train", "eval", "serve")
LAYERS = ("pallas_kernels", *FILES, *(f"moerec.{folder}" for folder in FOLDERS), "configs", "experiments")
RANK = {name: rank for rank, name in enumerate(LAYERS)}
# Data and model are above and below each other in the list, but meet in the tasks at the earliest.
APART = {("moerec.nn", "moerec.data")}
MOST_ENTRIES = 12  # of a folder of moerec: files, and folders
# What runs on machines with accelerators, where these are often not installed.
LEAN = ("moerec.config", "moerec.nn", "moerec.tasks", "moerec.train.step", "moerec.train.state", "moerec.train.optim")
SPARED = {"grain", "ml_collections", "array_record", "pyarrow", "orbax", "tensorboardX"}


def find_entry(module: str) -> str | None:
    """The layer that a module lies in (`moerec` itself is only its `__init__`)."""
    parts = module.split(".")
    name = module if module in FILES else ".".join(parts[:2] if parts[0] == "moerec" else parts[:1])
    return name if name in RANK and (name != "moerec" or module == "moerec") else None


def read_imports(source: str, modules: set[str]) -> list[tuple[int, str]]:
    """Line and name of every module of ours (one of `modules`) that `source` imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in joined]
        else:
            continue
        found += [(node.lineno, name) for name in names if name.split(".")[0] in TOP_LEVEL]
    return found


def find_breaches(sources: dict[str, str]) -> list[str]:
    """One line for every import of `sources` (module -> source) that goes sideways or up, or module of no layer."""
    breaches = [f"{module}: in no folder that is a layer" for module in sources if find_entry(module) is None]
    for module, source in sources.items():
        own = find_entry(module)
        for line, target in read_imports(source, set(sources)):
            other = find_entry(target)
            if own is None or other is None or other == own:
                continue
            if own == "moerec":
                continue  # names are found there when they are asked for; what it imports itself is settled in `config`
            if RANK[other] >= RANK[own] or (own, other) in APART:
                breaches.append(f"{module}:{line}: imports {target}, which is not in a folder above")
    return list(dict.fromkeys(breaches))


def find_circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    graph = {
        module: {target for _, target in read_imports(source, set(sources)) if target != module}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def read_tree() -> dict[str, str]:
    """Module name -> source of all our files."""
    sources = {}
    for top in TOP_LEVEL:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def test_imports_go_down():
    assert not find_breaches(read_tree())


def test_no_circles():
    assert not find_circle(read_tree())


def test_kernels_need_nothing_but_jax():
    """But for the extra with which one is compared, imported only where it is asked for."""
    allowed, extra = {"jax", "jaxlib", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names), {"tokamax", "absl"}
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            import_tops = {name.split(".")[0] for name in names}
            assert import_tops <= (allowed if node in tree.body else allowed | extra), f"{path}:{node.lineno}"


def test_folders_are_small():
    """A folder has at most twelve entries, and a folder without anything in it does not exist."""
    folders = [path for path in (ROOT / "moerec").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    for folder in (ROOT / "moerec", *folders):
        entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
        assert 2 <= len(entries) <= MOST_ENTRIES, f"{folder.relative_to(ROOT)}: {len(entries)} entries"


def test_what_accelerators_run_needs_no_input_pipeline():
    """Neither by itself nor by anything that it imports at its top."""
    sources = read_tree()
    todo = [module for module in sources if module.startswith(LEAN)]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        body = [node for node in ast.parse(sources[module]).body if isinstance(node, ast.Import | ast.ImportFrom)]
        top = ast.unparse(ast.Module(body, []))
        names = [name for _, name in read_imports(top, set(sources))]
        todo += [name for name in names if name in sources]
        for node in body:
            tops = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not SPARED & {name.split(".")[0] for name in tops}, f"{module}:{node.lineno}"


def test_tests_mirror_the_tree():
    """A folder of tests for every folder of the library that it names."""
    for folder in (ROOT / "tests").rglob("*"):
        parts = folder.relative_to(ROOT / "tests").parts
        if folder.is_dir() and "__pycache__" not in parts and parts[0] not in ("pallas_kernels", "fuzz", "hf"):
            assert (ROOT / "moerec" / pathlib.Path(*parts)).is_dir(), folder


def test_breaches_are_seen():
    sources = {
        "moerec.errors": "",
        "moerec.config.model": "from moerec.errors import InputError",
        "moerec.tasks.losses": "def late():\n    from moerec.train import loop",
        "moerec.train.loop": "import moerec.tasks.losses, moerec.nn.a",
        "moerec.data.load": "import moerec.tasks.losses",
        "moerec.nn.a": "from moerec.nn import b",
        "moerec.nn.b": "from moerec.data import load",
        "moerec.misplaced": "",
        "experiments.train": "from moerec.train import loop",
        "pallas_kernels.router.api": "from moerec import config",
    }
    assert [line.split(": ")[0] for line in find_breaches(sources)] == [
        "moerec.misplaced",
        "moerec.tasks.losses:2",
        "moerec.data.load:1",
        "moerec.nn.b:1",
        "pallas_kernels.router.api:1",
    ]


def test_circles_are_seen():
    sources = {"moerec.nn.a": "from moerec.nn import b", "moerec.nn.b": "import moerec.nn.c", "moerec.nn.c": ""}
    assert not find_circle(sources)
    assert set(find_circle(sources | {"moerec.nn.c": "import moerec.nn.a"})) == set(sources)
