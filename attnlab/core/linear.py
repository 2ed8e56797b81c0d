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
from jax.ad_checkpoint import checkpoint_name

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

    On a mesh it has a reverse derivative only; ``jax.checkpoint`` sees it as "projection".
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
    y = checkpoint_name(_product((first, second, out), parts, x, w), "projection")
    return constrain(y, *y_axes)


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
    y = jnp.einsum(equation, a, b, preferred_element_type=dtype)
    return y if dtype is None else held(y)


def held(y: jax.Array) -> jax.Array:
    """``y``, whose cast to a narrower dtype XLA cannot move in front of the sum that makes it.

    The TPU compiler does, and then adds in bf16. A barrier alone does not stop it, bits do.
    """
    bits = jnp.uint64 if y.dtype.itemsize == 8 else jnp.uint32
    y_bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(y, bits))
    return jax.lax.bitcast_convert_type(y_bits, y.dtype)


def widened(x: jax.Array, wide: str) -> jax.Array:
    """``x`` in ``wide``, for what many devices get a copy of: its gradient is summed in wide."""
    context = axes.current()
    return x.astype(wide) if context is None or context[0].size == 1 else _widened(x, wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _widened(x, wide):
    return x.astype(wide)


def _widened_fwd(x, wide):
    return x.astype(wide), x[..., :0]  # carries the dtype


def _widened_bwd(wide, like, g):
    return (held(g).astype(like.dtype),)


_widened.defvjp(_widened_fwd, _widened_bwd)
