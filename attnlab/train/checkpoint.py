"""Checkpoints through orbax: asynchronous, atomic, keep-n, restorable on another mesh.

A checkpoint holds the training state, the data iterator's state and a meta record: format,
parameter layout, corpus fingerprint, versions and one checksum a leaf. The checksums are verified
on restore, so a damaged file is found even where the storage format would not notice.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from attnlab.core.errors import CheckpointError, ConfigError
from attnlab.parallel import processes
from attnlab.train.state import Trainer, TrainState

_HALF_WRITTEN = ".orbax-checkpoint-tmp"
FORMAT = 2  # 1: document ends were no targets, so a step held other rows
LAYOUT = "stacked"


def flatten(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts with string keys (optimizer and layer state by their paths)."""
    return {
        "opt": _by_path(state.opt_state),
        "counters": {"step": state.step, "skipped": state.skipped, "streak": state.streak},
        **_weights(state),
    }


def _weights(state: TrainState) -> dict[str, Any]:
    """What a model needs to run: parameters, and the state of its layers where they have one."""
    layers = _by_path(state.layers)
    return {"params": state.params} | ({"layers": layers} if layers else {})


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _from_paths(flat: dict[str, Any], like: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path)], like
    )


def unflatten(flat: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of ``flatten`` around the tree structure of ``like``."""
    return TrainState(
        params=flat["params"], opt_state=_from_paths(flat["opt"], like.opt_state),
        layers=_from_paths(flat.get("layers", {}), like.layers), **flat["counters"],
    )


def _checksum(x: jax.Array) -> jax.Array:
    """Position-weighted sum of the bits modulo 2^32: the same on every mesh."""
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


def absolute(path: str | epath.Path) -> epath.Path:
    """``path`` as orbax wants it; remote ones are absolute."""
    text = str(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def run_folder(path: str) -> epath.Path:
    """The folder of a run; ConfigError where no package here serves its scheme."""
    try:
        folder = epath.Path(path)
        folder.exists()
    except (ImportError, KeyError, ValueError) as error:
        raise ConfigError(
            f"run folder {path}", f"no file system serves it ({_short(error)})",
            'pip install "attnlab[gcs]" for gs://, or name a local folder',
        ) from None
    return folder


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: local or remote (``gs://``) folder. keep: how many to keep.
        read_only: never create or delete anything.
    """

    def __init__(self, directory: str | epath.Path, keep: int = 3, *, read_only: bool = False):
        self.directory = absolute(directory)
        self.keep, self.read_only = keep, read_only
        self._half_written = self._find_half_written()
        self._manager = self._open()

    def _find_half_written(self) -> list[str]:
        if not self.directory.exists():
            return []
        return sorted(p.name for p in self.directory.iterdir() if p.name.endswith(_HALF_WRITTEN))

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
            "format": FORMAT, "layout": LAYOUT, "checksums": checksums(flat, replicated),
            "shapes": _shapes(flat), **meta
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
        """The meta record of one checkpoint, complete and of this version's format."""
        meta = self._json(step, "meta")
        missing = {"format", "layout", "checksums", "shapes"} - set(meta)
        if missing:
            raise ValueError(f"its meta record lacks {', '.join(sorted(missing))}")
        if meta["format"] != FORMAT or meta["layout"] != LAYOUT:
            raise CheckpointError(
                f"checkpoint {step} has format {meta['format']}, layout {meta['layout']!r}",
                f"this version reads format {FORMAT}, layout {LAYOUT!r}",
                "read it with the version of attnlab that wrote it (its meta record names it)",
            )
        return meta

    def restore(self, trainer: Trainer, report=print):
        """``(state, data, meta)`` of the newest good checkpoint.

        Damaged and half-written ones are reported; once an older one has been read, the damaged
        ones are renamed to ``damaged-<step>``. Raises CheckpointError where none can be read.
        """
        for name in self._half_written:
            report(f"warning: {self.directory / name} was not completely written: left out")
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            found, reason = None, ""
            try:
                found = self._restore(trainer, step)
            except CheckpointError:
                raise
            except Exception as error:  # orbax, tensorstore and zlib have no common one
                reason = _short(error)
            if processes.all_agree(found is not None):
                wrong = self._wrong(found, trainer)
                if not wrong:
                    self._set_aside(damaged)
                    return found
                reason = f"{len(wrong)} arrays fail their checksums, the first is {wrong[0]}"
            report(
                f"warning: checkpoint {step} in {self.directory} is damaged: "
                f"{reason or 'another process cannot read it'}"
            )
            damaged.append(step)
        raise CheckpointError(
            f"{self.directory}",
            f"every checkpoint ({steps}) is damaged" if steps else "holds no complete checkpoint",
            "start over with --overwrite",
        )

    # The handlers are called without orbax's Checkpointer around them: it waits for all processes
    # after reading, for ever if one of them could not read.
    def _json(self, step: int, item: str) -> dict:
        record = ocp.JsonCheckpointHandler().restore(
            self.directory / str(step) / item, ocp.args.JsonRestore()
        )
        if not isinstance(record, dict):
            raise ValueError(f"its {item} record is no JSON object")
        return record

    def _restore(self, trainer: Trainer, step: int):
        meta, data = self.meta(step), self._json(step, "data")
        if "step" not in data:
            raise ValueError("its data record lacks step")
        like = trainer.abstract_state()
        flat = ocp.StandardCheckpointHandler().restore(
            self.directory / str(step) / "state", args=ocp.args.StandardRestore(flatten(like))
        )
        return unflatten(flat, like), data, meta

    def _wrong(self, found, trainer: Trainer) -> list[str]:
        state, _, meta = found
        here, stored = checksums(flatten(state), trainer.replicated), meta["checksums"]
        return [n for n in sorted(here.keys() | stored.keys()) if here.get(n) != stored.get(n)]

    def _set_aside(self, steps: list[int]) -> None:
        if self.read_only or not steps:
            return
        if processes.is_first():
            for step in steps:
                target = self.directory / f"damaged-{step}"
                if target.exists():
                    target.rmtree()
                (self.directory / str(step)).rename(target)
        processes.barrier(f"attnlab_set_aside_{steps}")
        self._manager.close()
        self._manager = self._open()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a checkpoint holds for running a model: parameters, explicit state of its layers."""

    params: Any
    layers: list
    step: int
    meta: dict


def restore_weights(
    directory: str | epath.Path, trainer: Trainer, step: int | None = None, report=_to_stderr
) -> Weights:
    """The weights of checkpoint ``step``, or of the newest good one, in ``trainer``'s shardings.

    Damaged ones are reported and passed over. Raises CheckpointError where ``step`` is damaged,
    none can be read, or they are of another model.
    """
    directory = absolute(directory)
    if not directory.exists():
        raise CheckpointError(f"{directory}", "does not exist", "pass the folder of a run")
    checkpoints = Checkpoints(directory, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{directory}", "holds no complete checkpoint yet", "let the run reach its first one"
        )
    if step not in (None, *steps):
        raise CheckpointError(
            f"{directory}", f"has no checkpoint {step} (found {steps})", "pass another --step"
        )
    for candidate in reversed(steps) if step is None else [step]:
        weights, reason = _read_weights(checkpoints, trainer, candidate)
        if weights is not None:
            return weights
        if step is None:
            report(f"warning: checkpoint {candidate} in {directory} is damaged: {reason}")
    if step is None:
        raise CheckpointError(
            f"{directory}", f"every checkpoint ({steps}) is damaged", "train again"
        )
    others = [s for s in steps if s != step]
    raise CheckpointError(
        f"checkpoint {step} in {directory}", f"is damaged: {reason}",
        f"use another one of {others}" if others else "train again",
    )


def _read_weights(
    checkpoints: Checkpoints, trainer: Trainer, step: int
) -> tuple[Weights | None, str]:
    """``(weights, "")``, or ``(None, reason)`` of a damaged checkpoint."""
    abstract = trainer.abstract_state()
    like, restored, meta, reason = _weights(abstract), None, {}, "another process cannot read it"
    try:
        meta = checkpoints.meta(step)
        _check_shapes(meta["shapes"], like, checkpoints.directory, step)
        restored = ocp.PyTreeCheckpointHandler().restore(
            checkpoints.directory / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=like,
                restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                partial_restore=True,
            ),
        )
    except CheckpointError:
        raise
    except Exception as error:  # orbax, tensorstore and zlib have no common one
        reason = _short(error)
    if not processes.all_agree(restored is not None):
        return None, reason
    found = checksums(restored, trainer.replicated)
    wrong = [name for name, value in found.items() if meta["checksums"].get(name) != value]
    if wrong:
        return None, f"{wrong[0]} fails its checksum"
    layers = _from_paths(restored.get("layers", {}), abstract.layers)
    return Weights(restored["params"], layers, step, meta), ""


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {
        jax.tree_util.keystr(path): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_shapes(stored: dict[str, list[int]], like: Any, directory, step: int) -> None:
    """Raise CheckpointError unless the checkpoint has the weights of this model."""
    here = _shapes(like)
    weights = ("['params']", "['layers']")
    there = {name: shape for name, shape in stored.items() if name.startswith(weights)}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"checkpoint {step} in {directory} has {name} of shape {there.get(name)}",
                f"this model has {here.get(name)}", "use the model of that run",
            )


def _short(error: Exception) -> str:
    """One line of an error that somebody else wrote."""
    # Of many failed reads one is raised; asyncio would print the others when they are collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return " ".join(str(error).split())[:200] or type(error).__name__
