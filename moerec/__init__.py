"""moerec: a multi-expert personalised language model that recommends across services.

`Config` and `run_experiment` train and evaluate; `load_run` opens a run, and `Recommender` answers from it, for many
users at once; `recommend` explains one answer.
"""

import glob
import importlib.util
import os
from typing import Any

__version__ = "0.1.0"

_PLUGINS = ("jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def _settle_platform() -> None:
    """Keeps JAX from looking for a TPU where there is none.

    libtpu compiles for TPUs on any machine; where there is none, JAX would ask the network for one and tell at length
    that nobody answered. It does so when it is imported, so this comes first. Where no other accelerator's plugin is
    installed, there is nothing but the CPU to look for.
    """
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if importlib.util.find_spec("libtpu") and not any(map(importlib.util.find_spec, _PLUGINS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


_settle_platform()

# Found when they are asked for: a machine that only trains from Python may lack what the commands need.
_HOMES = {
    "Config": "moerec.config",
    "Recommendations": "moerec.serve.recommender",
    "RecommendRequest": "moerec.serve.request",
    "Recommender": "moerec.serve.recommender",
    "UserEvent": "moerec.serve.recommender",
    "UserHistory": "moerec.serve.recommender",
    "load_run": "moerec.train.run_dir",
    "recommend": "moerec.serve.explained",
    "run_experiment": "moerec.eval.evaluate_run",
}
__all__ = [
    "Config",
    "RecommendRequest",
    "Recommendations",
    "Recommender",
    "UserEvent",
    "UserHistory",
    "load_run",
    "recommend",
    "run_experiment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moerec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
