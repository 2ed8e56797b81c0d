"""The Hopper kernels in JAX's GPU interpreter, which reports races, against the dense reference.

Interpreted kernels take seconds, so the cases are few and each crosses tile borders on both sides.
What the interpreter cannot see (registers, shared memory, layouts) is compiled in the aot tests.
"""

from __future__ import annotations

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.mask import Blocks, Causal, Coords, Full, MaskMod, Segments, SinkTokens, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import JAX
from attnlab.ops.attention import (
    Call,
    attention,
    gpu,
    gpu_backward_fused,
    gpu_work,
    reference,
    tuning,
)

pytestmark = pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2")


def bucket(distance):
    """The 32 one-sided buckets of T5, up to a distance of 32 here."""
    d = jnp.maximum(distance, 0)
    far = 16 + (jnp.log(d.astype(jnp.float32) / 16) / jnp.log(2.0) * 16).astype(jnp.int32)
    return jnp.where(d < 16, d, jnp.minimum(far, 31))


def packed(T: int, lengths: tuple[int, ...]):
    """Documents of these lengths end to end, the rest padding."""
    left = T - sum(lengths)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, left])
    places = [np.arange(n) for n in lengths] + [np.zeros(left)]
    return jnp.asarray(np.concatenate(places)[None], jnp.int32), jnp.asarray(segments[None])


TABLE = jax.random.bernoulli(jax.random.key(5), 0.1, (203, 203))  # most rows see keys, not all
FIXED = jax.random.normal(jax.random.key(6), (2, 200, 200))

SHAPES = {
    "gqa": (203, 4, 2, 64, 64),
    "wide": (200, 2, 2, 128, 128),
    "gqa 128": (300, 4, 2, 128, 128),
    "mla": (200, 2, 2, 192, 128),
    "256": (100, 2, 1, 256, 256),
    "192": (140, 1, 1, 192, 192),
    "256 over 128": (100, 2, 1, 256, 128),
}

CASES = {
    "causal": dict(shape="gqa"),
    "causal 128": dict(shape="wide"),
    "scale 0": dict(shape="gqa", scale=0.0),
    "scale below 0": dict(shape="gqa", scale=-0.2, mask=Causal() & Window(40)),
    "192 over 128": dict(shape="mla"),
    "window, sinks, empty rows": dict(
        shape="gqa", mask=Causal() & (Window(40) | SinkTokens(2)) & MaskMod.of(
            lambda head, q, k: q != 70
        ), sink=False,
    ),
    "sink logits, full": dict(shape="gqa", mask=Full(), sink=True),
    "packed": dict(shape="gqa", lengths=(90, 5, 88), mask=Causal() & Window(50)),
    "head, row and column values": dict(
        shape="gqa",
        score=lambda e: lambda s, head, q, k, *, batch, q_index, k_index: (
            e["slope"][head] * (k - q) + jnp.tanh(s) * e["slope"][head]
            + e["row"][batch, q_index] * s + e["column"][head, k_index]
        ),
    ),
    # Far keys win: an error of delta counts with their distance in the gradient of the slope.
    "slopes upwards": dict(
        shape="gqa", slope_error=1e-3,
        score=lambda e: lambda s, head, q, k: s + jnp.abs(e["slope"][head]) * (q - k),
    ),
    "queries hidden by their own term, sinks": dict(
        shape="gqa", sink=True, lengths=(90, 5, 88),
        score=lambda e: lambda s, head, q, k, *, batch, q_index, k_index: (
            s + jnp.where(q_index % 3 == 0, -jnp.inf, e["row"][batch, q_index])
            + e["slope"][head] * (k - q)
        ),
    ),
    "T5 table": dict(
        shape="gqa", score=lambda e: lambda s, head, q, k: s + e["table"][head, bucket(q - k)]
    ),
    "Toeplitz table, cap": dict(
        shape="wide", cap=3.0, score=lambda e: lambda s, head, q, k: s + e["toeplitz"][q - k + 199],
    ),
    "blocks": dict(shape="gqa", blocks=True),
    "values by query and key, absent tiles": dict(
        shape="gqa", mask=Causal() & Window(40), score=lambda e: lambda s, head, q, k: (
            s * e["shared"][q, k] + e["bias"][head, q, k] + e["slope"][head]
        ),
    ),
    "table in the mask": dict(
        shape="wide", mask=Full() & MaskMod.of(lambda head, q, k: TABLE[q, k] & (q != 70)),
        score=lambda e: lambda s, head, q, k: s + FIXED[head, q, k],
    ),
    "256, values by query and key": dict(
        shape="256", mask=Causal() & Window(30),
        score=lambda e: lambda s, head, q, k: s + e["bias"][head, q, k] + e["toeplitz"][q - k + 99],
    ),
    "256": dict(shape="256", mask=Causal() & (Window(40) | SinkTokens(2))),
    "192": dict(shape="192", lengths=(60, 5, 70)),
    "256 over 128, head, row and column values": dict(
        shape="256 over 128",
        score=lambda e: lambda s, head, q, k, *, batch, q_index, k_index: (
            e["slope"][head] * (k - q) + jnp.tanh(s) * e["slope"][head]
            + e["row"][batch, q_index] * s + e["column"][head, k_index]
        ),
    ),
}


def run(forward, case, exact: bool):
    """Outputs and gradients of a case, with cotangents on o and lse."""
    T, N, K, H, V = SHAPES[case["shape"]]
    keys = iter(jax.random.split(jax.random.key(1), 14))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    q, k, v = draw(1, T, N, H), draw(1, T, K, H), draw(1, T, K, V)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v)) if exact else (q, k, v)
    do, dlse = draw(1, T, N, V), draw(1, T, N)
    extra = {
        "slope": draw(N) * 0.1, "row": draw(1, T), "column": draw(N, T), "table": draw(N, 32),
        "toeplitz": draw(399), "bias": draw(N, T, T), "shared": draw(T, T),
    }
    sink = draw(N) if case.get("sink") else None
    places = jnp.arange(T, dtype=jnp.int32)
    positions, segments = places[None], None
    mask = case.get("mask", Causal())
    if "lengths" in case:
        positions, segments = packed(T, case["lengths"])
        mask = mask & Segments()
    if case.get("blocks"):
        lists = jax.random.randint(next(keys), (1, N, 2, 2), -1, 2)
        mask = Causal() & Blocks(lists, 128, 128)
    coords = Coords(positions, segments, places)

    def loss(q, k, v, sink, extra):
        make = case.get("score")
        score = None if make is None else Mod.of(make(extra), score_dtype=jnp.float32).bound(1, N)
        o, lse = forward(
            q, k, v, mask=mask.bound(1, N), score=score, q_coords=coords, k_coords=coords,
            scale=case.get("scale", H**-0.5), sink_logits=sink, logit_cap=case.get("cap"),
            return_lse=True,
            softmax_dtype=jnp.dtype("float32"), layout="full" if segments is None else "packed",
        )
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o.astype(jnp.float32) * do).sum() + (seen * dlse).sum(), (o, lse)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
    (_, outs), grads = gradient(q, k, v, sink, extra)
    return outs, grads


# What tuning may choose beside the heuristic: the other kernels, other tiles.
SIZES = {
    "wide": {
        "block_k": 64, "stages": 3, "block_k_dq": 64, "stages_dq": 3, "wide_dq": 2, "turns_dq": 1,
        "block_q_dkv": 128, "stages_dkv": 2, "turns_dkv": 0, "wide_dkv": 1,
    },
    "mla": {
        "block_k": 64, "stages": 4, "wide_dq": 1, "stages_dkv": 3, "wide_dkv": 1, "turns_dkv": 0,
    },
    "gqa": {
        "block_k": 64, "stages": 2, "block_k_dq": 128, "stages_dq": 2, "turns_dkv": 1,
    },
    "256 over 128": {"stages": 3, "wide_dq": 0, "turns_dq": 1, "stages_dkv": 3},
}


@pytest.mark.parametrize("shape", SIZES)
def test_forced_sizes_interpreted(shape):
    """Also where lists, operands and gradients of functions must follow the sizes."""
    case = dict(
        shape=shape, mask=Causal() & (Window(150) | SinkTokens(2)),
        score=lambda e: lambda s, head, q, k, *, q_index, k_index: (
            s + e["slope"][head] * (k - q) + e["column"][head, k_index] + e["bias"][head, q, k]
        ),
    )
    with tuning.forcing(SIZES[shape]):
        compare(shape, case)


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    compare(name, CASES[name])


def compare(name, case):
    """The kernels against the dense reference."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = run(functools.partial(gpu.forward, interpret=interpret), case, exact=False)
    expected = run(reference.forward, case, exact=True)
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in leaves:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        where = jax.tree_util.keystr(path)
        assert (np.isfinite(a) == np.isfinite(b)).all(), f"{name} {where}: not finite alike"
        a, b = np.nan_to_num(a, neginf=0), np.nan_to_num(b, neginf=0)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
        most = case.get("slope_error", 1e-2) if "slope" in where else 1e-2
        assert error < most, f"{name} {where}: relative error {error:.1e}"


@pytest.mark.parametrize("name, blocks, room", [
    ("causal 128", 3, 2), ("window, sinks, empty rows", 2, 2), ("packed", 3, 2), ("packed", 3, 1),
    ("values by query and key, absent tiles", 3, 2), ("blocks", 3, 2), ("256", 1, 1),
])
def test_persistent_blocks_change_nothing(name, blocks, room, monkeypatch):
    """Fewer blocks that take the rows in turn give the bits of a block a row, without races.

    room: of a block, for what so many rows own; two of 256 do not fit.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    forward = functools.partial(gpu.forward, interpret=interpret)
    # At 128 what two rows own fits beside rings of two tiles of 64.
    rings = {"block_k_dq": 64, "stages_dq": 2, "stages_dkv": 2} if room > 1 else {}
    with tuning.forcing(rings):
        expected = run(forward, CASES[name], exact=False)
    monkeypatch.setattr(gpu_work, "cores", lambda kind: blocks)
    usual, fewer = gpu_work.blocks, []

    def counted(items, persistent):
        found = usual(items, persistent)
        fewer.append(found < items)
        return found

    monkeypatch.setattr(gpu_work, "blocks", counted)
    forced = {"persistent": room, "persistent_dq": room}
    forced |= {"persistent_dkv": room} if name != "256" else {}  # the wide kernel has none
    with tuning.forcing(rings | forced):
        found = run(forward, CASES[name], exact=False)
    assert fewer[0] and sum(fewer) == (2 if name == "256" else 3), "forward, dq and dk, dv"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


FUSED = {"fused_dkv": 1, "block_q_dkv": 64, "stages_dkv": 2, "turns_dkv": 0}


@pytest.mark.parametrize("case", [
    dict(shape="wide"), dict(shape="gqa"), dict(shape="gqa 128"),
    dict(shape="gqa 128", mask=Full(), sink=True), dict(shape="wide", scale=0.0),
], ids=lambda case: ", ".join(map(str, case.values())))
def test_the_fused_backward(case, monkeypatch):
    """Against the reference, and the same bits whoever does the rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found, launched = [], gpu_backward_fused.grads
    calls = []
    monkeypatch.setattr(
        gpu_backward_fused, "grads", lambda *a, **k: calls.append(a) or launched(*a, **k)
    )
    with tuning.forcing(FUSED):
        compare(case["shape"], case)
        for blocks in (132, 2):
            monkeypatch.setattr(gpu_work, "cores", lambda kind, blocks=blocks: blocks)
            found.append(run(functools.partial(gpu.forward, interpret=interpret), case, False))
    assert len(calls) == 3
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("B, K, G, least", [(1, 2, 4, 4), (2, 1, 6, 4), (2, 2, 2, 4), (1, 3, 2, 1)])
def test_parts_of_the_fused_backward(B, K, G, least, monkeypatch):
    """Query heads of a group in one, some or as many blocks as heads; B > 1."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(gpu_backward_fused, "HEADS", least)
    monkeypatch.setattr(gpu_work, "cores", lambda kind: 3)
    q, k, v, do = (
        jax.random.normal(key, (B, 150, n, 64), jnp.bfloat16)
        for key, n in zip(jax.random.split(jax.random.key(0), 4), (K * G, K, K, K * G))
    )
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = gradients(functools.partial(gpu.forward, interpret=interpret), q, k, v, do)
    exact = gradients(reference.forward, *(x.astype(jnp.float32) for x in (q, k, v, do)))
    for a, b in zip(found, exact, strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 1e-2 * np.linalg.norm(b)


def kernels(jaxpr):
    """The axes of blocks of every kernel in a program, and whether it counts in device memory."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            yield len(eqn.params["meshes"][0].grid), "get_global" in str(eqn)
            continue
        for below in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from kernels(below)


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(256)], ids=["causal", "window"])
def test_kernels_that_count_have_no_axis_of_vmap(mask):
    """Blocks of all rows of vmap would share the counters."""
    shapes = [jax.ShapeDtypeStruct((3, 1, 2048, n, 128), jnp.bfloat16) for n in (16, 4, 4)]

    def loss(q, k, v):
        return attention(q, k, v, mask=mask, impl="gpu").astype(jnp.float32).sum()

    with compiling_for(H200):
        found = [*kernels(jax.make_jaxpr(jax.vmap(jax.grad(loss, (0, 1, 2))))(*shapes).jaxpr)]
    assert (1, True) in found and (2, True) not in found, found


@pytest.mark.parametrize("mask, forced", [(Causal(), True), (Causal() & Window(40), False)])
def test_vmap_runs_kernels_that_count_in_turn(mask, forced, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(gpu_work, "cores", lambda kind: 2)
    forward = functools.partial(gpu.forward, interpret=plgpu.InterpretGPUParams())
    q, k, v, do = (
        jax.random.normal(key, (2, 1, 200, n, 64), jnp.bfloat16)
        for key, n in zip(jax.random.split(jax.random.key(0), 4), (2, 1, 1, 2))
    )

    def step(*x):
        return gradients(forward, *x, mask=mask, forced=FUSED if forced else {})

    found = jax.vmap(step)(q, k, v, do)
    for row in range(2):
        for a, b in zip(found, step(q[row], k[row], v[row], do[row]), strict=True):
            assert (np.asarray(a[row]) == np.asarray(b)).all()


def gradients(forward, q, k, v, do, mask=None, forced=None):
    """dq, dk, dv of a call."""
    mask, places = Causal() if mask is None else mask, jnp.arange(q.shape[1], dtype=jnp.int32)
    coords = Coords(jnp.broadcast_to(places, q.shape[:2]), None, places)

    def loss(q, k, v):
        o, _ = forward(
            q, k, v, mask=mask, score=None, q_coords=coords, k_coords=coords, scale=0.125,
            sink_logits=None, logit_cap=None, return_lse=True, softmax_dtype=jnp.dtype("float32"),
            layout="full",
        )
        return (o * do).astype(jnp.float32).sum()

    with tuning.forcing(FUSED if forced is None else forced):
        return jax.grad(loss, (0, 1, 2))(q, k, v)


H200 = Device("gpu", "NVIDIA H200")
SQUARE = jnp.ones((256, 256))
ROW = jnp.ones(600, bool)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(device=Device("gpu", "NVIDIA A100-SXM4-40GB")), "runs on Hopper GPUs"),
        (dict(dtype="float32"), "dtype is float32"),
        (dict(H=640, V=512), "H = 640"),
        (dict(mask=Blocks(jnp.zeros((1, 1, 4, 2), jnp.int32), 64, 64)), "multiples of the 128"),
        (dict(score=lambda s, h, q, k: jnp.log1p(jnp.abs(s))), "needs log1p"),
        (
            dict(B=64, N=2**10, score=lambda s, h, q, k: s + SQUARE[q, k]),
            "by query and key: its gradient takes 17179869184 bytes, served up to 8589934592",
        ),
        (dict(mask=MaskMod.of(lambda h, q, k: ROW[q - k])), "by distance"),
    ],
)
def test_refusals_say_why(change, reason):
    call = dict(
        B=1, T=256, S=256, N=4, K=2, H=64, V=64, dtype="bfloat16", mask=Causal(), layout="full",
        segments=False, sink_logits=False, logit_cap=None, return_lse=True, device=H200,
    ) | change
    if call.get("score"):
        call["score"] = Mod.of(call["score"], score_dtype=jnp.float32).program
    assert reason in str(gpu.supports(Call(**call)))
