"""Matrix products of activations and parameters whose sums over devices are taken in fp32.

On a mesh a product may be a sum of parts held by several devices: forward where the contracted
heads or columns are cut (output projections), backward where the rows are (gradients of
parameters) or the heads of the output (gradients of inputs). Each of the three products is told
from the logical axes of its activations; where it is such a sum it leaves the matrix unit in the
softmax dtype, so that the sum over devices is rounded once, after it. Elsewhere, and without a
mesh, it is a plain einsum in the compute dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnlab.core import axes
from attnlab.core.axes import Axes, constrain


def project(
    equation: str, x: jax.Array, w: jax.Array, x_axes: Axes, y_axes: Axes, wide: str
) -> jax.Array:
    """``einsum(equation, x, w)`` in the dtype of x, pinned to ``y_axes``.

    Args:
        equation: two terms and an output, a letter an axis. x: activation. w: parameter of any
            dtype; its gradient comes back in it.
        x_axes, y_axes: logical axes of x and of the result. wide: dtype of sums over devices.
    """
    context = axes.current()
    if context is None or context[0].size == 1:
        return jnp.einsum(equation, x, w.astype(x.dtype))
    left, _, out = equation.partition("->")
    first, second = left.split(",")
    cut = {
        letter for letter, name, size in zip(first, x_axes, x.shape, strict=True)
        if name and axes.shards(name, size) > 1
    }
    shapes = dict(zip(first, x.shape)) | dict(zip(second, w.shape))
    cut |= {
        letter for letter, name in zip(out, y_axes, strict=True)
        if name and axes.shards(name, shapes[letter]) > 1
    }
    parts = tuple(
        wide if cut & (set(a) & set(b) - set(c)) else None
        for a, b, c in ((first, second, out), (out, second, first), (first, out, second))
    )
    return constrain(_product((first, second, out), parts, x, w), *y_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(terms, parts, x, w):
    first, second, out = terms
    return _sum(f"{first},{second}->{out}", x, w.astype(x.dtype), parts[0]).astype(x.dtype)


def _product_fwd(terms, parts, x, w):
    return _product(terms, parts, x, w), (x, w)


def _product_bwd(terms, parts, saved, dy):
    (first, second, out), (x, w) = terms, saved
    dx = _sum(f"{out},{second}->{first}", dy, w.astype(x.dtype), parts[1])
    dw = _sum(f"{first},{out}->{second}", x, dy, parts[2])
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def _sum(equation: str, a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)
