"""Device meshes: named sizes in a fixed order, checked against the devices that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from attnlab.core import versions
from attnlab.core.errors import MeshError
from attnlab.parallel.rules import MESH_AXES


def parse(text: str) -> dict[str, int]:
    """``"data=2,fsdp=-1"`` to a dict; -1 takes the devices that are left."""
    sizes: dict[str, int] = {}
    for item in [part.strip() for part in text.split(",") if part.strip()] or [""]:
        name, _, size = item.partition("=")
        try:
            value = int(size)
        except ValueError:
            value = 0
        if name not in MESH_AXES or name in sizes or (value < 1 and value != -1):
            raise MeshError(
                f"mesh = {text!r}",
                f"{item!r} is not AXIS=SIZE with one of {', '.join(MESH_AXES)}, each named once",
                "write for example data=2,fsdp=2,tensor=2",
            )
        sizes[name] = value
    return sizes


def make_mesh(sizes: Mapping[str, int] | str | None = None, devices=None) -> Mesh:
    """A mesh with axes ``data, fsdp, seq, tensor, expert``; axes left out have size 1.

    ``None`` puts every device on ``data``. Raises MeshError if the sizes do not use up the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse(sizes) if isinstance(sizes, str) else dict(sizes or {"data": -1})
    count = len(devices)
    known = math.prod(s for s in sizes.values() if s != -1)
    open_axes = [name for name, s in sizes.items() if s == -1]
    if len(open_axes) > 1:
        raise MeshError(
            f"mesh axes {' and '.join(open_axes)} at -1", "only one axis can take the rest",
            "give the others a size",
        )
    if len(open_axes) == 1 and count % known == 0:
        sizes[open_axes[0]] = count // known
    if math.prod(sizes.values()) != count:
        shape = ",".join(f"{k}={v}" for k, v in sizes.items())
        raise MeshError(
            f"mesh {shape}",
            f"needs {known if not open_axes else f'a multiple of {known}'} devices but "
            f"{jax.process_count()} process(es) see {count}",
            "change --mesh, start on the matching number of devices, or leave one axis at -1",
        )
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return versions.make_mesh(shape, MESH_AXES, devices=devices)
