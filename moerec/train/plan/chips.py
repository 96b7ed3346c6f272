"""TPU slices that are described, not there: their chips, and a mesh over them.

The figures are the public ones: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moerec.config import Config
from moerec.errors import InputError
from moerec.nn.sharding import MESH_AXES, arrange_devices

GIB = 2**30
# libtpu reads these when it is loaded: it is not to ask the network which machine this is, nor to tell at length that
# nobody answers.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Chip(NamedTuple):
    """One chip of a kind.

    Attributes:
      hbm_bytes: main memory. peak_flops: bfloat16 operations per second. hbm_rate, ici_rate: bytes per second to and
        from main memory, and over all links to other chips together.
      n_axes: of the torus. most: chips of the largest slice.
    """

    hbm_bytes: float
    peak_flops: float
    hbm_rate: float
    ici_rate: float
    n_axes: int
    most: int
    options: dict[str, Any] = {}  # noqa: RUF012 - a constant: what libtpu has to be told beside the name


CHIPS = {
    # Both cores of a chip are one device, as on the machines: libtpu describes them apart unless told.
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, 3, 4096, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 2, 256),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 3, 8960),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9, 2, 256),  # links: 3,584 Gbit/s
}


class Topology(NamedTuple):
    """A slice: `v5p:4x4x4` is 64 chips of the kind v5p in a cube."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def n_chips(self) -> int:
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """A topology by its name.

    Raises:
      InputError: there is no such kind of chip, or no slice of that shape.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology: {name!r}: the chips are {', '.join(CHIPS)}, e.g. v5e:4x4 or v5p:4x4x4")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})+", shape) or shape.count("x") + 1 != chip.n_axes:
        example = "x".join(["4"] * chip.n_axes)
        raise InputError(f"--topology: {name!r}: a slice of {kind} has {chip.n_axes} sides, e.g. {kind}:{example}")
    found = Topology(name, kind, tuple(int(side) for side in shape.split("x")))
    if found.n_chips > chip.most:
        raise InputError(f"--topology: {name!r}: {found.n_chips} chips; the largest slice of {kind} has {chip.most}")
    return found


def describe_mesh(topology: Topology, config: Config) -> Mesh:
    """The mesh of a config over the chips of a slice, neighbours on an axis near each other where that can be.

    Raises:
      InputError: the mesh has another number of devices than the slice has chips, libtpu is not installed, or knows no
        such slice.
    """
    shape = config.train.mesh_data, config.train.mesh_expert, config.train.mesh_model
    if math.prod(shape) != topology.n_chips:
        fields = "config.train.mesh_data x mesh_expert x mesh_model"
        asked = f"{' x '.join(map(str, shape))} = {math.prod(shape)} chips"
        raise InputError(f"{fields}: {asked}; --topology={topology.name} has {topology.n_chips}")
    devices = arrange_devices(shape, _describe_devices(topology))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _describe_devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is not installed: pip install 'moerec[plan]'")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options = topology.chip.options
    try:
        return topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0].split(": ", 1)[-1]
        raise InputError(f"--topology: {topology.name!r}: the TPU compiler knows no such slice: {reason}") from None
