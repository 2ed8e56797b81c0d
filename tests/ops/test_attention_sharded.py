"""The fallback on four devices: under GSPMD and inside shard_map, equal to one device."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.core.mask import Causal, Window
from attnlab.core.versions import make_mesh
from attnlab.ops.attention import attention, xla
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


if __name__ == "__main__":
    main()
