"""Logical axes of the weights to axes of the mesh, in one place."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moerec.errors import InputError

MESH_AXES = ("data", "model")

# Wide axes are split over `model`; everything else is on every device. No weight may use one mesh axis twice.
RULES: dict[str, str | None] = {
    "embed": None,
    "experts": None,
    "mlp": "model",
    "heads": "model",
    "kv_heads": "model",
    "items": "model",
    "vocab": "model",
}


def make_mesh(n_data: int, n_model: int) -> Mesh:
    """A mesh of the first `n_data * n_model` devices."""
    devices = jax.devices()
    if n_data * n_model > len(devices):
        raise InputError(f"config.train.mesh_data: {n_data} x {n_model} devices asked for, {len(devices)} are there")
    grid = np.asarray(devices[: n_data * n_model]).reshape(n_data, n_model)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def param_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
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
    """The batch's rows are split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())
