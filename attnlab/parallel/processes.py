"""Several processes: start-up under jax.distributed, and what they must agree on."""

from __future__ import annotations

import os

import jax

from attnlab.core.errors import MeshError

_MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Join the other processes, if there are any; must run before anything touches a device.

    Where ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` are set they are
    used; on TPU VMs, Slurm and MPI jax.distributed finds its peers itself.
    """
    if jax.distributed.is_initialized():
        return
    manual = [name for name in _MANUAL if name in os.environ]
    if manual:
        missing = [name for name in _MANUAL if name not in os.environ]
        if missing:
            raise MeshError(
                f"{', '.join(manual)} set", f"{', '.join(missing)} missing",
                "set all three, or none",
            )
        jax.distributed.initialize(
            os.environ[_MANUAL[0]], _whole(_MANUAL[1]), _whole(_MANUAL[2]),
            heartbeat_timeout_seconds=30,
        )
    elif _on_cluster():
        jax.distributed.initialize()


def _whole(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise MeshError(f"{name} = {text!r}", "is not a whole number", f"set {name} to a number")
    return int(text)


def _on_cluster() -> bool:
    several = lambda name: int(os.environ.get(name, "1") or 1) > 1  # noqa: E731
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    on_tpu_vm = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    return (
        several("SLURM_NTASKS") or several("OMPI_COMM_WORLD_SIZE") or "," in hosts
        or (on_tpu_vm and jax.config.jax_platforms in (None, "", "tpu"))
    )


def is_first() -> bool:
    return jax.process_index() == 0


def agree(name: str, value: str) -> None:
    """Raise MeshError unless every process holds the same ``value``."""
    if jax.process_count() == 1:
        return
    import hashlib

    import numpy as np
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    everyone = multihost_utils.process_allgather(digest)
    if (np.asarray(everyone) != digest).any():
        raise MeshError(
            f"{name} differs between processes", "all run one program on one input",
            "start every process with the same command, code and data",
        )


def all_agree(ok: bool) -> bool:
    """Is ``ok`` true on every process?"""
    if jax.process_count() == 1:
        return ok
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.asarray(multihost_utils.process_allgather(np.asarray([ok]))).all())


def barrier(name: str) -> None:
    """Wait for every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def preempted(step: int, signalled: bool) -> bool:
    """Has a SIGTERM arrived anywhere? Every process gets the same answer at the same step."""
    if jax.process_count() == 1:
        return signalled
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))
