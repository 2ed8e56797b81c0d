"""Which implementation serves a call: decided at trace time from static facts, and reported."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from attnlab.core.errors import ConfigError, ImplementationError


@dataclasses.dataclass(frozen=True)
class Device:
    """The device a call is compiled for: platform (cpu, gpu, tpu) and kind ("NVIDIA H200", ...)."""

    platform: str
    kind: str

    @staticmethod
    def default() -> Device:
        """What calls are compiled for: see ``compiling_for``, else the first device of jax."""
        target = _target.get()
        if target is not None:
            return target
        device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
        return Device(platform, device.device_kind)


_target: contextvars.ContextVar[Device | None] = contextvars.ContextVar(
    "attnlab_target", default=None
)


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Ops traced inside are for ``device``, which need not be attached (ahead-of-time compiles).

    Like every context it acts on tracing: a function that jit has traced already keeps its trace.
    """
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: what ``impl=`` says. supports: given the static facts of a call, None for yes or the
            reason for no. forward: the function, differentiable. partitions: XLA can cut it over a
            mesh by itself; where not (Pallas kernels), the op maps it over the shards. step: the
            form that goes on from a carried state, or None (see ``ops.attention.carry``). tiles:
            given a call that it serves (on a mesh: one device's part), the tiles of the block lists
            that the call and its gradient read, ``(block_q, block_k)`` each; None where it reads no
            lists.
    """

    name: str
    supports: Callable[[Any], str | None]
    forward: Callable[..., Any]
    partitions: bool = True
    step: Callable[..., Any] | None = None
    tiles: Callable[[Any], Sequence[tuple[int, int]]] | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A row of the report: would this implementation serve the call, and why not."""

    name: str
    reason: str | None
    chosen: bool


_record: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "attnlab_record", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, Any, str]]]:
    """Collect ``(op, call, implementation)`` of every op traced inside the block."""
    rows: list[tuple[str, Any, str]] = []
    token = _record.set(rows)
    try:
        yield rows
    finally:
        _record.reset(token)


class Op:
    """An op's implementations, in the order of preference on each platform.

    Args:
        name: the op's name. implementations: all of them.
        order: platform to names, fastest first; the last one must serve every call.
    """

    def __init__(
        self, name: str, implementations: Sequence[Implementation], order: dict[str, Sequence[str]]
    ):
        self.name = name
        self.implementations = {i.name: i for i in implementations}
        self.order = order

    def choose(
        self, call: Any, impl: str | Sequence[str] | None = None, *, step: bool = False
    ) -> Implementation:
        """The implementation for ``call``.

        ``impl=None`` walks the platform's order and takes the first that serves the call; a name
        takes that one or raises ImplementationError with the reason; a sequence tries in order.
        ``step``: it must be able to go on from a carried state.
        """
        if impl is None:
            names = self.order.get(call.device.platform, self.order["cpu"])
        else:
            names = (impl,) if isinstance(impl, str) else tuple(impl)
        refusals = []
        for name in names:
            if name not in self.implementations:
                raise ConfigError(
                    f"impl = {name!r}",
                    f"{self.name} has no such implementation",
                    f"use one of {', '.join(self.implementations)} or None",
                )
            reason = self.implementations[name].supports(call)
            if step and self.implementations[name].step is None:
                reason = "it takes no carry"
            if reason is None:
                rows = _record.get()
                if rows is not None:
                    rows.append((self.name, call, name))
                return self.implementations[name]
            refusals.append(f"{name}: {reason}")
        raise ImplementationError(
            f"{self.name} with impl = {impl!r}",
            "cannot serve this call (" + "; ".join(refusals) + ")",
            "use impl=None or another implementation",
        )

    def report(self, call: Any) -> list[Verdict]:
        """Every implementation in the order of ``call``'s platform, then the others."""
        order = list(self.order.get(call.device.platform, self.order["cpu"]))
        order += [name for name in self.implementations if name not in order]
        verdicts, taken = [], False
        for name in order:
            reason = self.implementations[name].supports(call)
            listed = name in self.order.get(call.device.platform, self.order["cpu"])
            chosen = reason is None and listed and not taken
            taken |= chosen
            verdicts.append(Verdict(name, reason, chosen))
        return verdicts
