"""Folders that came in and went out again, as transformers loads them."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from moerec.data.text.chat_template import read_chat_template, read_template_tokens, render_chat
from moerec.data.text.tokenizer import TextTokenizer, read_stop_ids
from moerec.train.base_model.hf_export import export_run
from moerec.train.base_model.hf_run import import_run
from tests.convert.qwen2_cases import CASES
from tests.hf.loading import DTYPES, load_model, write_typed_folder

BY_NAME = {case.name: case for case in CASES}
# One file and several; tied, with its output stored and without, and not tied; experts packed and one by one.
NAMES = (
    "qwen2_tied",
    "qwen2_tied_stored",
    "qwen2_untied",
    "qwen2_wide_heads",
    "llama_without_fields",
    "llama_tied",
    "moe_normalised",
    "moe_every_second",
    "moe_packed_normalised",
    "moe_packed",
)
TEXTS = ("the quick brown fox jumps over the lazy dog; 1234 times!\n", "съешь ещё этих мягких французских булок\r\n")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)
MESSAGES = [{"role": "system", "content": "the lazy dog"}, {"role": "user", "content": " сколько? 12 \n"}]


def go_through(folder: Path) -> Path:
    import_run(folder, folder.with_name("run"))
    export_run(folder.with_name("run"), folder.with_name("out"))
    return folder.with_name("out")


def read_bits(model: torch.nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_transformers_has_the_same_weights_bit_by_bit(name, dtype, tmp_path):
    """Without a key that is missing, too many or of another shape; see `load_model`."""
    case, folder = BY_NAME[name], tmp_path / "in"
    write_typed_folder(case, folder, dtype)
    # Of this family transformers does not read the field: it would be 60.
    told = {"num_experts": case.config["num_local_experts"]} if "num_local_experts" in case.config else {}
    wanted = read_bits(load_model(folder, "auto", **told))
    assert {dtype for dtype, _, _ in wanted.values()} == {getattr(torch, dtype)}
    out = go_through(folder)
    assert read_bits(load_model(out, "auto", **told)) == wanted
    assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in folder.glob("*.safetensors")}


def write_side_files(folder: Path) -> None:
    """All that a folder may have beside its weights, in no layout that a writer of JSON would choose."""
    tokenizer = TextTokenizer.train([TEXTS[0] * 5, TEXTS[1] * 5], 330)
    tokenizer.save(folder / "tokenizer.json")
    model = json.loads(tokenizer.content)["model"]
    special = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    texts = {
        "vocab.json": json.dumps(model["vocab"]),
        "merges.txt": "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]),
        "added_tokens.json": '{ "<|endoftext|>":0 }',
        "special_tokens_map.json": json.dumps({**special, "eos_token": "<|im_end|>"}),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
            indent=3,
        ),
        "generation_config.json": '{"eos_token_id": [2,0],\r\n"temperature": 0.70, "do_sample": true}\n\n',
        "chat_template.jinja": TEMPLATE,
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())


@pytest.mark.parametrize("name", ["qwen2_tied", "llama_tied", "moe_normalised"])
def test_what_lies_beside_the_weights_stays_as_it_is_and_is_loaded(name, tmp_path):
    folder = tmp_path / "in"
    write_typed_folder(BY_NAME[name], folder, "float32")
    write_side_files(folder)
    out = go_through(folder)
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        there, here = path.read_bytes(), (out / path.name).read_bytes()
        if path.name in ("config.json", "model.safetensors.index.json"):
            assert json.loads(here) == json.loads(there)
        else:
            assert here == there, path.name

    tokenizer = TextTokenizer.load(out / "tokenizer.json")
    auto = transformers.AutoTokenizer.from_pretrained(out)
    exact = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    for text in (*TEXTS, "<|im_start|>user\nthe dog<|im_end|>", "ещё 1/2 — 漢字 \U0001f642"):
        wanted = tokenizer.encode_template(text).tolist()
        assert auto(text, add_special_tokens=False).input_ids == wanted
        assert exact(text, add_special_tokens=False).input_ids == wanted
        assert auto.decode(wanted) == tokenizer.decode(wanted) == text
    # A Qwen2 has a tokenizer of its own in transformers, which composes accents, whatever the file says.
    apart = "e\u0301"
    assert exact(apart, add_special_tokens=False).input_ids == tokenizer.encode_template(apart).tolist()

    template = read_chat_template(out)
    assert template is not None
    for prompted in (False, True):
        rendered = auto.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompted)
        assert render_chat(template, MESSAGES, prompted, **read_template_tokens(out)) == rendered
    stop = transformers.GenerationConfig.from_pretrained(out).eos_token_id
    assert read_stop_ids(out) == tuple(stop) == (2, 0)
