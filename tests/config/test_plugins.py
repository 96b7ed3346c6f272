"""Parts of one's own: a loss in a module outside the tree, as commands find it; a memory, a baseline and a task."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import PersonalConfig
from moerec.config.python_file import import_plugin
from moerec.data.load import load_data
from moerec.errors import InputError
from moerec.eval.baselines import BASELINES, register_scorer
from moerec.eval.evaluate_run import run_experiment
from moerec.nn.profile import ema_memory, register_memory
from moerec.nn.profile.memory import MEMORIES
from moerec.serve.explained import recommend
from moerec.serve.request import RecommendRequest
from moerec.tasks import Draws, TaskSums, register_loss, register_task
from moerec.tasks.base import TASKS
from moerec.tasks.losses import LOSSES
from moerec.train.run_dir import load_run
from moerec.types import Target
from tests.tiny import make_config

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = """from pathlib import Path
import jax.numpy as jnp
from moerec.tasks import draw_shared, register_loss

Path(__file__).with_name("imported").touch()

@register_loss("focal", draw=draw_shared)
def focal(targets, candidates, config):
    log_p_S = targets.log_prob(candidates)
    return -jnp.sum(targets.weight_S * (1 - jnp.exp(log_p_S)) ** 2 * log_p_S)
"""
CONFIG = """import dataclasses
import focal_loss
from moerec.config import LossConfig
from tests.tiny import make_config

def get_config():
    config = make_config(steps=2, eval_every=2, log_every=1)
    model = dataclasses.replace(config.model, n_layers=1, dropout=0.0, pointer="all")
    loss = LossConfig(kind="focal", n_negatives=20, chunk=64)
    return dataclasses.replace(config, model=model, loss=loss, baselines=())
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "focal_loss.py").write_text(PLUGIN)
    (folder / "own.py").write_text(CONFIG)
    return folder


def call(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m experiments.NAME` in a folder outside the tree, whose modules Python finds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def trained(outside):
    """Runs of one and of two microbatches, with pointers."""
    for n in (1, 2):
        flags = ("--config=own.py", f"--workdir=run{n}", f"--config.train.n_microbatches={n}")
        done = call(outside, "train", *flags)
        assert done.returncode == 0, done.stderr
    return outside


def test_a_loss_from_outside_is_trained_with_in_microbatches_and_with_pointers(trained):
    whole, parts = (losses(trained / f"run{n}") for n in (1, 2))
    assert len(whole) == 2
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert 0 < whole[0] < np.log(90)  # an estimate of the loss among all items
    assert json.loads((trained / "run2" / "config.json").read_text())["loss"]["kind"] == "focal"


def test_a_run_imports_nothing_by_itself_and_answers_when_the_module_is_named(trained):
    (trained / "imported").unlink()
    refused = call(trained, "recommend", "--workdir=run2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: config.loss.kind: 'focal' is none of full_softmax, ")
    assert "a loss of one's own needs --plugin=MODULE" in refused.stderr
    assert not (trained / "imported").exists()
    done = call(trained, "recommend", "--workdir=run2", "--plugin=focal_loss", "--json", "--top_k=3")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["items"]) == 3
    assert (trained / "imported").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "--plugin=own_part: no such module"),
        ("import not_there_at_all", "--plugin=own_part: no module not_there_at_all"),
        ("1 / 0", "--plugin=own_part: ZeroDivisionError"),
        ("def f(:", "--plugin=own_part: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_in_a_line(tmp_path, monkeypatch, text, words):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_part", raising=False)
    if text is not None:
        (tmp_path / "own_part.py").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        import_plugin("own_part")
    assert "\n" not in str(error.value)


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is gone afterwards."""
    for registry in (BASELINES, LOSSES, MEMORIES, TASKS):
        monkeypatch.setattr(registry, "_found", dict(registry._found))


def test_a_name_is_taken_once(registries):
    @register_loss("mine")
    def mine(targets, candidates, config):
        return targets.sum_nll(candidates)

    register_loss("mine")(mine)  # as a config file that is read twice does
    with pytest.raises(InputError, match=r"^loss 'mine': the name is taken by .*\.mine$"):

        @register_loss("mine")
        def other(targets, candidates, config):
            return targets.sum_nll(candidates)


class Flat:
    """Scores the items of even numbers above the others."""

    def score(self, dataset, targets, histories):
        return np.tile(np.arange(dataset.catalogue.n_items) % 2 == 0, (len(targets), 1)).astype(float)


class SmallStates:
    """States of events of the first service are to be small."""

    name = "small_states"

    def check(self, config):
        pass

    def render(self, packed):
        batch = packed.batch
        return Target(np.zeros_like(batch.item_BT), (batch.service_BT == 0).astype(np.float32))

    def constants(self, catalog, config):
        return np.float32(0.5)

    def binds_catalog(self, config):
        return False

    def domains(self, target, catalog):
        return None

    def draw(self, key, batch, catalog, constants, config):
        return Draws(shared=constants)

    def loss(self, model, outputs, batch, catalog, draws, config):
        weight_BT = batch.targets[self.name].weight_BT
        size = jnp.sum(weight_BT * jnp.mean(outputs.state_BTD**2, axis=-1))
        return TaskSums(draws.shared * size, jnp.sum(weight_BT), {"size": size})


def test_a_memory_a_baseline_and_a_task_of_ones_own_are_used_by_name(registries, tmp_path):
    register_memory("own_ema")(lambda sizes, chunk=64: ema_memory(sizes, chunk))
    register_scorer("even_items")(lambda dataset, split_ids: Flat())
    register_task("small_states")(SmallStates)
    config = make_config(steps=4, eval_every=4, log_every=1)
    personal = PersonalConfig(layers=(0,), n_aspects=2, d_memory=4, memory="own_ema")
    model = dataclasses.replace(config.model, n_layers=1, personal=personal, dropout=0.0)
    config = dataclasses.replace(config, model=model, baselines=("even_items",))
    run_experiment(config, tmp_path / "plain")
    both = dataclasses.replace(config, tasks=("next_event", "small_states"))
    metrics = run_experiment(both, tmp_path / "both")
    n_items = load_data(config.data, tmp_path / "data").dataset.catalogue.n_items
    # Half of the items are level with the target, and none or half are above it.
    assert 0 < metrics["baselines"]["even_items"]["union"]["all"]["recall@10"] < 2 * 10 / (n_items / 2)
    plain, found = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "both")
    )
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)  # the first task draws what it drew alone
    assert found[1]["loss"] != plain[1]["loss"]
    assert not [name for name in plain[0] if "small_states" in name]
    sizes = [line["small_states/size"] for line in found if "loss" in line]
    assert sizes[-1] < sizes[0]
    opened = load_run(tmp_path / "both")
    answer = recommend(opened, str(opened.data.dataset.users[0]), RecommendRequest(), 3)
    assert len(answer.relevance) == 2 * personal.n_scales + 1


def test_without_them_their_names_are_refused(tmp_path):
    config = make_config()
    personal = PersonalConfig(layers=(1,), memory="own_ema")
    for field, changes in (
        ("loss.kind", {"loss": dataclasses.replace(config.loss, kind="focal")}),
        ("model.personal.memory", {"model": dataclasses.replace(config.model, personal=personal)}),
        ("baselines", {"baselines": ("even_items",)}),
        ("tasks", {"tasks": ("small_states",)}),
    ):
        with pytest.raises(InputError, match=rf"^config\.{field}: '\w+' is none of .*--plugin=MODULE") as error:
            run_experiment(dataclasses.replace(config, **changes), tmp_path / "run")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
