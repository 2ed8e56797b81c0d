"""The accelerators that kernels are compiled for without one: names, clocks, bandwidths, peaks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from attnlab.core.errors import ConfigError

if TYPE_CHECKING:
    from attnlab.core.dispatch import Device


@dataclasses.dataclass(frozen=True)
class Target:
    """One device as jax sees it (a TPU v7x chip is two devices).

    Args:
        name: what ``--target`` says. platform, kind: as in ``core.dispatch.Device``. topology,
            options: what the compiler's plugin is asked for. clock: Hz; one VLIW bundle a cycle.
        bandwidth: bytes/s of device memory. peak: dense bf16 FLOP/s. efficiency: share of the
            static model's speed that published timings reach. cores: that may share one kernel.
    """

    name: str
    platform: str
    kind: str
    topology: str
    peak: float
    bandwidth: float
    clock: float = 0.0
    efficiency: float = 1.0
    cores: int = 1
    options: tuple[tuple[str, str], ...] = ()

    @property
    def device(self) -> Device:
        from attnlab.core.dispatch import Device  # brings jax, which `--help` does without

        return Device(self.platform, self.kind)


# Clocks are those at which the datasheet's peak follows from the matrix units. A v4 chip runs as
# one device of two cores, like v5p. v7x was 15 to 20 % slower in published timings than its
# schedule says, hence its efficiency; the other chips needed no constant.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("v4", "tpu", "TPU v4", "v4:2x2x1", 275e12, 1228e9, 1.05e9,
               cores=2, options=(("chip_config_name", "megacore"),)),
        Target("v5e", "tpu", "TPU v5 lite", "v5e:2x2", 197e12, 819e9, 1.5e9),
        Target("v5p", "tpu", "TPU v5", "v5p:2x2x1", 459e12, 2765e9, 1.75e9, cores=2),
        Target("v6e", "tpu", "TPU v6 lite", "v6e:2x2", 918e12, 1640e9, 1.755e9),
        Target("v7x", "tpu", "TPU7x", "tpu7x:2x2x1", 1153.5e12, 3690e9, 2.2e9, 0.85),
        Target("h200", "gpu", "NVIDIA H200", "1x1x1", 989e12, 4800e9),
    )
}


# Those, and devices of which two numbers are enough: a roofline.
DEVICES = TARGETS | {
    target.name: target
    for target in (
        Target("a100", "gpu", "NVIDIA A100-SXM4-80GB", "1x1x1", 312e12, 2039e9),
        Target("h100", "gpu", "NVIDIA H100 80GB HBM3", "1x1x1", 989e12, 3350e9),
    )
}


def find(name: str) -> Target:
    """The target called ``name``; ConfigError where there is none."""
    if name not in TARGETS:
        raise ConfigError(f"target = {name!r}", "unknown", f"use one of {', '.join(TARGETS)}")
    return TARGETS[name]
