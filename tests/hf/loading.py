"""How `transformers` is asked, and folders of other types of numbers for it."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.convert.qwen2_cases import Case, write_folder

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Plain sums; other experts want strides that tiny models do not have.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def load_model(folder: Path, dtype: str | torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """The model of a folder, every one of whose weights comes from there, and which leaves none there."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **PLAIN, **options
    )
    model, info = loaded
    faults = {name: found for name, found in info.items() if found}
    assert not faults, faults
    return model.eval()


@torch.no_grad()
def run_model(model: torch.nn.Module, token_BT: np.ndarray) -> np.ndarray:
    """`[B, T, V]` logits of rows without padding."""
    return model(torch.from_numpy(np.asarray(token_BT, np.int64)), use_cache=False).logits.numpy()


def measure_gap(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference in parts of the largest logit."""
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


def write_typed_folder(case: Case, path: Path, dtype: str) -> None:
    """A case's folder with its tensors rounded to a type, each with the type's extremes among them."""
    write_folder(case, path)
    limits, n_bytes = ml_dtypes.finfo(DTYPES[dtype]), 0
    extremes = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -0.0]
    for file in path.glob("*.safetensors"):
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in load_file(file).items()}
        for tensor in tensors.values():
            tensor.reshape(-1)[: len(extremes)] = extremes[: tensor.size]
            n_bytes += tensor.nbytes
        save_file(tensors, file, metadata={"format": "pt"})
    config = {name: dtype if name in ("dtype", "torch_dtype") else value for name, value in case.config.items()}
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    index = path / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps(values | {"metadata": {"total_size": n_bytes}}), encoding="utf-8")
