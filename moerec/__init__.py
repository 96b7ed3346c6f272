"""moerec: a multi-expert personalised language model that recommends across services."""

import glob
import importlib.util
import os

__version__ = "0.1.0"

# libtpu compiles for TPUs on any machine; where there is none, JAX would ask the network for one and tell at length
# that nobody answered. It does so when it is imported, so this comes first. Where no other accelerator's plugin is
# installed, there is nothing but the CPU to look for.
if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    plugins = ("jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
    if importlib.util.find_spec("libtpu") and not any(map(importlib.util.find_spec, plugins)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
