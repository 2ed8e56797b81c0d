"""Heads above 256 on Hopper: the interpreter with races, the missing gradient, and sm_90a compiles.

The wide gradients (up to 256) are cases of ``test_gpu_kernels``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.errors import UnsupportedError
from attnlab.core.mask import Causal, Coords, MaskMod, Segments, SinkTokens, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import JAX
from attnlab.ops.attention import gpu, reference, tuning

pytestmark = pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2")

WHEELS = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13")


def missing_wheels() -> list[str]:
    out = []
    for name in WHEELS:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        out += [] if found else [name]
    return out


def call(forward, q, k, v, *, mask, score=None, sink=None, **options):
    T, N, H = q.shape[1:]
    places = jnp.arange(T, dtype=jnp.int32)
    coords = Coords(places[None], None, places)
    mod = None if score is None else Mod.of(score, score_dtype=jnp.float32).bound(1, N)
    return forward(
        q, k, v, mask=mask.bound(1, N), score=mod, q_coords=coords, k_coords=coords,
        scale=H**-0.5, sink_logits=sink, logit_cap=None, return_lse=True,
        softmax_dtype=jnp.dtype("float32"), layout="full", **options,
    )


def draw(T: int, N: int, K: int, H: int, V: int):
    shapes = ((1, T, N, H), (1, T, K, H), (1, T, K, V))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)


CASES = {
    "576 over 512": dict(shape=(140, 2, 1, 576, 512), mask=Causal()),
    "values inside keys, window": dict(
        shape=(140, 2, 1, 576, 512), mask=Causal() & Window(40), prefix=True
    ),
    "320, score, sink logits": dict(
        shape=(70, 2, 2, 320, 320), mask=Causal(), sink=True,
        score=lambda s, head, q, k: jnp.tanh(s) + 0.1 * (k - q),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case = CASES[name]
    q, k, v = draw(*case["shape"])
    prefix = case.get("prefix", False)
    v = k[..., : v.shape[-1]] if prefix else v
    options = dict(mask=case["mask"], score=case.get("score"))
    options["sink"] = jnp.asarray([0.5, -1.0]) if case.get("sink") else None
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(gpu.forward, interpret=interpret, value_is_prefix=prefix)
    o, lse = jax.jit(functools.partial(call, kernel, **options))(q, k, v)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    expected, expected_lse = call(reference.forward, *exact, **options)
    o, expected = np.asarray(o, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(o - expected) < 1e-2 * np.linalg.norm(expected)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-2)


def test_the_gradient_above_256_says_what_to_do():
    q, k, v = draw(128, 2, 1, 576, 512)

    def loss(q):
        return call(gpu.forward, q, k, v, mask=Causal())[0].astype(jnp.float32).sum()

    with pytest.raises(UnsupportedError, match="train the expanded form"):
        jax.eval_shape(jax.grad(loss), q)


H200 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
registers_per_core_limit: 65536 registers_per_block_limit: 65536 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200" """


def compiled(f, *shapes):
    """``f`` of arrays ``(shape, dtype)`` compiled for an H200."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(*x, sharding=sharding) for x in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).lower(*arrays).compile()


for_hopper = pytest.mark.skipif(
    bool(missing_wheels()), reason=f"no CUDA compiler here: {', '.join(missing_wheels())} missing"
)


@pytest.mark.aot
@for_hopper
@pytest.mark.parametrize(
    "N, K, H, V, prefix",
    [
        (8, 8, 256, 256, False), (8, 4, 256, 128, False), (8, 8, 192, 192, False),
        (16, 1, 576, 512, True), (16, 1, 576, 512, False), (8, 8, 320, 320, False),
    ],
)
def test_compiles_for_hopper(N, K, H, V, prefix):
    """Shared memory, layouts and lowering; the gradient too where there is one."""
    shapes = [((1, 2048, *x), jnp.bfloat16) for x in ((N, H), (K, H), (K, V))]

    def outputs(q, k, v):
        return call(gpu.forward, q, k, v, mask=Causal(), value_is_prefix=prefix)

    def gradients(q, k, v):
        return jax.grad(lambda *x: outputs(*x)[0].astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    assert compiled(gradients if max(H, V) <= 256 else outputs, *shapes) is not None


@pytest.mark.aot
@for_hopper
@pytest.mark.parametrize(
    "H, V", [(64, 64), (128, 128), (192, 128), (192, 192), (256, 128), (256, 256)]
)
def test_every_candidate_compiles(H, V):
    """What ``attnlab tune`` would try, a candidate of each kernel at a time. There are more rows of
    tiles than multiprocessors, else none would be compiled with persistent blocks."""
    shapes = [((1, 2048, 16, x), jnp.bfloat16) for x in (H, H, V)]
    space, tried = tuning.space("gpu"), {"forward": [], "_dq": [], "_dkv": []}
    for direction in tuning.DIRECTIONS:
        key = tuning.Key("gpu", direction, H, V, 1, "bfloat16", 2048, 2048, "causal")
        usual = space.default(key)
        for blocks in space.candidates(key):
            changed = {n: size for n, size in blocks.items() if size != usual[n]}
            end = "_" + next(iter(changed), "_dq").rpartition("_")[2]
            kernel = "forward" if direction == "forward" else end
            tried[kernel].append(
                {n: x for n, x in blocks.items() if kernel == "forward" or n.endswith(end)}
            )

    def gradients(q, k, v):
        def loss(*x):
            return call(gpu.forward, *x, mask=Causal())[0].astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for one in itertools.zip_longest(*tried.values(), fillvalue={}):
        forced = functools.reduce(dict.__or__, one)
        with tuning.forcing(forced), tuning.recording() as seen:
            assert compiled(lambda *x: gradients(*x), *shapes) is not None, forced
        used = functools.reduce(dict.__or__, (choice.blocks for choice in seen))
        assert forced.items() <= used.items()


@pytest.mark.aot
@for_hopper
@pytest.mark.parametrize("N, K, H, V", [(8, 8, 128, 128), (8, 4, 256, 256)])
def test_values_by_query_and_key_compile(N, K, H, V):
    """A bias with its gradient, used twice over, beside a boolean table in the mask."""
    T = 1024
    shapes = [((1, T, *x), jnp.bfloat16) for x in ((N, H), (K, H), (K, V))]

    def gradients(q, k, v, bias, table):
        def loss(q, k, v, bias):
            mask = Causal() & MaskMod.of(lambda head, q, k: table[q, k])
            score = lambda s, head, q, k: jnp.tanh(s) + bias[head, q, k] * s  # noqa: E731
            return call(gpu.forward, q, k, v, mask=mask, score=score)[0].astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

    more = ((N, T, T), jnp.float32), ((T, T), jnp.bool_)
    assert compiled(gradients, *shapes, *more) is not None


# What the interpreter does not see: a vector that is computed and not used has no layout, and the
# compiler then searches for minutes and gives up. So each group of values, alone and with gradient.
FUNCTIONS = {
    "causal": {},
    "slopes, fixed": dict(score=lambda e: lambda s, n, q, k: s + e[0][n] * (k - q), learned=False),
    "slopes": dict(score=lambda e: lambda s, n, q, k: s + e[0][n] * (k - q)),
    "rows and places": dict(
        score=lambda e: lambda s, n, q, k, *, q_index, k_index: (
            jnp.tanh(s) + e[1][n, q_index] + 0.1 * q + jnp.where(k < 9, e[1][n, k_index], 0.0)
        ),
    ),
    "cap": dict(cap=30.0),
    "T5": dict(score=lambda e: lambda s, n, q, k: s + e[2][n, jnp.clip(q - k, 0, 31)]),
    "window, sinks": dict(mask=Causal() & (Window(200) | SinkTokens(4))),
    "documents": dict(packed=True),
    "documents, slopes": dict(
        packed=True, score=lambda e: lambda s, n, q, k: s + e[0][n] * (k - q)
    ),
}


@pytest.mark.aot
@for_hopper
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("H", [64, 128])
def test_functions_compile(name, H):
    """More rows of tiles than multiprocessors, as above."""
    case = {"learned": True, "mask": Causal(), "cap": None} | FUNCTIONS[name]
    T, N = 1000, 20
    places = jnp.arange(T, dtype=jnp.int32)

    def gradients(q, k, v, segments, positions, *extra):
        packed = case.get("packed", False)
        coords = Coords(positions, segments, places) if packed else Coords(
            places[None], None, places
        )
        mask = (case["mask"] & Segments() if packed else case["mask"]).bound(1, N)

        def loss(q, k, v, extra):
            make = case.get("score")
            mod = None if make is None else Mod.of(make(extra), score_dtype="float32").bound(1, N)
            o, _ = gpu.forward(
                q, k, v, mask=mask, score=mod, q_coords=coords, k_coords=coords, scale=H**-0.5,
                sink_logits=None, logit_cap=case["cap"], return_lse=True,
                softmax_dtype=jnp.dtype("float32"), layout="packed" if packed else "full",
            )
            return o.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2, 3) if case["learned"] else (0, 1, 2))(q, k, v, extra)

    shapes = [((1, T, N, H), jnp.bfloat16)] * 3 + [((1, T), jnp.int32)] * 2
    extra = [(x, jnp.float32) for x in ((N,), (N, T), (N, 32))]
    assert compiled(gradients, *shapes, *extra) is not None


@pytest.mark.aot
@for_hopper
@pytest.mark.parametrize("N, K, H, V", [(8, 8, 128, 128), (8, 4, 192, 128)])
def test_a_step_compiles(N, K, H, V):
    T = 1000  # not whole tiles
    lead = (1, T, N)
    shapes = [((1, T, *x), jnp.bfloat16) for x in ((N, H), (K, H), (K, V))]

    def gradients(q, k, v, o, m, l):
        def loss(q, k, v, *carry):
            o, _, l = call(functools.partial(gpu.step, carry), q, k, v, mask=Causal())
            return (o / l[..., None]).sum()

        return jax.grad(loss, (0, 1, 2, 3, 4, 5))(q, k, v, o, m, l)

    carry = ((*lead, V), jnp.float32), (lead, jnp.float32), (lead, jnp.float32)
    assert compiled(gradients, *shapes, *carry) is not None
