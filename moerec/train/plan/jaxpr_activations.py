"""What a traced step keeps of its layers for the backward pass."""

import math
from typing import Any

from jax.extend import core

from moerec.train.plan.jaxpr_flops import find_bodies


def count_activations(jaxpr: core.Jaxpr | core.ClosedJaxpr, rows: int, slots: int) -> int:
    """Bytes of what scans stack over layers for each row and slot of a batch, on all devices together.

    The forward scan hands them to the backward one; of rematerialised layers they are the inputs. Other arrays
    that scans stack, such as the gradients of weights, have no rows and slots.

    Args: rows of a microbatch, and slots of a row.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_count_equation(equation, rows, slots) for equation in inner.eqns)


def _count_equation(equation: Any, rows: int, slots: int) -> int:
    params = equation.params
    if equation.primitive.name == "scan":
        body = params["jaxpr"].jaxpr if isinstance(params["jaxpr"], core.ClosedJaxpr) else params["jaxpr"]
        pairs = zip(equation.outvars, body.outvars, strict=True)
        stacked = [out.aval for out, of_pass in pairs if len(out.aval.shape) > len(of_pass.aval.shape)]
        # Of microbatches one at a time is alive, so that the scans within their own are counted once.
        own = sum(math.prod(x.shape) * x.dtype.itemsize for x in stacked if x.shape[1:3] == (rows, slots))
        return own or count_activations(params["jaxpr"], rows, slots)
    return sum(count_activations(body, rows, slots) for body in find_bodies(params))
