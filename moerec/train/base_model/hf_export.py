"""The language model of a run as a Hugging Face folder."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.config.stored import read_config
from moerec.convert.hf_config import HFShape, expected_tensors, read_shape, write_config
from moerec.convert.hf_folder import CONFIG_NAME, DTYPES
from moerec.convert.hf_writer import TensorPlan, plan_files, write_folder
from moerec.convert.qwen2 import is_packed, is_weight, make_shape, read_blocks
from moerec.errors import InputError
from moerec.files import read_json
from moerec.nn.model import Predictor, SequenceModel
from moerec.nn.sharding import make_mesh
from moerec.train.base_model.hf_run import TENSORS, TOKENIZER, find_origin
from moerec.train.run_dir import CONFIG, Run

SHARD_BYTES = 5_000_000_000  # of a folder's file, where no origin says otherwise
# Without it `transformers` builds the tokenizer that it thinks the family has.
_PLAIN_TOKENIZER = b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
_OF_EVENTS = ("item_encoder", "slot_encoder", "input_norm", "analyser", "head", "profile")


class _Layout(NamedTuple):
    """The tensors of a folder, and its config.json."""

    plans: list[TensorPlan]
    config: dict[str, Any]


def export_run(workdir: Path, target: Path, dtype: str = "") -> dict[str, Any]:
    """Writes the language model of a run as a Hugging Face folder.

    Args: dtype: of the weights; empty: that of the folder which the model came from, or float32.

    Raises:
      InputError: the run's model has parts that have no place there (says which), a weight is too large for the type,
        or there is something at `target`.
    """
    known = {str(x): x for x in DTYPES.values()}
    if dtype and dtype not in known:
        raise InputError(f"--dtype: {dtype!r} is none of {', '.join(known)}")
    config = read_config(workdir / CONFIG)
    shape, origin = make_shape(config.model), find_origin(workdir)
    predictor = _read_predictor(workdir, config)
    model = predictor.params
    if predictor.router_bias_LE is not None and bool(jnp.any(predictor.router_bias_LE != 0)):
        raise InputError(f"{workdir}: the routers' biases (model.moe.bias_rate) have no Hugging Face layout")
    layout = _find_layout(shape, origin, known[dtype] if dtype else None)
    side_files, files = _find_side_files(workdir, origin)
    _write(model, layout, target, side_files, files)
    left_out = [name for name in _OF_EVENTS if getattr(model, name) is not None]
    if origin is not None and not _is_same_shape(shape, origin):
        left_out.append("types and files of the folder that the model came from, which is of another shape")
    if origin is not None and side_files is None:
        left_out.append("chat template and generation config, which belong to another tokenizer")
    return {
        "n_tensors": len(layout.plans),
        "n_bytes": sum(plan.n_bytes for plan in layout.plans),
        "dtypes": sorted({str(plan.dtype) for plan in layout.plans}),
        "left_out": left_out,
    }


def write_model(model: SequenceModel, target: Path) -> None:
    """Writes a language model alone, without a tokenizer, in float32.

    Raises:
      InputError: it has parts that have no place in a Hugging Face folder, or there is something at `target`.
    """
    _write(model, _find_layout(make_shape(model.config), None, None), target)


def _write(
    model: SequenceModel,
    layout: _Layout,
    target: Path,
    side_files: Path | None = None,
    files: Mapping[str, bytes] = {},
) -> None:
    by_name = {plan.name: plan for plan in layout.plans}
    packed = is_packed(by_name)

    def blocks(name: str) -> Iterator[np.ndarray]:
        return read_blocks(model, name, by_name[name].shape, by_name[name].dtype, packed)

    write_folder(target, layout.plans, blocks, layout.config, side_files, files)


def _find_layout(shape: HFShape, origin: Path | None, dtype: np.dtype | None) -> _Layout:
    """That of the folder which the model came from, where it still has the shape, else a new one."""
    if origin is None or not _is_same_shape(shape, origin):
        chosen = np.dtype(np.float32) if dtype is None else dtype
        shapes = expected_tensors(shape, ())
        sizes = {name: int(np.prod(x)) * chosen.itemsize for name, x in shapes.items()}
        files = plan_files(sizes, SHARD_BYTES)
        plans = [TensorPlan(name, chosen, x, files[name]) for name, x in shapes.items()]
        return _Layout(plans, write_config(shape, str(chosen)))
    plans, config = _read_plans(origin / TENSORS), read_json(origin / CONFIG_NAME)
    found = {plan.name: plan.shape for plan in plans}
    if found != expected_tensors(read_shape(config, origin / CONFIG_NAME), found):
        raise InputError(f"{origin / TENSORS}: does not name the tensors of the model that {CONFIG_NAME} describes")
    if dtype is not None:
        plans = [dataclasses.replace(plan, dtype=dtype) for plan in plans]
        config |= {name: str(dtype) for name in ("torch_dtype", "dtype") if name in config}
    return _Layout(plans, config)


def _find_side_files(workdir: Path, origin: Path | None) -> tuple[Path | None, dict[str, bytes]]:
    """The folder whose side files go out, and files beside them: the run's own tokenizer, where it is another one."""
    own = (workdir / TOKENIZER).read_bytes() if (workdir / TOKENIZER).is_file() else None
    if origin is not None:
        there = (origin / TOKENIZER).read_bytes() if (origin / TOKENIZER).is_file() else None
        if own is None or own == there:
            return origin, {}
    return None, {} if own is None else {TOKENIZER: own, "tokenizer_config.json": _PLAIN_TOKENIZER}


def _is_same_shape(shape: HFShape, origin: Path) -> bool:
    """Whether a model still has the sizes that it came with; a stage may have added layers or words."""
    there = read_shape(read_json(origin / CONFIG_NAME), origin / CONFIG_NAME)
    # A mixture without mixture layers is written as the dense model that it is.
    known = there.max_positions, there.dtype, there.family
    own = dataclasses.replace(shape, max_positions=known[0], dtype=known[1], family=known[2])
    return own == there


def _read_predictor(workdir: Path, config: Config) -> Predictor:
    train = config.train
    n_devices = train.mesh_data * train.mesh_expert * train.mesh_model
    mesh = (train.mesh_data, train.mesh_expert, train.mesh_model) if n_devices <= len(jax.devices()) else (1, 1, 1)
    return Run(workdir).restore(make_mesh(*mesh))


def _read_plans(path: Path) -> list[TensorPlan]:
    known, plans = {str(x): x for x in DTYPES.values()}, []
    entries = read_json(path).get("tensors")
    if not isinstance(entries, list):
        raise InputError(f"{path}: has no list of tensors")
    for entry in entries:
        try:
            shape = tuple(int(n) for n in entry["shape"])
            plan = TensorPlan(str(entry["name"]), known[entry["dtype"]], shape, str(entry["file"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: an entry of tensors is damaged ({error!r})") from None
        if is_weight(plan.name):
            plans.append(plan)
    return plans
