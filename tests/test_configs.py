"""Every experiment file, shrunk, for one step on its real data; and the checks of the configuration."""

import dataclasses
import gzip
import itertools
import pkgutil
from pathlib import Path

import jax
import numpy as np
import pytest

import configs
from moerec.config import (
    CityConfig,
    Config,
    LossConfig,
    ModelConfig,
    PersonalConfig,
    SplitConfig,
    TimeConfig,
    TrainConfig,
    checked,
    cli,
)
from moerec.convert.paths import flatten
from moerec.data.load import load_data
from moerec.data.pipeline.mixture import add_words
from moerec.data.text.corpus import load_corpus
from moerec.errors import InputError
from moerec.eval.baselines import BASELINES
from moerec.eval.baselines.sasrec import sasrec_config, sasrec_full_config
from moerec.eval.language import make_language_evaluator
from moerec.eval.ranking import make_evaluator
from moerec.nn.model import ModelSizes, SequenceModel, count_active_params
from moerec.nn.profile import count_profile_slots
from moerec.tasks import check_loss, make_tasks
from moerec.train.loop import fit
from tests.own_tables import write_own_tables

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def shrink(config: Config) -> Config:
    """The same experiment with a narrow model, few targets and one step."""
    model = dataclasses.replace(config.model, d_model=8, d_ff=8, n_heads=2, n_kv_heads=2, d_head=4, d_text=4)
    meshless = {"mesh_data": 1, "mesh_expert": 1, "mesh_model": 1}
    short = {"steps": 1, "batch_size": 2, "eval_every": 0, "n_valid": 16, "n_microbatches": 1}
    if config.data.mix.has_words:  # a row of each stream at least
        short["batch_size"] = config.train.batch_size
    train = dataclasses.replace(config.train, **short, **meshless)
    loss = dataclasses.replace(config.loss, n_negatives=8, chunk=64)
    evaluation = dataclasses.replace(config.eval, batch_size=16)
    city = dataclasses.replace(config.data.city, n_users=40, events_per_user=8, items_per_service=20)
    data = dataclasses.replace(config.data, city=city)
    return dataclasses.replace(config, model=model, train=train, loss=loss, eval=evaluation, data=data)


@pytest.fixture(autouse=True)
def own_tables(tmp_path, monkeypatch):
    """The tables that configs/own_data.py counts lie in the directory that it is read from."""
    (tmp_path / "own" / "data").mkdir(parents=True)
    write_own_tables(tmp_path / "own" / "data")
    monkeypatch.chdir(tmp_path / "own")


@pytest.mark.parametrize("name", NAMES)
def test_sasrec_has_items_and_blocks_whatever_the_run_has(name):
    if cli.load_config(str(ROOT / "configs" / f"{name}.py")).data.source == "text":
        return  # there are no items
    config = sasrec_config(cli.load_config(str(ROOT / "configs" / f"{name}.py")), "sasrec", "one_negative")
    sizes = ModelSizes(40, 12, 3, 2, (3, 4), (5,), service_offsets=(0, 10, 20, 40))
    model = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config.model, sizes))
    found = {path for path in flatten(model) if not path.startswith("groups/0/")}
    assert found == {"item_encoder/row_ID", "input_norm/scale", "final_norm/scale"}, found


@pytest.mark.parametrize("name", NAMES)
def test_the_full_sasrec_has_texts_and_pointers_and_nothing_of_the_request(name):
    run = cli.load_config(str(ROOT / "configs" / f"{name}.py"))
    if run.data.source == "text":
        return
    plain, full = sasrec_config(run, "full", "full_softmax"), checked(sasrec_full_config(run, "full"))
    has_near, own = run.data.text_neighbors > 0, run.model
    switched = {"item_text": True, "item_bias": True, "pointer": "all", "text_pointer": has_near}
    switched |= {"untrained_rows": own.untrained_rows, "row_dropout": own.row_dropout}
    assert full.model == dataclasses.replace(plain.model, **switched)
    shape = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_text", "d_pointer", "dropout")
    assert all(getattr(full.model, name) == getattr(own, name) for name in shape)
    assert (full.loss.kind, full.loss.scope) == ("full_softmax", "union")
    assert (full.optim, full.train.steps) == (dataclasses.replace(run.optim, groups=()), run.train.steps)
    sizes = ModelSizes(40, 12, 3, 2, (3, 4), (5,), service_offsets=(0, 10, 20, 40))
    model = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), full.model, sizes))
    found = {"/".join(path.split("/")[:2]) for path in flatten(model) if not path.startswith("groups/0/")}
    norms = {"input_norm/scale", "final_norm/scale"}
    expected = {"item_encoder/row_ID", "item_encoder/text", "head/bias_I", "head/aggregator", *norms}
    assert found - {"item_encoder/no_row_D", "head/no_row_bias_Z"} == expected


def take_a_step_of_text(config: Config, data_dir: Path, workdir: Path) -> None:
    """On the first documents of its data, with two layers: tokenizer and vocabulary are the real ones."""
    (workdir / "run").mkdir()
    with gzip.open(data_dir / "text" / "ru_en_libreoffice_help.jsonl.gz", "rt", encoding="utf-8") as file:
        (workdir / "documents.jsonl").write_text("".join(itertools.islice(file, 8)), encoding="utf-8")
    corpus = dataclasses.replace(
        config.data.corpus,
        path=str(workdir / "documents.jsonl"),
        tokenizer=str(data_dir / "tokenizer_qwen" / "tokenizer.json.gz"),
        valid_fraction=0.3,
    )
    data = dataclasses.replace(config.data, corpus=corpus, seq_len=16, history_len=16)
    config = checked(dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, n_layers=2)))
    documents = load_corpus(data, workdir / "run", config.model.text.vocab_size)
    fitted = fit(config, documents, workdir / "run", make_language_evaluator(config, documents))
    assert fitted.steps == 1
    assert fitted.valid["valid/lm/nats"] == pytest.approx(np.log(config.model.text.vocab_size), rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_takes_a_step(name, tmp_path, request):
    config = shrink(cli.load_config(str(ROOT / "configs" / f"{name}.py")))
    if name == "amazon3_past":  # its tables of neighbors take half a minute, and amazon6_half has the same pointers
        pointers = {f"{kind}_pointer": False for kind in ("text", "transition", "crossing")}
        sizes = {f"{kind}_neighbors": 0 for kind in ("text", "transition", "crossing")}
        model, data = dataclasses.replace(config.model, **pointers), dataclasses.replace(config.data, **sizes)
        config = dataclasses.replace(config, model=model, data=data)
    if config.data.source == "tables" and name != "own_data":
        folder = request.getfixturevalue("data_dir") / Path(config.data.tables.folder).name
        config.data.tables.folder = str(folder)
    if config.data.source == "text":
        take_a_step_of_text(config, request.getfixturevalue("data_dir"), tmp_path)
        return
    config = checked(config)
    data = add_words(config, load_data(config.data, tmp_path), tmp_path)
    fitted = fit(config, data, tmp_path, make_evaluator(config, data))
    assert fitted.steps == 1
    assert 0 <= fitted.valid["valid/union/ndcg@10"] <= 1
    assert np.isfinite(fitted.slots_per_s)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: CityConfig(rho=1.5), "data.city.rho"),
        (lambda: ModelConfig(n_heads=3, n_kv_heads=2), "model.n_kv_heads"),
        (lambda: ModelConfig(d_head=3), "model.d_head"),
        (lambda: ModelConfig(d_pointer=5), "model.d_pointer"),
        (lambda: ModelConfig(pointer="some"), "model.pointer"),
        (lambda: ModelConfig(context_dropout=1.0), "model.context_dropout"),
        (lambda: TimeConfig(kind="sine"), "model.time.kind"),
        (lambda: PersonalConfig(rank=0), "model.personal.rank"),
        (lambda: ModelConfig(item_row=False, item_text=False), "model.item_row"),
        (lambda: SplitConfig(kind="time"), "data.split.valid_from"),
        (lambda: TrainConfig(batch_size=6, n_microbatches=4), "train.batch_size"),
        (lambda: Config(tasks=()), "tasks"),
        (lambda: ModelConfig(group_starts=(2,)), "model.group_starts"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(make, field):
    with pytest.raises(InputError, match=f"config.{field}: "):
        make()


@pytest.mark.parametrize(
    ("look_up", "field"),
    [
        (
            lambda: count_profile_slots(ModelConfig(personal=PersonalConfig(layers=(1,), memory="lru"))),
            "model.personal.memory",
        ),
        (lambda: check_loss(Config(loss=LossConfig(kind="hinge"))), "loss.kind"),
        (lambda: make_tasks(Config(tasks=("next_events",))), "tasks"),
        (lambda: BASELINES["popularty"], "baselines"),
        (
            lambda: check_loss(Config(model=ModelConfig(pointer="all"), loss=LossConfig(scope="service"))),
            "model.pointer",
        ),
    ],
)
def test_a_name_that_nobody_registered_is_refused_with_its_field(look_up, field):
    with pytest.raises(InputError, match=rf"^config\.{field}: ") as error:
        look_up()
    assert "\n" not in str(error.value)


def test_the_default_names_are_registered():
    config = Config()
    make_tasks(config)
    check_loss(config)
    assert all(name in BASELINES for name in config.baselines)


def test_the_dense_city_has_as_many_parameters_as_are_active_in_the_mixture():
    counts = []
    for name in ("city_dense", "city_moe"):
        config = cli.load_config(str(ROOT / "configs" / f"{name}.py"))
        sizes = ModelSizes(n_items=1800, n_tokens=200, n_services=3, n_actions=1, context_sizes=(6, 4, 3))
        model = jax.eval_shape(lambda config=config, sizes=sizes: SequenceModel(jax.random.key(0), config.model, sizes))
        counts.append(count_active_params(model))
    assert 0 <= counts[0] / counts[1] - 1 < 0.002


def test_checked_sees_values_set_later():
    config = Config()
    config.model.dropout = 1.0
    with pytest.raises(InputError, match=r"config\.model\.dropout"):
        checked(config)
    assert checked(Config()) == Config()
