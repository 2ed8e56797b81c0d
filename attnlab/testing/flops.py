"""Matmul FLOPs of a traced function, counted from its jaxpr."""

from __future__ import annotations

import math
from typing import Any

import jax


def matmul_flops(fn, *args: Any) -> float:
    """FLOPs of every matmul and convolution in ``fn(*args)`` (a multiply and an add are two).

    Nothing is executed. Calls, remat, custom derivatives and Pallas bodies are entered; a scan
    counts ``length`` times, a Pallas body once a grid point, a cond as its dearest branch. A while
    loop that holds a matmul has no known trip count and raises ValueError.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr) -> float:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out_channels
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in eqn.params["branches"])
    inner = sum(_count(body) for value in eqn.params.values() for body in _bodies(value))
    if name == "scan":
        return inner * eqn.params["length"]
    if name == "pallas_call":
        return inner * math.prod(eqn.params["grid_mapping"].grid)
    if name == "while" and inner:
        raise ValueError("a while loop holds a matmul: its trip count is not in the jaxpr")
    return inner


def _bodies(value):
    """The jaxprs inside one equation parameter."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
        yield value.jaxpr
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _bodies(item)
