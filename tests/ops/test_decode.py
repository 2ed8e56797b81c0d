"""The decode op against a dense float64 oracle, over lengths, page tables and settings."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.mask import Causal, Coords, SinkTokens, Window
from attnlab.core.versions import JAX
from attnlab.ops.attention import decode_gpu, decode_xla
from attnlab.ops.attention.decode import OP, decode
from attnlab.ops.attention.decode_gpu import Config
from attnlab.testing.budget import close

B, PAGE = 3, 8
GARBAGE = (-7, 10**6, -1)  # table entries past the length


@dataclasses.dataclass(frozen=True)
class Setting:
    """Static facts of a case; ``documents``: rows hold documents of 11 tokens."""

    t: int = 1
    N: int = 4
    K: int = 2
    H: int = 8
    V: int = 8
    S: int = 64
    paged: bool = True
    documents: bool = False
    sinks: bool = False
    options: tuple[tuple[str, object], ...] = ()


SETTINGS = {
    "plain": Setting(paged=False),
    "paged": Setting(t=2),
    "eight tokens, 32 heads a group": Setting(t=8, N=32, K=1),
    "one head a group, wide values": Setting(t=3, N=2, K=2, H=4, V=12),
    "window": Setting(t=2, options=(("window", 9),)),
    "window, sinks, cap, scale": Setting(
        t=3, sinks=True,
        options=(("window", 5), ("sink_tokens", 3), ("logit_cap", 2.0), ("scale", -0.4)),
    ),
    "documents": Setting(t=2, paged=False, documents=True, sinks=True),
    "paged documents, window": Setting(
        t=4, documents=True, options=(("window", 6), ("sink_tokens", 2))
    ),
}


def arrays(s: Setting, dtype="float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pool = B * s.S // PAGE + 2
    shape = (pool, PAGE, s.K) if s.paged else (B, s.S, s.K)
    sizes = {"q": (B, s.t, s.N, s.H), "k": (*shape, s.H), "v": (*shape, s.V), "sink": (s.N,)}
    return {name: rng.normal(size=size).astype(dtype) for name, size in sizes.items()}


def table(s: Setting, lengths, seed: int, shared: bool) -> np.ndarray:
    """Pages in random order, the first two of row 0 shared by all; garbage past the lengths."""
    each = s.S // PAGE
    pages = np.random.default_rng(seed).permutation(B * each + 2)[: B * each].reshape(B, each)
    if shared:
        pages[1:, :2] = pages[0, :2]
    for b, n in enumerate(lengths):
        pages[b, -(-n // PAGE) :] = GARBAGE[b]
    return pages.astype(np.int32)


def places(s: Setting, lengths) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Positions and segments of packed documents; the first query of row 0 is padding."""
    if not s.documents:
        return {}
    slots = np.arange(s.S, dtype=np.int32)
    positions, segments = (np.tile(x, (B, 1)) for x in (slots % 11, slots // 11 + 1))
    last = np.clip(np.asarray(lengths)[:, None] - s.t + np.arange(s.t), 0, s.S - 1)
    own = np.take_along_axis(segments, last, 1)
    own[0, 0] = 0
    return {
        "positions": (np.take_along_axis(positions, last, 1), positions),
        "segments": (own, segments),
    }


def oracle(s: Setting, data, lengths, pages):
    """Query by query, in float64."""
    options = dict(s.options)
    window, sinks = options.get("window", 10**9), options.get("sink_tokens", 0)
    scale, cap = options.get("scale", s.H**-0.5), options.get("logit_cap")
    at = places(s, lengths)
    o, lse = np.zeros((B, s.t, s.N, s.V)), np.full((B, s.t, s.N), -np.inf)
    for b, n in enumerate(lengths):
        k, v = (data[x].astype(np.float64) for x in "kv")
        if s.paged:
            used = pages[b, : -(-n // PAGE)]
            k, v = (x[used].reshape(-1, s.K, x.shape[-1])[:n] for x in (k, v))
        else:
            k, v = k[b, :n], v[b, :n]
        for i in range(s.t):
            q_pos, k_pos, seen = n - s.t + i, np.arange(n), np.ones(n, bool)
            if s.documents:
                q_pos, k_pos = at["positions"][0][b, i], at["positions"][1][b, :n]
                own = at["segments"][0][b, i]
                seen = (at["segments"][1][b, :n] == own) & (own > 0)
            seen &= (k_pos <= q_pos) & ((k_pos > q_pos - window) | (k_pos < sinks))
            for h in range(s.N):
                z = scale * k[seen, h // (s.N // s.K)] @ data["q"][b, i, h].astype(np.float64)
                z = cap * np.tanh(z / cap) if cap else z
                every = np.append(z, data["sink"][h]) if s.sinks else z
                if every.size:
                    lse[b, i, h] = every.max() + np.log(np.exp(every - every.max()).sum())
                    p = np.exp(z - lse[b, i, h])
                    o[b, i, h] = p @ v[seen, h // (s.N // s.K)]
    return o, lse


@functools.cache
def compiled(s: Setting, impl: str):
    def run(q, k, v, lengths, pages, sink, at):
        return decode(
            q, k, v, lengths=lengths, pages=pages if s.paged else None, impl=impl,
            sink_logits=sink if s.sinks else None, return_lse=True, **at, **dict(s.options),
        )

    return jax.jit(run)


def run(s: Setting, impl: str, data, lengths, pages):
    return compiled(s, impl)(
        data["q"], data["k"], data["v"], np.array(lengths, np.int32), pages, data["sink"],
        places(s, lengths),
    )


LENGTHS = st.lists(st.integers(0, 64), min_size=B, max_size=B)


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), shared=st.booleans())
def test_against_the_oracle(name, lengths, seed, shared):
    s = SETTINGS[name]
    data, pages = arrays(s), table(s, lengths, seed, shared)
    expected = oracle(s, data, lengths, pages)
    before = decode_xla.TILE
    decode_xla.TILE = 16  # several tiles
    try:
        found = {impl: run(s, impl, data, lengths, pages) for impl in ("reference", "xla")}
    finally:
        decode_xla.TILE = before
    for impl, (o, lse) in found.items():
        close(o, expected[0], kind="op", name=f"{impl} o")
        close(lse, expected[1], kind="op", name=f"{impl} lse")
        assert (np.asarray(o)[np.isneginf(expected[1])] == 0).all(), "a query without keys"


def test_bfloat16_cache_and_budget():
    s = dataclasses.replace(SETTINGS["paged"], H=64, V=64)
    data = {n: jnp.asarray(x, "bfloat16") for n, x in arrays(s).items()}
    wide = {n: np.asarray(x, np.float64) for n, x in data.items()}
    lengths = (64, 3, 0)
    pages = table(s, lengths, 1, False)
    expected = oracle(s, wide, lengths, pages)
    found, reference = (run(s, impl, data, lengths, pages) for impl in ("xla", "reference"))
    for a, e, r in zip(found, expected, reference):
        close(a, e, r, dtype="bfloat16", kind="op")
    narrow = data | {"q": data["q"].astype("float32")}
    close(run(s, "xla", narrow, lengths, pages)[0], expected[0], kind="op", name="bf16 cache")


def test_only_needed_tiles_are_visited():
    """Tiles past the longest row, and those behind every window, are left out."""
    index = jnp.arange(256)
    lengths = jnp.array([200, 0, 90])
    k = Coords(jnp.broadcast_to(index, (3, 256)), None, index)
    q = Coords(lengths[:, None] - 1, None, jnp.arange(1))

    def visited(mask):
        order, count = decode_xla.needed(mask, q, k, lengths, 16, 16)
        return list(np.asarray(order[: int(count)]))

    assert visited(Causal()) == list(range(13))
    assert visited(Causal() & Window(20)) == [4, 5, 11, 12]
    assert visited(Causal() & (Window(20) | SinkTokens(3))) == [0, 4, 5, 11, 12]


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4), parts=st.integers(1, 9),
    tasks=st.integers(1, 3), window=st.booleans(),
)
def test_parts_cover_every_tile_once(lengths, parts, tasks, window):
    """The plan of the kernel: equal parts, every needed tile in one, no two pieces in one place."""
    rows, tile = len(lengths), 64
    index = jnp.arange(300)
    k = Coords(jnp.broadcast_to(index, (rows, 300)), None, index)
    q = Coords(jnp.array(lengths)[:, None] - 1, None, jnp.arange(1))
    mask = Causal() & Window(70) if window else Causal()
    plan = decode_gpu.work(
        mask, q, k, jnp.array(lengths), parts=parts, tasks=tasks, tile=tile, window=window
    )
    start, share = np.asarray(plan.start), int(plan.share[0])
    seen, used = [], {}
    for part in range(parts):
        begin = len(seen)
        for task in range(int(plan.first[part]), int(plan.last[part])):
            low, high = max(start[task], part * share), min(start[task + 1], (part + 1) * share)
            if low < high:
                assert task + part not in used
                used[task + part] = task
            for x in range(low - start[task], high - start[task]):
                row = task // tasks
                seen.append((task, int(plan.order[row, x]) if window else int(x)))
        assert len(seen) - begin <= share
    expected = []
    for task in range(rows * tasks):
        n = lengths[task // tasks]
        first = max(n - 70, 0) // tile if window else 0
        expected += [(task, j) for j in range(first, -(-n // tile))]
    assert seen == expected
    for task in range(rows * tasks):  # the places of a task stand together, as the merge reads them
        low, high = start[task], start[task + 1]
        number = (high - 1) // share - low // share + 1 if high > low else 0
        begin = task + low // share
        assert [p for p, i in sorted(used.items()) if i == task] == [
            *range(begin, begin + number)
        ]


KERNEL = {
    "GQA, ragged, paged": (Setting(2, 4, 2, 64, 64, 192), (192, 17, 0), None),
    "contiguous, odd room": (Setting(1, 2, 2, 64, 128, 200, paged=False), (200, 64, 1), None),
    "two tiles of rows": (Setting(8, 16, 1, 64, 64, 128), (128, 60, 3), None),
    "window, sinks, cap": (
        Setting(3, 4, 2, 64, 64, 192, sinks=True,
                options=(("window", 30), ("sink_tokens", 5), ("logit_cap", 3.0), ("scale", -0.2))),
        (190, 150, 0), None,
    ),
    "documents": (Setting(2, 2, 1, 64, 64, 128, documents=True), (128, 70, 20), None),
    "scale 0": (Setting(1, 2, 1, 64, 64, 128, options=(("scale", 0.0),)), (100, 0, 7), None),
    "one consumer, 192 over 128": (Setting(1, 2, 1, 192, 128, 128), (128, 65, 0), None),
    "128, one slot each": (Setting(1, 2, 1, 128, 128, 192), (192, 65, 0), Config(stages=2)),
}


@pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2")
@pytest.mark.parametrize("name", KERNEL)
def test_kernel_in_the_interpreter(name, monkeypatch, capfd):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    s, lengths, sizes = KERNEL[name]
    kernel = functools.partial(
        decode_gpu.forward, interpret=plgpu.InterpretGPUParams(detect_races=True), sizes=sizes
    )
    served = dataclasses.replace(
        OP.implementations["gpu"], supports=lambda call: None, forward=kernel
    )
    monkeypatch.setitem(OP.implementations, "gpu", served)
    data = {n: jnp.asarray(x, "float16") for n, x in arrays(s).items()}
    pages = table(s, lengths, 0, True)
    expected = oracle(s, {n: np.asarray(x) for n, x in data.items()}, lengths, pages)
    call = dict(
        lengths=jnp.array(lengths), pages=jnp.asarray(pages) if s.paged else None, splits=4,
        sink_logits=data["sink"].astype("float32") if s.sinks else None, return_lse=True,
        **jax.tree.map(jnp.asarray, places(s, lengths)), **dict(s.options),
    )
    o, lse = decode(data["q"], data["k"], data["v"], impl="gpu", **call)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected[1]))
    assert np.abs(np.asarray(o, np.float64) - expected[0]).max() < 4e-3
    alive = np.isfinite(expected[1])
    assert np.abs(np.asarray(lse)[alive] - expected[1][alive]).max() < 1e-3
