"""The shapes of Qwen2's models as their configs name them, and folders of two of their layers."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from moerec.config import cli
from moerec.convert.hf_config import check_tensors, expected_tensors, read_shape, write_config
from moerec.convert.hf_folder import open_folder
from moerec.convert.qwen2 import import_folder, make_model_config
from moerec.nn.model import TEXT_SIZES, SequenceModel
from moerec.nn.sharding import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of the published config.json: width, layers, heads, key heads, feed-forward width, vocabulary, tied; and parameters.
PUBLISHED = {
    "qwen2_0p5b": (896, 24, 14, 2, 4864, 151_936, True, 494_032_768),
    "qwen2_7b": (3584, 28, 28, 4, 18_944, 152_064, False, 7_615_616_512),
    "qwen2_72b": (8192, 80, 64, 8, 29_568, 152_064, False, 72_706_203_648),
}


def make_config(name: str, **fields) -> dict:
    width, n_layers, n_heads, n_kv_heads, d_ff, vocab_size, tied, _ = PUBLISHED[name]
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": d_ff,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "sliding_window": 131_072,
        "hidden_act": "silu",
        **fields,
    }


def write_zeros(path: pathlib.Path, config: dict) -> None:
    """A folder of zeros in bfloat16, whose file has no blocks on disk."""
    shapes = expected_tensors(read_shape(config, path), ())
    header, stop = {}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_has_the_published_shape_and_number_of_parameters(name):
    config = cli.load_config(str(ROOT / "configs" / f"{name}.py")).model
    published = make_model_config(read_shape(make_config(name), pathlib.Path("config.json")))
    trained = {"remat": True, "compute_dtype": "bfloat16"}
    assert dataclasses.replace(published, **trained) == config
    model = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, TEXT_SIZES))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == PUBLISHED[name][-1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_of_two_layers_is_let_in(name, tmp_path):
    config = make_config(name, num_hidden_layers=2)
    write_zeros(tmp_path, config)
    folder = open_folder(tmp_path)
    shape = read_shape(folder.config, tmp_path / "config.json")
    check_tensors(folder, shape)
    assert read_shape(write_config(shape, "bfloat16"), tmp_path) == dataclasses.replace(shape, dtype="bfloat16")
    if name == "qwen2_0p5b":  # of the larger ones the embedding alone has gigabytes
        model = import_folder(folder, shape, make_mesh(2, 1, 2))
        n_numbers = sum(int(np.prod(info.shape)) for info in folder.tensors.values())
        assert sum(leaf.size for leaf in jax.tree.leaves(model)) == n_numbers
