"""Facts of NVIDIA's Hopper GPUs, and what every Mosaic GPU kernel for them asks for."""

from __future__ import annotations

from collections.abc import Iterator

from attnlab.core.dispatch import Device
from attnlab.core.versions import JAX

NAMES = ("H100", "H200", "H800", "H20", "GH200")
FEWER_CORES = {"H20": 78, "H100 PCIe": 114}


def is_hopper(device: Device) -> bool:
    """Whether ``device`` is one of them."""
    return device.platform == "gpu" and any(name in device.kind for name in NAMES)


def cores(kind: str) -> int:
    """Multiprocessors of a GPU."""
    return next((n for name, n in FEWER_CORES.items() if kind.endswith(name)), 132)


def limits(device: Device) -> Iterator[tuple[bool, str]]:
    """``(refused, reason)`` of the device and of the installed jax."""
    yield not is_hopper(device), f"runs on Hopper GPUs, not on {device.platform} {device.kind!r}"
    yield JAX < (0, 11, 2), f"needs jax >= 0.11.2 (Mosaic GPU), this is {'.'.join(map(str, JAX))}"
