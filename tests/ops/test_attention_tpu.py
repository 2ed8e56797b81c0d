"""The TPU kernels in the interpreters, forward and every gradient, against the dense reference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.errors import UnsupportedError
from attnlab.core.mask import (
    Blocks,
    Causal,
    Coords,
    Full,
    Mask,
    MaskMod,
    Prefix,
    Segments,
    SinkTokens,
    Window,
)
from attnlab.core.mods import Mod
from attnlab.ops.attention import OP, Call, reference, tpu, tpu_blocks, tpu_steps, tuning
from attnlab.testing.budget import close

RNG = np.random.default_rng(0)
TPU = Device("tpu", "TPU v5 lite")


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)


def packed(*lengths):
    """Positions and segments of documents end to end; the last one is padding."""
    positions = np.concatenate([np.arange(n) for n in lengths])
    return positions[None], np.repeat([*range(1, len(lengths)), 0], lengths)[None]


@dataclasses.dataclass
class Case:
    """A call: shapes, mask, and what modifies the scores (``score(captured) -> score_mod``)."""

    mask: Mask
    T: int = 256
    S: int | None = None
    B: int = 1
    N: int = 4
    K: int = 2
    H: int = 16
    V: int = 16
    score: object = None
    captured: object = ()
    cap: float | None = None
    sink: bool = False
    layout: str = "full"
    positions: object = None
    segments: object = None
    dtype: str = "float32"


DOCUMENTS = packed(100, 30, 126, 44)
SHUFFLED = RNG.permutation(300)


def slope(captured):
    return lambda s, head, q_pos, k_pos: s + captured[head] * (k_pos - q_pos)


def rows(captured):
    return lambda s, head, q_pos, k_pos: s * captured[head, q_pos]


def columns(captured):
    return lambda s, head, q_pos, k_pos: s + captured[head, k_pos]


def relative(captured):
    last = captured.shape[-1] - 1
    return lambda s, head, q_pos, k_pos: s + captured[head, jnp.clip(q_pos - k_pos, 0, last)]


def everywhere(captured):
    return lambda s, head, q_pos, k_pos, *, batch: s + captured[batch, q_pos, k_pos]


def several(captured):
    return lambda s, head, q_pos, k_pos: (
        jnp.tanh(s * captured["a"][head]) + captured["b"][q_pos] * captured["c"][head, k_pos]
    )


CASES = {
    "causal": Case(Causal()),
    "full, odd lengths, widths apart": Case(Full(), T=200, H=24, V=40),
    "window, every head its keys": Case(Causal() & Window(70), T=300, K=4),
    "one key head": Case(Causal(), K=1),
    "cap": Case(Causal(), T=200, cap=3.0),
    "cap and slope": Case(Causal(), score=slope, captured=normal(4, scale=0.02), cap=5.0),
    "rows": Case(Causal() & Window(99), T=300, score=rows, captured=normal(4, 300)),
    "columns": Case(Causal(), T=300, score=columns, captured=normal(4, 300)),
    "relative table": Case(Causal(), T=300, N=2, K=1, score=relative, captured=normal(2, 64)),
    "relative table, few tokens": Case(
        Full(), T=40, N=2, K=1, score=relative, captured=normal(2, 30)
    ),
    "a bias everywhere": Case(
        Causal(), T=200, B=2, N=2, K=1, score=everywhere, captured=normal(2, 200, 200)
    ),
    "several captured": Case(
        Causal(), score=several, captured={"a": normal(4), "b": normal(256), "c": normal(4, 256)}
    ),
    "sinks and a window": Case(Causal() & Window(64), sink=True),
    "packed": Case(
        Causal() & Segments(), T=300, sink=True, layout="packed", positions=(DOCUMENTS[0],) * 2,
        segments=(DOCUMENTS[1],) * 2,
    ),
    "packed, relative table": Case(
        Causal() & Segments(), T=300, N=2, K=1, layout="packed", positions=(DOCUMENTS[0],) * 2,
        segments=(DOCUMENTS[1],) * 2, score=relative, captured=normal(2, 64),
    ),
    "queries in any order": Case(
        Causal() & Window(80) & Segments(), T=300, layout="any",
        positions=(DOCUMENTS[0][:, SHUFFLED], DOCUMENTS[0]),
        segments=(DOCUMENTS[1][:, SHUFFLED], DOCUMENTS[1]),
    ),
    "a chunk of a prefill": Case(
        Causal() | SinkTokens(3), T=130, S=500, layout="any",
        positions=(np.arange(370, 500)[None], np.arange(500)[None]),
    ),
    "rows that see nothing": Case(
        Causal(), T=130, S=256, layout="any", sink=False,
        positions=(np.arange(-60, 70)[None], np.arange(256)[None]),
    ),
    "nothing is visible": Case(
        Causal(), T=130, S=256, layout="any",
        positions=(np.full((1, 130), -1), np.arange(256)[None]),
    ),
    "block lists of each head": Case(
        Causal() & Blocks(jnp.asarray(RNG.integers(-1, 4, (1, 4, 4, 2)), jnp.int32), 128, 128),
        T=512,
    ),
    "block lists of each row": Case(
        Blocks(jnp.asarray(RNG.integers(-1, 2, (2, 1, 2, 2)), jnp.int32), 256, 256), T=512, B=2,
    ),
    "a mask by head": Case(
        Causal() & MaskMod.of(lambda head, q_pos, k_pos: ((q_pos - k_pos) % 4 == 0) | (head > 1)),
        T=300,
    ),
    "prefixes": Case(Causal() | Prefix(jnp.asarray([50, 20])), T=200, B=2),
    "one query, heads as rows": Case(
        Causal(), T=1, S=300, N=8, K=1, layout="any",
        positions=(np.asarray([[200]]), np.arange(300)[None]),
    ),
    "five queries, heads as rows": Case(
        Causal(), T=5, S=300, N=12, K=2, sink=True, layout="any", cap=4.0, score=slope,
        captured=normal(12, scale=0.02),
        positions=(np.arange(200, 205)[None], np.arange(300)[None]),
    ),
    "bf16": Case(Causal(), H=32, score=slope, captured=normal(4, scale=0.02), dtype="bfloat16"),
}


def results(f, case: Case, dtype, **options):
    """``(o, lse, gradients)`` of a loss of both, for all arrays that have a gradient."""
    S = case.S or case.T
    keys = jax.random.split(jax.random.key(1), 6)
    sizes = (case.T, case.N, case.H), (S, case.K, case.H), (S, case.K, case.V)
    q, k, v = (
        jax.random.normal(key, (case.B, *size)).astype(case.dtype).astype(dtype)
        for key, size in zip(keys, sizes)
    )
    do = jax.random.normal(keys[3], (case.B, case.T, case.N, case.V))
    dlse = jax.random.normal(keys[4], (case.B, case.T, case.N))
    sink = jax.random.normal(keys[5], (case.N,)) if case.sink else None
    default = tuple(np.broadcast_to(np.arange(n), (case.B, n)) for n in (case.T, S))
    positions, segments = case.positions or default, case.segments or (None, None)
    coords = [
        Coords(
            jnp.asarray(p, jnp.int32), None if s is None else jnp.asarray(s, jnp.int32),
            jnp.arange(n, dtype=jnp.int32),
        )
        for p, s, n in zip(positions, segments, (case.T, S))
    ]
    mask = case.mask.bound(case.B, case.N)

    def loss(arrays, captured):
        q, k, v, sink = arrays
        score = None
        if case.score is not None:
            score = Mod.of(case.score(captured), score_dtype="float32").bound(case.B, case.N)
        o, lse = f(
            q, k, v, mask=mask, score=score, q_coords=coords[0], k_coords=coords[1], scale=0.15,
            sink_logits=sink, logit_cap=case.cap, return_lse=True,
            softmax_dtype=jnp.dtype("float32"), layout=case.layout, **options,
        )
        seen = jnp.where(lse > -jnp.inf, lse, 0)
        return (o.astype(jnp.float32) * do).sum() + (seen * dlse).sum(), (o, lse)

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    grads, (o, lse) = grad((q, k, v, sink), case.captured)
    return o, lse, jax.tree.leaves(grads)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles of 128 x 128, so that short rows have several."""

    def small(T, S, H, V, dtype, mask):
        return tpu_blocks.dividing(mask, T + -T % 16 if T < 128 else 128, 128)

    monkeypatch.setattr(tpu_blocks, "forward_blocks", small)
    monkeypatch.setattr(
        tpu_blocks, "backward_blocks", lambda T, *rest: small(max(T, 128), *rest)
    )


def agree(case: Case, **options):
    found = results(tpu.forward, case, case.dtype, **options)
    exact = results(reference.forward, case, "float32")
    single = case.dtype == "float32"
    rough = exact if single else results(reference.forward, case, case.dtype)
    names = ("o", "lse", *(f"gradient {i}" for i in range(len(exact[2]))))
    flat = ((*x[:2], *x[2]) for x in (found, exact, rough))
    for name, a, b, c in zip(names, *flat, strict=True):
        kind = "gradient" if "gradient" in name else "op"
        close(a, b, None if single else c, dtype=case.dtype, kind=kind, name=name)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    agree(CASES[name], interpret=True)


@pytest.mark.parametrize("name", ["causal", "cap and slope", "packed", "relative table"])
def test_without_races(name):
    pltpu.reset_tpu_interpret_mode_state()
    agree(CASES[name], interpret=pltpu.InterpretParams(detect_races=True))
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state
    except ImportError:  # jax 0.12 raises by itself
        return
    races = getattr(state, "races", None)
    assert races is None or not races.races_found


@pytest.mark.parametrize("name", ["causal", "columns", "a bias everywhere", "packed"])
def test_in_parts(name, monkeypatch):
    """Tables that are cut, and sums of keys that do not fit: the kernels run once for each part."""
    monkeypatch.setattr(tpu_steps, "MOST_STEPS", 4)
    monkeypatch.setattr(tpu_blocks, "sums_limit", lambda kind: 128 * 1024)
    agree(CASES[name], interpret=True)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("sink", [False, True])
def test_what_is_added_to_rows(sink, kind):
    """It never reaches the scores, but o and lse; where it is -inf, the row is empty."""
    added = normal(4, 200, scale=30.0).at[:, ::3].set(-jnp.inf)
    bias = normal(4, 200)

    def score(captured):
        return lambda s, head, q_pos, k_pos: (
            2 * s + added[head, q_pos] - captured[head, k_pos] + 0.1 * (k_pos - q_pos)
        )

    case = Case(Causal() & Window(150), T=200, score=score, captured=bias, sink=sink)
    with compiling_for(Device("tpu", kind)):
        found = results(tpu.forward, case, "float32", interpret=True)
    assert np.isneginf(found[1][:, ::3]).all() != sink and (found[0][:, ::3] == 0).all()
    exact = results(reference.forward, case, "float32")
    for name, a, b in zip(("o", "lse"), found, exact):
        close(a, b, kind="op", name=name)
    for i, (a, b) in enumerate(zip(found[2], exact[2], strict=True)):
        close(a, b, kind="gradient", name=f"gradient {i}")


def test_the_same_twice():
    case = CASES["several captured"]
    one, other = (results(tpu.forward, case, "float32", interpret=True) for _ in range(2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_second_derivative_is_refused():
    case = dataclasses.replace(CASES["causal"], T=128)

    def first(scale):
        grown = dataclasses.replace(case, score=lambda c: lambda s, head, q_pos, k_pos: s * scale)
        return results(tpu.forward, grown, "float32", interpret=True)[2][0].sum()

    with pytest.raises(UnsupportedError, match="a second derivative of attention"):
        jax.grad(first)(1.0)


CALL = Call(
    2, 1024, 1024, 8, 2, 64, 64, "bfloat16", Causal(), "full", False, False, None, False, TPU
)


def _program(function):
    return Mod.of(function, score_dtype="float32").program


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"T": 1000, "S": 77, "layout": "any", "sink_logits": True, "return_lse": True}, None),
        ({"H": 576, "V": 512, "dtype": "float32", "logit_cap": 30.0}, None),
        ({"device": Device("gpu", "NVIDIA H200")}, "runs on TPUs, not on gpu"),
        ({"device": Device("tpu", "TPU v3")}, "'TPU v3' is not among the chips"),
        ({"dtype": "float64"}, "dtype is float64"),
        ({"softmax_dtype": "float64"}, "softmax is float32 only"),
        ({"H": 60}, "H = 60 is not a multiple of 8"),
        ({"mask": Blocks(jnp.zeros((1, 1, 16, 1), jnp.int32), 64, 64)}, "Blocks of 64 x 64"),
        (
            {"mask": Causal() | Blocks(jnp.zeros((1, 1, 8, 1), jnp.int32), 128, 128)},
            "a Blocks mask is served only under &",
        ),
        ({"score": _program(lambda s, h, q, k: jnp.expm1(s))}, "needs expm1"),
        (
            {"score": _program(relative(normal(8, 64))), "layout": "any"},
            "looks up a captured array by distance",
        ),
    ],
)
def test_what_is_served(changes, reason):
    found = OP.implementations["tpu"].supports(dataclasses.replace(CALL, **changes))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "axis, most, size, name",
    [("T", 4096, 512, "backward"), ("S", 8192, 512, "backward"), ("S", 8192, 2048, "forward")],
)
def test_tiles_that_no_step_can_name(monkeypatch, axis, most, size, name):
    """The last row or column that fits is served and packed right; one token more is refused."""
    monkeypatch.undo()  # the kernels' own block sizes
    blocks = {"block_q": 1024, "block_k": 1024, "block_q_bwd": 512, "block_k_bwd": 512}
    if name == "forward":
        blocks = {"block_q": 1024, "block_k": 2048, "block_q_bwd": 512, "block_k_bwd": 4096}
    supports = OP.implementations["tpu"].supports
    call = dataclasses.replace(CALL, layout="any", **{axis: most * size})
    with tuning.forcing(blocks), tuning.recording() as choices:
        assert supports(call) is None
        reason = supports(dataclasses.replace(call, **{axis: most * size + 1}))
    assert reason == (
        f"{axis} = {most * size + 1} makes {most + 1} {name} tiles of {size}, at most {most} are "
        "served: force larger blocks, or take parts (attention_step)"
    )
    assert not choices, "asking is not choosing"
    place = most - 1
    entry = np.int32(place << tpu_steps.COLUMN_AT if axis == "S" else place << tpu_steps.ROW_AT)
    assert entry >= 0
    found = tpu_steps.column_of(entry) if axis == "S" else tpu_steps.row_of(entry)
    assert found == place
