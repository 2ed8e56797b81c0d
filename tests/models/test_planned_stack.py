"""A stack plans its masks once: same numbers, fewer lists, whatever the layers and the stacking.

The kernels run in interpreters: those for TPUs on every jax, those for Hopper from 0.11.2 on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jex

from attnlab.core import versions
from attnlab.core.dispatch import Device, Implementation, compiling_for, recording
from attnlab.core.mask import Causal, Mask, MaskMod
from attnlab.core.registry import build_config
from attnlab.core.types import Precision, Seq
from attnlab.layers.gqa import GQAConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.ops.attention import (
    OP,
    attention,
    blocks,
    gpu,
    gpu_attend,
    tpu,
    tpu_attend,
    triton,
    tuning,
)
from attnlab.testing.budget import identical
from attnlab.testing.fixtures import pack

DIM, T = 32, 256
ROWS = ((100, 1, 60, 70, -25), (200, 56))
hopper = pytest.mark.skipif(
    versions.JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2"
)
TILES = {"block_q": 64, "block_k": 128, "block_q_bwd": 128, "block_k_bwd": 128}  # 2 pairs
SPANS = jnp.array([40, 90, 250, 3])
LOOK = Causal() & MaskMod.of(lambda head, q_pos, k_pos: q_pos - k_pos < SPANS[head])
FIELDS = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "window": {"num_heads": 4, "num_kv_heads": 2, "window": 50, "sink_tokens": 3},
    "cap": {"num_heads": 4, "num_kv_heads": 1, "logit_cap": 2.0, "sink_logits": True},
    "sqa": {"num_heads": 2, "num_kv_heads": 4, "head_dim": 8},
    "cca": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "mla": dict(num_heads=4, kv_rank=8, nope_dim=16, rope_dim=8, value_dim=16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookConfig(GQAConfig):
    """A layer whose mask captures an array and differs from head to head."""

    @property
    def mask(self) -> Mask:
        return LOOK


def layer(name: str, **fields):
    variant = name if name in ("sqa", "cca", "mla") else "gqa"
    if name == "look":
        return LookConfig(dim=DIM, num_heads=4, **fields)
    return build_config(variant, dim=DIM, **FIELDS[name], **fields)


@pytest.fixture
def listed(monkeypatch):
    """A context in which implementations "planned" and "alone" run one kernel, of given sizes."""
    @contextlib.contextmanager
    def use(forward, tiles, sizes=TILES):
        for name, asked in (("planned", tiles), ("alone", None)):
            made = Implementation(name, lambda call: None, forward, partitions=False, tiles=asked)
            monkeypatch.setitem(OP.implementations, name, made)
        with tuning.forcing(sizes):
            yield

    return use


def on_tpu(listed):
    return listed(functools.partial(tpu.forward, interpret=True), tpu.IMPLEMENTATION.tiles)


def model(names, **fields) -> DecoderConfig:
    period = tuple(layer(name) for name in names)
    return DecoderConfig(**(
        {"vocab_size": 17, "period": period, "repeats": 2, "mlp_dim": 24} | fields
    ))


def gradient(c: DecoderConfig, seq: Seq, impl: str):
    """``(function, parameters)``: the loss of a packed batch and its gradients."""
    graphdef, params = versions.split_module(c.build(nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 17, seq.positions.shape).astype(np.int32)

    def loss(params, seq):
        module = versions.merge_module(graphdef, params)
        return module.loss(tokens, tokens, jnp.ones(tokens.shape), seq, impl=impl)[0]

    return lambda params: jax.value_and_grad(loss)(params, seq), params


def both(c: DecoderConfig, seq: Seq):
    found = []
    for impl in ("planned", "alone"):
        run, params = gradient(c, seq, impl)
        found.append(jax.jit(run)(params))
    return found


@pytest.mark.parametrize(
    "names, change",
    [
        (("gqa",), {}),
        (("window", "sqa"), {"repeats": 1}),
        (("mla",), {"scan": False, "remat": "attention"}),
        (("cca",), {"remat": "full"}),
        (("look",), {"remat": "dots"}),
    ],
    ids=str,
)
def test_same_numbers(names, change, listed):
    with on_tpu(listed):
        identical(*both(model(names, **change), pack(ROWS[:1], "packed")))


@hopper
def test_same_numbers_on_hopper(listed):
    """Scanned; the interpreter has effects, which ``jax.checkpoint`` does not take."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    forward = functools.partial(gpu.forward, interpret=plgpu.InterpretGPUParams())
    bf16 = Precision.named("bfloat16")
    c = model((), period=(layer("window", head_dim=64, precision=bf16),), precision=bf16)
    with listed(forward, gpu.IMPLEMENTATIONS[0].tiles, sizes={}):
        identical(*both(c, pack(((100, 1, 60, -31),), "packed")))


# What is built, and where ----------------------------------------------------------------------


def builds(jaxpr, inside: bool = False, listing: bool = False) -> collections.Counter:
    """How many tables of tiles are made: by whether that stands inside a loop over layers.

    Counted by the additions at an index, of which a table takes one.
    """
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        here = listing or "block_lists" in str(eqn.source_info.name_stack)
        found[inside] += here and name == "scatter-add"
        within = inside or (name in ("scan", "while") and not here)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jex.Jaxpr):
                found += builds(inner, within, here)
    return found


def counted(c: DecoderConfig, impl: str, seq: Seq | None = None):
    run, params = gradient(c, pack(ROWS, "packed") if seq is None else seq, impl)
    found = builds(jax.make_jaxpr(run)(params).jaxpr)
    assert all(n % 2 == 0 for n in found.values()), "one of full tiles, one of partial ones"
    return found[False] // 2, found[True] // 2


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_lists_are_made_once_a_mask(scan, remat, listed):
    """Of two pairs of sizes, forward and transposed; a layer alone makes its own, each pass."""
    with on_tpu(listed):
        for names, masks in ((("gqa",), 1), (("gqa", "mla"), 1), (("gqa", "window", "gqa"), 2)):
            c = model(names, repeats=3, scan=scan, remat=remat)
            assert counted(c, "planned") == (4 * masks, 0), names
        outside, inside = counted(model(("gqa",), repeats=3, scan=scan, remat=remat), "alone")
        assert outside + inside * (3 if scan else 1) >= 3 * 2
        assert counted(model(("look", "look"), repeats=3, scan=scan), "planned") == (4, 0)


@pytest.mark.parametrize("impl", ["xla", "reference", None])
def test_who_reads_no_lists_pays_nothing(impl):
    """Not even a dead operation."""
    run, params = gradient(model(("gqa", "mla")), pack(ROWS, "packed"), impl)
    with_plans = str(jax.make_jaxpr(run)(params))
    with pytest.MonkeyPatch.context() as patch:
        for config in (GQAConfig, type(layer("mla"))):
            patch.setattr(config, "plan", lambda self, seq, impl=None: seq)
        run, params = gradient(model(("gqa", "mla")), pack(ROWS, "packed"), impl)
        assert str(jax.make_jaxpr(run)(params)) == with_plans


def test_constants_are_not_planned(listed):
    """Lists of a static mask over whole rows cost nothing on the device."""
    with on_tpu(listed):
        assert counted(model(("gqa",)), "planned", Seq.full(2, T)) == (0, 0)
        seq = Seq.full(2, T)
        assert layer("gqa").plan(seq, "planned") is seq


# The contract of a layer -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FIELDS, "look"])
def test_layers_plan_for_the_call_they_make(name, monkeypatch):
    """Same facts, so the same implementation and the same tiles; and with or without: the same."""
    asked = []
    spy = Implementation(
        "spy", lambda call: asked.append(call), OP.implementations["xla"].forward,
        tiles=lambda call: [(64, 128)],
    )
    monkeypatch.setitem(OP.implementations, "spy", spy)
    config, seq = layer(name), pack(ROWS, "packed")
    module = config.build(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, T, DIM))
    with recording() as rows:
        planned = config.plan(seq, "spy")
    assert not rows, "a question is no call"
    with recording() as rows:
        y = module(x, planned, impl="spy").y
    identical(y, module(x, seq, impl="spy").y)
    before, call = asked[0], rows[0][1]
    for field in dataclasses.fields(call):
        if field.name != "mask":
            assert getattr(before, field.name) == getattr(call, field.name), field.name
    assert len(call.mask.lists) == 2 and not hasattr(before.mask, "lists")
    assert jax.tree.structure(call.mask.inner) == jax.tree.structure(before.mask)
    assert call.mask.find(64, 128, "packed", True) is not None


def test_moved_tokens_are_not_planned(listed):
    """CCA brings the real tokens of rows without order to the front: other tokens, other lists."""
    config, seq = layer("cca"), pack(ROWS[:1] * 2, "any")
    with on_tpu(listed):
        assert config.plan(seq, "planned") is seq
        planned = layer("gqa").plan(seq, "planned")
        assert planned.plans is not None
        module, x = config.build(nnx.Rngs(0)), jnp.ones((2, T, DIM))
        identical(
            module(x, planned, impl="planned").y, module(x, seq, impl="planned").y
        )


def test_caches_know_no_plans(listed):
    """Prefill and decode of a Seq with plans are those without."""
    with on_tpu(listed):
        config, seq = layer("gqa"), pack(((T,),), "packed")
        module, x = config.build(nnx.Rngs(0)), jnp.ones((1, T, DIM))
        found = [
            module.prefill(x, s, module.init_cache(1, T), impl="xla")
            for s in (seq, config.plan(seq, "planned"))
        ]
        identical(*found)


class NoTriton(types.ModuleType):
    """The kernels of a module that needs triton; nothing looks at them."""

    attention_fwd = attention_dq = attention_dkv = None


def without_launch(monkeypatch):
    """The Triton kernels up to their launch, which needs no triton."""
    for name in ("forward", "backward"):
        module = f"attnlab.ops.attention.triton_{name}"
        monkeypatch.setitem(sys.modules, module, NoTriton(module))
    forward = functools.partial(
        triton.forward, launch=lambda call: [jnp.zeros(x.shape, x.dtype) for x in call.outs]
    )
    made = dataclasses.replace(triton.IMPLEMENTATION, forward=forward, supports=lambda call: None)
    monkeypatch.setitem(OP.implementations, "triton", made)


DEVICES = {
    "tpu": Device("tpu", "TPU v5 lite"), "gpu": Device("gpu", "NVIDIA H200"),
    "gpu-wide": Device("gpu", "NVIDIA H200"), "triton": Device("gpu", "NVIDIA L40S"),
}
MODULES = {"tpu": tpu_attend, "gpu": gpu_attend, "gpu-wide": gpu_attend, "triton": triton}
PLACES = {"full": {}, "packed": dict.fromkeys(("positions", "segments"), np.ones((1, 300), int))}


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=hopper if "gpu" in kind else ()) for kind in DEVICES
])
def test_tiles_are_those_that_are_read(kind, monkeypatch):
    """What an implementation declares is what its kernels ask for, forward and backward."""
    if kind == "triton":
        without_launch(monkeypatch)
    read = set()

    def listing(mask, q, k, *, block_q, block_k, **more):
        read.add((block_q, block_k))
        return blocks.block_lists(mask, q, k, block_q=block_q, block_k=block_k, **more)

    monkeypatch.setattr(MODULES[kind], "block_lists", listing)
    wide = kind == "gpu-wide"
    widths = ((64, 64), (128, 128), (192, 128), (256, 256), (80, 40))
    widths = ((576, 512), (300, 300)) if wide else widths
    for (H, V), cap, layout in itertools.product(widths, (None, 3.0), PLACES):
        q, k, v = (jax.ShapeDtypeStruct((1, 300, n, w), jnp.bfloat16)
                   for n, w in ((4, H), (2, H), (2, V)))

        def loss(q, k, v, cap=cap, layout=layout):
            where = jax.tree.map(jnp.int32, PLACES[layout])
            o = attention(q, k, v, logit_cap=cap, impl=kind, layout=layout, **where)
            return o.astype(jnp.float32).sum()

        read.clear()
        with compiling_for(DEVICES[kind]), recording() as rows:
            jax.eval_shape(loss if wide else jax.grad(loss, (0, 1, 2)), q, k, v)
            declared = OP.implementations[kind].tiles(rows[0][1])
        assert read and set(declared) == read, (H, V, cap, layout)
