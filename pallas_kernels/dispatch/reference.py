"""The plan by two stable argsorts and loops over experts; for tests."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch.api import Plan, count_tiles


def make_plan_reference(expert_TA: np.ndarray, n_experts: int, tile: int, capacity: int | None = None) -> Plan:
    """`make_plan` in NumPy, expert by expert."""
    expert_TA = np.asarray(expert_TA)
    n_choices = expert_TA.shape[1]
    n_tiles = count_tiles(expert_TA.size, n_experts, tile)
    expert_N = np.full(n_tiles, n_experts - 1)
    row_P, choice_P = np.zeros(n_tiles * tile, int), np.zeros(n_tiles * tile, int)
    used_P = np.zeros(n_tiles * tile, bool)
    place_TA, kept_TA = np.zeros(expert_TA.shape, int), np.zeros(expert_TA.shape, bool)
    size, demand, at = [], [], 0
    for e in range(n_experts):
        assignments = np.flatnonzero(expert_TA.reshape(-1) == e)
        kept = assignments[:capacity]
        for j, a in enumerate(kept):
            place = at * tile + j
            row_P[place], choice_P[place], used_P[place] = a // n_choices, a % n_choices, True
            place_TA.reshape(-1)[a], kept_TA.reshape(-1)[a] = place, True
        n = -(-len(kept) // tile)
        expert_N[at : at + n] = e
        at += n
        size.append(len(kept))
        demand.append(len(assignments))
    columns = (expert_N, row_P, choice_P, used_P, place_TA, kept_TA, np.array(size), np.array(demand), np.array(at))
    return Plan(*map(jnp.asarray, columns))
