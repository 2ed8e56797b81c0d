"""Runs in a process with 8 virtual CPU devices: every variant sharded = the same unsharded.

Started by ``test_layers_sharded.py``. Prints one line a comparison that passed, raises on the first
that did not.
"""

from __future__ import annotations

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cases
import jax
import numpy as np
from jax.sharding import NamedSharding

from attnlab.core import axes
from attnlab.core.axes import check_divisible, sharding, spec
from attnlab.core.errors import MeshError
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.testing.budget import close, close_trees
from attnlab.testing.fixtures import RAGGED, Lab, cut, pack, tokens

ROWS = (*RAGGED, (11, 2, -11))
B, T = 4, 24
MESHES = {
    "dp": {"data": 4},
    "fsdp": {"fsdp": 4},
    "tp": {"tensor": 2},
    "dp x fsdp x tp": {"data": 2, "fsdp": 2, "tensor": 2},
}


def is_axes(node) -> bool:
    return isinstance(node, tuple)


def shardings(mesh, names, arrays):
    """The NamedSharding of every array; MeshError where a dimension does not divide."""

    def one(names, array):
        part = spec(names, RULES, mesh, array.shape)
        check_divisible(str(names), array.shape, part, mesh)
        return NamedSharding(mesh, part)

    return jax.tree.map(one, names, arrays, is_leaf=is_axes)


def cache_shardings(mesh, cache):
    names = type(cache)(**type(cache).AXES)
    return jax.tree.map(
        lambda n, a: NamedSharding(mesh, spec(n, RULES, mesh, a.shape)),
        names, cache, is_leaf=is_axes,
    )


def passes(lab: Lab):
    """``(gradients, cached)``: the training pass with gradients, and a prefill with a decode."""

    def cached(params, x, seq, cache):
        y, cache = lab.fill(params, x[:, :-2], cut(seq, 0, T - 2), cache)
        z, cache = lab.step(params, x[:, -2:], cut(seq, T - 2, T), cache)
        return y, z, cache

    return lab.derive, cached


def compare(name: str, lab: Lab, title: str, cached_too: bool) -> bool:
    sizes = MESHES[title]
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, devices=jax.devices()[:count])
    try:
        where = shardings(mesh, lab.axes, lab.params)
    except MeshError as error:
        assert error.fix
        print(f"{name} {title}: refused, {error}")
        return False
    x, dy = tokens(1, B, T, lab.config.dim), tokens(2, B, T, lab.config.dim)
    seq = pack(ROWS)
    derive, cached = passes(lab)
    expected = jax.jit(derive)(lab.params, x, seq, dy)

    put = functools.partial(jax.device_put)
    params = jax.tree.map(put, lab.params, where)
    row = NamedSharding(mesh, spec(("batch", "time"), RULES, mesh))
    inputs = [jax.tree.map(lambda a: put(a, row), part) for part in (x, seq, dy)]
    cut_up = sum(
        leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(params)
    )
    if title != "dp":
        assert cut_up, f"{name} {title}: no parameter is sharded"
    with sharding(mesh, RULES):
        run = jax.jit(lambda *a: derive(*a), out_shardings=(row, where, row))
        y, dparams, dx = run(params, *inputs)
    close(y, expected[0], name=f"{name} {title}: y ")
    close_trees(dparams, expected[1], name=f"{name} {title}: gradient of params ")
    close(dx, expected[2], kind="gradient", name=f"{name} {title}: gradient of x ")
    if cached_too and lab.config.decode:
        cache = lab.cache(B, 30)
        want = jax.jit(cached)(lab.params, x, seq, cache)
        places = cache_shardings(mesh, cache)
        cache = jax.tree.map(put, cache, places)
        with sharding(mesh, RULES):
            run = jax.jit(lambda *a: cached(*a), out_shardings=(row, row, places))
            got = run(params, *inputs[:2], cache)
        close_trees(got, want, kind="output", name=f"{name} {title}: prefill and decode ")
    print(f"{name} {title}: same, {cut_up} of {len(jax.tree.leaves(params))} parameters cut")
    return True


def main():
    assert len(jax.devices()) == 8, jax.devices()
    assert axes.current() is None
    product = "dp x fsdp x tp"
    for variant in cases.CASES:
        labs = [
            (name, Lab(config)) for name, _, config in cases.configs()
            if name.rstrip("0123456789") == variant
        ]
        for title in MESHES:
            if title != product:
                served = [compare(name, lab, title, False) for name, lab in labs[:1]]
            else:
                served = [compare(name, lab, title, True) for name, lab in labs]
            supports = labs[0][1].config.supports
            declared = {"dp", "fsdp", "tp"} <= supports if title == product else title in supports
            assert any(served) == declared, f"{variant} declares {sorted(supports)} but {title}"


if __name__ == "__main__":
    main()
