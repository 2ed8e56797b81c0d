"""Rows on four devices, equal to one: under GSPMD, in a kernel mapped over shards, in shard_map."""

from __future__ import annotations

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
from attnlab.core.mask import Causal, MaskMod, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import make_mesh
from attnlab.ops.attention import OP, attention, xla
from attnlab.ops.attention.packed_rows import pack_rows
from attnlab.ops.attention.rows import attention_rows
from attnlab.parallel.rules import RULES
from attnlab.testing.budget import close_trees

B, T, N, K, H = 2, 24, 4, 2, 8


@pytest.mark.devices8
def test_four_devices(root):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_rows_sharded"], cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def main() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes = {
        "q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "sinks": (N,), "slope": (N,),
        "gate": (B, N, T), "column": (B, T),
    }
    a = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    selected = jax.random.bernoulli(next(keys), 0.6, (B, N, T))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    kernel = Implementation("mapped", lambda call: None, xla.forward, partitions=False)
    OP.implementations["mapped"] = kernel

    def mod(a):
        return lambda s, h, q, k, *, batch, q_index, k_index: (
            s * jnp.tanh(a["gate"][batch, h, q_index]) + a["column"][batch, k_index]
            + 0.1 * a["slope"][h] * (k - q)
        )

    def stripes(h, q, k):
        return (k + h) % 3 == 0

    def attend(a, selected, positions, at=None, impl="xla"):
        """``at``: numbers of the rows and heads at hand; arrays that functions read are whole."""
        score, mask = Mod.of(mod(a), score_dtype="float32"), Mod.of(stripes)
        score, mask = (x if at is None else x.at(**at) for x in (score, mask))
        rows = pack_rows(selected, a["k"].shape[2])
        o, lse = attention_rows(
            rows.take(a["q"]), a["k"], a["v"], num_heads=a["q"].shape[2], score_mod=score,
            mask=Causal() & (Window(9) | MaskMod(mask)), sink_logits=a["sinks"], return_lse=True,
            impl=impl, **rows.keywords(positions),
        )
        return rows.put(o), rows.put(lse)

    def gradients(f):
        def loss(a):
            o, lse = f(a, selected, positions)
            return jnp.sin(o).sum() + jnp.cos(lse).sum(), (o, lse)

        return jax.jit(jax.grad(loss, has_aux=True))

    xla.tile_sizes = lambda *_: (64, 64)
    expected = gradients(attend)(a)
    xla.tile_sizes = lambda *_: (8, 8)

    mesh = make_mesh((2, 2), ("data", "tensor"))
    heads = P("data", None, "tensor")
    specs = {name: heads if name in "qkv" else P() for name in a} | {"sinks": P("tensor")}
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in a.items()}
    close_trees(gradients(attend)(placed), expected, name="GSPMD")

    def mapped(a, selected, positions):
        return attend(a, selected, positions, impl="mapped")

    with axes.sharding(mesh, RULES):
        close_trees(gradients(mapped)(placed), expected, name="a kernel over the shards")

    def shard(a, selected, positions):
        at = dict(
            batch=jax.lax.axis_index("data") * B // 2 + jnp.arange(B // 2),
            heads=jax.lax.axis_index("tensor") * N // 2 + jnp.arange(N // 2),
        )
        return attend(a, selected, positions, at)

    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=(specs, P("data", "tensor"), P("data")), out_specs=heads
    )
    close_trees(gradients(sharded)(a), expected, name="shard_map")
    captured_arrays_are_cut(a, mesh)


def captured_arrays_are_cut(a, mesh) -> None:
    """A function inside shard_map may close over its shard of an array, in attention too."""

    def attend(q, k, v, slope, column):
        return attention(
            q, k, v, impl="xla", mask=lambda h, q, k, *, batch: column[batch, k] + slope[h] > -1,
            score_mod=lambda s, h, q, k, *, batch: s * slope[h] + column[batch, k],
        )

    heads = P("data", None, "tensor")
    given = [a[name] for name in ("q", "k", "v", "slope", "column")]
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(heads, heads, heads, P("tensor"), P("data")), out_specs=heads
    )
    close_trees(jax.jit(sharded)(*given), jax.jit(attend)(*given), name="captured arrays are cut")


if __name__ == "__main__":
    main()
