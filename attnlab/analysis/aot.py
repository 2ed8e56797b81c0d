"""Compile for an accelerator that is not here, with its real compiler.

``compile_for`` works inside a process whose environment was made by ``environment`` before jax
started; ``run`` starts such processes and hands them cells (see ``aot_cell``). TPUs need libtpu,
the H200 needs the CUDA compile wheels; both are in the extra ``aot``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attnlab.analysis.targets import Target, find
from attnlab.core.dispatch import compiling_for
from attnlab.core.errors import ConfigError

INSTALL = 'pip install "attnlab[aot]"'
LIMIT_S = 300.0  # seconds that one cell may take
# A newer libtpu reads the kernels of an older jax, not the other way round.
OLDEST_LIBTPU = {(0, 10): (0, 0, 42), (0, 11): (0, 0, 48), (0, 12): (0, 0, 50)}
CUDA_WHEELS = (
    "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm",
    "nvidia-nvjitlink", "nvidia-cuda-runtime",
)
DUMPED = ".*(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization).*"

# What the compiler must know of the device: NVIDIA's data sheet of the H200 SXM.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 10 }
"""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: jax's executable, the jaxpr it came from, seconds of compile time."""

    executable: Any
    jaxpr: Any
    seconds: float


def environment(target: Target, dump: Path | str | None = None) -> dict[str, str]:
    """The variables that must stand before jax loads, so that it compiles for ``target``.

    ``dump``: a folder that takes the compiler's reports (schedules on TPU, PTX and ptxas on GPU).
    """
    variables = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}
    if target.platform == "tpu":
        flags = "" if dump is None else (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex={DUMPED}"
        )
        # No metadata server to ask; compilers side by side; what to report.
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": flags,
        }
    elif dump is not None:
        variables["MOSAIC_GPU_DUMP_TO"] = str(dump)
    return variables


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def require(target: Target) -> None:
    """ConfigError unless the compiler of ``target`` is installed and fits the installed jax."""
    jax = version("jax") or ""
    if target.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
            raise ConfigError(f"target {target.name}", "needs libtpu, the TPU compiler", INSTALL)
        found = version("libtpu")
        pairs = [v for k, v in sorted(OLDEST_LIBTPU.items()) if k <= _numbers(jax)[:2]]
        if found is not None and pairs and _numbers(found) < pairs[-1]:
            oldest = ".".join(map(str, pairs[-1]))
            raise ConfigError(
                f"libtpu {found} with jax {jax}", f"this jax needs libtpu >= {oldest}", INSTALL
            )
        return
    if _numbers(jax) < (0, 11, 2):
        raise ConfigError(
            f"target {target.name} with jax {jax}", "Mosaic GPU kernels need jax >= 0.11.2",
            "use Python >= 3.12 and a newer jax",
        )
    missing = [name for name in CUDA_WHEELS if version(name) is None]
    if missing:
        raise ConfigError(f"target {target.name}", f"needs {', '.join(missing)}", INSTALL)
    for name in CUDA_WHEELS[:2]:
        if version(name) != jax:
            raise ConfigError(
                f"{name} {version(name)} with jax {jax}", "must be the same version",
                f'pip install "{name}=={jax}"',
            )


@functools.cache
def devices(target: Target) -> tuple:
    """The compile-only devices of a target; cached, since those of two calls are unequal."""
    from jax.experimental import topologies

    require(target)
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise ConfigError(
            f"JAX_PLATFORMS = {os.environ.get('JAX_PLATFORMS')!r}",
            "must be cpu in a process that compiles for absent devices",
            "set aot.environment(target) before jax starts",
        )
    if target.platform == "tpu":
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology, **dict(target.options)
        )
    else:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H200, topology=target.topology
        )
    return tuple(found.devices)


def compile_for(name: str, f: Callable, *shapes: Any) -> Compiled:
    """Compile ``f`` for one device of target ``name``.

    Args:
        shapes: one ``jax.ShapeDtypeStruct`` an argument. Ops of attnlab traced inside are told
            that they are for this device.

    Raises:
        ConfigError: the target is unknown or its compiler is missing. What the compiler refuses is
            raised as it says it.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    target = find(name)
    first = devices(target)[:1]
    mesh = Mesh(np.array(first), ("one",))
    placed = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed) for s in shapes]
    if target.platform == "tpu":  # lowerings that ask for the TPU's generation ask the mesh
        context = jax.set_mesh(mesh)
    else:
        context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    started = time.perf_counter()
    with compiling_for(target.device), context:
        traced = jax.jit(f).trace(*args)
        executable = traced.lower().compile()
    return Compiled(executable, traced.jaxpr, time.perf_counter() - started)


def run(cells: Sequence[dict[str, Any]], limit_s: float = LIMIT_S) -> Iterator[dict[str, Any]]:
    """The results of ``cells``, one after the other, from child processes (one a target).

    A cell that the compiler refuses has an ``error``; one that kills or hangs the compiler too, and
    the cells after it get a new process.

    Raises:
        ConfigError: an unknown target, or a compiler that is not installed.
    """
    for target in {cell["target"]: find(cell["target"]) for cell in cells}.values():
        require(target)
    waiting = list(cells)
    while waiting:
        target = find(waiting[0]["target"])
        mine = [cell for cell in waiting if cell["target"] == target.name]
        waiting = [cell for cell in waiting if cell["target"] != target.name]
        while mine:
            done = 0
            for result in _child(target, mine, limit_s):
                done += 1
                yield result
            mine = mine[done:]


def _child(target: Target, cells: Sequence[dict], limit_s: float) -> Iterator[dict[str, Any]]:
    """Results of one process, up to and with the first cell that it did not survive."""
    with tempfile.TemporaryDirectory(prefix="attnlab-aot-") as dump:
        log = Path(dump) / "stderr.log"
        reports = Path(dump) / "reports"
        reports.mkdir()
        command = [sys.executable, "-m", "attnlab.analysis.aot_cell", str(reports)]
        with log.open("w") as errors:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | environment(target, reports),
            )
            assert child.stdin is not None and child.stdout is not None
            done, late = 0, False

            def stop():
                nonlocal late
                late = True
                child.kill()

            try:
                for cell in cells:
                    timer = threading.Timer(limit_s, stop)
                    timer.start()
                    try:
                        child.stdin.write(json.dumps(cell) + "\n")
                        child.stdin.flush()
                        line = next((text for text in child.stdout if text.startswith("{")), None)
                    except BrokenPipeError:
                        line = None
                    finally:
                        timer.cancel()
                    if line is None:
                        break
                    done += 1
                    yield json.loads(line)
            finally:
                child.stdin.close()
                child.kill() if late else None
                child.wait(timeout=60)
        if done < len(cells):
            words = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
            what = f"took more than {limit_s:.0f} s" if late else f"died: {words[0][:200]}"
            yield {**cells[done], "error": f"the compiler {what}"}
