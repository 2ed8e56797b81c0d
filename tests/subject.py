"""A config under test with what the conformance checks share, and the list of those checks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import cases
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.versions import enable_x64
from attnlab.testing import fixtures
from attnlab.testing.fixtures import RAGGED, Lab, ones, pack, tokens

B, T = 3, 24
SPLITS = (1, 2, 1, 2, 14, 2, 2)  # three shapes; shorter than convolutions; inside documents
CHECKS: dict[str, Callable] = {}
NEEDS_CACHE: set[str] = set()
ONCE: set[str] = set()  # checks of what all configs of a variant share: its last, richest one


class Subject:
    """A case's config with everything the checks share: labs, tokens, results."""

    def __init__(self, name: str, case: cases.Case, config):
        self.name, self.case, self.config = name, case, config
        self.lab = Lab(config)
        self.x = tokens(1, B, T, config.dim)
        self.dy = tokens(2, B, T, config.dim)
        self.packed = pack(RAGGED)
        # Widths of decode steps; the configs of a variant share out 1 to 8.
        self.widths = ((8, 7, 1, 8), (6, 5, 1, 6, 6), (4, 3, 2, 4, 4, 3, 4))[int(name[-1]) % 3]

    @functools.cached_property
    def y(self) -> np.ndarray:
        """The training pass over whole rows."""
        return np.asarray(self.lab.train(self.x, ones(B, T)))

    @functools.cached_property
    def packed_grads(self):
        """``(y, gradients of params, gradient of x)`` of the packed rows."""
        return jax.tree.map(np.asarray, self.lab.grads(self.x, self.packed, self.dy))

    @functools.cached_property
    def reference_grads(self):
        """What ``packed_grads`` gives, with the reference implementation."""
        grads = self.lab.grads(self.x, self.packed, self.dy, impl="reference")
        return jax.tree.map(np.asarray, grads)

    def oracle(self, lab: Lab):
        """The fp64 oracle's ``(y, gradients of params, gradient of x)`` of the packed rows."""
        with enable_x64():
            x, dy = jnp.asarray(self.x, jnp.float64), jnp.asarray(self.dy, jnp.float64)
            y, back = jax.vjp(
                lambda p, x: self.case.run_oracle(lab.config, p, x, self.packed),
                fixtures.cast(lab.params, "float64"), x,
            )
            return jax.tree.map(np.asarray, (y, *back(dy)))

    @functools.cached_property
    def expected(self):
        return self.oracle(self.lab)

    @functools.cached_property
    def exact(self):
        """What ``oracle`` gives, from the layer at fp64."""
        return jax.tree.map(
            np.asarray, self.lab.at("float64").grads(self.x, self.packed, self.dy)
        )


def check(function=None, *, cache: bool = False, once: bool = False):
    """Register a check; ``cache``: it needs prefill and decode; ``once``: one config is enough."""
    if function is None:
        return functools.partial(check, cache=cache, once=once)
    CHECKS[function.__name__] = function
    if cache:
        NEEDS_CACHE.add(function.__name__)
    if once:
        ONCE.add(function.__name__)
    return function
