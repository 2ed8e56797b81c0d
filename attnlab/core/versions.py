"""Every difference between jax and flax versions lives here (jax 0.10.2 up to the newest)."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental
from flax import nnx
from jax.sharding import AxisType, Mesh

JAX: tuple[int, ...] = tuple(int(n) for n in jax.__version__.split(".")[:3] if n.isdigit())


def enable_x64(on: bool = True):
    """Context manager that switches 64-bit types on (moved out of jax.experimental in 0.11)."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return getattr(jax.experimental, "enable_x64")(on)  # noqa: B009 - gone in newer versions


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...], devices=None) -> Mesh:
    """A mesh with automatic axes (jax.make_mesh defaults to explicit ones since 0.10)."""
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices
    )


def reciprocal(x):
    """The TPU's approximate ``1 / x`` inside a Pallas kernel (moved to pallas.tpu after 0.10)."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    home: Any = tpu if hasattr(tpu, "reciprocal") else pallas
    return home.reciprocal(x, approx=True)


def split_module(module: nnx.Module) -> tuple[Any, dict]:
    """``(graphdef, params)``: params is a plain nested dict of arrays with string keys."""
    graphdef, state = nnx.split(module)
    return graphdef, _stringify(nnx.to_pure_dict(state))


def merge_module(graphdef: Any, params: dict) -> Any:
    """The module of ``split_module`` around other arrays."""
    return nnx.merge(graphdef, _restore_keys(params))


def module_axes(module: nnx.Module) -> dict:
    """The logical axes of every parameter, in the tree shape of ``split_module``'s params."""
    _, state = nnx.split(module)
    return _stringify(_map_variables(state, lambda variable: variable.get_metadata()["axes"]))


def _map_variables(state, f):
    flat = nnx.to_flat_state(state)
    nested: dict = {}
    for path, variable in flat:
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = f(variable)
    return nested


def _stringify(tree):
    if isinstance(tree, dict):
        return {str(k): _stringify(v) for k, v in tree.items()}
    return tree


def _restore_keys(tree):
    if isinstance(tree, dict):
        return {int(k) if k.isdigit() else k: _restore_keys(v) for k, v in tree.items()}
    return tree


def abstract_split(build) -> tuple[Any, dict]:
    """``split_module`` of ``build()`` without computing anything: leaves are ShapeDtypeStructs."""
    box: list[Any] = []

    def trace():
        graphdef, params = split_module(build())
        box.append(graphdef)
        return params

    params = jax.eval_shape(trace)
    return box[0], params
