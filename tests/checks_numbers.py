"""Conformance checks of numbers: oracle, budgets, implementations against each other, FLOPs."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from subject import B, Subject, T, check

from attnlab.core.mask import Coords
from attnlab.ops.attention import xla
from attnlab.testing.budget import close, close_trees, wide
from attnlab.testing.fixtures import Lab, cut, ones
from attnlab.testing.flops import matmul_flops


@check
def fp64_equals_the_oracle(s: Subject):
    close(s.exact[0], s.expected[0], dtype="float64", name="output")
    close_trees(s.exact[1], s.expected[1], dtype="float64", name="gradient of params")
    close(s.exact[2], s.expected[2], dtype="float64", kind="gradient", name="gradient of x")


@check
def every_parameter_has_gradient(s: Subject):
    for path, leaf in jax.tree_util.tree_flatten_with_path(s.expected[1])[0]:
        assert np.abs(leaf).max() > 0, f"{jax.tree_util.keystr(path)} has no gradient"
        found = np.abs(_get(s.packed_grads[1], path)).max()
        assert found > 0, f"{jax.tree_util.keystr(path)} has no gradient in float32"


def _get(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@check
def fp32_budget(s: Subject):
    _within_budget(s, s.lab, s.reference_grads)


@check
def bf16_budget(s: Subject):
    lab = s.lab.at("bfloat16")
    _within_budget(s, lab, lab.grads(s.x, s.packed, s.dy, impl="reference"))


@check(cache=True, once=True)
def bf16_cached_budget(s: Subject):
    """Prefill and decode in bf16 with a bf16 cache, against the fp64 oracle."""
    lab = s.lab.at("bfloat16")
    y, cache = lab.prefill(s.x[:, :20], cut(s.packed, 0, 20), lab.cache(B, 40))
    z, _ = lab.decode(s.x[:, 20:], cut(s.packed, 20, T), cache)
    found = np.concatenate([wide(y), wide(z)], 1)
    close(found, s.expected[0], dtype="bfloat16", name="prefill and decode")


def _within_budget(s: Subject, lab: Lab, reference):
    """The default way against the reference, and the reference against fixed numbers."""
    y, dparams, dx = lab.grads(s.x, s.packed, s.dy)
    ref_y, ref_dparams, ref_dx = reference
    want_y, want_dparams, want_dx = s.expected
    close(ref_y, want_y, dtype=lab.dtype, name="reference output")
    close_trees(ref_dparams, want_dparams, dtype=lab.dtype, name="reference gradient")
    close(ref_dx, want_dx, dtype=lab.dtype, kind="gradient", name="reference gradient of x")
    close(y, want_y, ref_y, dtype=lab.dtype, name="output")
    close_trees(dparams, want_dparams, ref_dparams, dtype=lab.dtype, name="gradient")
    close(dx, want_dx, ref_dx, dtype=lab.dtype, kind="gradient", name="gradient of x")


@check
def implementations_agree(s: Subject):
    y = s.lab.train(s.x, s.packed, impl="xla")
    close(y, s.reference_grads[0], name="xla against reference")
    close(y, s.packed_grads[0], name="xla against the default")


@check(once=True)
def many_tiles(s: Subject):
    """The same numbers and gradients when rows and columns span several tiles of the fallback."""
    with mock.patch.object(xla, "TILE", 8):
        y, dparams, dx = Lab(s.config, s.lab.params).grads(s.x, s.packed, s.dy, impl="xla")
    want_y, want_dparams, want_dx = s.reference_grads
    close(y, want_y, name="output")
    close_trees(dparams, want_dparams, name="gradient")
    close(dx, want_dx, kind="gradient", name="gradient of x")


@check(cache=True, once=True)
def many_tiles_of_a_cache(s: Subject):
    """Slots of several documents, padding left out, unwritten ones: skipped tile by tile."""
    with mock.patch.object(xla, "TILE", 8):
        lab = Lab(s.config, s.lab.params)
        y, cache = lab.walk(s.x[:, :20], cut(s.packed, 0, 20), lab.cache(B, 40), (16, 4))
        z, _ = lab.decode(s.x[:, 20:], cut(s.packed, 20, T), cache)
    close(np.concatenate([y, z], 1), s.packed_grads[0], name="prefill and decode")


@check(cache=True, once=True)
def cached_implementations_agree(s: Subject):
    first, then = s.x[:, :2], s.x[:, 2:3]
    _, cache = s.lab.prefill(first, ones(B, 2), s.lab.cache(B, 40), impl="reference")
    for impl in ("reference", "xla"):
        y, _ = s.lab.decode(then, ones(B, 1, first=2), cache, impl=impl)
        close(y, s.y[:, 2:3], name=f"decode with impl={impl}")


@check
def flops_are_counted(s: Subject):
    """``flops().dense`` = the matmuls in the reference's jaxpr, in every mode."""
    module = s.lab.module

    def compare(t, size, mode, run, *args):
        said = s.config.flops(t, size, mode)
        found = matmul_flops(run, jnp.zeros((1, t, s.config.dim)), ones(1, t), *args)
        assert said.dense == found, f"{mode} T={t} S={size}: {said} but the jaxpr has {found}"
        assert 0 < said.useful <= said.dense and said.visible <= said.attention
        if hasattr(s.config, "mask"):  # attention by pairs: the visible ones, counted
            places = np.arange(size, dtype=np.int32)[None]
            keys = Coords(places, None, places[0])
            queries = Coords(places[:, size - t :], None, places[0, size - t :])
            pairs = int(s.config.mask.visible(queries, keys).sum())
            assert said.visible * t * size == said.attention * pairs, f"{mode} T={t} S={size}"

    train = functools.partial(module, impl="reference")
    for t in (1, 7, 20):
        compare(t, t, "train", train)
    if s.config.decode:
        prefill = functools.partial(module.prefill, impl="reference")
        decode = functools.partial(module.decode, impl="reference")
        compare(7, 20, "prefill", prefill, module.init_cache(1, 20))
        compare(7, 7, "prefill", prefill, module.init_cache(1, 7))
        for t in (1, 3):
            compare(t, 20, "decode", decode, module.init_cache(1, 20))
