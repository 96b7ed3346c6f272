"""Warm start from the parameters of another run: partial and renamed restore that accounts for every leaf.

Leaves are matched by path, and layers one by one: `layers/3/attention/q_DNH` is layer 3's in whatever group it stands,
so that a dense model's layers are found by a mixture that groups them otherwise.
"""

import operator
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moerec.config import Config, ModelConfig, TrainConfig
from moerec.config.stored import read_config
from moerec.convert.paths import first_match, flatten, name_path, unflatten
from moerec.data.load import RunData, read_digests
from moerec.data.text.corpus import Corpus
from moerec.errors import InputError
from moerec.nn.block import split_layers
from moerec.train.checkpoint import Checkpoints
from moerec.train.state import TrainState

ROUTER_BIAS, BIAS = "router_bias_LE", "router_bias_E"  # of the state, and of a layer


class Restored(NamedTuple):
    """What became of every leaf; paths by layer.

    Attributes:
      leaves: those that were found, by their path here. renamed: `{path here: path there}` where the two differ.
      fresh: paths here that stay as they are initialised. dropped: paths there that are left out.
    """

    leaves: dict[str, np.ndarray]
    renamed: dict[str, str]
    fresh: list[str]
    dropped: list[str]


def split_groups(leaves: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Leaves of a model by layer: of `groups/G/…`, stacked over the group's layers, one a layer as `layers/L/…`."""
    groups, found = split_layers(config), {}
    for path, leaf in leaves.items():
        head, *rest = path.split("/")
        if head != "groups":
            found[path] = leaf
            continue
        group = groups[int(rest[0])]
        for layer in range(group.first, group.last):
            found["/".join(("layers", str(layer), *rest[1:]))] = leaf[layer - group.first]
    return found


def join_groups(leaves: Mapping[str, Any], config: ModelConfig, like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_groups`. Args: the paths by group."""
    groups, found = split_layers(config), {}
    for path in like:
        head, *rest = path.split("/")
        if head != "groups":
            found[path] = leaves[path]
            continue
        group = groups[int(rest[0])]
        paths = ["/".join(("layers", str(layer), *rest[1:])) for layer in range(group.first, group.last)]
        found[path] = np.stack([leaves[p] for p in paths])
    return found


def match_leaves(
    here: Mapping[str, tuple[int, ...]], there: Mapping[str, np.ndarray], options: TrainConfig
) -> Restored:
    """Finds for every leaf here the one there, and says what became of all others.

    Args:
      here: shapes by path. there: arrays by path.

    Raises:
      InputError: a leaf here has none there and is no `init_fresh`, one there has none here and is no `init_drop`, two
        are given one name, a shape differs, or a name or pattern is nobody's.
    """
    renames = dict(entry.split("=", 1) for entry in options.init_rename)
    names: dict[str, str] = {}
    used = set()
    dropped = [path for path in there if first_match(path, options.init_drop)]
    for path in there:
        old = next((old for old in renames if path == old or path.startswith(old.rstrip("/") + "/")), None)
        used |= {old} - {None}
        name = path if old is None else renames[old].rstrip("/") + path[len(old.rstrip("/")) :]
        if path in dropped:
            continue
        if name in names:
            raise InputError(f"config.train.init_rename: {path} and {names[name]} would both be {name}")
        names[name] = path
    for old in renames.keys() - used:
        raise InputError(f"config.train.init_rename: {old!r} begins no path there, such as {next(iter(there))}")
    fresh = [path for path in here if path not in names and first_match(path, options.init_fresh)]
    for path in here:
        if path not in names and path not in fresh:
            raise InputError(f"config.train.init_from: {path} is not there; init_fresh lets it stay as initialised")
    for name, path in names.items():
        if name not in here:
            raise InputError(f"config.train.init_from: {path} is not here; init_drop leaves it out")
        if tuple(there[path].shape) != tuple(here[name]):
            shapes = f"{tuple(there[path].shape)} there, {tuple(here[name])} here"
            raise InputError(f"config.train.init_from: {path} is {shapes}")
    for field, patterns, paths in (("fresh", options.init_fresh, fresh), ("drop", options.init_drop, dropped)):
        for pattern in patterns:
            if not any(first_match(path, [pattern]) for path in paths):
                raise InputError(f"config.train.init_{field}: {pattern!r} is no path that it could be about")
    renamed = {name: path for name, path in names.items() if name != path}
    return Restored({name: there[path] for name, path in names.items()}, renamed, fresh, dropped)


def find_checkpoint(folder: Path) -> tuple[Path, str, int | None]:
    """The run that a folder belongs to, which of its checkpoints are meant, and the step (None: the newest).

    Raises:
      InputError: it is neither a run's folder, nor `checkpoints`, `checkpoints/KIND` or `checkpoints/KIND/STEP` in one.
    """
    folder = folder.resolve()
    if (folder / "config.json").is_file():
        return folder, "best", None
    for run in folder.parents[:3]:
        inside = folder.relative_to(run).parts
        is_step = len(inside) == 3 and inside[2].isdecimal()
        if inside[0] == "checkpoints" and (len(inside) < 3 or is_step):
            kind = inside[1] if len(inside) > 1 else "best"
            if kind in ("best", "last") and (run / "config.json").is_file():
                return run, kind, int(inside[2]) if is_step else None
    raise InputError(f"config.train.init_from: {folder} is no run and no checkpoint of one")


def read_parameters(folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, by layer, those that are evaluated: the averaged ones where there are some.

    Args:
      folder: a run's, whose best checkpoint is meant; or of its checkpoints `checkpoints/last`, or a step there.

    Raises:
      InputError: it holds no run, or no checkpoint.
    """
    run, kind, step = find_checkpoint(folder)
    config = read_config(run / "config.json")
    if not (run / "checkpoints" / kind).is_dir():
        raise InputError(f"{run}: holds no checkpoint")
    checkpoints = Checkpoints(run / "checkpoints", read_only=True, kind=kind)
    try:
        prefix = "average/" if config.optim.ema_decay else "params/"
        leaves = checkpoints.read_leaves((prefix, ROUTER_BIAS), step)
    finally:
        checkpoints.close()
    bias_LE = leaves.pop(ROUTER_BIAS, None)
    leaves = {path.removeprefix(prefix): leaf for path, leaf in leaves.items()}
    return split_groups(leaves, config.model) | _split_bias(bias_LE, config.model)


def _split_bias(bias_LE: Any, config: ModelConfig) -> dict[str, Any]:
    """The routers' biases by layer; they are no parameters, and yet learned."""
    if bias_LE is None:
        return {}
    return {
        f"layers/{layer}/ffn/{BIAS}": bias_E for layer, bias_E in zip(sorted(config.moe.layers), bias_LE, strict=True)
    }


def warm_start(state: TrainState, config: Config, data: RunData | Corpus) -> TrainState:
    """The state before the first step with the parameters of `train.init_from`; what became of each leaf is told.

    Parameters are placed as those of the state are; moments and the step stay those of a start.

    Raises:
      InputError: as `read_parameters` and `match_leaves`; or a table of items or tokens is of other ones there.
    """
    current = flatten(state.params)
    by_layer = split_groups(current, config.model) | _split_bias(state.router_bias_LE, config.model)
    there = read_parameters(Path(config.train.init_from))
    restored = match_leaves({path: leaf.shape for path, leaf in by_layer.items()}, there, config.train)
    _refuse_other_items(restored, state, config, data)
    print(describe_restored(restored, config.train.init_from), file=sys.stderr)
    if other := list_other_functions(config.model, find_checkpoint(Path(config.train.init_from))[0]):
        print(
            f"{config.train.init_from}: the same weights make another function here: {'; '.join(other)}",
            file=sys.stderr,
        )
    by_layer |= restored.leaves
    joined = join_groups(by_layer, config.model, current)
    placed = {path: jax.device_put(joined[path].astype(leaf.dtype), leaf.sharding) for path, leaf in current.items()}
    params, bias_LE = unflatten(state.params, placed), state.router_bias_LE
    if bias_LE is not None:
        rows = [by_layer[f"layers/{layer}/ffn/{BIAS}"] for layer in sorted(config.model.moe.layers)]
        bias_LE = jax.device_put(np.stack(rows), bias_LE.sharding)
    average = None if state.average is None else jax.tree.map(jnp.copy, params)
    return state._replace(params=params, router_bias_LE=bias_LE, average=average)


def _refuse_other_items(restored: Restored, state: TrainState, config: Config, data: RunData | Corpus) -> None:
    """Rows of items and of their words mean the same only where items, their numbering and their texts are the same.

    Those of text tokens hang on the tokenizer, which a run takes over from the one that it begins with.
    """
    run, _, _ = find_checkpoint(Path(config.train.init_from))
    if read_digests(run).get("items_sha256") == data.items_digest:
        return
    leaves = jax.tree_util.tree_leaves_with_path(state.params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    tables = [name_path(path) for path, leaf in leaves if {"items", "vocab"} & set(leaf.get_metadata().get("axes", ()))]
    for name in tables:
        if name in restored.leaves and not name.startswith(("token_encoder/", "text_head/")):
            raise InputError(
                f"config.train.init_from: {name} is of other items there, or of items numbered otherwise (data.seed); "
                "init_fresh and init_drop leave it out"
            )


_FUNCTION = ("rope_theta", "norm_eps", "window", "moe.n_active", "moe.renormalise", "moe.n_open_groups")


def list_other_functions(config: ModelConfig, run: Path) -> list[str]:
    """Fields that have no parameters, and yet decide what these compute, where those of a run differ; in words."""
    there, found = read_config(run / "config.json").model, []
    for name in _FUNCTION:
        if name.startswith("moe.") and not (config.moe.layers and there.moe.layers):
            continue
        old, new = (operator.attrgetter(name)(x) for x in (there, config))
        if old != new:
            found.append(f"model.{name} was {old} and is {new}")
    return found


def describe_restored(restored: Restored, source: str) -> str:
    """What became of the leaves, in a line."""
    parts = [f"{len(restored.leaves)} parameters from {source}"]
    for title, paths in (
        ("renamed", restored.renamed),
        ("as initialised", restored.fresh),
        ("left out", restored.dropped),
    ):
        if paths:
            shown = ", ".join(list(paths)[:3]) + (", …" if len(paths) > 3 else "")
            parts.append(f"{len(paths)} {title} ({shown})")
    return "; ".join(parts)
