"""Models that came from no folder, or were trained since, as transformers loads what is exported of them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from configs import qwen2_0p5b
from experiments import train
from moerec.config import ModelConfig, MoEConfig, OptimConfig, TextConfig, TrainConfig, cli
from moerec.config.stored import store_config
from moerec.convert.hf_folder import open_folder
from moerec.convert.logits import compute_logits, make_text_batch
from moerec.data.text.tokenizer import TextTokenizer
from moerec.files import write_json
from moerec.nn.model import TEXT_SIZES, SequenceModel
from moerec.train.base_model.hf_export import export_run
from moerec.train.base_model.hf_run import import_run
from moerec.train.checkpoint import Checkpoints, TrainProgress
from moerec.train.run_dir import CONFIG, METRICS, load_run
from moerec.train.state import start_state
from tests.convert.qwen2_cases import CASES, write_folder
from tests.hf.loading import load_model, measure_gap, run_model
from tests.small_model import fill

ROOT = Path(__file__).resolve().parents[2]
BASE = ModelConfig(
    n_layers=3,
    d_model=24,
    n_heads=4,
    n_kv_heads=2,
    d_head=10,  # not the width over the heads
    d_ff=36,
    rope_theta=1e5,
    norm_eps=1e-5,
    dropout=0.0,
    text=TextConfig(vocab_size=90, tie_head=True),
)
UNTIED = TextConfig(vocab_size=90, tie_head=False)
MIXTURE = MoEConfig(
    layers=(0, 1, 2),
    services=False,
    n_per_group=5,
    d_expert=14,
    n_active=2,
    reads_domain=False,
    d_shared=22,
    shared_gate=True,
    bias_rate=0.0,
)
MODELS = {
    "tied": BASE,
    "untied": dataclasses.replace(BASE, text=UNTIED),
    "without_biases": dataclasses.replace(BASE, qkv_bias=False),
    "mixture": dataclasses.replace(BASE, moe=MIXTURE, text=UNTIED),
    "mixture_as_probable": dataclasses.replace(BASE, moe=dataclasses.replace(MIXTURE, renormalise=False)),
    "mixture_above_dense": dataclasses.replace(BASE, moe=dataclasses.replace(MIXTURE, layers=(1,)), qkv_bias=False),
}
FAMILIES = {"tied": "qwen2", "untied": "qwen2", "without_biases": "llama"}
# Two steps at a large rate: after small ones all logits would still be near zero.
TINY = {
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.d_head": 8,
    "model.d_ff": 48,
    "model.compute_dtype": "float32",
    "model.text.vocab_size": 320,
    "data.corpus.tokenizer": "",
    "data.corpus.vocab_size": 320,
    "data.corpus.valid_fraction": 0.2,
    "data.seq_len": 32,
    "data.history_len": 32,
    "optim.learning_rate": 0.05,
    "optim.warmup_steps": 1,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.mesh_data": 1,
    "train.eval_every": 2,
    "train.save_every": 2,
    "train.log_every": 1,
}
TINY_MIXTURE = {
    "model.moe.layers": "(1,)",
    "model.moe.services": False,
    "model.moe.n_per_group": 4,
    "model.moe.d_expert": 12,
    "model.moe.reads_domain": False,
    "model.moe.d_shared": 20,
    "model.moe.shared_gate": True,
    "model.moe.bias_rate": 0.0,
}


def make_run(folder: Path, config: ModelConfig) -> None:
    """A run of a text model with random weights."""
    whole = dataclasses.replace(
        qwen2_0p5b.get_config(),
        model=config,
        optim=OptimConfig(groups=("*=frozen",), warmup_steps=0),
        train=TrainConfig(steps=1, batch_size=1),
    )
    model = fill(jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, TEXT_SIZES)))
    folder.mkdir()
    store_config(folder / CONFIG, whole)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        checkpoints.save_best(0, start_state(whole, model), TrainProgress())
        checkpoints.wait()
    finally:
        checkpoints.close()
    write_json(folder / METRICS, {"config": dataclasses.asdict(whole), "steps": 0})


def write_corpus(path: Path) -> None:
    """Documents of random words."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeгде"), rng.integers(1, 6))) for _ in range(60)]
    documents = [" ".join(rng.choice(words, rng.integers(8, 40))) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def train_run(folder: Path, corpus: Path, **fields) -> None:
    flags = [f"--config.{name}={value}" for name, value in {**TINY, "data.corpus.path": corpus, **fields}.items()]
    command = ["train", f"--config={ROOT / 'configs/qwen2_0p5b.py'}", f"--workdir={folder}", *flags]
    assert cli.execute(train.main, command, None, train.FLAGS) == 0


def check_export(run: Path, out: Path) -> None:
    """transformers, given what was written, answers as the run's own parameters do."""
    model = load_run(run).predictor.params
    token_BT = np.random.default_rng(1).integers(0, model.config.text.vocab_size, (2, 24))
    found = np.asarray(compute_logits(model, make_text_batch(token_BT)))
    wanted = run_model(load_model(out), token_BT)
    assert np.std(wanted) > 0.1
    assert measure_gap(found, wanted) < 1e-4


@pytest.mark.parametrize("dtype", ["", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_ours_answers_alike_in_transformers(name, dtype, tmp_path):
    """Rounded to a narrow type, it answers as what was written, which comes in again."""
    make_run(tmp_path / "run", MODELS[name])
    export_run(tmp_path / "run", tmp_path / "out", dtype)
    assert {str(info.dtype) for info in open_folder(tmp_path / "out").tensors.values()} == {dtype or "float32"}
    told = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert told.model_type == FAMILIES.get(name, "qwen2_moe")
    assert str(told.dtype) == f"torch.{dtype or 'float32'}"
    if dtype:
        import_run(tmp_path / "out", tmp_path / "again")
    check_export(tmp_path / ("again" if dtype else "run"), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "fields"), [("qwen2", {}), ("llama", {"model.qkv_bias": False}), ("qwen2_moe", TINY_MIXTURE)]
)
def test_a_model_that_was_trained_here_answers_alike_in_transformers(family, fields, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    train_run(tmp_path / "run", tmp_path / "corpus.jsonl", **fields)
    export_run(tmp_path / "run", tmp_path / "out")
    check_export(tmp_path / "run", tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == family
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "run/tokenizer.json").read_bytes()
    tokenizer, text = TextTokenizer.load(tmp_path / "run/tokenizer.json"), "<|im_start|>abe где 12<|im_end|>\n"
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto(text, add_special_tokens=False).input_ids == tokenizer.encode_template(text).tolist()


def test_a_model_that_came_in_and_was_trained_goes_out_in_its_own_files(tmp_path):
    case = next(case for case in CASES if case.name == "qwen2_untied")
    write_corpus(tmp_path / "corpus.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text("utf-8").splitlines()]
    write_folder(dataclasses.replace(case, config=case.config | {"vocab_size": 300}), tmp_path / "in")
    TextTokenizer.train(texts, 300).save(tmp_path / "in/tokenizer.json")
    import_run(tmp_path / "in", tmp_path / "first")
    model = load_run(tmp_path / "first").config.model
    names = "n_layers d_model n_heads n_kv_heads d_head d_ff rope_theta norm_eps".split()
    fields = {f"model.{name}": getattr(model, name) for name in names}
    fields |= {"model.text.vocab_size": 300, "model.text.tie_head": False, "train.init_from": tmp_path / "first"}
    train_run(tmp_path / "run", tmp_path / "corpus.jsonl", **fields)
    export_run(tmp_path / "run", tmp_path / "out")
    before, after = open_folder(tmp_path / "in"), open_folder(tmp_path / "out")
    assert after.config == before.config
    there, here = (
        {name: (x.dtype, x.shape, x.file.name) for name, x in folder.tensors.items()} for folder in (before, after)
    )
    assert here == there
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "in/tokenizer.json").read_bytes()
    moved = [not np.array_equal(before.read_rows(name, 0, 1), after.read_rows(name, 0, 1)) for name in before.tensors]
    assert np.mean(moved) > 0.9  # it is what was trained, not what came in
    check_export(tmp_path / "run", tmp_path / "out")
