"""On four devices, equal to one: the fallback under GSPMD and inside shard_map, and a kernel that
XLA cannot cut, mapped over the shards of rows and heads.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.core import axes
from attnlab.core.dispatch import Implementation
from attnlab.core.mask import Blocks, Causal, Coords, MaskMod, Prefix, Segments, Window
from attnlab.core.versions import make_mesh
from attnlab.ops.attention import (
    OP,
    _over_shards,
    attention,
    decode_xla,
    reference,
    tpu,
    vendor,
    xla,
)
from attnlab.ops.attention import decode as decode_module
from attnlab.ops.attention.carry import attention_step, finish
from attnlab.ops.attention.decode import decode
from attnlab.parallel.rules import RULES
from attnlab.testing.budget import close_trees


@pytest.mark.devices8
def test_four_devices(root):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_attention_sharded"], cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def main() -> None:
    B, T, N, K, H = 2, 32, 4, 2, 8
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (N,)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))

    def attend(q, k, v, sinks, q_positions, k_positions):
        return attention(
            q, k, v, sink_logits=sinks, positions=(q_positions, k_positions),
            mask=Causal() & Window(11), return_lse=True, impl="xla",
        )

    def gradients(f):
        def loss(arrays):
            o, lse = f(*arrays, positions, positions)
            return jnp.sin(o).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.grad(loss))

    xla.tile_sizes = lambda *shape: (64, 64)
    expected = gradients(attend)(arrays)
    xla.tile_sizes = lambda *shape: (8, 8)

    mesh = make_mesh((2, 2), ("data", "tensor"))
    specs = [P("data", None, "tensor")] * 3 + [P("tensor")]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
    close_trees(gradients(attend)(placed), expected, name="GSPMD")

    # Queries sharded over tokens, keys replicated: their gradient is a sum over devices.
    mesh = make_mesh((4,), ("seq",))
    rows = P(None, "seq")
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(rows, P(), P(), P(), rows, P()), out_specs=rows
    )
    close_trees(gradients(sharded)(arrays), expected, name="shard_map")
    for heads in ((4, 2), (4, 1), (3, 3)):
        kernel_over_shards(*heads)
    masks_over_shards()
    steps_over_shards()
    kernel_steps_over_shards()
    functions_over_shards()
    decode_over_shards()


def kernel_over_shards(N: int, K: int) -> None:
    """Splash (interpreted), which reads no coordinates but segments: packed rows, N over K heads.

    N = 4 over K = 2 is cut over the tensor axis, K = 1 replicated, three heads stay whole.
    """
    B, T, H = 4, 128, 64
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K)))
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    cut = jnp.array([40, 128, 1, 77])[:, None]
    segments = jnp.where(place < cut, 1, jnp.where(place < 120, 2, 0))
    coords = Coords(jnp.where(place < cut, place, place - cut), segments, jnp.arange(T))
    call = dict(
        mask=Causal() & Segments(), score=None,
        q_coords=coords, k_coords=coords, scale=0.1, sink_logits=None,
        logit_cap=None, return_lse=False, softmax_dtype=jnp.dtype("float32"), layout="packed",
    )
    kernel = functools.partial(_over_shards, functools.partial(vendor.splash, interpret=True))

    def gradients(forward):
        def loss(q, k, v):
            o = forward(q, k, v, **call)[0]
            return jnp.sin(o).sum(), o

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    expected = gradients(reference.forward)(q, k, v)
    mesh = make_mesh((2, 2), ("data", "tensor"))
    with axes.sharding(mesh, RULES):
        found = gradients(kernel)(q, k, v)
    close_trees(found, expected, name=f"kernel over shards, N = {N}, K = {K}")
    spec = found[1].sharding.spec
    assert spec[0] == "data" and ("tensor" in spec) == (N % 2 == 0), spec


def masks_over_shards() -> None:
    """Arrays inside a mask are cut as the rows and heads they speak of; sinks and lse too."""
    B, T, N, H = 4, 8, 4, 4
    keys = jax.random.split(jax.random.key(2), 3)
    q, k, v = (jax.random.normal(key, (B, T, N, H)) for key in keys)
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    lists = jax.random.randint(jax.random.key(3), (B, N, 4, 2), -1, 4)
    coords = Coords(place, None, jnp.arange(T))
    for mask in (
        Causal() | Prefix(jnp.array([6, 0, 3, 1])), Causal() | Prefix(2), Blocks(lists, 2, 2),
        Blocks(lists[:1], 2, 2) | Causal(), Blocks(lists[:, :1], 2, 2) & Causal(),
    ):
        call = dict(
            mask=mask, score=None, q_coords=coords, k_coords=coords, scale=0.5, logit_cap=None,
            return_lse=True, softmax_dtype=jnp.dtype("float32"), layout="any",
            sink_logits=jnp.arange(N) / 4,
        )
        expected = reference.forward(q, k, v, **call)
        with axes.sharding(make_mesh((2, 2), ("data", "tensor")), RULES):
            run = jax.jit(functools.partial(_over_shards, xla.forward, **call))
            found = run(q, k, v)
        close_trees(found, expected, name=f"{type(mask).__name__} over shards")


def steps_over_shards() -> None:
    """A step that XLA cannot cut, with and without a carry; inside shard_map it is called as is."""
    B, T, N, K, H = 4, 8, 4, 2, 4
    keys = jax.random.split(jax.random.key(4), 3)
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K)))
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    step = OP.implementations["xla"].step
    kernel = Implementation("mapped", lambda call: None, xla.forward, partitions=False, step=step)

    def ring(q, k, v, place):
        def one(carry, half):
            return attention_step(
                carry, q, k[:, half], v[:, half], positions=(place, place[:, half]), impl="mapped"
            )

        return finish(one(one(None, slice(0, 4)), slice(4, 8)))

    expected = attention(q, k, v, return_lse=True, impl="reference")
    mesh = make_mesh((2, 2), ("data", "tensor"))
    specs = (P("data", None, "tensor"),) * 3 + (P("data"),)
    OP.implementations["mapped"] = kernel
    with axes.sharding(mesh, RULES):
        found = jax.jit(ring)(q, k, v, place)
        inside = jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=specs[:2])
        within = jax.jit(inside)(q, k, v, place)
    del OP.implementations["mapped"]
    assert found[0].sharding.spec[0] == "data", found[0].sharding
    close_trees(found, expected, name="steps over shards")
    close_trees(within, expected, name="steps inside shard_map")


def kernel_steps_over_shards() -> None:
    """A kernel (interpreted) that goes on from a state: the state is cut like the queries."""
    B, T, N, K, H = 2, 128, 4, 2, 16
    keys = jax.random.split(jax.random.key(5), 3)
    shapes = (B, T, N, H), (B, 2 * T, K, H), (B, 2 * T, K, H)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    place = jnp.broadcast_to(jnp.arange(2 * T), (B, 2 * T))
    slopes = jnp.arange(N) / 8
    step = functools.partial(tpu.step, interpret=True)
    OP.implementations["mapped"] = Implementation(
        "mapped", lambda call: None, tpu.forward, partitions=False, step=step
    )

    def gradients(impl):
        def loss(arrays, slopes):
            q, k, v = arrays
            carry = None
            for low in (0, T):
                here = slice(low, low + T)
                carry = attention_step(
                    carry, q, k[:, here], v[:, here], positions=(place[:, T:], place[:, here]),
                    score_mod=lambda s, h, q, k: s + slopes[h] * (k - q), impl=impl,
                )
            o, lse = finish(carry)
            return jnp.sin(o).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    expected = gradients("xla")(arrays, slopes)
    with axes.sharding(make_mesh((2, 2), ("data", "tensor")), RULES):
        close_trees(gradients("mapped")(arrays, slopes), expected, name="steps over shards")
    del OP.implementations["mapped"]


def functions_over_shards() -> None:
    """A kernel (interpreted) whose mask looks up by head and by row, with and without a score."""
    B, T, N, K, H = 4, 128, 4, 2, 16
    keys = jax.random.split(jax.random.key(6), 3)
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K)))
    spans, slopes = jnp.array([3, 9, 27, 81]), jnp.arange(N) / 8
    lengths = jnp.array([1, 20, 5, 60])
    mask = Causal() & MaskMod.of(lambda head, q, k: q - k < spans[head]) | Prefix(lengths)
    scores = (None, lambda s, head, q, k: s + slopes[head] * (k - q))
    OP.implementations["mapped"] = Implementation(
        "mapped", lambda call: None, functools.partial(tpu.forward, interpret=True),
        partitions=False,
    )
    for score in scores:
        call = functools.partial(attention, mask=mask, score_mod=score, return_lse=True)
        expected = call(q, k, v, impl="reference")
        with axes.sharding(make_mesh((2, 2), ("data", "tensor")), RULES):
            found = jax.jit(functools.partial(call, impl="mapped"))(q, k, v)
        close_trees(found, expected, name=f"functions over shards, score {score is not None}")
    del OP.implementations["mapped"]


def decode_over_shards() -> None:
    """Decoding under GSPMD, and a kernel mapped over the shards; contiguous and paged caches."""
    B, t, N, S, H, page = 4, 2, 4, 32, 8, 4
    keys = jax.random.split(jax.random.key(4), 4)
    q = jax.random.normal(keys[0], (B, t, N, H))
    decode_xla.TILE = 8
    for K, paged in ((2, False), (2, True), (1, True)):
        shape = (B * S // page, page, K, H) if paged else (B, S, K, H)
        k, v = (jax.random.normal(key, shape) for key in keys[1:3])
        pages = jax.random.permutation(keys[3], B * S // page).reshape(B, -1) if paged else None
        lengths = jnp.array([32, 0, 5, 17])
        call = dict(window=9, sink_tokens=1, sink_logits=jnp.arange(N) / 4, return_lse=True)

        def run(impl, lengths, pages, q, k, v, call=call):
            return decode(q, k, v, lengths=lengths, pages=pages, impl=impl, **call)

        expected = run("reference", lengths, pages, q, k, v)
        kernel = decode_module.Implementation(
            "mapped", lambda call: None, decode_xla.forward, partitions=False
        )
        decode_module.OP.implementations["mapped"] = kernel
        with axes.sharding(make_mesh((2, 2), ("data", "tensor")), RULES):
            for impl in ("xla", "mapped"):
                found = jax.jit(functools.partial(run, impl))(lengths, pages, q, k, v)
                close_trees(found, expected, name=f"{impl}, K = {K}, paged = {paged}")


if __name__ == "__main__":
    main()
