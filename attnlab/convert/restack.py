"""Decoder parameters between the stacked form (scanned) and one entry a layer.

Stacked: ``params["blocks"][place]`` holds leaves ``[repeats, ...]``, ``place`` in the period.
Unstacked: ``params["blocks"]`` is a list in execution order, layer ``repeat * period + place``.
"""

from __future__ import annotations

import jax
import numpy as np

from attnlab.core.errors import ConfigError, ShapeError


def unstack(params: dict) -> dict:
    """The list form; inverse of ``stack``. Leaves are slices, nothing is computed."""
    places = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
    repeats = {leaf.shape[0] for leaf in jax.tree.leaves(places)}
    if len(repeats) != 1:
        raise ShapeError(
            f"blocks have {sorted(repeats)} layers", "every leaf is stacked over the same repeats",
            "pass the params of one decoder, in stacked form",
        )
    layers = [jax.tree.map(lambda a, i=i: a[i], p) for i in range(repeats.pop()) for p in places]
    return params | {"blocks": layers}


def stack(params: dict, period: int = 1) -> dict:
    """The stacked form of a list with ``period`` different layers; numpy leaves stay numpy."""
    layers = params["blocks"]
    if period < 1 or not layers or len(layers) % period:
        raise ConfigError(
            f"period = {period}", f"must divide the {len(layers)} layers", "use len(config.period)"
        )

    def join(*leaves):
        host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        return np.stack(leaves) if host else jax.numpy.stack(leaves)

    places = {str(i): jax.tree.map(join, *layers[i::period]) for i in range(period)}
    return params | {"blocks": places}
