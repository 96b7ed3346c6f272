"""How long a trained run takes to answer: one request at a time, and lists for many users."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moerec.errors import InputError
from moerec.serve.explained import recommend
from moerec.serve.recommender import Recommender
from moerec.serve.request import RecommendRequest
from moerec.train.run_dir import Run

TOP_K = 10


def bench_recommend(run: Run, n_requests: int, mass: float, n_users: int = 1024) -> dict[str, Any]:
    """Median and 95th percentile (ms) of warm requests of one user, and users a second of lists for many.

    Of one user: `explained` as `experiments.recommend` asks, and `mass` the same with the most probable services alone,
    where services are asked; `library` by `Recommender`. All three are measured in turn, user by user.

    Raises:
      InputError: no request to measure.
    """
    if n_requests < 1:
        raise InputError("--requests: must be at least 1")
    users = run.data.dataset.users
    chosen = [str(name) for name in users[np.random.default_rng(0).integers(0, len(users), n_requests)]]
    recommender, n_asked = Recommender(run), []

    def ask_most(user: str) -> None:
        asked = recommend(run, user, RecommendRequest(), TOP_K, mass=mass).asked
        assert asked is not None
        n_asked.append(len(asked.answers))

    ways: dict[str, Callable[[str], Any]] = {
        "explained": lambda user: recommend(run, user, RecommendRequest(), TOP_K),
        "library": lambda user: recommender.recommend([user], k=TOP_K),
    }
    if run.config.model.is_asked:
        ways["mass"] = ask_most
    took: dict[str, list[float]] = {name: [] for name in ways}
    for is_warm in (False, True):  # the first time over, programs are compiled
        n_asked.clear()
        for user in chosen:
            for name, ask in ways.items():
                start = time.perf_counter()
                ask(user)
                if is_warm:
                    took[name].append(1e3 * (time.perf_counter() - start))
    found: dict[str, Any] = {
        name: {"p50_ms": float(np.median(ms)), "p95_ms": float(np.quantile(ms, 0.95))} for name, ms in took.items()
    }
    found["services"] = run.data.dataset.catalogue.n_services
    if n_asked:
        found["services_asked"] = float(np.mean(n_asked))
        found["ratio"] = found["mass"]["p50_ms"] / found["explained"]["p50_ms"]
    many = [str(name) for name in users[:n_users]]
    recommender.recommend(many, k=TOP_K)
    start = time.perf_counter()
    recommender.recommend(many, k=TOP_K)
    found["lists"] = {"n_users": len(many), "users_per_s": len(many) / (time.perf_counter() - start)}
    found["n_items"] = run.data.dataset.catalogue.n_items
    return found
