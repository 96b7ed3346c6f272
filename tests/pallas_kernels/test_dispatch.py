"""The plan against one made expert by expert, and against its own meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import make_plan, make_plan_reference
from tests.pallas_kernels.routes import routes

planned = jax.jit(make_plan, static_argnums=(1, 2, 3))


@settings(max_examples=25, deadline=None)
@given(routes(), st.sampled_from((None, 1, 3)))
def test_plan_is_that_of_a_loop_over_experts(route, capacity):
    got, expected = planned(*route, capacity), make_plan_reference(*route, capacity)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(routes(), st.sampled_from((None, 2)))
def test_every_kept_assignment_stands_once_in_a_tile_of_its_expert(route, capacity):
    expert_TA, n_experts, tile = route
    plan = jax.tree.map(np.asarray, planned(*route, capacity))
    rows, choices = np.nonzero(plan.kept_TA)
    row_slots = plan.row_slot_TA[rows, choices]
    assert len(np.unique(row_slots)) == len(row_slots) == plan.used_R.sum() == plan.size_E.sum()
    np.testing.assert_array_equal(plan.row_R[row_slots], rows)
    np.testing.assert_array_equal(plan.choice_R[row_slots], choices)
    np.testing.assert_array_equal(plan.expert_L[row_slots // tile], expert_TA[rows, choices])
    assert np.all(row_slots < plan.n_tiles * tile)
    np.testing.assert_array_equal(plan.demand_E, np.bincount(expert_TA.reshape(-1), minlength=n_experts))
    dropped = np.maximum(plan.demand_E - (capacity or len(expert_TA)), 0)
    np.testing.assert_array_equal(plan.demand_E - plan.size_E, dropped)


def test_the_first_rows_are_kept_where_capacity_drops():
    plan = planned(np.zeros((7, 1), np.int32), 2, 4, 3)
    np.testing.assert_array_equal(plan.kept_TA[:, 0], [True] * 3 + [False] * 4)


def test_a_key_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="32-bit"):
        jax.eval_shape(lambda e: make_plan(e, 1 << 20, 8), jax.ShapeDtypeStruct((1 << 12, 2), jnp.int32))
    with pytest.raises(ValueError, match="32-bit"):
        make_plan(jnp.zeros((0, 2), jnp.int32), 4, 8)
