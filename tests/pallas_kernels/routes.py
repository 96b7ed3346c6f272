"""Assignments of rows to experts that the kernels' tests share."""

from hypothesis import strategies as st

from pallas_kernels.specs import LOADS, draw_experts


@st.composite
def routes(draw):
    """`(expert_TA, n_experts, tile)` of every shape of load: empty groups, one row, all rows to one expert."""
    n_experts = draw(st.integers(1, 9))
    n_choices = draw(st.integers(1, min(n_experts, 3)))
    n_rows = draw(st.integers(1, 40))
    load = draw(st.sampled_from(LOADS))
    seed = draw(st.integers(0, 2**16))
    return draw_experts(load, n_rows, n_choices, n_experts, seed), n_experts, draw(st.sampled_from((1, 2, 8, 16)))
