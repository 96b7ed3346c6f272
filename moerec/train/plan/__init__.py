"""Plans of training steps on TPU slices that are not there."""

from moerec.train.plan.chips import Topology, describe_mesh, parse_topology
from moerec.train.plan.step_plan import plan_step
from moerec.train.plan.table import format_plan

__all__ = ["Topology", "describe_mesh", "format_plan", "parse_topology", "plan_step"]
