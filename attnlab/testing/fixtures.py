"""Building blocks of the tests: random tokens, packed rows, a layer with its compiled passes."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.core.types import Precision, Seq
from attnlab.core.versions import enable_x64, merge_module, module_axes, split_module

Rows = Sequence[Sequence[int]]
"""What rows hold, left to right: a positive number is a document, a negative one is padding."""

# One-token documents, documents shorter than a window or convolution; left, inner, right padding.
RAGGED: Rows = ((3, 1, 11, 3, -6), (11, 1, 1, 11), (-4, 1, 3, -2, 11, -3))
# What layout="packed" promises: padding only at the end.
PACKED: Rows = ((3, 1, 11, 3, -6), (11, 1, 1, 11), (1, 11, 3, -9))


def tokens(seed: int, *shape: int) -> np.ndarray:
    """Standard normal fp32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spans(rows: Rows) -> Iterator[tuple[int, int, int]]:
    """``(row, start, length)`` of every document."""
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            if length > 0:
                yield b, start, length
            start += abs(length)


def pack(rows: Rows, layout: str = "any", first: int = 0) -> Seq:
    """The Seq of ``rows``; positions start at ``first`` in every document."""
    length = sum(abs(n) for n in rows[0])
    positions = np.zeros((len(rows), length), np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for i, (b, start, n) in enumerate(spans(rows)):
        positions[b, start : start + n] = first + np.arange(n)
        # Unsorted names with gaps, except where the layout promises an ordinary packer.
        segments[b, start : start + n] = i + 1 if layout == "packed" else (7 * i + 3) % 19 + 1
    return Seq(positions, segments, layout)


def ones(batch: int, length: int, first: int = 0) -> Seq:
    """One document a row, with explicit segments, at positions ``first..``."""
    positions = np.broadcast_to(first + np.arange(length, dtype=np.int32), (batch, length))
    return Seq(positions.copy(), np.ones((batch, length), np.int32), "any")


def cut(seq: Seq, start: int, stop: int) -> Seq:
    """The tokens ``start..stop-1`` of every row; a piece keeps no promise."""
    segments = None if seq.segments is None else seq.segments[:, start:stop]
    return Seq(seq.positions[:, start:stop], segments, "any")


def pieces(widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive pieces."""
    start = 0
    for width in widths:
        yield start, start + width
        start += width


def randomise(params: dict, seed: int = 0, spread: float = 0.25) -> dict:
    """Params moved off their initial values, so that no bias is zero and no norm weight is one."""
    leaves, tree = jax.tree.flatten(params)
    moved = [np.asarray(p) + spread * tokens(seed + i, *p.shape) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(tree, moved)


def cast(tree, dtype: str):
    """Every floating leaf in ``dtype``."""
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


class Lab:
    """A layer, its parameters, and its passes compiled once a shape.

    Args:
        config: of the layer. params: fp32 numbers to use; default random ones.

    ``traces`` counts how often each pass was traced.
    """

    def __init__(self, config, params: dict | None = None):
        self.config = config
        self.dtype = config.precision.compute
        self.x64 = config.precision.params == "float64"
        self.traces: Counter[str] = Counter()
        with enable_x64(self.x64):
            module = config.build(nnx.Rngs(0))
            self.graph, initial = split_module(module)
            self.axes = module_axes(module)
            self.initial = initial
            params = randomise(initial) if params is None else params
            self.params = cast(params, config.precision.params)
        self._train = jax.jit(self._count("train", self.run), static_argnames="impl")
        self._grads = jax.jit(self._count("grads", self.derive), static_argnames="impl")
        self._prefill = jax.jit(self._count("prefill", self.fill), static_argnames="impl")
        self._decode = jax.jit(self._count("decode", self.step), static_argnames="impl")

    @functools.cached_property
    def module(self):
        return merge_module(self.graph, self.params)

    def at(self, precision: str | Precision) -> Lab:
        """The same numbers at another precision."""
        if isinstance(precision, str):
            precision = Precision.named(precision)
        return _at(self, precision)

    def _count(self, name, function):
        def counted(*args, **kwargs):
            self.traces[name] += 1
            return function(*args, **kwargs)

        return counted

    # The passes as plain functions, to be transformed by the tests.

    def run(self, params, x, seq, impl=None):
        return merge_module(self.graph, params)(x, seq, impl=impl).y

    def derive(self, params, x, seq, dy, impl=None):
        """``(y, gradient of params, gradient of x)`` for the output cotangent ``dy``."""
        y, back = jax.vjp(lambda p, x: self.run(p, x, seq, impl), params, x)
        return y, *back(dy.astype(y.dtype))

    def fill(self, params, x, seq, cache, impl=None):
        out = merge_module(self.graph, params).prefill(x, seq, cache, impl=impl)
        return out.y, out.cache

    def step(self, params, x, seq, cache, impl=None):
        out = merge_module(self.graph, params).decode(x, seq, cache, impl=impl)
        return out.y, out.cache

    # The same, compiled, on this lab's parameters and at its precision.

    def _call(self, function, x, *rest, params=None, impl=None):
        params = self.params if params is None else params
        with enable_x64(self.x64):
            x = np.asarray(x, np.float64 if self.x64 else np.float32)
            return function(params, x, *rest, impl=impl)

    def train(self, x, seq, **kw):
        return self._call(self._train, x, seq, **kw)

    def grads(self, x, seq, dy, **kw):
        dy = np.asarray(dy, np.float64 if self.x64 else np.float32)
        return self._call(self._grads, x, seq, dy, **kw)

    def prefill(self, x, seq, cache, **kw):
        return self._call(self._prefill, x, seq, cache, **kw)

    def decode(self, x, seq, cache, **kw):
        return self._call(self._decode, x, seq, cache, **kw)

    def cache(self, batch: int, capacity: int, dtype=None):
        with enable_x64(self.x64):
            return self.module.init_cache(batch, capacity, dtype)

    def walk(self, x, seq, cache, widths, decode: bool = False):
        """``(y, cache)`` of consecutive pieces of these widths; decode takes pieces of up to 8."""
        step, ys = self.decode if decode else self.prefill, []
        for start, stop in pieces(widths):
            y, cache = step(x[:, start:stop], cut(seq, start, stop), cache)
            ys.append(np.asarray(y))
        return np.concatenate(ys, axis=1), cache


@functools.cache
def _at(lab: Lab, precision: Precision) -> Lab:
    return Lab(dataclasses.replace(lab.config, precision=precision), lab.params)
