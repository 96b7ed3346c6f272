"""A file imports only from lower layers; inside a layer only within its own folder; and never in a circle."""

import ast
import graphlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP_LEVEL = ("moerec", "pallas_kernels", "configs", "experiments")

# From the ground up. A row may use the rows above it; a name is a module, or a folder with all that is in it.
LAYERS = (
    ("moerec", "moerec.errors", "pallas_kernels"),
    ("moerec.config", "moerec.types"),
    ("moerec.data", "moerec.train.loop.malloc", "moerec.nn.sharding", "moerec.train.loop.metric_writer", "configs"),
    ("moerec.nn", "moerec.nn.moe.balance", "moerec.eval.metrics", "moerec.train.optim", "moerec.eval.significance"),
    ("moerec.eval.baselines", "moerec.tasks.losses"),
    ("moerec.train.loop.step", "moerec.hf"),
    ("moerec.train.loop.checkpoint", "moerec.serve.profile_store", "moerec.upcycle"),
    (
        "moerec.config.cli",
        "moerec.eval.ranking",
        "moerec.generate",
        "moerec.plan",
        "moerec.eval.report",
    ),
    (
        "moerec.eval.probes.profile_aspects",
        "moerec.eval.audit",
        "moerec.eval.compare",
        "moerec.eval.probes.interventions",
        "moerec.eval.probes.routing",
        "moerec.train.loop",
        "moerec.eval.probes.transfer",
    ),
    ("moerec.serve.profiles", "moerec.eval.per_target"),
    ("moerec.serve.recommender",),
    ("moerec.serve.profile_card", "moerec.eval.evaluate_run"),
    ("moerec.eval.bench.step", "moerec.eval.bench.prepare", "moerec.eval.run"),
    ("experiments",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def find_entry(module: str) -> str | None:
    """The longest name of the table that `module` is or lies in (`moerec` itself is only its `__init__`)."""
    parts = module.split(".")
    prefixes = [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
    return next((name for name in prefixes if name in RANK and (name != "moerec" or module == "moerec")), None)


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
    breaches = [f"{module}: in no layer; give it a place in LAYERS" for module in sources if find_entry(module) is None]
    for module, source in sources.items():
        own = find_entry(module)
        for line, target in read_imports(source, set(sources)):
            other = find_entry(target)
            if own is None or other is None or other == own:
                continue
            if RANK[other] >= RANK[own]:
                breaches.append(f"{module}:{line}: imports {target}, which is not in a lower layer")
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


def test_breaches_are_seen():
    sources = {
        "moerec.errors": "",
        "moerec.config": "from moerec.errors import InputError",
        "moerec.tasks.losses": "def late():\n    from moerec import train",
        "moerec.eval.metrics": "import moerec.tasks.losses",
        "moerec.nn.a": "from moerec.nn import b",
        "moerec.nn.b": "",
        "moerec.train.loop": "import moerec.tasks.losses, moerec.nn.a",
        "moerec.misplaced": "",
        "experiments.train": "from moerec.train.loop import train",
        "pallas_kernels.router.api": "from moerec import config",
    }
    assert [line.split(": ")[0] for line in find_breaches(sources)] == [
        "moerec.misplaced",
        "moerec.tasks.losses:2",
        "moerec.eval.metrics:1",
        "pallas_kernels.router.api:1",
    ]


def test_circles_are_seen():
    sources = {"moerec.nn.a": "from moerec.nn import b", "moerec.nn.b": "import moerec.nn.c", "moerec.nn.c": ""}
    assert not find_circle(sources)
    assert set(find_circle(sources | {"moerec.nn.c": "import moerec.nn.a"})) == set(sources)
