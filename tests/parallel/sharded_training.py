"""In a process with 8 virtual devices: loss curves on meshes, and a state moved between them.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python sharded_training.py gqa
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from attnlab.core import registry
from attnlab.core.axes import sharding
from attnlab.core.types import Seq
from attnlab.models.decoder import DecoderConfig
from attnlab.parallel.feed import place
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train.checkpoint import Checkpoints, checksums, flatten
from attnlab.train.optimizer import OptimizerConfig
from attnlab.train.state import Trainer

FIELDS: dict[str, dict[str, Any]] = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "mqa": {"num_heads": 4, "num_kv_heads": 1},
    "sqa": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4},
    "mla": dict(num_heads=4, kv_rank=8, q_rank=8, nope_dim=6, rope_dim=4, value_dim=8),
    "cca": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
    "short conv": {"num_heads": 4, "num_kv_heads": 2},
}
STEPS, ROWS, LENGTH, VOCAB = 6, 8, 16, 100


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 10, (ROWS, LENGTH + 1)).astype(np.int32)  # 10 of the ids: learnable
    cut = rng.integers(2, LENGTH - 3, ROWS)[:, None]
    place_ = np.arange(LENGTH, dtype=np.int32)[None]
    segments = np.where(place_ < cut, 1, 2) * (place_ < LENGTH - 1)
    positions = np.where(place_ < cut, place_, place_ - cut) * (segments > 0)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:],
        "positions": positions.astype(np.int32), "segments": segments.astype(np.int32),
        "loss_mask": (segments > 0).astype(np.float32),
    }


def trainer(name: str, mesh: str, devices: int, accumulate=1, optimizer="adamw") -> Trainer:
    variant = "gqa" if name in ("mqa", "short conv") else name
    layer = registry.build_config(variant, dim=16, **FIELDS[name])
    model = DecoderConfig(
        vocab_size=VOCAB, period=(layer,), repeats=2, mlp_dim=32, tied=False,
        short_conv=3 if name == "short conv" else 0,
    )
    config = OptimizerConfig(name=optimizer, lr=1e-2, matrix_lr=1e-2, warmup=2)
    where = make_mesh(mesh, jax.devices()[:devices])
    return Trainer(model, config, STEPS, where, RULES, accumulate=accumulate)


def run(t: Trainer, state, first: int, last: int) -> tuple[Any, list]:
    curve = []
    for step in range(first, last):
        state, m = t.step(state, place(batch(step), t.batch_sharding))
        curve.append([float(m["loss"]), float(m["grad_norm"])])
    return state, curve


def save(t: Trainer, state, folder) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, {"step": int(state.step)}, {}, t.replicated)
    checkpoints.close()


def main(name: str) -> dict:
    found: dict[str, Any] = {"devices": jax.device_count()}
    single = trainer(name, "data=1", 1)
    found["single"] = run(single, single.init(0), 0, STEPS)[1]
    others = ("data=8", "fsdp=8", "data=4,tensor=2", "fsdp=4,tensor=2")
    for mesh in ("data=2,fsdp=2,tensor=2", *others):
        if name != "gqa" and "=2,fsdp=2" not in mesh:
            continue  # every variant on the full product, one variant on each strategy too
        t = trainer(name, mesh, 8)
        state, found[mesh] = run(t, t.init(0), 0, STEPS)
        cut = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
            if leaf.addressable_shards[0].data.size < leaf.size
        ]
        found[f"cut {mesh}"] = len(cut) / len(jax.tree.leaves(state.params))
        found[f"opt {mesh}"] = [  # bytes of optimizer state: on one device, and all
            sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.opt_state)),
            sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        ]
    eight = trainer(name, "data=2,fsdp=2,tensor=2", 8)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        half, _ = run(eight, eight.init(0), 0, 3)
        save(eight, half, path)
        sums = checksums(flatten(half), eight.replicated)
        rest, found["rest on the same mesh"] = run(eight, half, 3, STEPS)
        for mesh, devices in (
            ("data=2,fsdp=2,tensor=2", 8), ("fsdp=4,tensor=2", 8), ("data=4,fsdp=2", 8),
            ("data=1", 1),
        ):
            if name != "gqa" and (devices == 1 or mesh.startswith("data=4")):
                continue
            t = trainer(name, mesh, devices)
            state, data, _ = Checkpoints(path, read_only=True).restore(t)
            assert data == {"step": 3} and int(state.step) == 3
            assert checksums(flatten(state), t.replicated) == sums, mesh
            for leaf, want in zip(
                jax.tree.leaves(state), jax.tree.leaves(t.state_shardings), strict=True
            ):
                assert leaf.sharding == want, mesh
            state, found[f"rest on {mesh}, {devices}"] = run(t, state, 3, STEPS)
            if mesh == "data=2,fsdp=2,tensor=2":
                found["bitwise"] = checksums(flatten(state), t.replicated) == checksums(
                    flatten(rest), t.replicated
                )
    if name == "gqa":
        found |= more() | {"in loop": largest_in_loop(), "kept": kept()}
    return found


def largest_in_loop() -> int:
    """Elements of the largest result that a collective inside a loop has; 3 chunks of the loss."""
    t = trainer("gqa", "data=2,fsdp=2,tensor=2", 8)
    model = dataclasses.replace(t.model, loss_chunk=6, scan=False)
    t = Trainer(model, t.config, STEPS, t.mesh, RULES)
    like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=t.batch_sharding)
            for k, v in batch(0).items()}
    text = t.step.lower(t.abstract_state(), like).compile().as_text()
    loops = [part for part in text.split("\n\n") if not part.lstrip().startswith("ENTRY")]
    found = [0]
    for line in "\n".join(loops).splitlines():
        collective = re.match(r"(.*) (?:all-reduce|all-gather|all-to-all)\(", line)
        for dims in re.findall(r"f32\[([\d,]+)\]", collective[1]) if collective else ():
            found.append(math.prod(map(int, dims.split(","))))
    return max(found)


def kept() -> dict[str, int]:
    """Bytes the backward pass holds under every remat policy: the leaves that jax.vjp returns."""
    t = trainer("gqa", "data=2,fsdp=2,tensor=2", 8)
    one = batch(0)
    seq = Seq(one["positions"], one["segments"], "packed")

    def held(remat: str) -> int:
        model = dataclasses.replace(t.model, remat=remat)
        other = Trainer(model, t.config, STEPS, t.mesh, RULES)

        def loss(params):
            return other.module(params).loss(
                one["tokens"], one["targets"], one["loss_mask"], seq
            )[0]

        with sharding(t.mesh, RULES):
            like = other.abstract_state().params
            leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], like))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    return {remat: held(remat) for remat in ("none", "dots", "attention", "full")}


def more() -> dict:
    """Muon, and Muon with accumulation, on a mesh."""
    one, eight = (
        trainer("gqa", mesh, n, optimizer="muon")
        for mesh, n in (("data=1", 1), ("data=2,fsdp=2,tensor=2", 8))
    )
    split = trainer("gqa", "data=2,fsdp=2,tensor=2", 8, accumulate=2, optimizer="muon")
    want = run(one, one.init(0), 0, 4)[1]
    return {
        label: [run(t, t.init(0), 0, 4)[1], want]
        for label, t in (("muon", eight), ("accumulate", split))
    }


if __name__ == "__main__":
    result = main(sys.argv[1])
    print(json.dumps(result))
