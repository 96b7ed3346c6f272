"""What has to be settled before JAX is imported."""

import glob
import importlib.util
import os

PLUGINS = ("jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def settle_platform() -> None:
    """Keeps JAX from looking for a TPU where there is none.

    libtpu compiles for TPUs on any machine; where there is none, JAX would ask the network for one and tell at length
    that nobody answered. It does so when it is imported, so this comes first. Where no other accelerator's plugin is
    installed, there is nothing but the CPU to look for.
    """
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if importlib.util.find_spec("libtpu") and not any(map(importlib.util.find_spec, PLUGINS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
