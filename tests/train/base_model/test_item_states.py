"""States of items' texts by an imported model: against loops in float64, in parts, and as data of a run."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import CityConfig, Config, DataConfig, MoEConfig, SchemaConfig, TablesConfig, TextConfig
from moerec.convert.logits import encode_text, make_text_batch
from moerec.data import city
from moerec.data.load import RunData, load_data, reload_data
from moerec.data.text import item_states as stores
from moerec.data.text.item_states import FOLDER, order_as_source, standardise
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.files import write_json
from moerec.nn.model import TEXT_SIZES
from moerec.train.base_model import item_states as module
from moerec.train.base_model.hf_run import import_run
from moerec.train.base_model.item_states import MOST_TOKENS, add_item_states, encode_texts
from moerec.train.run_dir import Run, load_run
from tests.convert import qwen2_oracle as oracle
from tests.convert.qwen2_cases import FINE, OLD, QWEN2, TIED, Case, make_tensors, write_folder
from tests.small_model import make_config as make_model_config
from tests.small_model import make_model
from tests.tiny import make_config

WIDTH, V = 16, 300
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
CASE = Case("small", 5, QWEN2 | OLD | TIED | FINE | SIZES | {"vocab_size": V, "num_hidden_layers": 1})
TEXTS = ["", "x", "green tea", "Черный чай, 20 пакетиков", "12345678", "123456789", " ", "tea " * 100, "<|endoftext|>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The run of an imported model."""
    folder = tmp_path_factory.mktemp("base")
    write_folder(CASE, folder / "hf")
    TextTokenizer.train(["green tea black tea"] * 3, 270).save(folder / "hf" / "tokenizer.json")
    import_run(folder / "hf", folder / "run")
    return folder / "run"


@functools.cache
def average_by_hand(text: str, tokenizer: TextTokenizer) -> np.ndarray:
    """The mean of the states after the last norm, the text alone in its row."""
    ids = tokenizer.encode(text)[:MOST_TOKENS]
    if not len(ids):
        return np.zeros(WIDTH)
    tensors = make_tensors(CASE)
    found = oracle.run(CASE.config, tensors, ids[None], np.ones((1, len(ids)), int), np.arange(len(ids))[None])
    scale = tensors["model.norm.weight"].astype(np.float64)
    return oracle.rms_norm(found["hidden"][-1][0], scale, CASE.config["rms_norm_eps"]).mean(axis=0)


def test_a_text_has_the_mean_of_its_tokens_states(base, monkeypatch):
    """Whatever stands beside it, and however long it is; what is beyond the limit is not read."""
    tokenizer = TextTokenizer.load(base / "hf" / "tokenizer.json")
    lengths = [len(tokenizer.encode(text)) for text in TEXTS]
    assert {0, 1, 8, 9} < set(lengths)
    assert max(lengths) > MOST_TOKENS + 8
    monkeypatch.setattr(module, "SLOTS", 24)  # of short rows there are three in a batch
    model = Run(base).predictor.params
    found = encode_texts(model, tokenizer, TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [average_by_hand(text, tokenizer) for text in TEXTS], rtol=1e-4, atol=2e-5)
    assert not np.any(found[0])
    cut = tokenizer.decode(tokenizer.encode(TEXTS[7])[:MOST_TOKENS])
    again = encode_texts(model, tokenizer, ["x", *reversed(TEXTS), cut])
    np.testing.assert_allclose(again[1:-1][::-1], found, atol=1e-6)
    np.testing.assert_allclose(again[-1], found[7], atol=1e-6)
    assert encode_texts(model, tokenizer, ["", ""]).tolist() == np.zeros((2, WIDTH)).tolist()
    assert encode_texts(model, tokenizer, []).shape == (0, WIDTH)


def test_experts_are_chosen_under_the_biases_of_their_routers(base, monkeypatch):
    """As the run itself chooses them: here a bias calls for the last two."""
    monkeypatch.setattr(module, "SLOTS", 8)
    tokenizer = TextTokenizer.load(base / "hf" / "tokenizer.json")
    moe = MoEConfig(layers=(0,), n_per_group=4, n_active=2, d_expert=4, tile=4, services=False, reads_domain=False)
    model = make_model(make_model_config(n_layers=1, moe=moe, text=TextConfig(V)), sizes=TEXT_SIZES)
    bias_LE = jnp.asarray([[0.0, 0.0, 9.0, 9.0]])
    ids = tokenizer.encode("green tea")
    encode = jax.jit(lambda model, bias: encode_text(model, make_text_batch(ids[None]), bias))
    expected, plain = (np.mean(encode(model, bias)[0], axis=0) for bias in (bias_LE, 0 * bias_LE))
    np.testing.assert_allclose(encode_texts(model, tokenizer, ["green tea"], bias_LE)[0], expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 0.01


def config_for(base: Path | str, seed: int = 0, reader: str = "memory") -> Config:
    """A city of 18 items."""
    small = CityConfig(n_users=8, events_per_user=6, items_per_service=6)
    config = make_config()
    data = dataclasses.replace(config.data, city=small, seed=seed, reader=reader, item_states=str(base))
    return read_states(config, data)


def read_states(config: Config, data: DataConfig) -> Config:
    """The config on other data, with a model that reads the states of their items."""
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, item_states=True))


def add(config: Config, workdir: Path) -> RunData:
    workdir.mkdir(exist_ok=True)
    return add_item_states(config, load_data(config.data, workdir), workdir)


def table_config(folder: Path) -> DataConfig:
    """Five items, of which one has no text."""
    titles = ["green tea", "", "black tea", "bread", "lamp"]
    rows = [f"u{u}\ti{(u + k) % 5}\t{10 * u + k}\n" for u in range(4) for k in range(4)]
    (folder / "interactions.tsv").write_text("user\titem\ttime\n" + "".join(rows))
    (folder / "items.tsv").write_text("item\ttitle\n" + "".join(f"i{k}\t{text}\n" for k, text in enumerate(titles)))
    schema = SchemaConfig(time="time", item_id="item", text=("title",))
    return DataConfig("tables", tables=TablesConfig(str(folder), "interactions.tsv", items="items.tsv"), schema=schema)


def states_by_hand(data: RunData, base: Path) -> np.ndarray:
    """By the numbers of the data set."""
    tokenizer = TextTokenizer.load(base / "hf" / "tokenizer.json")
    return standardise(np.array([average_by_hand(text, tokenizer) for text in data.dataset.catalogue.text.tolist()]))


@pytest.fixture
def encoded(monkeypatch) -> list[list[str]]:
    """The texts of each part that is computed; there are seven items in a part."""
    calls: list[list[str]] = []

    def note(model, tokenizer, texts, *options):
        calls.append(texts)
        return encode_texts(model, tokenizer, texts, *options)

    monkeypatch.setattr(stores, "PART", 7)
    monkeypatch.setattr(module, "encode_texts", note)
    return calls


def test_states_are_computed_once_and_of_what_is_missing_alone(tmp_path, base, encoded, monkeypatch, capsys):
    first = add(config_for(base), tmp_path / "run")
    texts = order_as_source(first.dataset.catalogue.text, first.item_number).tolist()
    assert encoded == [texts[:7], texts[7:14], texts[14:]]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"item states: {len(texts)} texts by {base}"
    assert told[-1].startswith("item states: 3 of 3 parts")
    np.testing.assert_allclose(first.catalog.state_IX, states_by_hand(first, base), rtol=1e-3, atol=1e-3)
    encoded.clear()
    monkeypatch.setattr(Run, "predictor", property(lambda run: pytest.fail("the model was read")))
    assert add(config_for(base), tmp_path / "run").digests == first.digests
    assert not encoded


def test_an_interrupted_computation_goes_on_where_it_ended(tmp_path, base, encoded, monkeypatch):
    whole = add(config_for(base), tmp_path / "whole")
    note = module.encode_texts

    def fail_at_the_last(model, tokenizer, texts, *options):
        if len(texts) == 4:
            raise KeyboardInterrupt
        return note(model, tokenizer, texts, *options)

    monkeypatch.setattr(module, "encode_texts", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        add(config_for(base), tmp_path / "run")
    monkeypatch.setattr(module, "encode_texts", note)
    (tmp_path / "run" / FOLDER / "part-00000.npy").unlink()
    encoded.clear()
    resumed = add(config_for(base), tmp_path / "run")
    assert [len(texts) for texts in encoded] == [7, 4]
    np.testing.assert_array_equal(resumed.item_states, whole.item_states)


def test_runs_that_number_items_otherwise_share_the_states_beside_their_data(tmp_path, base, encoded):
    found = []
    load_data(table_config(tmp_path), tmp_path / "first")
    for seed in (0, 1):
        prepared = str(tmp_path / "first" / "data")
        data = DataConfig("prepared", prepared, seed=seed, item_states=str(base))
        found.append(add(read_states(make_config(), data), tmp_path / f"run {seed}"))
        np.testing.assert_allclose(found[-1].item_states, states_by_hand(found[-1], base), rtol=1e-3, atol=1e-3)
    assert len(encoded) == 1
    assert np.any(found[0].item_number != found[1].item_number)


@pytest.mark.parametrize("source", ["city", "city in shards", "tables"])
def test_a_run_reads_its_states_again_without_the_model(tmp_path, base, source, encoded):
    """From wherever its data are, and they are not computed anew when the same command is given again."""
    config, own = config_for(base, reader="shards" if "shards" in source else "memory"), tmp_path / "own"
    if source == "tables":
        config = read_states(config, dataclasses.replace(table_config(tmp_path), item_states=str(base)))
    config.data.item_states = str(shutil.copytree(base, own))
    data = add(config, tmp_path / "run")
    write_json(tmp_path / "run" / "data.json", data.digests)
    data.keep_item_tokens(tmp_path / "run")
    assert encoded
    encoded.clear()
    assert add(config, tmp_path / "run").digests == data.digests
    assert not encoded
    shutil.rmtree(own)
    found = reload_data(config.data, tmp_path / "run")
    np.testing.assert_array_equal(found.catalog.state_IX, data.item_states)


def test_another_model_computes_anew(tmp_path, base, encoded):
    write_folder(dataclasses.replace(CASE, seed=6), tmp_path / "hf")
    shutil.copy(base / "hf" / "tokenizer.json", tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "other")
    first = add(config_for(base), tmp_path / "run")
    encoded.clear()
    second = add(config_for(tmp_path / "other"), tmp_path / "run")
    assert len(encoded) == 3
    assert np.abs(second.item_states - first.item_states).max() > 0.1
    write_json(tmp_path / "run" / "data.json", first.digests)
    first.keep_item_tokens(tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a run on other states of items \(data\.item_states\)"):
        add(config_for(tmp_path / "other"), tmp_path / "run")


def drop_words(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"], config["tasks"] = "city", ["next_event"]
    config["model"]["text"]["vocab_size"] = 0
    (run / "config.json").write_text(json.dumps(config))


def narrow_words(run: Path) -> None:
    TextTokenizer.train(["any"], V + 1, special=[f"<{k}>" for k in range(V + 1 - 256)]).save(
        run / "hf" / "tokenizer.json"
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (drop_words, r"^config\.data\.item_states: \S*own knows no words \(model\.text\.vocab_size\)$"),
        (lambda run: (run / "hf" / "tokenizer.json").unlink(), r"^\S*own: has no tokenizer\.json"),
        (narrow_words, r"^\S*own/hf/tokenizer\.json: has 301 tokens, but the model has 300 rows$"),
        (lambda run: shutil.rmtree(run / "checkpoints"), r"^\S*own: holds no checkpoint$"),
        (shutil.rmtree, r"^\S*own"),
    ],
)
def test_a_run_that_has_no_states_of_texts_is_refused(tmp_path, base, damage, told):
    own = shutil.copytree(base, tmp_path / "own")
    damage(own)
    with pytest.raises(InputError, match=told) as error:
        add(config_for(own), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_model_with_states_needs_a_run_that_has_them():
    model = dataclasses.replace(make_config().model, item_states=True)
    with pytest.raises(InputError, match=r"^config\.model\.item_states: needs the run of a language model"):
        dataclasses.replace(make_config(), model=model)
    data = dataclasses.replace(make_config().data, item_states="runs/base")
    with pytest.raises(InputError, match=r"^config\.data\.item_states: nothing reads them"):
        dataclasses.replace(make_config(), data=data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """A finished run in which every fifth item has no text; the model that its states are by is gone."""
    folder, generate = tmp_path_factory.mktemp("trained"), city.generate

    def generate_with_gaps(*args):
        dataset, world = generate(*args)
        text = dataset.catalogue.text.astype(object)
        text[::5] = ""
        return dataclasses.replace(dataset, catalogue=dataclasses.replace(dataset.catalogue, text=text)), world

    config = make_config(steps=4)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, item_states=str(shutil.copytree(base, folder / "base"))),
        model=dataclasses.replace(
            config.model, n_layers=1, item_states=True, item_text=False, request_time=False, request_context=False
        ),
        eval=dataclasses.replace(config.eval, n_probed=0),
        baselines=(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(city, "generate", generate_with_gaps)
        run_experiment(config, folder / "run")
        shutil.rmtree(folder / "base")
        yield load_run(folder / "run")


def test_a_run_with_states_is_opened_when_the_model_is_gone(trained, base):
    np.testing.assert_allclose(trained.catalog.state_IX, states_by_hand(trained.data, base), rtol=1e-3, atol=2e-3)
    assert trained.metrics["steps"] == 4
    stored = json.loads((trained.folder / "data.json").read_text())
    assert stored == trained.data.digests
    assert len(stored["item_states_sha256"]) == 64


def test_items_without_a_text_are_their_rows_alone(trained):
    encoder, data = trained.predictor.params.item_encoder, trained.data
    has_text = data.dataset.catalogue.text != ""
    assert 0 < np.sum(~has_text) < len(has_text) / 2
    found = np.asarray(encoder.states(trained.catalog.state_IX))
    np.testing.assert_array_equal(np.any(found, axis=1), has_text)
    count = np.asarray(data.catalog.count_I)[:, None]
    rows = np.where(count > 0, encoder.row_ID[...], encoder.no_row_D[...])
    np.testing.assert_allclose(trained.catalog.vector_ID, rows + found, atol=1e-6)
