"""In a process of its own: compile the Triton kernels of a call for GPUs that are not here.

    python -m tests.ops.triton_compiled CAPABILITY...

Prints a JSON list with a row a kernel: call, capability, kernel, bytes of shared memory, registers,
bytes of stack (spilled registers), tensor core instructions of Hopper (wgmma) and before (mma).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import triton as compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.mask import Causal, Coords, Segments, SinkTokens, Window
from attnlab.ops.attention import triton

DEVICES = {80: "NVIDIA A100-SXM4-80GB", 89: "NVIDIA L40S", 90: "NVIDIA H100 80GB HBM3"}
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
TOOLS = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin"
# dtype, H, V, N, K, mask, cap, layout, tokens
CALLS = {
    "64": ("bfloat16", 64, 64, 4, 4, Causal(), None, "full", 2048),
    "128": ("bfloat16", 128, 128, 4, 1, Causal(), None, "full", 2048),
    "192/128": ("bfloat16", 192, 128, 2, 2, Causal(), None, "full", 2048),
    "128 packed window cap odd": (
        "float16", 128, 128, 4, 2, (Causal() & Window(100) | SinkTokens(2)) & Segments(), 30.0,
        "packed", 1999,
    ),
    "256 any window odd": (
        "bfloat16", 256, 256, 2, 1, Causal() & Window(100, 0) & Segments(), None, "any", 999,
    ),
}


def launches(call, device: str) -> list[triton.Launch]:
    """The kernels of forward and backward, with the constants of ``device``."""
    dtype, H, V, N, K, mask, cap, layout, T = call
    found = []

    def record(launch):
        found.append(launch)
        return [jnp.zeros(x.shape, x.dtype) for x in launch.outs]

    def loss(q, k, v, positions):
        ids = None if layout == "full" else positions // 300 + 1
        coords = Coords(positions, ids, jnp.arange(T, dtype=jnp.int32))
        o, lse = triton.forward(
            q, k, v, mask=mask.bound(1, N), score=None, q_coords=coords, k_coords=coords,
            scale=H**-0.5, sink_logits=None, logit_cap=cap, return_lse=True, softmax_dtype=None,
            layout=layout, launch=record,
        )
        return o.astype(jnp.float32).sum() + lse.sum()

    args = [jax.ShapeDtypeStruct((1, T, n, w), dtype) for n, w in ((N, H), (K, H), (K, V))]
    positions = jax.ShapeDtypeStruct((1, T), jnp.int32)
    with compiling_for(Device("gpu", device)):
        jax.eval_shape(jax.grad(loss, (0, 1, 2)), *args, positions)
    return found


def compiled(launch: triton.Launch, capability: int) -> dict:
    """What the compiler says of a kernel."""
    names = launch.kernel.arg_names
    arrays = [*launch.arrays, *launch.outs]
    signature = {name: TYPES[x.dtype.name] for name, x in zip(names, arrays)}
    signature |= {name: "constexpr" for name in launch.constants}
    assert set(signature) == set(names), f"{launch.kernel.__name__}: {set(names) ^ set(signature)}"
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    source = ASTSource(launch.kernel, signature, launch.constants, aligned)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    kernel = compiler.compile(source, GPUTarget("cuda", capability, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
            check=True,
        ).stdout
    ptx = kernel.asm["ptx"]
    return dict(
        kernel=launch.kernel.__name__, shared=kernel.metadata.shared,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)), mma=len(re.findall(r"\bmma\.sync", ptx)),
    )


def main(capabilities: list[int]) -> list[dict]:
    return [
        dict(call=name, capability=capability) | compiled(launch, capability)
        for capability in capabilities
        for name, call in CALLS.items()
        for launch in launches(call, DEVICES[capability])
    ]


if __name__ == "__main__":
    print(json.dumps(main([int(x) for x in sys.argv[1:]])))
