"""How long a request takes: all services asked against the most probable ones, in turn, on one run."""

import time
from typing import Any

import numpy as np

from moerec.errors import InputError
from moerec.serve.explained import recommend
from moerec.serve.request import RecommendRequest
from moerec.train.run_dir import Run

TOP_K = 10


def bench_recommend(run: Run, n_requests: int, mass: float) -> dict[str, Any]:
    """Median and 95th percentile (ms) of warm requests of as many users, and how many services were asked (mean).

    Raises:
      InputError: services are not asked in this run; no request to measure.
    """
    if not run.config.model.is_asked:
        raise InputError("config.model.ask.from_layer: nothing is asked in this run")
    if n_requests < 1:
        raise InputError("--requests: must be at least 1")
    users = run.data.dataset.users
    chosen = users[np.random.default_rng(0).integers(0, len(users), n_requests)]
    took: dict[str, list[float]] = {"all": [], "mass": []}
    n_asked: list[int] = []
    for is_warm in (False, True):  # the first time over, programs are compiled
        for user in chosen:
            for name, share in (("all", 1.0), ("mass", mass)):
                start = time.perf_counter()
                answer = recommend(run, str(user), RecommendRequest(), TOP_K, mass=share)
                if is_warm:
                    took[name].append(1e3 * (time.perf_counter() - start))
                    if name == "mass":
                        assert answer.asked is not None
                        n_asked.append(len(answer.asked.answers))
    found: dict[str, Any] = {
        name: {"p50_ms": float(np.median(ms)), "p95_ms": float(np.quantile(ms, 0.95))} for name, ms in took.items()
    }
    found["services"], found["services_asked"] = run.data.dataset.catalogue.n_services, float(np.mean(n_asked))
    found["ratio"] = found["mass"]["p50_ms"] / found["all"]["p50_ms"]
    return found
