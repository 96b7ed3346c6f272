"""moerec: a multi-expert personalised language model that recommends across services.

`Config` and `run_experiment` train and evaluate; `load_run` opens a run, and `Recommender` answers from it, for many
users at once; `recommend` explains one answer.
"""

import importlib
from typing import Any

from moerec.config.platform import settle_platform

__version__ = "0.1.0"

settle_platform()

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
