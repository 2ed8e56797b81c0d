"""``attnlab train``: one run from recipe to checkpoint, metrics, plot and sample."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import shlex
import signal
import time
from typing import Any

import jax

from attnlab.core import config as configs
from attnlab.core import registry
from attnlab.core.errors import CheckpointError, ConfigError, NonFiniteError
from attnlab.infer.evaluate import evaluate
from attnlab.parallel import processes
from attnlab.parallel.feed import batch_shard, place
from attnlab.train import checkpoint, metrics, trackers
from attnlab.train import recipe as recipes
from attnlab.train.data import bytes_per_token, eval_batches, make_loader
from attnlab.train.progress import Reporter, describe
from attnlab.train.recipe import Recipe
from attnlab.train.setup import Run, prepare

MAX_STREAK = 10
_OWN_FILES = (
    "config.json", "metrics.jsonl", "loss.png", "sample.txt", "tb", "profile", "checkpoints",
)
# What may differ when a run goes on: how far, where and how often. The text may have moved: its
# fingerprint and the tokenizer's are compared instead. A new number of steps moves the end of the
# learning-rate schedule, which is how a run is made longer.
_MAY_CHANGE = (
    "train.steps", "train.mesh", "train.impl", "train.log_every", "train.eval_every",
    "train.eval_rows", "train.checkpoint_every", "train.keep", "train.sample_tokens",
    "model.remat", "model.scan", "model.loss_chunk", "name",
    "data.data", "data.val_data", "data.tokenizer",
)


def run(
    recipe: Recipe | None, out: str, overrides: list[str] | None = None, *, resume: bool = False,
    overwrite: bool = False, profile: tuple[int, int] | None = None,
    trackers_wanted: tuple[str, ...] = (), plain: bool = False,
) -> int:
    """Train, and return the exit code.

    Args:
        recipe: what to run; None with ``resume`` (then the stored one, changed by ``overrides``).
        out: run folder, local or remote. resume: go on from its newest good checkpoint.
        overwrite: replace the run that is there. profile: steps to trace into ``out/profile``.
        trackers_wanted: "tb", "wandb".
        plain: no progress bar.
    """
    processes.start()
    folder = checkpoint.run_folder(out)
    recipe, before = _choose_recipe(recipe, folder, overrides or [], resume)
    if before is None and not overwrite:
        _refuse_taken(folder, resume)
    if profile and profile[0] > recipe.train.steps:
        raise ConfigError(
            f"--profile {profile[0]}:{profile[1]}", f"the run has {recipe.train.steps} steps",
            "name steps it takes",
        )
    init_from, c = recipe.train.init_from, recipe.train
    if init_from is not None and checkpoint.absolute(init_from) == checkpoint.absolute(folder):
        raise ConfigError(
            f"--init-from {init_from}", "is the folder of this run", "pass another --out"
        )
    trackers.check_installed(trackers_wanted)
    reporter = Reporter(recipe.train.steps, first=processes.is_first(), plain=plain)
    try:
        with _Stop() as stop:
            processes.agree("whether --out holds a run", str(before is not None))
            begun = before is not None and _has_checkpoint(folder)
            processes.agree("whether --out holds a checkpoint", str(begun))
            prepared = prepare(recipe, reporter.say)
            weights = None
            if init_from is not None and not begun:
                weights = checkpoint.restore_weights(
                    checkpoint.run_folder(init_from) / "checkpoints", prepared.trainer,
                    report=reporter.say,
                ).params
                reporter.say(f"weights from {init_from}")
            batch_shard(prepared.trainer.batch_sharding, (c.batch, c.seq_len))
            prepared.trainer.trace(c.batch, c.seq_len)
            # What can be wrong has been found by now: only from here on the folder changes.
            if before is None:
                _claim(folder, recipe)
            return _Session(
                prepared, folder, reporter, before, weights, profile, trackers_wanted
            ).run(stop)
    finally:
        reporter.stop()


def _choose_recipe(recipe, folder, overrides, resume) -> tuple[Recipe, Recipe | None]:
    """The recipe to run, and the one of the run that goes on (None: a new run)."""
    stored = folder / "config.json"
    if resume and stored.exists():
        before = recipes.from_json(str(stored))
        after = configs.override(recipe if recipe is not None else before, overrides)
        _check_same(before, after)
        return after, before
    if recipe is None:
        raise CheckpointError(f"{folder}", "holds no run to resume", "start it without --resume")
    return configs.override(recipe, overrides), None


def _has_checkpoint(folder) -> bool:
    saved = folder / "checkpoints"
    return saved.exists() and bool(checkpoint.Checkpoints(saved, read_only=True).steps())


def _refuse_taken(folder, resume: bool) -> None:
    taken = [name for name in _OWN_FILES if (folder / name).exists()]
    if taken:
        more = "" if resume else "--resume to go on, "  # with it, there was no config.json
        raise ConfigError(
            f"--out {folder}", f"holds a run already ({', '.join(taken)})",
            f"pass {more}--overwrite to start over, or another --out",
        )


def _claim(folder, recipe: Recipe) -> None:
    """Make the folder, and put the recipe in the place of what another run left in it.

    A kill at any point leaves a folder to start, resume or overwrite: the checkpoints go first, and
    config.json is there before anything of the new run is.
    """
    processes.barrier("attnlab_folder_checked")
    if processes.is_first():
        for name in reversed(_OWN_FILES):
            path = folder / name
            if path.exists() and name != "config.json":
                path.rmtree() if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        _store(folder, recipe)
    processes.barrier("attnlab_folder_ready")


def _store(folder, recipe: Recipe) -> None:
    partial = folder / "config.json.part"
    partial.write_text(recipe.to_json())
    partial.replace(folder / "config.json")


def _check_same(before: Recipe, after: Recipe) -> None:
    old, new = (configs.flat(configs.to_dict(recipe)) for recipe in (before, after))
    for name in sorted(old.keys() | new.keys()):
        may = name in _MAY_CHANGE or name.rpartition(".")[0] in _MAY_CHANGE
        if old.get(name) != new.get(name) and not may:
            raise CheckpointError(
                f"--resume with {name} = {new.get(name)!r}",
                f"the run was started with {old.get(name)!r}",
                "drop the flag, or start another run with --init-from",
            )


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


class _Stop:
    """SIGTERM asks the loop to save and leave; in a single process we listen ourselves."""

    def __init__(self):
        self.signalled = False

    def __enter__(self):
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # not in the main thread: nobody signals it
                self._before = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, *_):
        self.signalled = True

    def __exit__(self, *_):
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose metrics are still on the device."""

    step: int
    values: dict[str, jax.Array]


class _Session:
    def __init__(self, run: Run, folder, reporter, before, weights, profile, wanted):
        self.run_, self.folder, self.reporter = run, folder, reporter
        self.recipe, self.trainer = run.recipe, run.trainer
        self.config = run.recipe.train
        self.first = processes.is_first()
        self.profile = profile
        self.checkpoints = checkpoint.Checkpoints(folder / "checkpoints", self.config.keep)
        shape = (self.config.batch, self.config.seq_len)
        index, count = batch_shard(self.trainer.batch_sharding, shape)
        self.shard = {"shard_index": index, "shard_count": count}
        self.loader = make_loader(
            run.train_rows, batch=self.config.batch, seed=self.recipe.data.seed, **self.shard
        )
        self.state = self._start(before is not None, weights)
        self.start = int(self.state.step)
        if before is not None:
            self._go_on(before)
        self.bytes_per_token = bytes_per_token(
            run.val_rows, run.tokenizer, self.config.eval_rows or None
        )
        self.trackers = self._open_trackers(wanted)
        self.pending: collections.deque[_Pending] = collections.deque()
        self.clock: tuple[float, int] | None = None  # when and at which step the last row was

    def _go_on(self, before: Recipe) -> None:
        """From here on the run is that of the new recipe."""
        steps = self.config.steps
        if before.train.steps != steps:
            self.reporter.say(
                f"train.steps = {steps} instead of {before.train.steps}: from here on the "
                f"learning rates of a run of {steps} steps"
            )
        if self.first:
            _store(self.folder, self.recipe)

    def _start(self, resume: bool, weights):
        if resume and self.checkpoints.steps():
            state, data, meta = self.checkpoints.restore(self.trainer, report=self.reporter.say)
            here = self.run_.meta()
            for what, flag in (("corpus", "fingerprint"), ("tokenizer", "tokenizer")):
                if meta.get(flag) != here[flag]:
                    raise CheckpointError(
                        f"{what} fingerprint {here[flag]}",
                        f"the run was trained on {meta.get(flag)}",
                        f"pass the same {what}, or start another run with --init-from",
                    )
            step = int(state.step)
            if step > self.config.steps:
                raise CheckpointError(
                    f"--resume with train.steps = {self.config.steps}",
                    f"the run has taken {step} steps already", f"use {step} or more",
                )
            self.loader.set_state(data)
            self.reporter.say(f"resumed {self.folder} at step {step}")
            return state
        if resume:
            self.reporter.say(f"{self.folder} holds no complete checkpoint: from the first step")
        state = self.trainer.init(self.config.seed)
        return state if weights is None else dataclasses.replace(state, params=weights)

    def _open_trackers(self, wanted) -> list:
        if not self.first:
            return []
        opened: list = [trackers.JsonLines(self.folder / "metrics.jsonl", self.start)]
        if "tb" in wanted:
            opened.append(trackers.TensorBoard(self.folder / "tb", self.start))
        if "wandb" in wanted:
            opened.append(
                trackers.WandB(self.folder, self.recipe.name, configs.to_dict(self.recipe))
            )
        return opened

    def run(self, stop: _Stop) -> int:
        steps, c = self.config.steps, self.config
        stopped = False
        try:
            for step in range(self.start + 1, steps + 1):
                self._profile(step)
                batch = place(next(self.loader), self.trainer.batch_sharding)
                self.state, values = self.trainer.step(self.state, batch)
                if step == self.start + 1:
                    jax.block_until_ready(values)  # compilation is not training time
                self.pending.append(_Pending(step, values))
                evaluates = step == steps or (c.eval_every and step % c.eval_every == 0)
                saves = step == steps or (c.checkpoint_every and step % c.checkpoint_every == 0)
                stopped = step < steps and processes.preempted(step, stop.signalled)
                self._drain(0 if evaluates or saves or stopped else 2, bool(evaluates))
                if saves or stopped:
                    with self._pause():
                        self._save()
                if stopped:
                    break
        finally:
            self._finish_profile()
            self.checkpoints.wait()
            for tracker in self.trackers:
                tracker.close()
        self.checkpoints.close()
        self.reporter.stop()
        if self.profile:
            self.reporter.say(f"no step of --profile {self.profile[0]}:{self.profile[1]} was taken")
        if stopped:
            self.reporter.say(
                f"SIGTERM: saved step {step} in {self.folder}; go on with "
                f"`attnlab train --resume --out {self.folder}`"
            )
            return 0
        self._finish()
        return 0

    def _drain(self, left: int, evaluates: bool) -> None:
        """Read the metrics of all but the last ``left`` steps; the device works on meanwhile."""
        while len(self.pending) > left:
            item = self.pending.popleft()
            last = evaluates and not self.pending
            values = {k: float(v) for k, v in jax.device_get(item.values).items()}
            self._check_finite(item.step, values)
            first = item.step == self.start + 1 and self.start == 0
            if last or first or item.step % self.config.log_every == 0:
                self._log(item.step, values, time.monotonic(), last)

    def _check_finite(self, step: int, values: dict) -> None:
        if values["streak"] > 0:
            self.reporter.say(
                f"step {step:>6}  skipped: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']} ({int(values['skipped'])} skipped so far)"
            )
        if values["streak"] >= MAX_STREAK:
            raise NonFiniteError(
                f"loss = {values['loss']}, gradient norm = {values['grad_norm']} at step {step}",
                f"{MAX_STREAK} steps in a row were not finite and were skipped",
                "lower the learning rate or --set optimizer.clip_norm, and look at the data",
            )

    def _log(self, step: int, values: dict, at: float, validate: bool) -> None:
        c = self.config
        speed: dict[str, Any] = {"tokens_per_s": None, "tflops_per_s": None, "mfu": None}
        if self.clock is not None and step > self.clock[1]:
            seconds = max(at - self.clock[0], 1e-9) / (step - self.clock[1])
            speed = metrics.rates(self.recipe.model, c.batch, c.seq_len, seconds)
        self.clock = (at, step)
        validation = {}
        if validate:
            with self._pause():
                validation = self._validate()
        row = {
            "step": step,
            "tokens": step * c.batch * c.seq_len,
            "loss": _number(values.pop("loss")),
            "grad_norm": _number(values.pop("grad_norm")),
            "lr": float(self.trainer.lr(step - 1)),
            **validation,
            **speed,
            "skipped": int(values.pop("skipped")),
            "fingerprint": self.run_.fingerprint,
            **{k: _number(v) for k, v in values.items() if k not in ("streak", "loss_tokens")},
        }
        for tracker in self.trackers:
            tracker.log(row)
        self.reporter.row(row)

    @contextlib.contextmanager
    def _pause(self):
        """What happens inside is not training time."""
        started = time.monotonic()
        yield
        if self.clock is not None:
            self.clock = (self.clock[0] + time.monotonic() - started, self.clock[1])

    def _validate(self) -> dict:
        batches = eval_batches(
            self.run_.val_rows, self.config.batch, limit=self.config.eval_rows or None,
            **self.shard,
        )
        result = evaluate(
            self.trainer, self.state.params, batches, layers=self.state.layers,
            bytes_per_token=self.bytes_per_token,
        )
        return {"val_loss": result.nats_per_token, "val_bits_per_byte": result.bits_per_byte}

    def _save(self) -> None:
        self.checkpoints.save(
            self.state, self.loader.get_state(), self.run_.meta(), self.trainer.replicated
        )
        for tracker in self.trackers:
            tracker.flush()

    def _profile(self, step: int) -> None:
        if self.profile and step == max(self.profile[0], self.start + 1) <= self.profile[1]:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self._tracing = True
        if self.profile and step > self.profile[1]:
            self._finish_profile()

    def _finish_profile(self) -> None:
        if getattr(self, "_tracing", False):
            jax.block_until_ready(self.state.params)
            jax.profiler.stop_trace()
            self._tracing = False
            self.reporter.say(f"trace written to {self.folder / 'profile'} (open it with xprof)")
            self.profile = None

    def _finish(self) -> None:
        """Plot, sample and what to try next."""
        sample = self.run_.sample(self.state) if self.config.sample_tokens else None
        if not self.first:
            return
        rows = trackers.read(self.folder / "metrics.jsonl")
        trackers.plot_loss(rows, self.folder / "loss.png", f"{self.recipe.name}")
        if sample is not None:
            (self.folder / "sample.txt").write_text(sample)
            self.reporter.say(f"\nsample:\n{sample}\n")
        self.reporter.say(f"done: step {self.config.steps}  {describe(rows[-1]) if rows else ''}")
        out = shlex.quote(str(self.folder))
        used = {registry.name_of(type(layer)) for layer in self.recipe.model.period}
        other = next(name for name in ("mla", "gqa") if name not in used or name == "gqa")
        self.reporter.say(
            f"next: attnlab generate {out} --prompt 'def '   or compare: "
            f"attnlab train {out}/config.json --attention {other} --out {out}-{other}"
        )
