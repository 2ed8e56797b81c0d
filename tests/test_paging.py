"""Paged caches: the same tokens in pages as in a row, pages handed out and shared, generation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import DecoderConfig, GQAConfig, generate
from attnlab.core.cache import KVCache
from attnlab.core.dispatch import recording
from attnlab.core.errors import ConfigError, ShapeError, UnsupportedError
from attnlab.core.paging import Paged, PagedKVCache, PageTable
from attnlab.core.types import Seq
from attnlab.infer.sample import SampleConfig

SIZES = (2, 12, 2, 4, 3, "float32")  # batch, capacity, heads, widths


def tokens(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(rng.normal(size=(2, count, 2, w)), jnp.float32) for w in (4, 3))
    segments = np.ones((2, count), np.int32)
    segments[1, ::3] = 0  # padding is not written
    positions = np.broadcast_to(np.arange(count, dtype=np.int32), (2, count))
    return Seq(jnp.asarray(positions), jnp.asarray(segments)), {"k": k, "v": v}


@pytest.mark.parametrize("pool", [None, 9])
def test_holds_what_a_plain_cache_holds(pool):
    plain, paged = KVCache.empty(*SIZES), PagedKVCache.empty(*SIZES, Paged(4, pool))
    if pool:
        pages = PageTable(2, pool, 4, 12)
        pages.free = [3, 7, 0, 8, 1, 2]  # in any order
        for row in (1, 0):
            pages.grow(row, 9)
        paged = dataclasses.replace(paged, pages=jnp.asarray(pages.table))
    assert paged.capacity == 12 and paged.page == 4
    for seed, count in enumerate((5, 4)):
        seq, values = tokens(count, seed)
        plain, paged = plain.write(seq, **values), paged.write(seq, **values)
    for step in (lambda c: c, lambda c: c.truncate(jnp.array([6, 2]))):
        plain, paged = step(plain), step(paged)
        assert np.array_equal(plain.length, paged.length)
        assert np.array_equal(plain.segments, paged.segments)
        for a, b in zip(plain.rows(), paged.rows(), strict=True):
            for row, n in enumerate(np.asarray(plain.length)):
                assert np.array_equal(a[row, :n], b[row, :n])


def test_room_is_checked():
    paged = PagedKVCache.empty(*SIZES, Paged(4, 9))
    seq, values = tokens(5)
    with pytest.raises(ShapeError, match="row 0 has pages for 0 tokens: 5 are to be cached"):
        paged.write(seq, **values)
    table = PageTable(2, 9, 4, 12)
    table.grow(0, 4)
    table.grow(1, 8)
    paged = dataclasses.replace(paged, pages=jnp.asarray(table.table))
    with pytest.raises(ShapeError, match="row 0 has pages for 4 tokens"):
        paged.write(seq, **values)
    before = paged.k
    after = jax.jit(lambda c, s, v: c.write(s, **v))(paged, seq, values)  # nothing stray is written
    unused = np.setdiff1d(np.arange(9), table.table)
    assert np.array_equal(after.k[unused], before[unused])
    with pytest.raises(ConfigError, match="page = 0: is a count"):
        Paged(0)


def test_pages_are_handed_out_shared_and_taken_back():
    pages = PageTable(batch=3, pool=5, page=4, capacity=16)
    pages.grow(0, 9)
    with pytest.raises(ShapeError, match="needs 3 pages of 4 at most, has 0, and 2 are free"):
        pages.grow(1, 12)
    pages.share(1, 0, 8)
    pages.grow(1, 9)
    assert np.array_equal(pages.table[1, :2], pages.table[0, :2])
    assert len(np.unique(pages.table[pages.table >= 0])) == 4 and len(pages.free) == 1
    for bad in ((2, 0, 6), (1, 0, 4), (2, 0, 16)):
        with pytest.raises(ShapeError, match="shared are whole pages"):
            pages.share(*bad)
    pages.release(0)
    assert len(pages.free) == 2 and (pages.table[0] == -1).all()
    pages.release(1)
    assert sorted(pages.free) == list(range(5))


def test_generate_uses_the_decode_op_and_pages():
    layer = GQAConfig(dim=16, num_heads=4, num_kv_heads=2, window=5, sink_tokens=1)
    config = DecoderConfig(vocab_size=30, period=(layer,), repeats=2, mlp_dim=24)
    model = config.build(nnx.Rngs(0))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [9, 8, 7]]
    options = dict(new_tokens=6, sample=SampleConfig(temperature=1.5), key=jax.random.key(0))
    with recording() as rows:
        plain = generate(model, prompts, **options)
    assert ("decode", "xla") in {(op, impl) for op, _, impl in rows}
    with recording() as rows:
        paged = generate(model, prompts, cache_policy=Paged(4), **options)
    assert {call.page for op, call, _ in rows if op == "decode"} == {4}
    assert plain == paged and len(set(plain.tokens[0])) > 1
    with pytest.raises(UnsupportedError, match="init_cache"):
        generate(model, prompts, cache_policy="int8", **options)
