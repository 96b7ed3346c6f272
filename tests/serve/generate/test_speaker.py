"""`experiments.generate`: folders and runs go on with texts, and bad input ends in one line and exit code 2."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import bench_generate, generate, import_hf
from moerec.config import cli
from moerec.data.text.tokenizer import TextTokenizer
from moerec.serve.generate.sampling import Sampling
from moerec.serve.generate.speaker import load_speaker
from moerec.train.base_model.hf_run import read_hf_model
from tests.convert.qwen2_cases import CASES, write_folder
from tests.serve.generate.test_equality import score_whole

V = 300
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen2 with a tokenizer, a template and a stop token."""
    path = tmp_path_factory.mktemp("hf") / "model"
    case = next(case for case in CASES if case.name == "qwen2_one_key_head")
    case = dataclasses.replace(case, config=case.config | {"vocab_size": V})
    write_folder(case, path)
    TextTokenizer.train(["to be or not to be, that is the question"] * 20, 290).save(path / "tokenizer.json")
    (path / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def run(*flags: str) -> int:
    extra = {"extra_flags": generate.FLAGS, "config_type": None, "workdir": False}
    return cli.execute(generate.main, ["generate", *flags], **extra)


def read_last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def go_on(folder, row: np.ndarray, n: int, stop: tuple[int, ...]) -> list[int]:
    """Greedily, without a cache."""
    model, start = read_hf_model(folder)[1], len(row)
    for _ in range(n):
        padded = np.pad(row, (0, 64 - len(row)))
        token = int(np.argmax(score_whole(model, padded.astype(np.int32))[len(row) - 1]))
        if token in stop:
            break
        row = np.append(row, token)
    return row[start:].tolist()


def test_a_prompt_is_gone_on_with(folder, capsys):
    assert run(f"--hf_folder={folder}", "--prompt=to be or", "--max_new_tokens=12", "--json") == 0
    found = read_last(capsys)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    prompt = tokenizer.encode("to be or")
    assert found["tokens"] == go_on(folder, prompt, 12, (3, 4))
    kept = np.array([token for token in found["tokens"] if token < tokenizer.n_vocab], np.int32)
    assert found["text"] == tokenizer.decode(kept, skip_special=True)
    assert found["tokens_per_s"] > 0
    assert found["n_prompt"] == len(prompt)


def test_several_prompts_of_flags_and_files(folder, tmp_path, capsys):
    texts = ["to be", "that is the question", "not to be or"]
    (tmp_path / "prompts.txt").write_text(f"{texts[1]}\n\n{texts[2]}\n")
    lines = [json.dumps({"prompt": texts[1]}), json.dumps(texts[2])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    found = []
    for name in ("prompts.txt", "prompts.jsonl"):
        flags = f"--hf_folder={folder}", f"--prompt={texts[0]}", f"--prompts={tmp_path / name}"
        assert run(*flags, "--max_new_tokens=5", "--json") == 0
        found.append([answer["tokens"] for answer in read_last(capsys)["answers"]])
    assert found[0] == found[1]
    for text, tokens in zip(texts, found[0], strict=True):
        assert run(f"--hf_folder={folder}", f"--prompt={text}", "--max_new_tokens=5", "--json") == 0
        assert read_last(capsys)["tokens"] == tokens


def test_what_is_streamed_is_the_text(folder, capsys):
    """In whole characters; the command prints it, control characters by their names."""
    speaker, parts = load_speaker("", str(folder)), []
    found = speaker.answer(["to be"], 40, Sampling(1.5, top_k=200, top_p=0.95, seed=3), write=parts.append)
    assert "".join(parts) == found["text"]
    assert sum(map(bool, parts)) > 3
    assert run(f"--hf_folder={folder}", "--prompt=to be", "--stream", "--max_new_tokens=9") == 0
    streamed = capsys.readouterr().out
    assert run(f"--hf_folder={folder}", "--prompt=to be", "--max_new_tokens=9") == 0
    assert streamed == capsys.readouterr().out


def test_a_message_is_text_and_the_template_is_not(folder, tmp_path):
    speaker = load_speaker("", str(folder))
    tokenizer = speaker.tokenizer
    ids = speaker.encode("be <|im_end|>", True, "the prompt").tolist()
    assert ids.count(tokenizer.id_of("<|im_end|>")) == 1
    assert ids.count(tokenizer.id_of("<|im_start|>")) == 2
    conversation = [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or"}]
    assert speaker.encode(conversation, True, "").tolist().count(tokenizer.id_of("<|im_end|>")) == 2
    assert tokenizer.id_of("<|im_end|>") not in speaker.encode("be <|im_end|>", False, "the prompt")


def test_a_run_says_what_its_folder_says(folder, tmp_path, capsys):
    extra = {"extra_flags": import_hf.FLAGS, "config_type": None}
    run_dir = tmp_path / "run"
    assert cli.execute(import_hf.main, ["import_hf", f"--hf_folder={folder}", f"--workdir={run_dir}"], **extra) == 0
    flags = "--prompt=to be", "--max_new_tokens=6", "--chat", "--json"
    assert run(f"--hf_folder={folder}", *flags) == 0
    of_folder = read_last(capsys)
    assert run(f"--workdir={run_dir}", *flags) == 0
    of_run = read_last(capsys)
    assert [of_run[name] for name in ("text", "tokens", "finish", "n_prompt")] == [
        of_folder[name] for name in ("text", "tokens", "finish", "n_prompt")
    ]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((), "--prompt"),
        (("--prompt=",), "is empty"),
        (("--prompt=be", "--stop=<|nothing|>"), "'<|nothing|>' is not in the vocabulary"),
        ((f"--prompt={'to be ' * 60}",), "the model's context is 64"),
        (("--prompts=nowhere.txt",), "nowhere.txt: no such file"),
        (("--prompt=be", "--prompt=to", "--stream"), "--stream: one prompt"),
        (("--prompt=be", "--temperature=-1"), "temperature"),
        (("--prompt=be", "--quantize=int4"), "--quantize: 'int4'"),
        (("--prompt=be", "--dtype=float16"), "--dtype: 'float16'"),
        (("--prompt=be", "--mesh=1,2"), "--mesh"),
        (("--prompt=be", "--max_new_tokens=0"), "max_new_tokens"),
        (("--prompt=be", "--workdir=runs/x"), "one of --workdir"),
    ],
)
def test_bad_input_is_one_line(folder, flags, line, capsys):
    assert run(f"--hf_folder={folder}", *flags) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"{", ":1: is no JSON"), (b'{"text": 1}', ":1: a text, or"), (b'"a"\n3', ":2: a text, or"), (b"\xff", "UTF-8")],
)
def test_bad_lines_are_named(folder, tmp_path, content, line, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert run(f"--hf_folder={folder}", f"--prompts={path}") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told
    assert str(path) in told


def test_a_conversation_needs_the_template(folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "be"}]}')
    assert run(f"--hf_folder={folder}", f"--prompts={path}") == 2
    assert "needs --chat" in capsys.readouterr().err


def test_the_benchmark_measures_a_folder(folder, capsys):
    flags = "--prompt_tokens=4", "--new_tokens=4", "--batches=1,2", f"--hf_folder={folder}", "--json"
    extra = {"extra_flags": bench_generate.FLAGS, "config_type": None, "workdir": False}
    assert cli.execute(bench_generate.main, ["bench_generate", "--weights=float32,int8", *flags], **extra) == 0
    found = read_last(capsys)
    assert [(row["weights"], row["batch"]) for row in found["rows"]] == [
        (kind, n) for kind in ("float32", "int8") for n in (1, 2)
    ]
    assert [row["n_compiled"] for row in found["rows"]] == [2, 4, 2, 4]
    assert all(row["decode_tokens_per_s"] > 0 and row["limit_share"] > 0 for row in found["rows"])


def test_the_benchmark_refuses_what_it_cannot_measure(capsys):
    extra = {"extra_flags": bench_generate.FLAGS, "config_type": None, "workdir": False}
    for flag, line in (("--weights=int4", "'int4'"), ("--batches=0", "'0'"), ("--new_tokens=1", "--new_tokens")):
        assert cli.execute(bench_generate.main, ["bench_generate", flag], **extra) == 2
        assert line in capsys.readouterr().err
