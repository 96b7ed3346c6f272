"""moerec: a multi-expert personalised language model that recommends across services.

`Config` and `run_experiment` train and evaluate; `load_run`, `RecommendRequest` and `recommend` answer from a run.
"""

import importlib
from typing import Any

from moerec.config.platform import settle_platform

__version__ = "0.1.0"

settle_platform()

# Found when they are asked for: a machine that only trains from Python may lack what the commands need.
_HOMES = {
    "Config": "moerec.config",
    "RecommendRequest": "moerec.serve.request",
    "load_run": "moerec.train.run_dir",
    "recommend": "moerec.serve.recommender",
    "run_experiment": "moerec.eval.evaluate_run",
}
__all__ = ["Config", "RecommendRequest", "load_run", "recommend", "run_experiment"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moerec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
