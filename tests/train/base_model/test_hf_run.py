import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import export_hf, import_hf
from moerec.config import cli
from moerec.config.stored import read_config
from moerec.convert.hf_folder import open_folder
from moerec.convert.logits import compute_logits, make_text_batch
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.train.base_model.hf_export import export_run
from moerec.train.base_model.hf_run import import_run, read_hf_model
from moerec.train.run_dir import load_run
from tests.convert.qwen2_cases import CASES, make_inputs, write_folder

BY_NAME = {case.name: case for case in CASES}
SIDE_FILES = {
    "generation_config.json": '{"eos_token_id": [3, 1]}',
    "tokenizer_config.json": '{"chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"}',
    "chat_template.jinja": "{{ messages[0].content }}\n",
}


def make_folder(path: Path, name: str) -> Path:
    path.mkdir()
    write_folder(BY_NAME[name], path)
    for side, text in SIDE_FILES.items():
        (path / side).write_text(text)
    return path


def run(module, *flags: str) -> int:
    extra = {"extra_flags": module.FLAGS, "config_type": None}
    return cli.execute(module.main, [module.__name__, *flags], **extra)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_tied_stored", "llama_tied", "moe_packed", "moe_normalised"])
def test_what_comes_in_goes_out_byte_by_byte(name, tmp_path, capsys):
    folder = make_folder(tmp_path / "in", name)
    assert run(import_hf, f"--hf_folder={folder}", f"--workdir={tmp_path / 'run'}") == 0
    assert run(export_hf, f"--workdir={tmp_path / 'run'}", f"--hf_folder={tmp_path / 'out'}") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        other = tmp_path / "out" / path.name
        if path.suffix == ".safetensors":
            there, here = load_file(path), load_file(other)
            assert there.keys() == here.keys()
            assert all(there[k].tobytes() == here[k].tobytes() and there[k].dtype == here[k].dtype for k in there)
        elif path.name in SIDE_FILES:
            assert path.read_bytes() == other.read_bytes()
        else:
            assert json.loads(path.read_text()) == json.loads(other.read_text())
    assert "tensors" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen2_wide_heads", "llama_tied", "moe_every_second"])
def test_the_flags_of_a_shape_give_it_to_another_config(name, tmp_path):
    metrics = import_run(make_folder(tmp_path / "in", name), tmp_path / "run")
    seen = []

    def main(config, flags):
        seen.append(config.model)

    flags = shlex.split(metrics["imported"]["shape_flags"])
    path = Path(__file__).resolve().parents[3] / "configs" / "qwen2_0p5b.py"
    assert cli.execute(main, ["train", f"--config={path}", *flags], workdir=False) == 0
    assert dataclasses.replace(seen[0], remat=False, compute_dtype="float32") == load_run(tmp_path / "run").config.model


def test_a_run_answers_as_its_folder(tmp_path):
    folder = make_folder(tmp_path / "in", "moe_every_second")
    import_run(folder, tmp_path / "run")
    x = make_inputs(BY_NAME["moe_every_second"])["packed"]
    batch = make_text_batch(x.token_BT, x.segment_BT)
    restored = load_run(tmp_path / "run").predictor.params
    np.testing.assert_array_equal(compute_logits(restored, batch), compute_logits(read_hf_model(folder)[1], batch))


def test_a_run_on_a_mesh_is_the_same(tmp_path):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    assert run(import_hf, f"--hf_folder={folder}", f"--workdir={tmp_path / 'run'}", "--mesh=2,1,2") == 0
    config = read_config(tmp_path / "run" / "config.json")
    assert (config.train.mesh_data, config.train.mesh_expert, config.train.mesh_model) == (2, 1, 2)
    export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes()[-1000:] == (folder / "model.safetensors").read_bytes()[
        -1000:
    ]


def test_links_of_a_hub_cache_are_followed(tmp_path):
    real = make_folder(tmp_path / "blobs", "qwen2_tied")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(Path("../blobs") / path.name)
    import_run(linked, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/chat_template.jinja").read_text() == SIDE_FILES["chat_template.jinja"]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def window(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_sliding_window": True, "sliding_window": 4}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "model.safetensors"),
        (drop_tensor, "model.layers.1.mlp.up_proj.weight"),
        (window, "use_sliding_window"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_a_damaged_folder_ends_in_one_line_and_leaves_nothing(damage, told, tmp_path, capsys):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    damage(folder)
    assert run(import_hf, f"--hf_folder={folder}", f"--workdir={tmp_path / 'run'}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_place_that_is_taken_is_left_as_it_is(tmp_path, capsys):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    assert run(import_hf, f"--hf_folder={folder}", f"--workdir={tmp_path / 'run'}") == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    import_run(folder, tmp_path / "other")
    assert run(export_hf, f"--workdir={tmp_path / 'other'}", f"--hf_folder={folder}") == 2
    assert run(export_hf, f"--workdir={tmp_path / 'other'}", f"--hf_folder={tmp_path / 'x'}", "--dtype=int8") == 2
    assert not (tmp_path / "x").exists()


def test_another_dtype_is_said_in_the_config(tmp_path):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    import_run(folder, tmp_path / "run")
    found = export_run(tmp_path / "run", tmp_path / "out", "bfloat16")
    assert found["dtypes"] == ["bfloat16"]
    out = open_folder(tmp_path / "out")
    assert {str(info.dtype) for info in out.tensors.values()} == {"bfloat16"}
    assert {out.config.get(name, "bfloat16") for name in ("dtype", "torch_dtype")} == {"bfloat16"}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"moe": {"layers": [1], "services": True}}, "model.moe.services"),
        ({"moe": {"layers": [1], "services": False, "reads_domain": True}}, "model.moe.reads_domain"),
        ({"moe": {"layers": [1], "services": False, "reads_domain": False, "d_shared": 0}}, "model.moe.shared_gate"),
        ({"personal": {"layers": [1]}}, "model.personal.layers"),
        ({"window": 4}, "model.window"),
    ],
)
def test_what_has_no_layout_is_refused_with_the_reason(parts, told, tmp_path):
    import_run(make_folder(tmp_path / "in", "qwen2_tied"), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name, value in parts.items():
        if isinstance(value, dict):
            config["model"][name] |= value
        else:
            config["model"][name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.{told}.*has no Hugging Face layout") as error:
        export_run(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def change_norm(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_let_in(value, tmp_path, capsys):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    change_norm(folder, value)
    assert run(import_hf, f"--hf_folder={folder}", f"--workdir={tmp_path / 'run'}") == 2
    assert "model.norm.weight has numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_number_that_a_type_cannot_hold_is_not_written(tmp_path, capsys):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    change_norm(folder, 1e6)
    import_run(folder, tmp_path / "run")
    target = tmp_path / "out"
    assert run(export_hf, f"--workdir={tmp_path / 'run'}", f"--hf_folder={target}", "--dtype=float16") == 2
    assert "model.norm.weight: has numbers that are not finite in float16" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in", "run"}
    assert run(export_hf, f"--workdir={tmp_path / 'run'}", f"--hf_folder={target}", "--dtype=bfloat16") == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda entries: entries[1:],
        lambda entries: [{**entries[0], "name": "foo"}, *entries[1:]],
        lambda entries: [{**entries[0], "name": "model.layers.99.mlp.up_proj.weight"}, *entries[1:]],
        lambda entries: [{**entries[0], "shape": [1, 2]}, *entries[1:]],
        lambda entries: [{"name": "x"}],
        lambda entries: 3,
    ],
)
def test_a_damaged_list_of_tensors_is_refused(damage, tmp_path):
    import_run(make_folder(tmp_path / "in", "qwen2_tied"), tmp_path / "run")
    path = tmp_path / "run" / "hf" / "tensors.json"
    path.write_text(json.dumps({"tensors": damage(json.loads(path.read_text())["tensors"])}))
    with pytest.raises(InputError, match=r"hf/tensors\.json: ") as error:
        export_run(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_not_let_in(tmp_path):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    (folder / "tokenizer.json").write_text("{garbage")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        import_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_a_run_has_another_tokenizer_that_one_goes_out(tmp_path):
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    own, other = (TextTokenizer.train(["ab ab ab", word * 3], 300).content for word in ("cd ", "xyz "))
    (folder / "tokenizer.json").write_bytes(own)
    import_run(folder, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_bytes(own)
    export_run(tmp_path / "run", tmp_path / "same")
    assert (tmp_path / "same/chat_template.jinja").is_file()
    (tmp_path / "run" / "tokenizer.json").write_bytes(other)
    found = export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == other
    assert not (tmp_path / "out/chat_template.jinja").exists()
    assert any("chat template" in name for name in found["left_out"])


@pytest.mark.parametrize("kind", ["link", "loop", "below a file"])
def test_a_place_that_can_be_no_folder_is_refused(kind, tmp_path, capsys):
    folder, target = make_folder(tmp_path / "in", "qwen2_tied"), tmp_path / "x"
    if kind == "below a file":
        target.write_text("")
        target /= "run"
    else:
        target.symlink_to(tmp_path / "nowhere" if kind == "link" else target)
    assert run(import_hf, f"--hf_folder={folder}", f"--workdir={target}") == 2
    assert str(target) in capsys.readouterr().err


# In a process of its own: peaks of memory are those of a process.
MEASURE = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp

def read(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

from moerec.train.base_model.hf_run import read_hf_model
warm = sys.argv[1]
_, model = read_hf_model(Path(warm))  # programs are compiled and libraries are loaded
del model
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = read("VmRSS")
folder, model = read_hf_model(Path(sys.argv[2]))
jax.block_until_ready(jax.tree.leaves(model))
state = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
print(read("VmHWM") - before - state, max(info.stop - info.start for info in folder.tensors.values()), state)
"""


def test_an_import_needs_less_than_two_of_its_largest_tensors_beside_the_model(tmp_path):
    rng = np.random.default_rng(0)
    folder = make_folder(tmp_path / "in", "qwen2_tied")
    tensors = load_file(folder / "model.safetensors")
    n, width = 2_000_000, tensors["model.embed_tokens.weight"].shape[1]
    narrow = {name: x.astype(np.float16) for name, x in tensors.items()}
    narrow["model.embed_tokens.weight"] = rng.integers(0, 1000, (n, width), np.uint16).view(np.float16)
    save_file(narrow, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": n}))
    warm = make_folder(tmp_path / "warm", "qwen2_tied")
    done = subprocess.run([sys.executable, "-c", MEASURE, warm, folder], capture_output=True, text=True, check=True)
    extra, largest, state = map(int, done.stdout.split())
    assert state > 2 * largest > 150e6  # far above a block and what the program itself takes
    assert extra < 2 * largest, (extra, largest, state)


def test_parameters_are_frozen_and_have_no_moments(tmp_path):
    import_run(make_folder(tmp_path / "in", "qwen2_tied"), tmp_path / "run")
    leaves = jax.tree.leaves(load_run(tmp_path / "run").predictor.params)
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file())
    assert size < 2 * sum(leaf.nbytes for leaf in leaves) + 100_000
