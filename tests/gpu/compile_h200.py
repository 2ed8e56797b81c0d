"""In a process of its own: compile a small Mosaic GPU kernel for an H200 that is not there.

    python -m tests.gpu.compile_h200 REPORTS      (environment: attnlab.analysis.aot.environment)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.analysis import aot, gpu_report


def product(a, b, out, a_tile, b_tile, out_tile, arrived):
    """One tile: bring a and b in, multiply on the tensor cores, send the product out."""
    plgpu.copy_gmem_to_smem(a, a_tile, arrived)
    plgpu.copy_gmem_to_smem(b, b_tile, arrived)
    plgpu.barrier_wait(arrived)

    def multiply(sums):
        plgpu.wgmma(sums, a_tile, b_tile)
        return sums[...]

    sums = pl.run_scoped(multiply, plgpu.ACC((64, 128), jnp.float32))
    out_tile[...] = sums.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out)
    plgpu.wait_smem_to_gmem(0)


def main(reports: Path) -> list[dict]:
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    left, right = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 64), (64, 128)))
    tiles = [
        plgpu.SMEM(x.shape, x.dtype, transforms=layout) for x in (left, right, right)
    ]
    kernel = plgpu.kernel(
        product, out_type=right, scratch_types=[*tiles, plgpu.Barrier(num_arrivals=2)]
    )
    aot.compile_for("h200", lambda a, b: kernel(a, b), left, right)
    return gpu_report.read(reports)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
