"""In a process of its own: compile cells for a device that is not here, one JSON line each.

    python -m attnlab.analysis.aot_cell REPORTS     (started by ``attnlab.analysis.aot.run``)

A cell is a JSON object on one line of stdin: ``target``, ``implementation``, ``shape`` (the fields
of ``ops.attention.shapes.Shape``), ``direction`` (forward, or backward: both passes) and ``blocks``
(names to sizes, or null for what the call would use). The answer repeats the cell and adds either
``error`` or what the compiler and the static model say. REPORTS is where the compiler writes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from attnlab.analysis import aot, gpu_report, tpu_model, tpu_program, tpu_schedule
from attnlab.analysis.targets import Target, find
from attnlab.core.errors import AttnlabError
from attnlab.ops.attention import attention, tuning
from attnlab.ops.attention.shapes import Shape


def main(reports: Path) -> None:
    for line in sys.stdin:
        cell = json.loads(line)
        try:
            result = measure(cell, reports)
        except AttnlabError as error:
            result = {"error": str(error)}
        except Exception as error:  # whatever the compiler raises is the answer for this cell
            result = {"error": short(error)}
        print(json.dumps({**cell, **result}), flush=True)
        empty(reports)


def short(error: Exception) -> str:
    """The sentence of a compiler's message that says what is wrong."""
    text = " ".join(str(error).split())
    for telling in (r"Scoped allocation with size [^.]*\.\d+\w* and limit [^.]*\.\d+\w*",
                    r"Used \S+ of \S+ \w+", r"kernel exceeds available shared memory[^.]*"):
        found = re.search(telling, text)
        if found:
            return f"out of on-chip memory: {found[0]}"
    return f"{type(error).__name__}: {text[:240]}"


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def program(shape: Shape, implementation: str, direction: str):
    """``(function, argument shapes)`` of one pass: forward, or forward and backward."""
    import jax
    import jax.numpy as jnp

    def forward(q, k, v):
        return attention(
            q, k, v, mask=shape.mask, logit_cap=shape.logit_cap, impl=implementation
        )

    def both(q, k, v, do):
        o, pull = jax.vjp(forward, q, k, v)
        return o, *pull(do)

    heads = [(shape.N, shape.H), (shape.K, shape.H), (shape.K, shape.V), (shape.N, shape.V)]
    arrays = [
        jax.ShapeDtypeStruct((shape.B, shape.T, n, width), jnp.bfloat16) for n, width in heads
    ]
    return (forward, arrays[:3]) if direction == "forward" else (both, arrays)


def measure(cell: dict[str, Any], reports: Path) -> dict[str, Any]:
    """Compile one cell and read the compiler's reports."""
    target = find(cell["target"])
    fields = {**cell["shape"], "tags": tuple(cell["shape"].get("tags", ()))}
    shape = Shape(**fields)
    f, arrays = program(shape, cell["implementation"], cell["direction"])
    blocks = cell.get("blocks")
    with contextlib.ExitStack() as stack:
        chosen = stack.enter_context(tuning.recording())
        if blocks:
            stack.enter_context(tuning.forcing(blocks))
        compiled = aot.compile_for(target.name, f, *arrays)
    memory = compiled.executable.memory_analysis()
    used = {name: size for choice in chosen for name, size in choice.blocks.items()}
    found = {
        "compile_s": round(compiled.seconds, 2),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "blocks": used,
        "source": sorted({choice.source for choice in chosen}),
        "compiler": compiler(target),
    }
    read = tpu if target.platform == "tpu" else gpu
    return found | read(cell, shape, target, compiled, used, reports)


def compiler(target: Target) -> dict[str, str | None]:
    """The versions that the result depends on."""
    name = "libtpu" if target.platform == "tpu" else "nvidia-cuda-nvcc"
    return {"jax": aot.version("jax"), name: aot.version(name)}


def tpu(cell, shape, target, compiled, used, reports: Path) -> dict[str, Any]:
    """The static model's answer: see ``tpu_model``."""
    launches = tpu_model.launches(compiled.jaxpr.jaxpr)
    if not launches:
        return {"kernels": [], "unpredicted": "no Pallas kernel in it: the model reads only those"}
    space = tuning.space(cell["implementation"])
    schedules = tpu_schedule.read(reports, [launch.name for launch in launches])
    kernels = []
    for schedule, launch in zip(schedules, launches):
        work = tpu_model.work(shape, launch.role, space.tile(launch.role, used))
        kernels.append(tpu_model.predict(schedule, launch, work, target))
    around = tpu_program.traffic(tpu_program.read(reports)) / target.bandwidth
    seconds = around + sum(kernel.seconds for kernel in kernels)
    flops = tpu_model.flops(shape, cell["direction"])
    return {
        "kernels": [kernel.row_dict() for kernel in kernels],
        "vmem_bytes": vmem(compiled),
        "kernel_ms": sum(kernel.seconds for kernel in kernels) * 1e3,
        "around_ms": around * 1e3,
        "ms": seconds * 1e3,
        "tflops": flops / seconds / 1e12,
        "peak_share": flops / seconds / target.peak,
    }


def vmem(compiled: aot.Compiled) -> int | None:
    """Bytes of VMEM of the hungriest kernel; None where this jax cannot read the program back.

    (jax 0.10 reads no program for v7x that a newer libtpu made.)
    """
    import jax

    try:
        text = compiled.executable.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return tpu_program.kernel_vmem(text)


def gpu(cell, shape, target, compiled, used, reports: Path) -> dict[str, Any]:
    """What ptxas says; there is no time model of GPUs."""
    kernels = gpu_report.read(reports)
    reason = "GPU time is measured (attnlab bench attention on it), not predicted"
    return {"kernels": kernels, "unpredicted": reason if kernels else "no Mosaic GPU kernel in it"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
