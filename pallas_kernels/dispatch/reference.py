"""The plan by two stable argsorts and loops over experts; for tests."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch.api import DispatchPlan, count_tiles


def make_plan_reference(expert_TA: np.ndarray, n_experts: int, tile: int, capacity: int | None = None) -> DispatchPlan:
    """`make_plan` in NumPy, expert by expert."""
    expert_TA = np.asarray(expert_TA)
    n_choices = expert_TA.shape[1]
    n_tiles = count_tiles(expert_TA.size, n_experts, tile)
    expert_L = np.full(n_tiles, n_experts - 1)
    row_R, choice_R = np.zeros(n_tiles * tile, int), np.zeros(n_tiles * tile, int)
    used_R = np.zeros(n_tiles * tile, bool)
    row_slot_TA, kept_TA = np.zeros(expert_TA.shape, int), np.zeros(expert_TA.shape, bool)
    size, demand, at = [], [], 0
    for e in range(n_experts):
        assignments = np.flatnonzero(expert_TA.reshape(-1) == e)
        kept = assignments[:capacity]
        for j, a in enumerate(kept):
            row_slot = at * tile + j
            row_R[row_slot], choice_R[row_slot], used_R[row_slot] = a // n_choices, a % n_choices, True
            row_slot_TA.reshape(-1)[a], kept_TA.reshape(-1)[a] = row_slot, True
        n = -(-len(kept) // tile)
        expert_L[at : at + n] = e
        at += n
        size.append(len(kept))
        demand.append(len(assignments))
    columns = (expert_L, row_R, choice_R, used_R, row_slot_TA, kept_TA, np.array(size), np.array(demand), np.array(at))
    return DispatchPlan(*map(jnp.asarray, columns))
