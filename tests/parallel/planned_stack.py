"""In a process with 8 virtual devices: a stack that plans ahead on a mesh.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python planned_stack.py

Each device makes the lists of its rows: same numbers as where every layer makes its own, and not
one collective more. Raises on the first thing that is not so.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.core import versions
from attnlab.core.axes import sharding
from attnlab.core.dispatch import Implementation
from attnlab.core.mask import Causal, Mask, MaskMod
from attnlab.core.registry import build_config
from attnlab.core.types import Seq
from attnlab.layers.gqa import GQAConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.ops.attention import OP, tpu, tuning
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.testing.budget import close_trees, identical
from attnlab.testing.fixtures import pack

DIM, T = 32, 256
ROWS = ((100, 1, 60, 70, -25), (200, 56), (3, 253), (256,))
SPANS = jnp.array([40, 90, 250, 3])
LOOK = Causal() & MaskMod.of(
    lambda head, q_pos, k_pos, *, batch: q_pos - k_pos < SPANS[head] + 20 * batch
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookConfig(GQAConfig):
    """Lists that differ from row to row and from head to head: both are cut."""

    @property
    def mask(self) -> Mask:
        return LOOK


def gradient(period, impl: str, **fields):
    c = DecoderConfig(vocab_size=64, period=period, repeats=2, mlp_dim=32, **fields)
    graphdef, params = versions.split_module(c.build(nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 64, (len(ROWS), T)).astype(np.int32)

    def loss(params, positions, segments):
        seq = Seq(positions, segments, "packed")
        module = versions.merge_module(graphdef, params)
        return module.loss(tokens, tokens, jnp.ones(tokens.shape), seq, impl=impl)[0]

    return jax.jit(jax.value_and_grad(loss)), params


def collectives(text: str) -> list[str]:
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))


def main() -> None:
    assert jax.device_count() == 8
    declared, served = set(), set()

    def tiles(call):
        declared.add((call.B, call.N, call.K))
        return tpu.IMPLEMENTATION.tiles(call)

    def forward(q, k, v, **call):
        served.add((q.shape[0], q.shape[2], k.shape[2]))
        return tpu.forward(q, k, v, interpret=True, **call)

    for name, asked in (("planned", tiles), ("alone", None)):
        OP.implementations[name] = Implementation(
            name, lambda call: None, forward, partitions=False, tiles=asked
        )
    seq = pack(ROWS, "packed")
    gqa = build_config("gqa", dim=DIM, num_heads=4, num_kv_heads=2)
    mqa = build_config("gqa", dim=DIM, num_heads=4, num_kv_heads=1, window=50)
    mla = build_config(
        "mla", dim=DIM, num_heads=4, kv_rank=8, nope_dim=16, rope_dim=8, value_dim=16
    )
    look = LookConfig(dim=DIM, num_heads=4, num_kv_heads=2)
    for mesh_text, period, fields in (
        ("data=2,fsdp=2,tensor=2", (gqa, mqa), {}),
        ("data=2,fsdp=2,tensor=2", (look, mla), {"remat": "full"}),
        ("data=2,tensor=4", (gqa,), {}),  # two key/value heads: heads stay whole
    ):
        mesh = make_mesh(mesh_text)
        whole = NamedSharding(mesh, PartitionSpec())
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        places = jax.device_put((seq.positions, seq.segments), rows)
        found, counts = [], []
        with tuning.forcing({"block_q": 64, "block_k": 128}):
            run, params = gradient(period, "alone", **fields)
            expected = run(params, seq.positions, seq.segments)
            served.clear()
            for impl in ("planned", "alone"):
                run, _ = gradient(period, impl, **fields)
                with sharding(mesh, RULES):
                    program = run.lower(jax.device_put(params, whole), *places).compile()
                counts.append(collectives(program.as_text()))
                found.append(program(jax.device_put(params, whole), *places))
        assert declared == served, (declared, served)
        declared.clear()
        identical(found[0], found[1], name=mesh_text)
        close_trees(found[0], expected, name=mesh_text)
        assert counts[0] == counts[1] and counts[0], (mesh_text, counts)
        print(f"{mesh_text}: {len(counts[0])} collectives", flush=True)


if __name__ == "__main__":
    main()
