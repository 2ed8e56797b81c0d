"""What every variant must do, whatever it computes: each check runs on every config of every case.

A check is a function of a ``Subject``; ``test_conformance_bites.py`` runs the same checks on broken
layers and expects them to fail.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import cases
import checks_numbers  # noqa: F401 - registers its checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subject import CHECKS, NEEDS_CACHE, ONCE, SPLITS, B, Subject, T, check

from attnlab.core import registry
from attnlab.core.errors import ConfigError, ShapeError, UnsupportedError
from attnlab.core.layer import MAX_DECODE
from attnlab.core.types import Out, Seq
from attnlab.core.versions import merge_module
from attnlab.testing import fixtures
from attnlab.testing.budget import close, close_trees, identical, wide
from attnlab.testing.fixtures import PACKED, RAGGED, Lab, cut, ones, pack, spans, tokens

INDEX_DTYPE = jnp.int32  # cache fields of this dtype are bookkeeping, not counted by cache_bytes


def is_padding(seq: Seq) -> np.ndarray:
    return np.asarray(seq.segments) == 0


# --- shapes, dtypes, errors, compiles


@check
def out_in_every_mode(s: Subject):
    """Out is the same type with the same shapes in every mode; y has the compute dtype."""
    for lab in (s.lab, s.lab.at("bfloat16")):
        for seq in (Seq.full(2, 5), ones(2, 5)):
            passes = {"train": lambda lab, m, x, seq: m(x, seq)}
            if s.config.decode:
                passes["prefill"] = lambda lab, m, x, seq: m.prefill(x, seq, m.init_cache(2, 9))
                passes["decode"] = lambda lab, m, x, seq: m.decode(x, seq, m.init_cache(2, 9))
            for mode, run in passes.items():
                out = jax.eval_shape(
                    lambda p, x, run=run, lab=lab, seq=seq: run(
                        lab, merge_module(lab.graph, p), x, seq
                    ),
                    lab.params, jnp.zeros((2, 5, s.config.dim), jnp.float32),
                )
                assert type(out) is Out, mode
                assert out.y.shape == (2, 5, s.config.dim), mode
                assert out.y.dtype == jnp.dtype(lab.dtype), (mode, out.y.dtype)
                assert (out.cache is None) == (mode == "train"), mode
                for name, value in (out.aux or {}).items():
                    assert isinstance(name, str) and value.shape == (), mode
                    assert value.dtype in (jnp.float32, jnp.float64), (mode, name)


@check(once=True)
def wrong_shapes_raise(s: Subject):
    module, x = s.lab.module, jnp.zeros((2, 5, s.config.dim))
    bad = [
        (x[..., :-1], Seq.full(2, 5)),
        (x[0], Seq.full(2, 5)),
        (x[:, :0], Seq.full(2, 0)),
        (x, Seq.full(2, 4)),
        (x, Seq.full(1, 5)),
        (x, Seq(Seq.full(2, 5).positions, jnp.ones((2, 4), jnp.int32))),
    ]
    for tokens_, seq in bad:
        with pytest.raises(ShapeError):
            jax.eval_shape(module, tokens_, seq)
        if s.config.decode:
            with pytest.raises(ShapeError):
                jax.eval_shape(module.prefill, tokens_, seq, module.init_cache(2, 9))
    if s.config.decode:
        long = jnp.zeros((2, MAX_DECODE + 1, s.config.dim))
        with pytest.raises(ShapeError, match="prefill"):
            jax.eval_shape(module.decode, long, ones(2, MAX_DECODE + 1), module.init_cache(2, 12))
        with pytest.raises(ShapeError):
            jax.eval_shape(module.prefill, x, ones(2, 5), module.init_cache(3, 9))
        with pytest.raises(ShapeError):
            module.init_cache(2, 0)
        with pytest.raises(ShapeError):
            module.init_cache(0, 4)
        with pytest.raises(UnsupportedError):
            module.init_cache(2, 4, policy="no such policy")
    with pytest.raises(ConfigError):
        jax.eval_shape(lambda x: module(x, Seq.full(2, 5), impl="no such way"), x)


@check
def config_guards_itself(s: Subject):
    config = s.config
    twin = dataclasses.replace(config)
    assert hash(config) == hash(twin) and config == twin
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 8
    with pytest.raises(TypeError):
        type(config)(8)  # positional
    fields = s.case.configs[0]
    for bad in ({"dim": 0}, {"dim": -8}, *s.case.bad):
        value = next(iter(bad.values()))
        with pytest.raises(ConfigError) as caught:
            type(config)(**fields | bad)
        said = caught.value
        assert said.what and said.rule and said.fix, bad
        text = str(said)
        assert all(part in text for part in (said.what, said.rule, said.fix)), text
        assert str(value) in text, f"{bad}: the message does not show the value: {text}"


@check(once=True)
def unknown_fields_are_refused(s: Subject):
    name = s.name.rstrip("0123456789")
    with pytest.raises(ConfigError, match="not a field") as caught:
        registry.build_config(name, dim=8, num_headz=4)
    assert "num_headz" in caught.value.what and caught.value.fix
    with pytest.raises(ConfigError, match=name):
        registry.get(name + "x")


@check
def parameters_counted_and_named(s: Subject):
    leaves = jax.tree.leaves(s.lab.initial)
    assert sum(leaf.size for leaf in leaves) == s.config.param_count()
    axes = jax.tree.leaves(s.lab.axes, is_leaf=lambda a: isinstance(a, tuple))
    flat = jax.tree_util.tree_flatten_with_path(s.lab.initial)[0]
    assert len(axes) == len(flat)
    for (path, leaf), names in zip(flat, axes, strict=True):
        where = jax.tree_util.keystr(path)
        assert isinstance(names, tuple) and len(names) == leaf.ndim, (where, names, leaf.shape)
        assert leaf.dtype == jnp.dtype(s.config.precision.params), where
        known = {"embed", "heads", "kv_heads", "head", "latent", "mlp", "experts", None}
        assert set(names) <= known, f"{where}: {names} has a name that no rule knows"


@check
def one_compile_a_shape(s: Subject):
    s.lab.train(s.x, ones(B, T))
    s.lab.train(s.x, s.packed)
    before = s.lab.traces["train"]
    s.lab.train(2 * s.x, s.packed)
    s.lab.train(s.x, ones(B, T, first=7))
    assert s.lab.traces["train"] == before, "a pass was traced again for other values"


@check(cache=True)
def one_decode_compile(s: Subject):
    """A thousand decode steps are one program."""
    cache = s.lab.cache(B, 40)
    _, cache = s.lab.decode(s.x[:, :1], ones(B, 1), cache)
    before = s.lab.traces["decode"]
    for t in range(1, 4):
        _, cache = s.lab.decode(s.x[:, t : t + 1], ones(B, 1, first=t), cache)
    assert s.lab.traces["decode"] == before, "decode was traced again at a later step"


@check
def same_bits_twice(s: Subject):
    again = jax.tree.map(np.asarray, s.lab.grads(s.x, s.packed, s.dy))
    identical(again, s.packed_grads)


# --- what a token may see


@check
def causality(s: Subject):
    """The gradient of every output token: exactly zero on tokens it must not see, else not."""
    _seen_by_gradient(s, s.packed, range(B))
    n = max(length for _, _, length in spans(RAGGED))
    _seen_by_gradient(s, Seq.full(4, n), (0,))


def _seen_by_gradient(s: Subject, seq: Seq, rows):
    positions = np.asarray(seq.positions)
    batch, length = positions.shape
    segments = np.ones_like(positions) if seq.segments is None else np.asarray(seq.segments)
    x = tokens(1, batch, length, s.config.dim)
    dy = tokens(2, batch, length, s.config.dim)
    reach, sinks = s.case.reach(s.config), getattr(s.config, "sink_tokens", 0)
    for t in range(length):
        one = np.zeros_like(dy)
        one[:, t] = dy[:, t]
        dx = np.abs(wide(s.lab.grads(x, seq, one)[2])).max(-1)
        for b in rows:
            for j in range(length):
                pair = f"row {b}: output {t} and input {j}"
                same = segments[b, t] == segments[b, j] > 0
                distance = int(positions[b, t]) - int(positions[b, j])
                near = reach is None or distance < reach or positions[b, j] < sinks
                if not same:
                    assert dx[b, j] == 0, f"{pair} are of different documents: {dx[b, j]:.2e}"
                elif distance < 0:
                    assert dx[b, j] == 0, f"{pair} lies in the future: {dx[b, j]:.2e}"
                elif not near:
                    assert dx[b, j] == 0, f"{pair} is outside the window: {dx[b, j]:.2e}"
                else:
                    assert dx[b, j] > 0, f"{pair} should depend on each other"


@check
def packing_is_separate_documents(s: Subject):
    """Outputs, input gradients and parameter gradients of packed rows = each document alone."""
    y, dparams, dx = s.packed_grads
    total = jax.tree.map(np.zeros_like, dparams)
    for length in sorted({n for _, _, n in spans(RAGGED)}):
        where = [(b, i) for b, i, n in spans(RAGGED) if n == length]
        own = [np.stack([a[b, i : i + length] for b, i in where]) for a in (s.x, s.dy)]
        alone = s.lab.grads(own[0], Seq.full(len(where), length), own[1])
        for row, (b, i) in enumerate(where):
            name = f"document of {length} at row {b}, column {i}"
            close(y[b, i : i + length], alone[0][row], name=name)
            close(dx[b, i : i + length], alone[2][row], kind="gradient", name="d x of " + name)
        total = jax.tree.map(np.add, total, jax.tree.map(np.asarray, alone[1]))
    close_trees(dparams, total, name="gradient of params")


@check
def layouts_agree(s: Subject):
    """A promise about the layout changes speed, not results."""
    promised = pack(PACKED, "packed")
    close(s.lab.train(s.x, promised), s.lab.train(s.x, dataclasses.replace(promised, layout="any")))
    close(s.lab.train(s.x, Seq.full(B, T)), s.y)


@check
def padding_is_inert(s: Subject):
    """What stands in padding changes nothing, bit for bit; it gives zero and gets no gradient."""
    pad = is_padding(s.packed)
    x = np.where(pad[..., None], 100 * tokens(9, *s.x.shape), s.x)
    positions = np.where(pad, tokens(8, B, T).astype(np.int32) * 50 + 7, s.packed.positions)
    other = dataclasses.replace(s.packed, positions=positions)
    dy = np.where(pad[..., None], tokens(10, *s.x.shape), s.dy)
    y, dparams, dx = jax.tree.map(np.asarray, s.lab.grads(x, other, dy))
    identical((y, dparams, dx), s.packed_grads, "other padding: ")
    assert np.all(y[pad] == 0), "padding gives output"
    assert np.all(dx[pad] == 0), "padding gets gradient"
    assert np.all(np.abs(dx[~pad]).max(-1) > 0)


@check
def empty_row_is_finite(s: Subject):
    rows = (RAGGED[0], RAGGED[1], (-T,))
    y, dparams, dx = s.lab.grads(s.x, pack(rows), s.dy)
    for leaf in jax.tree.leaves((y, dparams, dx)):
        assert np.isfinite(leaf).all(), "a row of padding makes NaN"
    assert np.all(np.asarray(y)[2] == 0) and np.all(np.asarray(dx)[2] == 0)


@check
def rows_are_independent(s: Subject):
    """A row alone = the row in a batch; permuted rows give permuted outputs."""
    y = s.packed_grads[0]
    for b in range(B):
        one = jax.tree.map(lambda a, b=b: a[b : b + 1], s.packed)
        close(s.lab.train(s.x[b : b + 1], one)[0], y[b], name=f"row {b} alone")
    order = np.array([2, 0, 1])
    turned = jax.tree.map(lambda a: a[order], s.packed)
    close(s.lab.train(s.x[order], turned), y[order], name="permuted rows")


@check
def lengths(s: Subject):
    """Lengths around every block border are prefixes of each other."""
    x = tokens(3, 1, 127, s.config.dim)
    whole = np.asarray(s.lab.train(x, Seq.full(1, 127)))
    assert np.isfinite(whole).all()
    for n in (1, 2, 63, 65):
        close(s.lab.train(x[:, :n], Seq.full(1, n)), whole[:, :n], name=f"the first {n} of 127")
    if s.config.decode:
        y, cache = s.lab.walk(x, ones(1, 127), s.lab.cache(1, 127), (65, 62))
        close(y, whole, name="prefill of 65 and 62")
        assert int(cache.length[0]) == 127


@check
def positions_are_relative(s: Subject):
    """A common shift of positions changes nothing (fp64, where angles do not round)."""
    lab = s.lab.at("float64")
    shifted = dataclasses.replace(
        s.packed, positions=s.packed.positions + 1000 * (s.packed.segments > 0).astype(np.int32)
    )
    y = np.asarray(lab.grads(s.x, shifted, s.dy)[0])
    if s.case.shifts(s.config):
        close(y, s.exact[0], dtype="float64", kind="gradient", name="shifted by 1000")
    else:
        assert np.isfinite(y).all()


@check(cache=True)
def far_positions(s: Subject):
    """A document that starts at position 100000: finite, and decode = train."""
    seq = ones(B, T, first=100_000)
    y = s.lab.train(s.x, seq)
    assert np.isfinite(y).all()
    again, _ = s.lab.walk(s.x, seq, s.lab.cache(B, 40), s.widths, decode=True)
    close(again, y, name="decode at 100000")


# --- caches


@check
def no_decode_raises(s: Subject):
    """A variant that declares ``decode = False`` refuses every cached pass, and says so."""
    if s.config.decode:
        return
    module, x = s.lab.module, jnp.zeros((1, 1, s.config.dim))
    for call in (
        lambda: module.init_cache(1, 4),
        lambda: module.prefill(x, Seq.full(1, 1), None),
        lambda: module.decode(x, Seq.full(1, 1), None),
    ):
        with pytest.raises(UnsupportedError) as caught:
            call()
        assert caught.value.fix


@check(cache=True)
def split_prefill(s: Subject):
    """Prefill at once or in odd pieces = the training pass, for whole rows and for packed ones."""
    y, cache = s.lab.prefill(s.x, Seq.full(B, T), s.lab.cache(B, 40))
    close(y, s.y, name="prefill")
    assert np.array_equal(cache.length, [T] * B)
    y, cache = s.lab.walk(s.x, ones(B, T), s.lab.cache(B, 40), SPLITS)
    close(y, s.y, name="split prefill")
    assert np.array_equal(cache.length, [T] * B)
    y, cache = s.lab.walk(s.x, s.packed, s.lab.cache(B, 40), SPLITS)
    close(y, s.packed_grads[0], name="split prefill of packed rows")
    assert np.array_equal(cache.length, (~is_padding(s.packed)).sum(1)), "padding takes slots"


@check(cache=True)
def decode_is_train(s: Subject):
    """Stepwise decode in a scan whose carry is the donated cache = the training pass."""

    def loop(params, x, seq, cache):
        def body(cache, token):
            x, positions, segments = (a[:, None] for a in token)
            y, cache = s.lab.step(params, x, Seq(positions, segments), cache)
            return cache, y[:, 0]

        columns = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, seq.positions, seq.segments))
        cache, y = jax.lax.scan(body, cache, columns)
        return jnp.swapaxes(y, 0, 1), cache

    scan = jax.jit(loop, donate_argnums=3)
    for seq, expected in ((ones(B, T), s.y), (s.packed, s.packed_grads[0])):
        given = s.lab.cache(B, 40)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y, cache = scan(s.lab.params, s.x, jax.tree.map(jnp.asarray, seq), given)
        close(y, expected, name="decode token by token")
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "cache was not donated"
        assert np.array_equal(cache.length, (~is_padding(seq)).sum(1))


@check(cache=True)
def decode_several(s: Subject):
    """Decode of 1 to 8 tokens a step = the training pass; whole and packed rows."""
    y, _ = s.lab.walk(s.x, ones(B, T), s.lab.cache(B, 40), s.widths, decode=True)
    close(y, s.y, name=f"decode by {s.widths}")
    y, _ = s.lab.walk(s.x, s.packed, s.lab.cache(B, 40), s.widths, decode=True)
    close(y, s.packed_grads[0], name=f"decode of packed rows by {s.widths}")


@check(cache=True)
def mixed_prefill_and_decode(s: Subject):
    cache, ys, start = s.lab.cache(B, 40), [], 0
    for width, step in ((2, s.lab.prefill), (1, s.lab.decode), (14, s.lab.prefill),
                        (1, s.lab.decode), (1, s.lab.prefill), (s.widths[1] // 2, s.lab.decode)):
        y, cache = step(
            s.x[:, start : start + width], cut(ones(B, T), start, start + width), cache
        )
        ys.append(y)
        start += width
    close(np.concatenate(ys, axis=1), s.y[:, :start], name="prefill and decode in turn")


@check(cache=True)
def ragged_prompts(s: Subject):
    """Prompts of different lengths, padded left or right, then decoded, with a row that stops."""
    width, real = max(SPLITS), np.array([14, 7, 2])
    for left in (False, True):
        x = tokens(5, B, width, s.config.dim)
        positions, segments = np.zeros((2, B, width), np.int32)
        at = [slice(width - n, width) if left else slice(0, n) for n in real]
        for b, n in enumerate(real):
            x[b, at[b]] = s.x[b, :n]
            positions[b, at[b]], segments[b, at[b]] = np.arange(n), 1
        y, cache = s.lab.prefill(x, Seq(positions, segments), s.lab.cache(B, 40))
        assert np.array_equal(cache.length, real)
        for b, n in enumerate(real):
            close(y[b][at[b]], s.y[b, :n], name=f"prompt {b}, padded {'left' if left else 'right'}")
        length = real.copy()
        for step in range(3):
            alive = np.array([True, step != 1, True])  # row 1 pauses: its token is padding
            x = np.stack([s.x[b, length[b]] for b in range(B)])[:, None]
            y, cache = s.lab.decode(
                x, Seq(length[:, None].astype(np.int32), alive[:, None].astype(np.int32)), cache
            )
            for b in range(B):
                expected = s.y[b, length[b]] if alive[b] else np.zeros_like(s.y[b, 0])
                close(y[b, 0], expected, name=f"step {step} after ragged prompt {b}")
            length += alive
        assert np.array_equal(cache.length, length)


@check(cache=True)
def padding_leaves_no_trace_in_the_cache(s: Subject):
    """The cache after packed rows is bit for bit the same whatever stands in the padding."""
    pad = is_padding(s.packed)
    x = np.where(pad[..., None], 100 * tokens(9, *s.x.shape), s.x)
    y, cache = s.lab.walk(s.x, s.packed, s.lab.cache(B, 40), SPLITS)
    other, other_cache = s.lab.walk(x, s.packed, s.lab.cache(B, 40), SPLITS)
    identical(other, y, "prefill: ")
    assert np.all(y[pad] == 0), "padding gives output"
    identical(other_cache, cache, "cache: ")


@check(cache=True)
def cache_is_a_carry(s: Subject):
    """prefill and decode give back the structure, shapes and dtypes of ``init_cache``."""
    for lab, dtype in ((s.lab, None), (s.lab.at("bfloat16"), None), (s.lab, "bfloat16")):
        for width in (1, 5):
            def run(params, x, seq, cache, step):
                return step(params, x, seq, cache)[1]

            given = jax.eval_shape(lambda lab=lab, dtype=dtype: lab.module.init_cache(2, 9, dtype))
            x = jnp.zeros((2, width, s.config.dim))
            for step in (lab.fill, lab.step):
                after = jax.eval_shape(
                    functools.partial(run, step=step), lab.params, x, ones(2, width), given
                )
                assert jax.tree.structure(after) == jax.tree.structure(given)
                for a, g in zip(jax.tree.leaves(after), jax.tree.leaves(given), strict=True):
                    assert (a.shape, a.dtype) == (g.shape, g.dtype), (a, g)
                    assert getattr(a, "weak_type", False) == getattr(g, "weak_type", False)


@check(cache=True)
def cache_declares_its_axes(s: Subject):
    cache = s.lab.cache(2, 9)
    fields = [f.name for f in dataclasses.fields(cache)]
    assert set(type(cache).AXES) == set(fields)
    known = {"batch", "kv_heads", "heads", "latent", "head", None}
    for name in fields:
        axes = type(cache).AXES[name]
        for leaf in jax.tree.leaves(getattr(cache, name)):
            assert len(axes) == leaf.ndim, (name, axes, leaf.shape)
            assert leaf.shape[axes.index("batch")] == 2, name
        assert set(axes) <= known, (name, axes)


@check(cache=True)
def cache_bytes_are_true(s: Subject):
    for dtype in (None, "float32", "bfloat16"):
        for capacity in (1, 9, 40):
            cache = s.lab.cache(2, capacity, dtype)
            size = sum(
                leaf.nbytes for leaf in jax.tree.leaves(cache) if leaf.dtype != INDEX_DTYPE
            )
            assert size == 2 * s.config.cache_bytes(capacity, dtype), (dtype, capacity)


@check(cache=True, once=True)
def cache_in_bfloat16(s: Subject):
    """A narrow cache under wide compute costs rounding of what it stores, no more."""
    x, seq = s.x[:, :10], cut(ones(B, T), 0, 10)
    y, _ = s.lab.walk(x, seq, s.lab.cache(B, 40, "bfloat16"), (2,) * 5)
    close(y, s.y[:, :10], dtype="bfloat16", name="prefill on a bfloat16 cache")


@check(cache=True)
def truncate_rewinds(s: Subject):
    """Forgetting tokens and going on with others = never having seen them; or a clear refusal."""
    wrong = np.concatenate([s.x[:, :10], tokens(6, B, T - 10, s.config.dim)], axis=1)
    _, cache = s.lab.prefill(wrong[:, :14], ones(B, 14), s.lab.cache(B, 40))
    try:
        back = cache.truncate(10)
    except UnsupportedError as refusal:
        assert refusal.fix
        return
    assert np.array_equal(back.length, [10] * B)
    assert np.array_equal(cache.truncate(99).length, [14] * B), "truncate must not grow"
    y, _ = s.lab.prefill(s.x[:, 10:], cut(ones(B, T), 10, T), back)
    close(y, s.y[:, 10:], name="going on after truncate(10)")
    keep = np.array([10, 4, 0], np.int32)
    y, after = s.lab.prefill(
        np.stack([s.x[b, n : n + 14] for b, n in enumerate(keep)]),
        Seq(keep[:, None] + np.arange(14, dtype=np.int32), np.ones((B, 14), np.int32)),
        jax.jit(lambda c, n: c.truncate(n))(cache, keep),
    )
    for b, n in enumerate(keep):
        close(y[b], s.y[b, n : n + 14], name=f"row {b} after truncate({n})")
    assert np.array_equal(after.length, keep + 14)


@check(cache=True)
def overflow_raises(s: Subject):
    """Too many tokens raise, eagerly and (by shape) under a trace; nothing is dropped."""
    module, x = s.lab.module, jnp.asarray(s.x)
    with pytest.raises(ShapeError, match="capacity"):
        jax.eval_shape(module.prefill, x[:, :8], ones(B, 8), s.lab.cache(B, 7))
    cache = s.lab.cache(B, 40)
    full = dataclasses.replace(cache, length=jnp.array([0, 40, 39], jnp.int32))
    with pytest.raises(ShapeError, match="capacity"):
        module.decode(x[:, :1], ones(B, 1), full)


# --- transforms and degenerate settings


@check(once=True)
def remat_changes_nothing(s: Subject):
    def derive(params, x, seq, dy):
        run = jax.checkpoint(s.lab.run)
        y, back = jax.vjp(lambda p, x: run(p, x, seq), params, x)
        return y, *back(dy)

    y, dparams, dx = jax.jit(derive)(s.lab.params, s.x, s.packed, s.dy)
    close(y, s.packed_grads[0], name="output under remat")
    close_trees((dparams, dx), s.packed_grads[1:], name="gradient under remat")


@check(once=True)
def ensembles(s: Subject):
    """vmap over parameters = one model after the other."""
    other = fixtures.randomise(s.lab.initial, seed=50)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), s.lab.params, other)
    y = jax.jit(jax.vmap(s.lab.run, in_axes=(0, None, None)))(both, s.x, s.packed)
    close(y[0], s.packed_grads[0], name="first model")
    close(y[1], s.lab.train(s.x, s.packed, params=other), name="second model")


@check
def window_of_the_row_is_no_window(s: Subject):
    if getattr(s.config, "window", None) is None:
        return
    extra = {"sink_tokens": 0} if hasattr(s.config, "sink_tokens") else {}
    none = Lab(dataclasses.replace(s.config, window=None, **extra), s.lab.params)
    y = np.asarray(none.train(s.x, s.packed))
    whole = Lab(dataclasses.replace(s.config, window=11, **extra), s.lab.params)
    close(whole.train(s.x, s.packed), y, name="window of the longest document")
    narrow = Lab(dataclasses.replace(s.config, window=10, **extra), s.lab.params)
    with pytest.raises(AssertionError):
        close(narrow.train(s.x, s.packed), y)


SUBJECTS = {name: (case, config) for name, case, config in cases.configs()}


@functools.cache
def subject(name: str) -> Subject:
    return Subject(name, *SUBJECTS[name])


def _pairs() -> list:
    last = {name.rstrip("0123456789"): name for name in SUBJECTS}
    return [
        pytest.param(name, title, id=f"{name}-{title}")
        for name, (_, config) in SUBJECTS.items()
        for title in CHECKS
        if (config.decode or title not in NEEDS_CACHE)
        and (title not in ONCE or name in last.values())
    ]


def run(s: Subject, title: str) -> None:
    """One check; a variant that declares ``causal = False`` must fail the one of causality."""
    if title == "causality" and not s.config.causal:
        with pytest.raises(AssertionError, match="future"):
            CHECKS[title](s)
    else:
        CHECKS[title](s)


@pytest.mark.parametrize(("name", "title"), _pairs())
def test_conformance(name: str, title: str):
    run(subject(name), title)


@pytest.mark.parametrize(
    ("variant", "same"),
    [
        pytest.param(name, same, id=f"{name}-{same.name}")
        for name, case in cases.CASES.items()
        for same in case.same
    ],
)
def test_degenerate_settings(variant: str, same: cases.Same):
    left = Lab(registry.build_config(variant, **same.left))
    right = Lab(
        registry.build_config(same.right_variant or variant, **same.right),
        same.params(left.params),
    )
    x, seq = tokens(1, B, T, left.config.dim), pack(RAGGED)
    close(left.train(x, seq), right.train(x, seq), name=same.name)
