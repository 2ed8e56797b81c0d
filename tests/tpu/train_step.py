"""In a process of its own: compile the sharded training step for a TPU that is not there.

    python -m tests.tpu.train_step v5e:2x2 fsdp=2,tensor=2 gqa
"""

from __future__ import annotations

import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no cloud metadata server to ask
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # tests run side by side

from jax.experimental import topologies

from attnlab.core import dispatch
from attnlab.core.registry import build_config
from attnlab.core.types import Precision
from attnlab.models.decoder import DecoderConfig
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train.optimizer import OptimizerConfig
from attnlab.train.state import Trainer

FIELDS = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128},
    "mqa": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128},
    "mla": dict(num_heads=4, kv_rank=128, nope_dim=64, rope_dim=64, value_dim=64),
    "cca": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
}


def main(topology: str, mesh_text: str, name: str) -> dict:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    precision = Precision.named("bfloat16")
    layer = build_config(
        "gqa" if name == "mqa" else name, dim=512, precision=precision, **FIELDS[name]
    )
    model = DecoderConfig(
        vocab_size=1024, period=(layer,), repeats=2, mlp_dim=1024, precision=precision
    )
    mesh = make_mesh(mesh_text, devices)
    target = dispatch.Device("tpu", devices[0].device_kind)
    trainer = Trainer(model, OptimizerConfig(), 10, mesh, RULES, layout="packed")
    with dispatch.compiling_for(target), dispatch.recording() as rows:
        lowered = trainer.step.lower(trainer.abstract_state(), trainer.abstract_batch(8, 512))
    text = lowered.compile().as_text()
    return {
        "attention": sorted({impl for op, _, impl in rows if op == "attention"}),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "sums": sums(text),
    }


def sums(text: str) -> dict[str, list[str]]:
    """Dtype to the names of the operations that add it up over devices in a compiled program."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        made = re.match(r".*? = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", line)
        if made:
            name = re.search(r'op_name="([^"]*)"', line)
            for dtype in set(re.findall(r"\b([a-z]+\d+)\[", made[1])):
                found.setdefault(dtype, []).append(name[1] if name else "")
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
