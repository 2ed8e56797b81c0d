"""In a process with 8 virtual devices: the dtypes of the sums over devices in a bf16 step.

    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_dump_to=FOLDER
        --xla_dump_hlo_pass_re=spmd.* --xla_dump_hlo_as_text"
        python bf16_sums.py gqa data=2,fsdp=2,tensor=2 FOLDER

Read from the program right after it was cut over the mesh: later the CPU widens what it cannot sum.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

from attnlab.core.registry import build_config
from attnlab.core.types import Precision
from attnlab.models.decoder import DecoderConfig
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train.optimizer import OptimizerConfig
from attnlab.train.state import Trainer

FIELDS = {
    "gqa": dict(num_heads=4, num_kv_heads=2, bias=True, qk_norm=True, sink_logits=True),
    "sqa": dict(num_heads=2, num_kv_heads=4, head_dim=4, gate=True, out_bias=True),
    "mla": dict(num_heads=4, kv_rank=8, q_rank=8, nope_dim=6, rope_dim=4, value_dim=8),
    "cca": dict(num_heads=4, num_kv_heads=2, head_dim=4),
}


def main(name: str, mesh: str, folder: str) -> dict[str, list[str]]:
    precision = Precision.named("bfloat16")
    layer = build_config(name, dim=16, precision=precision, **FIELDS[name])
    model = DecoderConfig(
        vocab_size=64, period=(layer,), repeats=2, mlp_dim=32, precision=precision, scan=False
    )
    t = Trainer(model, OptimizerConfig(), 10, make_mesh(mesh), RULES)
    t.step.lower(t.abstract_state(), t.abstract_batch(8, 8)).compile()
    dumps = [p for p in pathlib.Path(folder).iterdir() if "after_spmd-partitioning" in p.name]
    text = max(dumps, key=lambda p: p.stat().st_size).read_text()
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        sum_ = re.search(r"= \(?(\w+)\[\S* (?:all-reduce|reduce-scatter)\(", line)
        if sum_:
            where = re.search(r'op_name="([^"]*)"', line)
            found.setdefault(sum_[1], []).append(where[1][-100:] if where else "")
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
