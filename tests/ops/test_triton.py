"""The Triton kernels without a GPU: refusals, the mask in intervals, interpreter, compiles.

Interpreter and compiler run in processes of their own: the first is chosen before triton is
imported. Lowering goes through jax-triton itself, which needs JAX's CUDA plugin.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_cases

from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.errors import UnsupportedError
from attnlab.core.mask import (
    Blocks,
    Causal,
    Coords,
    Full,
    MaskMod,
    Prefix,
    Segments,
    SinkTokens,
    Window,
)
from attnlab.core.mods import Mod
from attnlab.ops.attention import OP, Call, attention, plan, triton, triton_mask, triton_sizes

A100, L40S = Device("gpu", "NVIDIA A100-SXM4-80GB"), Device("gpu", "NVIDIA L40S")
CALL = dict(
    B=1, T=256, S=256, N=4, K=2, H=64, V=64, dtype="bfloat16", mask=Causal(), layout="full",
    segments=False, sink_logits=False, logit_cap=None, return_lse=True, device=A100,
)
ABSENT = "" if importlib.util.find_spec("triton") else "triton is not installed"
needs_triton = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
EITHER = Causal() | Prefix(3)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        (dict(device=L40S, dtype="float16", H=8, V=256, N=8, K=1, S=100, layout="any"), None),
        (dict(sink_logits=True, logit_cap=3.0, mask=(EITHER & Window(9)) & Segments()), None),
        (dict(mask=plan(Causal(), batch=1, heads=4, length=256)), None),
        (dict(device=Device("cpu", "cpu")), "runs on NVIDIA GPUs, not on cpu 'cpu'"),
        (dict(device=Device("gpu", "AMD Instinct MI300X")), "runs on NVIDIA GPUs, not on gpu"),
        (dict(device=Device("gpu", "Tesla V100-SXM2-16GB")), "runs on NVIDIA GPUs"),
        (dict(device=Device("gpu", "NVIDIA B200")), "'NVIDIA B200' is not among the GPUs"),
        (dict(dtype="float32"), "dtype is float32, served: bfloat16, float16"),
        (dict(softmax_dtype="float64"), "softmax is float32 only, not float64"),
        (dict(H=60), "H = 60 is not a multiple of 8 up to 256"),
        (dict(V=264), "V = 264 is not a multiple of 8 up to 256"),
        (dict(score=lambda s, h, q, k: s + q), "a score_mod is not served"),
        (dict(mask=Causal() & MaskMod.of(lambda h, q, k: q != 3)), "a mask_mod is not served"),
        (dict(mask=Blocks(jnp.zeros((1, 1, 2, 2), jnp.int32), 128, 128)), "a Blocks mask is not"),
        (dict(mask=EITHER & EITHER & EITHER & EITHER), "the mask has 16 alternatives"),
    ],
)
def test_what_is_served(change, reason, monkeypatch):
    monkeypatch.setattr(triton, "_missing", lambda: None)
    call = CALL | change
    if call.get("score"):
        call["score"] = Mod.of(call["score"], score_dtype=jnp.float32).program
    found = OP.implementations["triton"].supports(Call(**call))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    "versions, imports, reason",
    [
        (("0.11.2", "0.3.1", "3.6.0"), True, None),
        (("0.11.2", None, "3.6.0"), True, "jax-triton is not installed (Python 3.12, pip install"),
        (("0.11.2", "0.3.1", None), True, "triton is not installed"),
        (("0.10.2", "0.3.1", "3.6.0"), True, "jax 0.10.2, jax-triton 0.3.1, triton 3.6.0 were not"),
        (("0.11.2", "0.3.1", "3.7.0"), True, "these were: jax 0.11.2, jax-triton 0.3.1"),
        (("0.11.2", "0.3.1", "3.6.0"), False, "triton does not import: no libcuda"),
    ],
)
def test_packages(versions, imports, reason, monkeypatch):
    table = dict(zip(("jax", "jax-triton", "triton"), versions))

    def version(name):
        if table[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return table[name]

    def load(name):
        if not imports:
            raise ImportError("no\n  libcuda")

    monkeypatch.setattr(triton.importlib.metadata, "version", version)
    monkeypatch.setattr(triton.importlib, "import_module", load)
    triton._missing.cache_clear()
    try:
        found = triton.supports(Call(**CALL))
    finally:
        triton._missing.cache_clear()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("NVIDIA A100-SXM4-40GB", 80), ("NVIDIA A800 80GB PCIe", 80), ("NVIDIA A30", 80),
        ("NVIDIA A10G", 86), ("NVIDIA A10", 86), ("NVIDIA RTX A6000", 86),
        ("NVIDIA GeForce RTX 3090 Ti", 86), ("NVIDIA L4", 89), ("NVIDIA L40S", 89),
        ("NVIDIA RTX 6000 Ada Generation", 89), ("NVIDIA GeForce RTX 4090", 89),
        ("NVIDIA H100 80GB HBM3", 90), ("NVIDIA H200", 90), ("NVIDIA GH200 480GB", 90),
        ("NVIDIA B200", None), ("NVIDIA GeForce RTX 5090", None), ("Tesla T4", None),
    ],
)
def test_capability_by_name(kind, expected):
    assert triton_sizes.capability(kind) == expected


@pytest.mark.parametrize(
    "mask",
    [
        Full(), Causal(), Window(4), Window(3, 2), Window(2**31 - 1, 2**31 - 1), Prefix(5),
        Prefix(np.asarray([2, 9], np.int32)), SinkTokens(3), SinkTokens(0), Segments(),
        Causal() & Window(5), Causal() & (Window(4) | SinkTokens(2)) & Segments(),
        (Causal() & Segments()) | Prefix(2), (Causal() | Prefix(4)) & (Window(6) | Segments()),
    ],
    ids=str,
)
def test_intervals_are_the_mask(mask):
    """What the kernel compares, evaluated here, is ``mask.visible`` on every pair."""
    rng = np.random.default_rng(1)
    q, k = (
        Coords(
            jnp.asarray(rng.integers(-3, 14, (2, n)), jnp.int32),
            jnp.asarray(rng.integers(0, 3, (2, n)), jnp.int32), jnp.arange(n, dtype=jnp.int32),
        )
        for n in (17, 23)
    )
    found = triton_mask.clauses(mask, q)
    low, high = (np.asarray(x)[..., None] for x in (found.low, found.high))
    position = np.asarray(k.positions)[:, None]
    mine, other = np.asarray(q.segments)[..., None], np.asarray(k.segments)[:, None]
    seen = np.zeros((2, 17, 23), bool)
    for c in range(found.number):
        one = np.ones_like(seen)
        for bit, holds in (
            (triton_mask.LOW, position >= low[:, c]), (triton_mask.HIGH, position <= high[:, c]),
            (triton_mask.SEGMENT, (mine == other) & (mine > 0)),
        ):
            one &= holds if found.flags >> 3 * c & bit else True
        seen |= one
    expected = np.broadcast_to(np.asarray(mask.visible(q, k))[:, 0], seen.shape)
    assert (seen == expected).all() and found.number == triton_mask.count(mask)


def test_no_interval():
    with pytest.raises(UnsupportedError, match="the mask MaskMod: is no interval of key positions"):
        triton_mask.bounds(MaskMod.of(lambda h, q, k: q != k), jnp.zeros((1, 4), jnp.int32))


def process(root, tmp_path, module: str, *arguments: str, **environment: str):
    """What a module of the tests prints as JSON."""
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=root, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_CACHE_DIR": str(tmp_path)} | environment,
        timeout=550, check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("part", range(3))
def test_interpreted(part, root, tmp_path):
    """The kernels in Triton's interpreter are at most twice as wrong as the reference."""
    found = process(
        root, tmp_path, "tests.ops.triton_interpreted", f"{part}/3", TRITON_INTERPRET="1"
    )
    assert len(found) >= 5
    for case, results in found.items():
        triton_cases.judge(case, triton_cases.CASES[case], results)


SHARED_KB = {80: 163, 89: 99, 90: 227}


@pytest.mark.aot
@needs_triton
@pytest.mark.parametrize("capability", SHARED_KB)
def test_compiled(capability, root, tmp_path):
    """Shared memory, spilled registers and tensor core instructions of every kernel."""
    rows = process(root, tmp_path, "tests.ops.triton_compiled", str(capability))
    assert {row["kernel"] for row in rows} == {"attention_fwd", "attention_dq", "attention_dkv"}
    for row in rows:
        assert row["shared"] <= SHARED_KB[capability] * 1024, row
        assert row["stack"] <= 512, row
        assert (row["wgmma"] > 0, row["mma"] > 0) == (capability == 90, capability < 90), row


@pytest.mark.aot
def test_lowers_through_jax_triton():
    """Forward and backward become three kernels of a program for a GPU that is not here."""
    reason = triton._missing()
    if reason is not None:
        pytest.skip(reason=reason)

    def loss(q, k, v, sink):
        o, lse = attention(q, k, v, impl="triton", sink_logits=sink, logit_cap=9.0, return_lse=True)
        return o.astype(jnp.float32).sum() + lse.sum()

    shapes = ((4, 64), (2, 64), (2, 128))
    args = [jax.ShapeDtypeStruct((2, 300, *shape), jnp.bfloat16) for shape in shapes]
    with compiling_for(A100):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(
            *args, jax.ShapeDtypeStruct((4,), jnp.float32)
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @triton_kernel_call") == 3
