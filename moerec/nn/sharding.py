"""Logical axes of the weights to axes of the mesh, in one place."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moerec.errors import InputError

MESH_AXES = ("data", "expert", "model")
ROW_AXES = ("data", "expert")  # over which rows of a batch are split: all but experts are as parallel over `expert`

# Wide axes are split over `model`, experts over `expert`, and the model width, which nearly every weight has, over
# `data` (FSDP: the parts come together where they are used). No weight may use one mesh axis twice.
RULES: dict[str, str | None] = {
    "embed": "data",
    "experts": "expert",
    "mlp": "model",
    "heads": "model",
    "kv_heads": "model",
    "items": "model",
    "vocab": "model",
}


def make_mesh(n_data: int, n_expert: int, n_model: int) -> Mesh:
    """A mesh of the first `n_data * n_expert * n_model` devices.

    Its axes are of JAX's `Auto` type. What the compiler must not guess (where rows go to experts and come back, the
    rows of attention) stands inside `shard_map`, where placement is explicit; for the rest it has the placement of
    weights and rows. With `Explicit` axes every einsum, reshape and gather of the model would have to name its
    result's, for the same program.
    """
    devices, shape = jax.devices(), (n_data, n_expert, n_model)
    n = n_data * n_expert * n_model
    if n > len(devices):
        asked = " x ".join(map(str, shape))
        raise InputError(f"config.train.mesh_data: {asked} devices asked for, {len(devices)} are there")
    return Mesh(arrange_devices(shape, devices[:n]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange_devices(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices as a mesh; of TPUs each axis has whole sides of the torus, else parts of sides, else as they come."""
    if devices[0].platform == "tpu":
        for splits in (False, True):
            with contextlib.suppress(NotImplementedError, ValueError, AssertionError):
                return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=splits)
    return np.asarray(devices).reshape(shape)


def mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """`jax.set_mesh` of the mesh that the tree's arrays lie on, for the layers of experts; nothing on one device."""
    sharding = jax.tree.leaves(tree)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
        return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def param_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where a weight goes. An axis that its mesh axis does not divide stays whole; leading stacked axes, too."""
    stacked = len(shape) - len(axes)
    names: list[str | None] = [None] * stacked
    for axis, size in zip(axes, shape[stacked:], strict=True):
        name = RULES[axis] if axis else None
        names.append(name if name and size % mesh.shape[name] == 0 else None)
    used = [name for name in names if name]
    if len(used) != len(set(used)):
        raise InputError(f"sharding rules put {axes} twice onto one mesh axis")
    return PartitionSpec(*names)


def param_shardings(tree, mesh: Mesh):
    """The same tree (of a model, an optimiser's or a training state) with a `NamedSharding` in place of every array.

    Moments carry the axes of their weights, so they are split like them; whatever has no axes is on every device.
    """

    def place(leaf):
        if isinstance(leaf, nnx.Param):
            return leaf.replace(NamedSharding(mesh, param_spec(leaf.get_metadata()["axes"], leaf.shape, mesh)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch's rows are split over `ROW_AXES`."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


class TableLayout(NamedTuple):
    """How a table of rows, such as a vocabulary's, lies on a mesh, for what is written inside `jax.shard_map`.

    Attributes:
      mesh: the one that is set. spec: of the table.
      is_split: whether its rows are split over `model`. is_sharded: whether their width is over `data` (FSDP).
    """

    mesh: AbstractMesh
    spec: PartitionSpec
    is_split: bool
    is_sharded: bool

    @property
    def n_row_parts(self) -> int:
        """Devices over which rows of a batch are split."""
        return int(np.prod([self.mesh.shape[axis] for axis in ROW_AXES]))

    def gather(self, table_XD: jax.Array) -> tuple[jax.Array, jax.Array | int]:
        """This device's rows in their whole width, and the number of the first of them."""
        if self.is_sharded:
            table_XD = jax.lax.all_gather(table_XD, "data", axis=1, tiled=True)
        return table_XD, jax.lax.axis_index("model") * table_XD.shape[0] if self.is_split else 0


def find_layout(table_XD: jax.Array, axes: tuple[str | None, ...]) -> TableLayout | None:
    """The layout under `jax.set_mesh`; None on one device. Args: the table, and its logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    spec = param_spec(axes, table_XD.shape, mesh)
    return TableLayout(mesh, spec, spec[0] == "model", spec[1] == "data")
