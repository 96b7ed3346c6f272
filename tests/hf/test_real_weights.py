"""SmolLM2-135M-Instruct here and in transformers: logits, perplexity, greedy text, and its files out again."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments import check_hf
from moerec.config import cli
from moerec.convert.logits import compute_logits, encode_text, make_text_batch
from moerec.data.text.chat_template import encode_chat, read_chat_template, read_template_tokens, render_chat
from moerec.data.text.tokenizer import TextTokenizer
from moerec.nn.model import SequenceModel
from moerec.train.base_model.hf_export import export_run
from moerec.train.base_model.hf_run import import_run, read_hf_model
from moerec.types import Batch
from tests.hf.loading import load_model, measure_gap, run_model

TEXT = (
    "The lighthouse at the end of the pier was built in 1874, after three ships had been lost on the rocks in a "
    "single winter. Its keeper, who lived alone, wrote down the weather every evening; his notebooks are now kept in "
    "the town's museum."
)
N_TOKENS = 48
PROMPTS = ("The capital of France is", "Once upon a time, in a small village")  # beside a conversation
MESSAGES = [{"role": "user", "content": "Name three colours of the rainbow, and say which one you like best."}]
WIDTH, N_CONTINUED = 96, 24
WINDOW, N_WINDOWS = 512, 14  # 7,168 of the text's 273,868 tokens: all of them would take half an hour of two cores
CLOSE = 1e-3  # logits of two tokens that are nearer than this may change places


@pytest.fixture(scope="module")
def folder(smollm2) -> Path:
    return smollm2("qwen2")


@pytest.fixture(scope="module")
def model(folder) -> SequenceModel:
    return read_hf_model(folder)[1]


@pytest.fixture(scope="module")
def other(folder) -> torch.nn.Module:
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder) -> TextTokenizer:
    return TextTokenizer.load(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def token_T(tokenizer) -> np.ndarray:
    found = tokenizer.encode(TEXT)[:N_TOKENS]
    assert len(found) == N_TOKENS
    return found


@pytest.fixture(scope="module")
def text(data_dir) -> str:
    return gzip.decompress((data_dir / "text/wikitext2_valid.txt.gz").read_bytes()).decode()


def test_texts_and_conversations_are_the_same_tokens(folder, tokenizer, text):
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for part in (TEXT, text[:200_000], "naïve — 12,5 °C\r\n\tПривет, мир! \U0001f642", "<|im_start|>user"):
        ids = tokenizer.encode_template(part).tolist()
        assert ids == auto(part, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == auto.decode(ids) == part
    template, known = read_chat_template(folder), read_template_tokens(folder)
    assert template is not None
    rendered = auto.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_chat(template, MESSAGES, **known) == rendered
    wanted = auto(rendered, add_special_tokens=False).input_ids
    assert encode_chat(tokenizer, template, MESSAGES, **known).tolist() == wanted


def test_logits_at_every_position_are_those_of_transformers(model, other, token_T, record_property):
    found = np.asarray(compute_logits(model, make_text_batch(token_T[None])))
    gap = measure_gap(found, run_model(other, token_T[None]))
    print(f"largest difference in parts of the largest logit: {gap:.1e}")
    record_property("largest_gap", gap)
    assert gap < 1e-4


def test_as_a_llama_it_answers_as_it_does_as_a_qwen2(smollm2, model, other, token_T):
    """The latter's biases are zero."""
    _, llama = read_hf_model(smollm2("llama"))
    assert not llama.config.qkv_bias
    assert model.config.qkv_bias
    batch = make_text_batch(token_T[None])
    found = np.asarray(compute_logits(llama, batch))
    assert measure_gap(found, np.asarray(compute_logits(model, batch))) < 1e-5
    assert measure_gap(found, run_model(other, token_T[None])) < 1e-4


@jax.jit
def sum_nll(model: SequenceModel, batch: Batch, label_S: jax.Array, weight_S: jax.Array) -> jax.Array:
    assert model.text_head is not None
    assert model.token_encoder is not None
    state_SD = encode_text(model, batch).reshape(-1, model.config.d_model)
    return model.text_head.sum_nll(state_SD, label_S, weight_S, model.token_encoder, chunk=8192)


def test_perplexity_of_real_text_is_that_of_transformers(model, other, tokenizer, text, record_property):
    """To more than four significant digits, over the beginning of WikiText-2's validation part."""
    window_NT = tokenizer.encode(text)[: WINDOW * N_WINDOWS].reshape(N_WINDOWS, WINDOW)
    weight_S = np.append(np.ones(WINDOW - 1, np.float32), np.float32(0))
    ours, theirs = 0.0, 0.0
    for token_T in window_NT:
        label_S = np.append(token_T[1:], 0).astype(np.int32)
        ours += float(sum_nll(model, make_text_batch(token_T[None]), label_S, weight_S))
        logits_TV = torch.from_numpy(run_model(other, token_T[None])[0, :-1]).double()
        labels = torch.from_numpy(token_T[1:].astype(np.int64))
        theirs += float(torch.nn.functional.cross_entropy(logits_TV, labels, reduction="sum"))
    found, wanted = (float(np.exp(nll / (N_WINDOWS * (WINDOW - 1)))) for nll in (ours, theirs))
    print(f"perplexity of {window_NT.size:,} tokens: {found:.6f}, by transformers {wanted:.6f}")
    record_property("perplexity", found)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert 10 < wanted < 40  # it has learned English


def continue_greedily(model: SequenceModel, prompts: list[list[int]], n: int) -> list[list[int]]:
    """The most probable tokens, one after another, each from the whole prefix again: one program for all steps."""
    rows, places = [list(prompt) for prompt in prompts], np.arange(len(prompts))
    for _ in range(n):
        lengths = np.array([len(row) for row in rows])
        token_BT = np.stack([np.pad(row, (0, WIDTH - len(row))) for row in rows])
        segment_BT = (np.arange(WIDTH) < lengths[:, None]).astype(np.int32)
        logits_BTV = compute_logits(model, make_text_batch(token_BT, segment_BT))
        for row, token in zip(rows, np.argmax(np.asarray(logits_BTV[places, lengths - 1]), axis=1), strict=True):
            row.append(int(token))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def generate(other: torch.nn.Module, prompt: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """transformers' greedy tokens, until it would stop, and by how much each was ahead of the second."""
    ids = torch.tensor([prompt])
    found = other.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=n,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first, second = torch.cat(found.logits).topk(2).values.T
    return found.sequences[0, len(prompt) :].tolist(), (first - second).numpy()


def test_greedy_text_is_that_of_transformers(folder, model, other, tokenizer):
    """Token by token, up to where two are all but equally probable."""
    prompts = [tokenizer.encode(text).tolist() for text in PROMPTS]
    template = read_chat_template(folder)
    assert template is not None
    prompts.append(encode_chat(tokenizer, template, MESSAGES, **read_template_tokens(folder)).tolist())
    assert len({len(prompt) for prompt in prompts}) == 3
    found = continue_greedily(model, prompts, N_CONTINUED)
    for prompt, ours in zip(prompts, found, strict=True):
        theirs, lead = generate(other, prompt, N_CONTINUED)
        certain = int(np.argmax(lead < CLOSE)) if np.any(lead < CLOSE) else len(theirs)
        print(f"{certain} tokens compared: {tokenizer.decode(theirs)!r}")
        assert ours[:certain] == theirs[:certain]
        assert certain >= N_CONTINUED // 2


def test_what_goes_out_is_what_came_in(folder, big_folder):
    import_run(folder, big_folder / "run")
    export_run(big_folder / "run", big_folder / "out")
    assert {path.name for path in (big_folder / "out").iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        there, here = path.read_bytes(), (big_folder / "out" / path.name).read_bytes()
        if path.name in ("config.json", "model.safetensors.index.json"):
            assert json.loads(here) == json.loads(there)
        else:
            assert here == there, path.name


def test_the_command_reports_the_gap_and_writes_the_logits(folder, other, token_T, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", token_T)
    flags = [f"--hf_folder={folder}", f"--tokens={tmp_path / 'tokens.npy'}", f"--logits={tmp_path / 'logits.npz'}"]
    options = {"extra_flags": check_hf.FLAGS, "config_type": None, "workdir": False}
    assert cli.execute(check_hf.main, ["check_hf", *flags, "--json"], **options) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    with np.load(tmp_path / "logits.npz", allow_pickle=False) as file:
        logits_TV = file["logits"]
    wanted_TV = run_model(other, token_T[None])[0]
    assert logits_TV.dtype == np.float32
    assert logits_TV.shape == wanted_TV.shape == (N_TOKENS, 49152)
    assert measure_gap(logits_TV, wanted_TV) < 1e-4
    assert told["gap"] == pytest.approx(measure_gap(logits_TV, wanted_TV), rel=0.01)
    assert [row["position"] for row in told["positions"]] == list(range(N_TOKENS))
    assert max(row["gap"] for row in told["positions"]) == told["gap"] < 1e-4
    same = np.argmax(logits_TV, axis=1) == np.argmax(wanted_TV, axis=1)
    assert [row["same_first"] for row in told["positions"]] == same.tolist()
