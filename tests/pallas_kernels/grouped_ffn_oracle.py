"""The experts' network expert by expert in float64 NumPy: its values and all gradients, without a compiler."""

import numpy as np

from pallas_kernels.dispatch import make_plan_reference

NAMES = ("y", "x", "weight", "gate", "up", "down")


def grouped_ffn_by_hand(operands, expert_TA, n_experts: int, tile: int, capacity: int | None = None):
    """The output, and what rows, weights and matrices get of its cotangent, the last of the operands."""
    x, weight, gate, up, down, g = (np.asarray(a, np.float64) for a in operands)
    kept_TA = np.asarray(make_plan_reference(expert_TA, n_experts, tile, capacity).kept_TA)
    y, d_x, d_weight, d_gate, d_up, d_down = (np.zeros_like(a) for a in (x, x, weight, gate, up, down))
    for e in range(n_experts):
        row, choice = np.nonzero(kept_TA & (np.asarray(expert_TA) == e))
        share = weight[row, choice][:, None]
        gated, raised = x[row] @ gate[e], x[row] @ up[e]
        open_ = 1 / (1 + np.exp(-gated))
        hidden = gated * open_ * raised
        np.add.at(y, row, share * (hidden @ down[e]))
        d_weight[row, choice] = np.sum(g[row] * (hidden @ down[e]), axis=1)
        d_hidden = share * g[row] @ down[e].T
        d_raised = d_hidden * gated * open_
        d_gated = d_hidden * raised * open_ * (1 + gated * (1 - open_))
        np.add.at(d_x, row, d_gated @ gate[e].T + d_raised @ up[e].T)
        d_gate[e], d_up[e], d_down[e] = x[row].T @ d_gated, x[row].T @ d_raised, hidden.T @ (share * g[row])
    return y, d_x, d_weight, d_gate, d_up, d_down


def assert_right(got, operands, expert_TA, n_experts: int, tile: int, capacity=None, tolerance: float = 3e-6) -> None:
    """That each of these is what is made by hand, by the largest number in it."""
    expected = grouped_ffn_by_hand(operands, expert_TA, n_experts, tile, capacity)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, b / scale, atol=tolerance, err_msg=name)
