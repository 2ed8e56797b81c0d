"""Checkpoints through orbax: asynchronous, atomic, keep-n, restorable on another mesh.

A checkpoint holds the training state, the data iterator's state and a meta record: format version,
parameter layout, corpus fingerprint, versions and one checksum a leaf. The checksums are verified on
restore, so a damaged file is found even where the storage format would not notice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from attnlab.core.errors import CheckpointError
from attnlab.train.state import Trainer, TrainState

FORMAT = 1
LAYOUT = "stacked"


def flatten(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts with string keys (optimizer leaves by their path)."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {
        "params": state.params,
        "opt": {jax.tree_util.keystr(path): leaf for path, leaf in leaves},
        "counters": {"step": state.step, "skipped": state.skipped, "streak": state.streak},
    }


def unflatten(flat: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of ``flatten`` around the tree structure of ``like``."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(like.opt_state)
    opt = tree.unflatten([flat["opt"][jax.tree_util.keystr(path)] for path, _ in leaves])
    return TrainState(params=flat["params"], opt_state=opt, **flat["counters"])


def _checksum(x: jax.Array) -> jax.Array:
    """Position-weighted sum of the bits modulo 2^32: the same on every mesh and order of addition."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    if x.dtype.itemsize == 8:  # two 32-bit words
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
    weight = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        weight = weight * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _checksums(flat, replicated):
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(_checksum(x), replicated), flat
    )


def checksums(flat: dict[str, Any], replicated) -> dict[str, int]:
    """``{path: checksum}`` of every leaf."""
    sums = jax.device_get(_checksums(flat, replicated))
    return {
        jax.tree_util.keystr(path): int(value)
        for path, value in jax.tree_util.tree_leaves_with_path(sums)
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: local or remote (``gs://``) folder. keep: how many to keep.
        read_only: never create or delete anything.
    """

    def __init__(self, directory: str | epath.Path, keep: int = 3, *, read_only: bool = False):
        self.directory = epath.Path(directory)
        self.keep, self.read_only = keep, read_only
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self.read_only else self.keep,
            create=not self.read_only,
            read_only=self.read_only,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not self.read_only,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: dict, meta: dict, replicated) -> None:
        """Start saving ``state``; returns before it is written."""
        step = int(state.step)
        if step in self.steps():
            return
        flat = flatten(state)
        meta = {
            "format": FORMAT, "layout": LAYOUT, "checksums": checksums(flat, replicated), **meta
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flat),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def wait(self) -> None:
        """Block until everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def meta(self, step: int) -> dict:
        """The meta record of one checkpoint."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored["meta"]

    def restore(self, trainer: Trainer, step: int | None = None, report=print):
        """``(state, data, meta)`` of the newest good checkpoint (or of ``step``).

        A damaged one is reported, set aside as ``damaged-<step>`` and the next older one is tried.
        Raises CheckpointError when none is left.
        """
        steps = self.steps() if step is None else [step]
        if not steps:
            raise CheckpointError(
                f"{self.directory}", "holds no complete checkpoint",
                "start without --resume, or with --overwrite",
            )
        for candidate in reversed(steps):
            try:
                return self._restore(trainer, candidate)
            except CheckpointError:
                raise
            except Exception as error:
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                report(f"warning: checkpoint {candidate} in {self.directory} is damaged: {reason}")
                self._set_aside(candidate)
        raise CheckpointError(
            f"{self.directory}", f"every checkpoint ({steps}) is damaged", "start with --overwrite"
        )

    def _restore(self, trainer: Trainer, step: int):
        meta = self.meta(step)
        if meta.get("format") != FORMAT or meta.get("layout") != LAYOUT:
            raise CheckpointError(
                f"checkpoint {step} has format {meta.get('format')}, layout {meta.get('layout')!r}",
                f"this version reads format {FORMAT}, layout {LAYOUT!r}",
                "convert it with `attnlab convert`",
            )
        like = trainer.abstract_state()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(flatten(like)), data=ocp.args.JsonRestore()
            ),
        )
        found = checksums(restored["state"], trainer.replicated)
        wrong = [name for name, value in meta["checksums"].items() if found.get(name) != value]
        if wrong or len(found) != len(meta["checksums"]):
            raise ValueError(f"checksum mismatch in {len(wrong)} arrays, first {wrong[:1]}")
        return unflatten(restored["state"], like), restored["data"], meta

    def _set_aside(self, step: int) -> None:
        if self.read_only:
            return
        if jax.process_index() == 0:
            target = self.directory / f"damaged-{step}"
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"attnlab_set_aside_{step}")
        self._manager.close()
        self._manager = self._open()


def restore_params(directory: str | epath.Path, trainer: Trainer, step: int | None = None) -> Any:
    """Only the parameters of a checkpoint, checked, in ``trainer``'s shardings."""
    checkpoints = Checkpoints(directory, read_only=True)
    steps = checkpoints.steps()
    if step is None and steps:
        step = steps[-1]
    if step not in steps:
        raise CheckpointError(
            f"{directory}", f"has no checkpoint {'' if step is None else step} (found {steps})",
            "pass the folder of a run, or another --step",
        )
    meta = checkpoints.meta(step)
    like = {"params": trainer.abstract_state().params}
    restored = ocp.PyTreeCheckpointer().restore(
        epath.Path(directory) / str(step) / "state",
        args=ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        ),
    )
    found = checksums(restored, trainer.replicated)
    wrong = [name for name, value in found.items() if meta["checksums"].get(name) != value]
    if wrong:
        raise CheckpointError(
            f"checkpoint {step} in {directory}", f"is damaged: {wrong[0]} fails its checksum",
            f"use --step with one of {[s for s in steps if s != step]}",
        )
    return restored["params"]
