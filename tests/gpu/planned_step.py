"""In a process of its own: compile a scanned training step of packed rows for an absent H200.

    python -m tests.gpu.planned_step none      (environment: attnlab.analysis.aot.environment)

Prints how many kernels of the compiled program make block lists, outside and inside the loops
over the layers.
"""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.analysis import aot
from attnlab.core.registry import build_config
from attnlab.core.types import Precision, Seq
from attnlab.core.versions import abstract_split, merge_module
from attnlab.models.decoder import DecoderConfig


def main(remat) -> dict[str, int]:
    precision = Precision.named("bfloat16")
    layer = build_config(
        "gqa", dim=128, num_heads=2, num_kv_heads=1, head_dim=64, precision=precision
    )
    model = DecoderConfig(
        vocab_size=256, period=(layer,), repeats=4, mlp_dim=128, precision=precision, remat=remat
    )
    graphdef, params = abstract_split(lambda: model.build(nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)

    def step(tokens, positions, segments, *leaves):
        def loss(params):
            return merge_module(graphdef, params).loss(
                tokens, tokens, jnp.ones(tokens.shape), Seq(positions, segments, "packed"),
                impl="gpu",
            )[0]

        return jax.grad(loss)(jax.tree.unflatten(tree, leaves))

    row = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    text = aot.compile_for("h200", step, row, row, row, *leaves).executable.as_text()
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    loops = set(re.findall(r"body=%?([\w.-]+)", text))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    assert entry is not None

    def lists(name: str) -> int:
        return len(re.findall(r'fusion\(.*op_name="[^"]*block_lists', parts[name]))

    return {"outside": lists(entry[1]), "inside": sum(map(lists, loops)), "loops": len(loops)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
