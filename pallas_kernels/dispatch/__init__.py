"""Which row goes to which expert's tiles: the plan that every grouped operation follows."""

from pallas_kernels.dispatch.api import DispatchPlan, make_plan
from pallas_kernels.dispatch.reference import make_plan_reference

__all__ = ["DispatchPlan", "make_plan", "make_plan_reference"]
