"""In a process of its own: compile the attention kernels for a TPU that is not there.

    python -m tests.tpu.attention_cells v5e:2x2
"""

from __future__ import annotations

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no cloud metadata server to ask
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # tests run side by side

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab import attention
from attnlab.core import dispatch
from attnlab.core.mask import Blocks, Causal, Full, Window
from attnlab.ops.attention.carry import Carry, attention_step, finish


def slope(table):
    return lambda s, head, q_pos, k_pos: 30 * jnp.tanh(s / 30) + table[head] * (k_pos - q_pos)


def relative(table):
    return lambda s, head, q_pos, k_pos: s + table[head, jnp.clip(q_pos - k_pos, 0, 63)]


def each_key(table):
    return lambda s, head, q_pos, k_pos: s * table[head, q_pos] + table[head, k_pos]


# name: (shape B T S N K H V, mask, score and the shape of its table, options)
CELLS = {
    "causal 128": ((1, 1024, 1024, 2, 2, 128, 128), Causal(), None, {}),
    "causal 64, packed, grouped": ((2, 1024, 1024, 4, 2, 64, 64), Causal(), None, {"packed": True}),
    "window 256, sinks": ((1, 1024, 1024, 2, 1, 256, 256), Causal() & Window(300), None,
                          {"sink": True}),
    "192 and 128, odd length": ((1, 777, 777, 2, 2, 192, 128), Causal(), None, {}),
    "576 and 512, one key head": ((1, 1024, 1024, 4, 1, 576, 512), Causal(), None, {}),
    "float32": ((1, 512, 512, 2, 2, 128, 128), Full(), None, {"dtype": "float32"}),
    "cap and slope": ((1, 1024, 1024, 4, 2, 128, 128), Causal(), (slope, (4,)), {}),
    "relative": ((1, 1024, 1024, 2, 2, 128, 128), Causal(), (relative, (2, 64)), {}),
    "rows and columns": ((1, 1024, 1024, 2, 2, 64, 64), Causal(), (each_key, (2, 1024)), {}),
    "block lists": ((1, 1024, 1024, 4, 2, 128, 128), "blocks", None, {}),
    "from a state": ((1, 1024, 1024, 4, 2, 128, 128), Causal(), (slope, (4,)), {"step": True}),
    "from a state, few queries": (
        (1, 40, 1024, 8, 2, 128, 128), Causal(), None, {"step": True}
    ),
    "one query": ((4, 1, 2048, 32, 4, 128, 128), Causal(), (slope, (32,)), {"forward": True}),
    "eight absorbed queries": ((1, 8, 2048, 128, 1, 576, 512), Causal(), None, {"forward": True}),
}


def compiled(cell, target: dispatch.Device, sharding) -> float:
    """MiB of temporary memory of one cell, forward and all gradients."""
    (B, T, S, N, K, H, V), mask, score, options = cell
    dtype = options.get("dtype", "bfloat16")

    def step(q, k, v, table, sink, positions, o, m, l):
        carry = attention_step(
            Carry(o, m, l), q, k, v, positions=(positions[:, :T], positions), impl="tpu",
            score_mod=score[0](table) if score else None, mask=mask,
        )
        o, lse = finish(carry, sink)
        return o.sum() + lse.sum()

    def f(q, k, v, table, sink, positions, segments, lists):
        seen = Causal() & Blocks(lists, 128, 256) if mask == "blocks" else mask
        more = {}
        if "packed" in options:
            more = dict(positions=positions, segments=segments, layout="packed")
        elif T != S:
            more = dict(positions=(positions[:, :T], positions))
        return attention(
            q, k, v, mask=seen, score_mod=score[0](table) if score else None, impl="tpu",
            sink_logits=sink if "sink" in options else None, **more,
        ).astype(jnp.float32).sum()

    shapes = [
        ((B, T, N, H), dtype), ((B, S, K, H), dtype), ((B, S, K, V), dtype),
        (score[1] if score else (1,), "float32"), ((N,), "float32"), ((B, S), "int32"),
        ((B, S), "int32"), ((1, N, T // 128 or 1, 2), "int32"),
    ]
    program = f if "forward" in options else jax.grad(f, (0, 1, 2, 3, 4))
    if "step" in options:
        shapes[6:] = [((B, T, N, V), "float32"), *[((B, T, N), "float32")] * 2]
        program = jax.grad(step, (0, 1, 2, 3, 4, 6, 7, 8))
    arrays = [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in shapes]
    with dispatch.compiling_for(target):
        executable = jax.jit(program).lower(*arrays).compile()
    return executable.memory_analysis().temp_size_in_bytes / 2**20


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    target = dispatch.Device("tpu", devices[0].device_kind)
    mesh = Mesh(np.array(devices[:1]), ("x",))
    with jax.set_mesh(mesh):
        for name, cell in CELLS.items():
            temp = compiled(cell, target, NamedSharding(mesh, PartitionSpec()))
            print(f"{name}\t{temp:.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
