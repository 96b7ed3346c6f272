"""Floating-point operations of a traced program: its matmuls and convolutions, in every pass of its loops.

XLA's own analysis counts the body of a loop once. Here a scan over layers counts all of them, what `jax.checkpoint`
recomputes counts as often as it is computed, and what a `shard_map` does on each device counts on all of them.
Elementwise work is left out: it is done elsewhere than matmuls, beside them.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jax.extend import core

_CALLED_ONCE = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # what jit, checkpoint and custom derivatives call their body


class Flops(NamedTuple):
    """Operations of the whole program on all devices together; a multiplication and an addition are two.

    Attributes:
      total: matmuls and convolutions. unbounded: loops with matmuls whose number of passes nobody knows before they
        run; one pass of each is in the total.
    """

    total: float
    unbounded: int = 0


def count_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr, platform: str = "tpu") -> Flops:
    """Of a `cond` the branch with the most; where the branches are those of platforms, that of `platform`."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return _add(_count_equation(equation, platform) for equation in inner.eqns)


def _add(parts: Iterable[Flops]) -> Flops:
    found = list(parts)
    return Flops(sum(part.total for part in found), sum(part.unbounded for part in found))


def _repeat(flops: Flops, times: int) -> Flops:
    return Flops(times * flops.total, flops.unbounded)


def _count_equation(equation: Any, platform: str) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name in _MATMULS:
        return Flops(_MATMULS[name](equation))
    if name == "scan":
        return _repeat(count_flops(params["jaxpr"], platform), params["length"])
    if name == "while":
        body = _add(count_flops(params[part], platform) for part in ("cond_jaxpr", "body_jaxpr"))
        return Flops(body.total, body.unbounded + int(body.total > 0))
    if name == "cond":
        return max(count_flops(branch, platform) for branch in _find_branches(params, platform))
    if name == "shard_map":
        n_devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return _repeat(count_flops(params["jaxpr"], platform), n_devices)
    if name == "pallas_call":
        return _count_kernel(params, platform)
    return _add(count_flops(body, platform) for body in find_bodies(params))


def _find_branches(params: dict[str, Any], platform: str) -> tuple[Any, ...]:
    """The branches that may run on the platform: a `jax.lax.platform_dependent` keeps one."""
    branches, platforms = params["branches"], params.get("branches_platforms")
    if platforms is None:
        return branches
    own = [branch for branch, names in zip(branches, platforms, strict=True) if names and platform in names]
    return tuple(own) or tuple(branch for branch, names in zip(branches, platforms, strict=True) if names is None)


def find_bodies(params: dict[str, Any]) -> Iterator[Any]:
    """What any other equation calls, once."""
    for name, value in params.items():
        if name in _CALLED_ONCE and isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value


def _count_kernel(params: dict[str, Any], platform: str) -> Flops:
    """What a Pallas kernel declares, else its body at every step of its grid."""
    if params.get("cost_estimate") is not None:
        return Flops(params["cost_estimate"].flops)
    body = count_flops(params["jaxpr"], platform)
    grid = params["grid_mapping"].grid
    if all(isinstance(size, int) for size in grid):
        return _repeat(body, math.prod(grid))
    return Flops(body.total, body.unbounded + 1)


def _shapes(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    left, right = equation.invars[:2]
    return left.aval.shape, right.aval.shape


def _count_dot(equation: Any) -> float:
    """Twice batch times M times N times K: all of the left operand, with each free column of the right one."""
    left, right = _shapes(equation)
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    return 2.0 * math.prod(left) * _count_free(right, (*contracted, *batch))


def _count_ragged_dot(equation: Any) -> float:
    """Every row meets the matrix of one group, whether groups split the rows or what is summed over."""
    left, right = _shapes(equation)
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return 2.0 * math.prod(left) * _count_free(right, (*contracted, *batch, *numbers.rhs_group_dimensions))


def _count_convolution(equation: Any) -> float:
    """Every output with all of the kernel that leads to it; padding counts as input."""
    _, kernel = _shapes(equation)
    n_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / n_features


def _count_free(shape: tuple[int, ...], bound: tuple[int, ...]) -> int:
    return math.prod(size for axis, size in enumerate(shape) if axis not in bound)


_MATMULS = {
    "dot_general": _count_dot,
    "ragged_dot_general": _count_ragged_dot,
    "conv_general_dilated": _count_convolution,
}
