"""Base models as runs: a Hugging Face folder becomes the directory of a run, and a run becomes such a folder.

What the folder says beside its weights (its config, tokenizer, chat template, which file has which tensor, of which
type) is kept in the run's `hf/`, so that what goes out again is what came in, but for what was trained.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config, DataConfig, EvalConfig, OptimConfig, TrainConfig
from moerec.config.stored import read_config, store_config
from moerec.convert.hf_config import HFShape, check_tensors, expected_tensors, read_shape, write_config
from moerec.convert.hf_folder import CONFIG_NAME, DTYPES, HFFolder, copy_side_files, open_folder
from moerec.convert.hf_writer import TensorPlan, plan_files, write_folder
from moerec.convert.qwen2 import import_folder, is_packed, is_weight, make_model_config, make_shape, read_blocks
from moerec.errors import InputError
from moerec.files import read_json, require_plain_path, write_json
from moerec.nn.model import Predictor, SequenceModel, count_active_params
from moerec.nn.sharding import make_mesh
from moerec.train.base_model.warm_start import find_checkpoint
from moerec.train.checkpoint import Checkpoints, TrainProgress
from moerec.train.run_dir import CONFIG, METRICS, Run
from moerec.train.state import start_state

ORIGIN, TENSORS = "hf", "tensors.json"  # in the directory of a run; and in that folder: names, types, shapes and files
TOKENIZER = "tokenizer.json"
SHARD_BYTES = 5_000_000_000  # of a folder's file, where no origin says otherwise


def read_hf_model(path: Path, mesh: tuple[int, int, int] = (1, 1, 1)) -> tuple[HFFolder, SequenceModel]:
    """A folder, checked, and the model that it holds, on a mesh of the first devices.

    Raises:
      InputError: whatever is wrong with the folder, in one line.
    """
    folder = open_folder(path)
    shape = read_shape(folder.config, path / CONFIG_NAME)
    check_tensors(folder, shape)
    return folder, import_folder(folder, shape, make_mesh(*mesh))


def import_run(path: Path, workdir: Path, mesh: tuple[int, int, int] = (1, 1, 1)) -> dict[str, Any]:
    """Makes a run of a Hugging Face folder, whole or not at all; training begins with it by `train.init_from`.

    Raises:
      InputError: as `read_hf_model`; or there is something at `workdir`.
    """
    require_plain_path(workdir)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir}: is there already; a model is imported into a new or empty folder")
    folder, model = read_hf_model(path, mesh)
    config = Config(
        name=path.resolve().name,
        data=DataConfig(source="text"),
        model=make_model_config(read_shape(folder.config, path / CONFIG_NAME)),
        tasks=("lm",),
        # Nothing is trained here: without moments the run has the size of the model.
        optim=OptimConfig(groups=("*=frozen",), warmup_steps=0),
        train=TrainConfig(
            steps=1, batch_size=mesh[0] * mesh[1], mesh_data=mesh[0], mesh_expert=mesh[1], mesh_model=mesh[2]
        ),
        eval=EvalConfig(n_probed=0),
        baselines=(),
    )
    n_params = sum(leaf.size for leaf in jax.tree.leaves(model))
    metrics = {
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "steps": 0,
        "n_params": n_params,
        "n_active_params": count_active_params(model),
        "imported": {
            "n_tensors": len(folder.tensors),
            "n_bytes": sum(info.stop - info.start for info in folder.tensors.values()),
            "dtypes": sorted({str(info.dtype) for info in folder.tensors.values()}),
        },
    }
    with _making(workdir) as temporary:
        store_config(temporary / CONFIG, config)
        _keep_origin(folder, temporary / ORIGIN)
        checkpoints = Checkpoints(temporary / "checkpoints")
        try:
            checkpoints.save_best(0, start_state(config, model), TrainProgress())
            checkpoints.wait()
        finally:
            checkpoints.close()
        write_json(temporary / METRICS, metrics)
    return metrics


@contextlib.contextmanager
def _making(workdir: Path) -> Iterator[Path]:
    """A temporary folder beside `workdir`, which takes its name when all is there."""
    whole = Path(os.path.abspath(workdir))
    temporary = whole.with_name(f".{whole.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_origin(folder: HFFolder, origin: Path) -> None:
    origin.mkdir()
    write_json(origin / CONFIG_NAME, folder.config)
    copy_side_files(folder.path, origin)
    tensors = [
        {"name": name, "dtype": str(info.dtype), "shape": info.shape, "file": info.file.name}
        for name, info in folder.tensors.items()
    ]
    write_json(origin / TENSORS, {"tensors": tensors})


def find_origin(run: Path) -> Path | None:
    """The folder `hf/` of a run, or of the one whose parameters its training began with."""
    for _ in range(100):  # of a chain of stages
        if (run / ORIGIN / TENSORS).is_file():
            return run / ORIGIN
        init_from = read_config(run / CONFIG).train.init_from
        if not init_from:
            return None
        run = find_checkpoint(Path(init_from))[0]
    return None


def find_tokenizer(run: Path) -> Path:
    """The tokenizer of a run: its own, or that of the folder which its model came from.

    Raises:
      InputError: it has none.
    """
    if (run / TOKENIZER).is_file():
        return run / TOKENIZER
    origin = find_origin(run)
    if origin is not None and (origin / TOKENIZER).is_file():
        return origin / TOKENIZER
    raise InputError(f"{run}: has no {TOKENIZER}, nor has the model that its training began with")


def keep_origin(config: Config, workdir: Path) -> None:
    """Copies what the model that training begins with came with, so that the run stands without that one.

    Raises:
      InputError: `train.init_from` is no run.
    """
    target = workdir / ORIGIN
    if not config.train.init_from or target.exists():
        return
    origin = find_origin(find_checkpoint(Path(config.train.init_from))[0])
    if origin is not None:
        partial = workdir / f".{ORIGIN}.{os.getpid()}.tmp"
        shutil.copytree(origin, partial)
        partial.rename(target)


def export_run(workdir: Path, target: Path, dtype: str = "") -> dict[str, Any]:
    """Writes the language model of a run as a Hugging Face folder.

    Args: dtype: of the weights; empty: that of the folder which the model came from, or float32.

    Raises:
      InputError: the run's model has parts that have no place there (says which), or there is something at `target`.
    """
    known = {str(x): x for x in DTYPES.values()}
    if dtype and dtype not in known:
        raise InputError(f"--dtype: {dtype!r} is none of {', '.join(known)}")
    config = read_config(workdir / CONFIG)
    shape = make_shape(config.model)
    origin, predictor = find_origin(workdir), _read_predictor(workdir, config)
    model = predictor.params
    if predictor.router_bias_LE is not None and bool(jnp.any(predictor.router_bias_LE != 0)):
        raise InputError(f"{workdir}: the routers' biases (model.moe.bias_rate) have no Hugging Face layout")
    if origin is not None and _is_same_shape(shape, origin):
        plans = _read_plans(origin / TENSORS)
        hf_config = read_json(origin / CONFIG_NAME)
        if dtype:
            plans = [dataclasses.replace(plan, dtype=known[dtype]) for plan in plans]
            hf_config |= {name: dtype for name in ("torch_dtype", "dtype") if name in hf_config}
    else:
        origin, chosen = None, known[dtype or "float32"]
        shapes = expected_tensors(shape, ())
        sizes = {name: int(np.prod(x)) * chosen.itemsize for name, x in shapes.items()}
        files = plan_files(sizes, SHARD_BYTES)
        plans = [TensorPlan(name, chosen, x, files[name]) for name, x in shapes.items()]
        hf_config = write_config(shape, str(chosen))
    by_name = {plan.name: plan for plan in plans}
    packed = is_packed(by_name)

    def blocks(name: str) -> Iterator[np.ndarray]:
        return read_blocks(model, name, by_name[name].shape, by_name[name].dtype, packed)

    side_files = origin or (workdir if (workdir / TOKENIZER).is_file() else None)
    write_folder(target, plans, blocks, hf_config, side_files)
    if side_files == workdir:  # else `transformers` builds the tokenizer that it thinks the family has
        write_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    of_events = ("item_encoder", "slot_encoder", "input_norm", "analyser", "head", "profile")
    return {
        "n_tensors": len(plans),
        "n_bytes": sum(plan.n_bytes for plan in plans),
        "dtypes": sorted({str(plan.dtype) for plan in plans}),
        "left_out": [name for name in of_events if getattr(model, name) is not None],
    }


def _is_same_shape(shape: HFShape, origin: Path) -> bool:
    """Whether a model still has the sizes that it came with; a stage may have added layers or words."""
    there = read_shape(read_json(origin / CONFIG_NAME), origin / CONFIG_NAME)
    return dataclasses.replace(shape, max_positions=there.max_positions, dtype=there.dtype) == there


def _read_predictor(workdir: Path, config: Config) -> Predictor:
    train = config.train
    n_devices = train.mesh_data * train.mesh_expert * train.mesh_model
    mesh = (train.mesh_data, train.mesh_expert, train.mesh_model) if n_devices <= len(jax.devices()) else (1, 1, 1)
    return Run(workdir).restore(make_mesh(*mesh))


def _read_plans(path: Path) -> list[TensorPlan]:
    known, plans = {str(x): x for x in DTYPES.values()}, []
    for entry in read_json(path).get("tensors", ()):
        try:
            shape = tuple(int(n) for n in entry["shape"])
            plan = TensorPlan(str(entry["name"]), known[entry["dtype"]], shape, str(entry["file"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: an entry of tensors is damaged ({error!r})") from None
        if is_weight(plan.name):
            plans.append(plan)
    return plans
