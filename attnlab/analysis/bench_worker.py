"""Processes that measure: one for jax, one for torch, each alone with its framework.

A CUDA fault or a kernel that never ends poisons its process, not the run: the parent, which never
touches the GPU, stops it and starts another.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
from typing import Any

from attnlab.core.errors import AttnlabError, ImplementationError

ENGINES = {"jax": "attnlab.analysis.bench_jax", "torch": "attnlab.analysis.peers"}
TEXT = 240  # characters of an error that a row keeps


def told(error: BaseException) -> str:
    """An error in one line: the rule for our own, else its type and the start of its text."""
    if isinstance(error, ImplementationError):
        return error.rule.removeprefix("cannot serve this call (").removesuffix(")")[:TEXT]
    if isinstance(error, AttnlabError):
        return f"{error.what}: {error.rule}"[:TEXT]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"[:TEXT]


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of ``packages`` that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def serve(pipe: Any, module: str) -> None:
    """The loop of a worker: ``(method, arguments)`` in, a dict out, until None or the end."""
    try:
        engine = importlib.import_module(module).Engine()
        pipe.send({"stamp": engine.stamp()})
    except Exception as error:
        pipe.send({"reason": told(error)})
        return
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request is None:
            return
        method, arguments = request
        try:
            reply = getattr(engine, method)(**arguments)
        except Exception as error:
            reply = {"reason": told(error), "healthy": engine.healthy()}
        pipe.send(reply)


class Worker:
    """The parent's end of one measuring process, started on first use and again after a fault.

    Args:
        kind: "jax" or "torch". start_s: seconds it may take to start.
    """

    def __init__(self, kind: str, start_s: float = 180.0):
        self.kind, self.start_s = kind, start_s
        self.process: Any = None
        self.pipe: Any = None

    def stamp(self) -> dict[str, Any]:
        """``{"stamp": {device, platform, versions}}``, or ``{"reason": ...}`` if it cannot run."""
        # Two frameworks share the GPU, so neither may take its memory in advance.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, ENGINES[self.kind]))
        self.process.start()
        end.close()
        reply = self._reply(self.start_s)
        if "reason" in reply:
            self.stop()
        return reply

    def ask(self, method: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """What a method of the engine returns; ``{"reason": ...}`` if it failed or took longer.

        ``"lost": True`` beside the reason: the process was stopped.
        """
        if self.process is None:
            reply = self.stamp()
            if "reason" in reply:
                return reply | {"lost": True}
        try:
            self.pipe.send((method, arguments))
        except OSError:
            pass  # it is gone: the reply says how
        reply = self._reply(seconds)
        if not reply.pop("healthy", True):
            self.stop()
            reply["lost"] = True
        return reply

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            reason = f"no answer in {seconds:.0f} s: stopped"
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"the {self.kind} process died with exit code {self.process.exitcode}"
        return {"reason": reason, "healthy": False}

    def stop(self) -> None:
        """End the process, by force if need be."""
        if self.process is None:
            return
        try:
            self.pipe.send(None)
        except OSError:
            pass  # it is gone already
        self.process.join(3)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(20)
        self.pipe.close()
        self.process = self.pipe = None
