"""Sizes of the Hopper kernels: the heuristic, forced and tuned ones, limits, and what plans ask."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.errors import ConfigError
from attnlab.core.mask import Causal, Full, MaskMod, Segments, SinkTokens, Window
from attnlab.core.mods import Mod
from attnlab.core.staging import split
from attnlab.core.versions import JAX
from attnlab.ops.attention import (
    Planned,
    attention,
    gpu,
    gpu_backward,
    gpu_backward_wide,
    gpu_backward_wide_kv,
    gpu_forward,
    gpu_sizes,
    plan,
    tuning,
)
from attnlab.ops.attention.gpu_backward import Config as Narrow
from attnlab.ops.attention.gpu_backward_fused import Config as Fused
from attnlab.ops.attention.gpu_backward_wide import Config as Wide
from attnlab.ops.attention.gpu_forward import Config as Forward
from attnlab.ops.attention.gpu_wide import Config as Above

for_kernels = pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU needs jax >= 0.11.2")
H200 = Device("gpu", "NVIDIA H200")
T = 256
SLOPES, BIAS = jnp.ones(2), jnp.ones((T, T))
TABLE = BIAS > 0


def slope(s, head, q, k):
    return s + SLOPES[head] * (k - q)


def bias(s, head, q, k):
    return s + BIAS[q, k]


def arrays(H, V, N=2, K=2, T=T):
    return [jax.ShapeDtypeStruct((1, T, *x), jnp.bfloat16) for x in ((N, H), (K, H), (K, V))]


def sizes(H, V, mask=None, layout="full", score=None, dense=False, prefix=False, **shape):
    q, _, v = arrays(H, V, **shape)
    body = None if score is None else split(Mod.of(score, score_dtype="float32").program, T, T)
    mask = Causal() if mask is None else mask
    return gpu_sizes.Sizes.of(q, v, mask, layout, body, dense, prefix)


QUIET, SMALL = Narrow(64, 128, 3, turns=False), Narrow(128, 64, 3, turns=False)
TURNS = Narrow(64, 128, 3)
TWO = Narrow(128, 64, 2, turns=False, persistent=2), Narrow(64, 128, 2, turns=False, persistent=2)
WINDOW, PACKED = Causal() & Window(9), dict(mask=Causal() & Segments(), layout="packed")
HEURISTIC = [
    (64, 64, {}, Forward(128, 128, 4), Narrow(128, 128, 2, turns=False), Narrow(128, 128, 2)),
    (64, 64, dict(dense=True), Forward(128, 128, 4), SMALL, QUIET),
    (64, 64, dict(score=slope, mask=WINDOW), Forward(128, 128, 4), SMALL, QUIET),
    (40, 64, dict(mask=WINDOW), Forward(128, 128, 4, persistent=2), *TWO),
    (128, 128, {}, Forward(128, 128, 2), SMALL, TURNS),
    (96, 72, dict(mask=Full()), Forward(128, 128, 2), SMALL, TURNS),
    (128, 128, dict(mask=WINDOW), Forward(128, 128, 2, persistent=2), *TWO),
    (128, 128, PACKED, Forward(128, 128, 2, persistent=2), *TWO),
    (128, 64, dict(layout="any"), Forward(128, 128, 2, persistent=2), *TWO),
    (128, 128, dict(score=lambda s, head, q, k: jnp.tanh(s)), Forward(128, 128, 2),
     Narrow(128, 128, 2, turns=False), QUIET),
    (128, 128, dict(score=slope, mask=WINDOW), Forward(128, 128, 2), SMALL, TURNS),
    (128, 128, dict(score=lambda s, head, q, k: s * SLOPES[head], layout="any"),
     Forward(128, 128, 2), SMALL, TURNS),
    (128, 128, dict(score=bias, dense=True), Forward(128, 64, 4), SMALL, TURNS),
    (128, 128, dict(dense=True), Forward(128, 64, 4), SMALL, TURNS),
    (192, 128, {}, Forward(128, 128, 2), Narrow(128, 64, 2, turns=False), Wide(64, 128, 2)),
    (192, 128, dict(dense=True), Forward(128, 64, 4), Narrow(128, 64, 2, turns=False),
     Wide(64, 128, 2)),
    (192, 128, PACKED, Forward(128, 128, 2), Narrow(128, 64, 2, turns=False), Wide(64, 128, 2)),
    (192, 192, {}, Forward(128, 64, 2), Wide(128, 64, 2, 2), Wide(64, 128, 3)),
    (256, 128, dict(layout="any"), Forward(128, 64, 2), Wide(128, 64, 2, 2, turns=False),
     Wide(64, 128, 2)),
    (256, 256, dict(dense=True), Forward(128, 64, 2), Wide(128, 64, 2, 1, turns=False),
     Wide(64, 128, 2)),
    (128, 200, dict(score=slope), Forward(128, 64, 2), Wide(128, 64, 2, 1, turns=False),
     Wide(64, 128, 2)),
]


@pytest.mark.parametrize("H, V, call, forward, dq, dkv", HEURISTIC)
def test_heuristic(H, V, call, forward, dq, dkv):
    found = sizes(H, V, **call)
    assert found.forward == forward and found.backward == (dq, dkv)


def test_fused_serves_plain_calls():
    with tuning.forcing(FUSED):
        assert sizes(128, 128).backward == (Fused(64, 128, 2),) * 2
        for more in (dict(score=slope), dict(dense=True)):
            with pytest.raises(ConfigError, match="serves calls without score function and bias"):
                _ = sizes(128, 128, **more).backward
        with pytest.raises(ConfigError, match="serves plain causal and full masks"):
            _ = sizes(128, 128, layout="packed").backward


MANY = dict(N=8, K=2)


def test_many_heads_have_one_backward_kernel():
    fused = (Fused(64, 128, 2),) * 2
    for H, V, more in ((128, 128, {}), (64, 64, {}), (100, 128, dict(mask=Full()))):
        assert sizes(H, V, **MANY, **more).backward == fused
        assert sizes(H, V, N=4, **more).backward != fused, "of too few heads"
        two_rows = jax.ShapeDtypeStruct((2, T, 4, H), jnp.bfloat16)
        v = jax.ShapeDtypeStruct((2, T, 2, V), jnp.bfloat16)
        mask = more.get("mask", Causal())
        found = gpu_sizes.Sizes.of(two_rows, v, mask, "full", None, False)
        assert found.backward == fused
    for H, V, more in (
        (128, 64, {}), (192, 192, {}), (128, 128, dict(mask=WINDOW)), (128, 128, PACKED),
        (128, 128, dict(score=slope)), (128, 128, dict(dense=True)),
    ):
        assert not isinstance(sizes(H, V, **MANY, **more).backward[0], Fused)


def test_forcing_sizes_of_dq_asks_for_its_kernel():
    with tuning.forcing({"stages_dq": 2}):
        assert sizes(128, 128, **MANY).backward == (Narrow(128, 64, 2, turns=False), TURNS)
    with tuning.forcing({"fused_dkv": 0}):
        assert sizes(128, 128, **MANY).backward == (SMALL, TURNS)
    for size in ("turns_dkv", "persistent_dkv"):
        with tuning.forcing({size: 1}):
            assert not isinstance(sizes(128, 128, **MANY).backward[0], Fused)
    with tuning.forcing({"fused_dkv": 1}):
        assert sizes(128, 128).backward == (Fused(64, 128, 2),) * 2, "two heads, but asked for"
    with tuning.forcing({"fused_dkv": 1, "stages_dq": 2, "section_dkv": 8}):
        assert sizes(128, 128, **MANY).backward == (Fused(64, 128, 2, section=8),) * 2
    with (
        tuning.forcing({"fused_dkv": 1, "turns_dkv": 1}),
        pytest.raises(ConfigError, match="turns_dkv = 1: the kernel of fused_dkv has no"),
    ):
        _ = sizes(128, 128, **MANY).backward


def test_above_256_nothing_is_chosen():
    found = sizes(576, 512), sizes(576, 512, prefix=True)
    assert [x.forward for x in found] == [
        Above(128, 64, 1, 1), Above(128, 64, 2, 2, value_is_prefix=True)
    ]


KEY = tuning.Key("gpu", "forward", 128, 128, 1, "bfloat16", 4096, 4096, "causal")
BACK = dataclasses.replace(KEY, direction="backward")


def key(direction, H, V):
    return dataclasses.replace(KEY, direction=direction, H=H, V=V)


FUSED = {"fused_dkv": 1, "block_q_dkv": 64, "stages_dkv": 2, "turns_dkv": 0, "persistent_dkv": 0}
# Of the last size of a line the compiler took the first value and refused the second.
COMPILED = [
    ("forward", 128, 128, {"block_k": (64,), "stages": (5, 6)}),
    ("forward", 128, 128, {"stages": (2, 3)}),
    ("forward", 192, 128, {"block_k": (64,), "stages": (4, 5)}),
    ("forward", 256, 128, {"stages": (3, 4)}),
    ("forward", 256, 256, {"stages": (2, 3)}),
    ("backward", 128, 128, {"block_k_dq": (128,), "stages_dq": (2, 3)}),
    ("backward", 128, 128, {"block_k_dq": (64,), "stages_dq": (5, 6)}),
    ("backward", 192, 128, {"stages_dq": (3, 4)}),
    ("backward", 192, 192, {"stages_dq": (3,), "wide_dq": (2, 3)}),
    ("backward", 256, 128, {"stages_dq": (3,), "wide_dq": (2, 3)}),
    ("backward", 256, 256, {"wide_dq": (1, 2)}),
    ("backward", 192, 128, {"wide_dkv": (1,), "stages_dkv": (4, 5)}),
    ("backward", 192, 192, {"stages_dkv": (3, 4)}),
    ("backward", 256, 256, {"stages_dkv": (2, 3)}),
]


@pytest.mark.parametrize("direction, H, V, changes", COMPILED)
def test_what_shared_memory_holds(direction, H, V, changes):
    space, name = tuning.space("gpu"), list(changes)[-1]
    fixed = {n: x[0] for n, x in changes.items()}
    blocks = space.default(key(direction, H, V)) | fixed
    fits, full = changes[name]
    assert space.refuses(key(direction, H, V), blocks | {name: fits}) is None
    reason = space.refuses(key(direction, H, V), blocks | {name: full})
    assert "KB of shared memory, there are 226" in str(reason)


@pytest.mark.parametrize("end, sizes, H, V, reported", [
    ("", (128, 128, 2), 192, 128, 211), ("", (128, 64, 2), 64, 64, 51),
    ("", (128, 64, 2), 256, 256, 195), ("", (128, 64, 3), 256, 128, 211),
    ("_dq", (128, 64, 3, 0, 2), 256, 128, 224), ("_dq", (128, 64, 2, 0, 1), 64, 64, 56),
    ("_dkv", (64, 128, 3, 0, 1), 192, 192, 210), ("_dkv", (128, 128, 2, 0, 1), 128, 128, 194),
    # Without sums along its rows such a kernel takes 2 KB less.
    ("_dq", (128, 128, 2, 0, 0), 128, 128, 192 + 2),
    ("_dkv", (64, 128, 3, 1, 0), 192, 128, 202 + 2),
])
def test_shared_memory_is_what_the_compiler_reports(end, sizes, H, V, reported):
    named = dict.fromkeys(gpu_sizes.FIELDS[end], 0) | dict(zip(gpu_sizes.FIELDS[end], sizes))
    assert gpu_sizes._shared_kb(end, named, H, V) == reported


@pytest.mark.parametrize("key, blocks, message", [
    (KEY, {"block_x": 1}, "block size 'block_x': gpu has no such block. Fix: use block_k, "),
    (KEY, {"block_q": 64}, "block_q = 64 is not the 128 rows of two warpgroups"),
    (KEY, {"block_k": 96}, "block_k = 96 is not 64 or 128"),
    (KEY, {"stages": 1}, "stages = 1 leaves no tile in flight"),
    (KEY, {"stages": 3}, "forward: the tiles of H = 128, V = 128 take 227 KB of shared memory"),
    (BACK, {"block_k_dkv": 64}, "block_k_dkv = 64 is not the 128 rows"),
    (BACK, {"turns_dq": 2}, "turns_dq = 2 is not from 0 to 1"),
    (BACK, {"wide_dkv": 2, "turns_dkv": 0}, "wide_dkv = 2 is not from 0 to 1"),
    (BACK, {"wide_dq": -1}, "wide_dq = -1 is not from 0 to inf"),
    (BACK, {"wide_dkv": 1}, "turns_dkv = 1: the kernel of wide_dkv has no"),
    (BACK, {"wide_dkv": 1, "turns_dkv": 0, "persistent_dkv": 1}, "persistent_dkv = 1: the kernel"),
    (key("forward", 256, 256), {"persistent": 2}, "take 260 KB of shared memory"),
    (BACK, FUSED | {"turns_dkv": 1}, "turns_dkv = 1: the kernel of fused_dkv has no"),
    (BACK, FUSED | {"wide_dkv": 1}, "wide_dkv = 1: the kernel of fused_dkv has no"),
    (BACK, FUSED | {"stages_dkv": 3}, "dkv: the tiles of H = 128, V = 128 take 259 KB"),
    (BACK, FUSED | {"block_q_dkv": 128}, "serves H = V up to 128 and block_q_dkv = 64"),
    (key("backward", 192, 128), FUSED | {"wide_dkv": 0}, "serves H = V up to 128 and block_q_dkv"),
    (dataclasses.replace(BACK, mask="window"), FUSED, "serves plain causal and full masks"),
    (BACK, {"block_k_dq": 128}, "dq: the tiles of H = 128, V = 128 take 258 KB"),
    (BACK, {"stages_dq": 4, "persistent_dq": 2}, "dq: the tiles of H = 128, V = 128 take 259 KB"),
    (BACK, {"block_q_dkv": 128, "stages_dkv": 2},
     "block_q_dkv = 128 with H = 128, V = 128: .* take 256 registers of a thread, there are 224"),
    (key("backward", 192, 128), {"block_k_dq": 128, "wide_dq": 1}, "block_k_dq = 128 with H = 192"),
    (key("backward", 256, 128), {"wide_dkv": 0}, "take 256 registers of a thread"),
])
def test_wrong_sizes(key, blocks, message):
    with tuning.forcing(blocks), pytest.raises(ConfigError, match=message):
        tuning.choose(key, H200)


@pytest.mark.parametrize("H, V, forward, backward", [
    (64, 64, 8, 17), (128, 128, 6, 13), (192, 128, 5, 10), (192, 192, 4, 7), (256, 128, 3, 8),
    (256, 256, 2, 3),
])
def test_candidates(H, V, forward, backward):
    """Few, the heuristic first, and a candidate changes one kernel."""
    space = tuning.space("gpu")
    assert len(space.candidates(key("forward", H, V))) == forward
    usual, *others = space.candidates(key("backward", H, V))
    assert len(others) == backward - 1 and usual == space.default(key("backward", H, V))
    for blocks in others:
        changed = {n.rpartition("_")[2] for n in blocks if blocks[n] != usual[n]}
        assert len(changed) == 1 and changed <= {"dq", "dkv"}


WINNER = {
    "forward": {
        "block_q": 128, "block_k": 64, "stages": 4, "persistent": 1, "section": 2,
    },
    "backward": {
        "block_q_dq": 128, "block_k_dq": 64, "stages_dq": 3, "turns_dq": 1, "wide_dq": 2,
        "persistent_dq": 1, "section_dq": 0, "block_q_dkv": 128, "block_k_dkv": 128,
        "stages_dkv": 2, "turns_dkv": 0, "wide_dkv": 1, "persistent_dkv": 0, "section_dkv": 4,
        "fused_dkv": 0,
    },
}
TUNED = (
    Forward(128, 64, 4, persistent=1, section=2),
    Wide(128, 64, 3, 2, turns=True, persistent=1), Wide(128, 128, 2, section=4),
)


def row(direction, **changes):
    made = dataclasses.asdict(dataclasses.replace(KEY, direction=direction, T=T, S=T))
    stamp = {"ms": 1.0, "basis": "measured", "date": "2026-01-01", "versions": {}}
    return made | stamp | {"blocks": WINNER[direction]} | changes


@pytest.fixture
def rows(monkeypatch):
    """A tuned table of the H200 made of these rows."""
    def put(*found):
        monkeypatch.setattr(tuning, "table", lambda kind: found if kind == H200.kind else ())

    return put


def chosen(found):
    with compiling_for(H200):
        return found.forward, *found.backward


def test_tuned_rows_serve_plain_calls(rows):
    rows(row("forward"), row("backward"))
    assert chosen(sizes(128, 128)) == chosen(sizes(128, 128, N=8, K=8)) == TUNED
    assert chosen(sizes(100, 128, T=500)) == TUNED, "the kernel of 128 serves 100; 512 is near 256"
    others = [
        sizes(128, 128, score=slope), sizes(128, 128, dense=True),
        sizes(128, 128, mask=Full()), sizes(128, 128, mask=Causal() & Window(9)),
        sizes(128, 128, layout="any"), sizes(128, 128, Causal() & Segments(), "packed"),
        sizes(64, 64), sizes(128, 128, T=65536),
    ]
    usual = [(x.forward, *x.backward) for x in map(dataclasses.replace, others)]  # on a CPU
    assert list(map(chosen, others)) == usual and TUNED not in usual
    rows(row("forward", mask="window"), row("backward", mask="window"))
    assert chosen(sizes(128, 128, mask=Causal() & Window(9))) == TUNED


def test_tuned_rows_of_the_fused_kernel_serve_many_heads(rows):
    usual = sizes(128, 128).backward
    fused = WINNER["backward"] | FUSED | {"wide_dkv": 0, "section_dkv": 16}
    rows(row("backward", blocks=fused))
    with compiling_for(H200):
        assert sizes(128, 128, **MANY).backward == (Fused(64, 128, 2, section=16),) * 2
        assert sizes(128, 128).backward == usual
        with tuning.forcing({"stages_dq": 2}):
            assert sizes(128, 128, **MANY).backward == (Narrow(128, 64, 2, turns=False), TURNS)


def test_rows_of_other_sizes_are_not_used(rows):
    """After a size has come or gone: a row that lacks it cannot say what it was."""
    short = {n: x for n, x in WINNER["backward"].items() if n != "turns_dq"}
    rows(row("forward", blocks=WINNER["forward"] | {"new": 1}), row("backward", blocks=short))
    found = chosen(sizes(128, 128))
    assert found == (Forward(128, 128, 2), SMALL, TURNS)


def test_chosen_once(rows):
    """Forward, backward and the carry of one call agree, whatever surrounds them."""
    found = sizes(128, 128)
    with tuning.forcing({"block_k": 64}), tuning.recording() as seen:
        assert found.forward == found.forward == Forward(128, 64, 2)
    assert found.forward.block_k == 64 and [x.source for x in seen] == ["forced"]


@pytest.fixture
def launched(monkeypatch):
    """The sizes that every kernel was launched with, in order."""
    found = []

    def watch(module, name):
        kernel = getattr(module, name)

        def wrapped(plan, config, *args, **more):
            found.append((f"{module.__name__.rpartition('.')[2]}.{name}", config))
            return kernel(plan, config, *args, **more)

        monkeypatch.setattr(module, name, wrapped)

    for module, name in (
        (gpu_forward, "forward"), (gpu_backward, "grad_q"), (gpu_backward, "grad_kv"),
        (gpu_backward_wide, "grad_q"), (gpu_backward_wide_kv, "grad_kv"),
    ):
        watch(module, name)
    return found


def trace(H=128, V=128, **options):
    """Forward and backward of a call, up to the kernels' own programs."""
    def loss(q, k, v):
        return attention(q, k, v, impl="gpu", **options).astype(jnp.float32).sum()

    with compiling_for(H200):
        jax.eval_shape(jax.grad(loss, (0, 1, 2)), *arrays(H, V))


@for_kernels
@pytest.mark.parametrize("score", [None, slope])
def test_forced_sizes_reach_the_kernels(launched, score):
    with tuning.forcing(WINNER["forward"] | WINNER["backward"]), tuning.recording() as seen:
        trace(score_mod=score)
    assert launched == list(zip(
        ("gpu_forward.forward", "gpu_backward_wide.grad_q", "gpu_backward_wide_kv.grad_kv"), TUNED
    ))
    assert [x.source for x in seen] == ["forced"] * 2
    launched.clear()
    with tuning.forcing({"turns_dq": 1}):  # of a narrow kernel; what is not named stays
        trace(64, 64, score_mod=score)
    dq, dkv = sizes(64, 64, score=score).backward
    assert launched == [
        ("gpu_forward.forward", Forward(128, 128, 4)),
        ("gpu_backward.grad_q", dataclasses.replace(dq, turns=True)), ("gpu_backward.grad_kv", dkv),
    ]
    with tuning.forcing({"stages": 7}), pytest.raises(ConfigError, match="KB of shared memory"):
        trace(score_mod=score)


@for_kernels
def test_tuned_sizes_reach_the_kernels(launched, rows):
    rows(row("forward"), row("backward"))
    trace()
    assert tuple(config for _, config in launched) == TUNED
    launched.clear()
    trace(score_mod=slope)
    assert [x for _, x in launched] == [Forward(128, 128, 2), SMALL, Narrow(64, 128, 3)]


PLACES = dict(
    positions=jnp.arange(T, dtype=jnp.int32)[None] % 128,
    segments=1 + jnp.arange(T, dtype=jnp.int32)[None] // 128,
)
PLANNED = {
    "causal": dict(mask=Causal()),
    "window and sinks": dict(mask=Causal() & Window(40), sink_tokens=2),
    "slope": dict(mask=Causal(), score_mod=slope),
    "bias": dict(mask=Causal(), score_mod=bias),
    "table": dict(mask=lambda head, q, k: TABLE[q, k]),
    "cap": dict(mask=Causal(), logit_cap=3.0),
    "packed": dict(mask=Causal(), layout="packed", **PLACES),
    "any": dict(mask=Causal(), layout="any", **PLACES),
}


@for_kernels
@pytest.mark.parametrize("source", ["heuristic", "tuned", "forced"])
@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_for_the_tiles_of_a_call_is_used(name, source, rows, monkeypatch):
    call, looked = PLANNED[name], []
    find = Planned.find

    def watched(self, *tile):
        looked.append((tile, find(self, *tile)))
        return looked[-1][1]

    monkeypatch.setattr(Planned, "find", watched)
    if source == "tuned":
        rows(row("forward"), row("backward"))
    forced = {"block_k": 64, "block_k_dq": 64, "block_q_dkv": 64} if source == "forced" else {}
    about = {n: x for n, x in call.items() if n not in ("positions", "segments")}
    where = {n: call[n] for n in ("positions", "segments", "layout", "sink_tokens") if n in call}
    where |= {} if "positions" in call else {"length": T}
    options = {n: x for n, x in call.items() if n not in ("mask", "sink_tokens")}
    with compiling_for(H200), tuning.forcing(forced):
        tiles = gpu.tiles(*arrays(128, 128), **{"layout": "full", **about})
        mask = call["mask"]
        for block_q, block_k in tiles:
            mask = plan(
                mask, batch=1, heads=2, block_q=block_q, block_k=block_k,
                **(where if mask is call["mask"] else where | {"sink_tokens": 0}),
            )
        looked.clear()  # plan() asks for what it is about to make
        trace(mask=mask, **options)
    assert len(looked) == 3 and all(lists is not None for _, lists in looked), looked
    assert {tile[:2] for tile, _ in looked} == set(tiles), "and nothing in vain"


@for_kernels
def test_a_plan_of_other_tiles_is_not(monkeypatch):
    """What the test above would see."""
    looked, find = [], Planned.find
    monkeypatch.setattr(
        Planned, "find", lambda self, *tile: looked.append(find(self, *tile)) or looked[-1]
    )
    planned = plan(Causal(), batch=1, heads=2, length=T, block_q=128, block_k=128)
    looked.clear()
    trace(mask=planned, score_mod=slope)
    assert [lists is None for lists in looked] == [False, True, True]


def test_tiles_say_what_the_heuristic_takes():
    def tiles(H, V, **call):
        return gpu.tiles(*arrays(H, V), **{"layout": "full", **call})

    assert tiles(64, 64) == [(128, 128)]
    assert tiles(128, 128) == [(128, 128), (128, 64), (64, 128)]
    assert tiles(128, 128, layout="packed") == [(128, 128), (128, 64), (64, 128)]
    table = MaskMod.of(lambda head, q, k: TABLE[q, k])
    assert tiles(128, 128, mask=table) == [(128, 64), (64, 128)]
    assert tiles(128, 128, sink_tokens=1, mask=Causal() & Window(3)) == tiles(
        128, 128, mask=(Causal() & Window(3)) | SinkTokens(1)
    )
    assert tiles(576, 512) == [(128, 64)]
