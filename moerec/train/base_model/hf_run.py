"""Base models as runs: a Hugging Face folder becomes the directory of a run, and a run becomes such a folder.

What the folder says beside its weights (its config, tokenizer, chat template, which file has which tensor, of which
type) is kept in the run's `hf/`, so that what goes out again is what came in, but for what was trained.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from moerec.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from moerec.config.stored import read_config, store_config
from moerec.convert.hf_config import check_tensors, read_shape
from moerec.convert.hf_folder import CONFIG_NAME, HFFolder, copy_side_files, open_folder
from moerec.convert.qwen2 import SHAPE_FIELDS, import_folder, make_model_config
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.files import making_folder, require_new_folder, require_plain_path, write_json
from moerec.nn.model import SequenceModel, count_active_params
from moerec.nn.sharding import make_mesh
from moerec.train.base_model.warm_start import find_checkpoint
from moerec.train.checkpoint import Checkpoints, TrainProgress
from moerec.train.run_dir import CONFIG, METRICS
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
    require_new_folder(workdir)  # before minutes are spent
    _check_tokenizer(path)
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
            "shape_flags": list_shape_flags(config),
            "n_tensors": len(folder.tensors),
            "n_bytes": sum(info.stop - info.start for info in folder.tensors.values()),
            "dtypes": sorted({str(info.dtype) for info in folder.tensors.values()}),
        },
    }
    with making_folder(workdir) as temporary:
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


def list_shape_flags(config: Config) -> str:
    """The flags that give another config the shape of a run's model."""
    default, model = ModelConfig(), config.model
    values = {name: getattr(model, name) for name in SHAPE_FIELDS}
    values |= {f"text.{name}": value for name, value in dataclasses.asdict(model.text).items()}
    for name, value in dataclasses.asdict(model.moe).items():
        if value != getattr(default.moe, name):
            values[f"moe.{name}"] = f"'{value}'" if isinstance(value, tuple) else value
    found = [f"--config.model.{name}={value}" for name, value in values.items()]
    return " ".join(found)


def _check_tokenizer(path: Path) -> None:
    """Raises: InputError, where the folder's tokenizer.json is none."""
    if (path / TOKENIZER).is_file():
        TextTokenizer.load(path / TOKENIZER)


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
