"""``attnlab tune``: write the tables of block sizes that ``ops.attention.tuning`` reads.

For a target that is not here the static cycle model ranks the candidates (TPUs; rows say
``predicted``); on an accelerator they are timed (rows say ``measured``). A row is one
implementation, pass and call; writing it again replaces it.

Sizes that no candidate changes together (those of two kernels, say) are chosen one after the
other when they are measured, the later ones beside the best of the earlier.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attnlab.analysis import aot, lab
from attnlab.analysis.printing import table
from attnlab.analysis.targets import Target, find
from attnlab.core.dispatch import Device
from attnlab.core.errors import ConfigError, ImplementationError
from attnlab.ops.attention import OP, tuning
from attnlab.ops.attention.shapes import Shape

TIE = 1.01  # among candidates this close to the fastest, the one with the least VMEM wins
ERROR = 2e-2  # relative error in bf16 above which a candidate is not timed
Timer = Callable[[Callable[..., Any], Sequence[Any]], float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate and what it takes: ``ms`` or None with the ``error``; ``vmem`` bytes if known."""

    blocks: tuning.Blocks
    ms: float | None
    vmem: int = 0
    error: str = ""


def main(args: argparse.Namespace) -> int:
    """Tune and write; 1 where nothing could be tuned."""
    if args.all_targets:
        targets = [target for target in lab.installed() if target.platform == "tpu"]
    else:
        targets = [find(args.target)] if args.target else []
    shapes = lab.shapes_of(args.shape or ["primary"])
    folder = Path(args.out) if args.out else Path(__file__).parent.parent / "data" / "tuned"
    written = 0
    if args.budget is not None and (targets or not args.budget > 0):
        raise ConfigError(
            f"--budget {args.budget:g}{' with a target' if targets else ''}",
            "is how many minutes measuring here may take", "give minutes, and no target",
        )
    if targets:
        for target in targets:
            if target.platform != "tpu":
                raise ConfigError(
                    f"--target {target.name}", "has no time model: GPU kernels are measured",
                    "run attnlab tune on that GPU without --target",
                )
            print(f"{target.name}: predicted (static model), nothing measured")
            found = predicted(target, shapes, args.impl or ())
            written += write(folder, target.kind, found)
    else:
        device = Device.default()
        if device.platform == "cpu":
            raise ConfigError(
                "attnlab tune on a CPU", "there is nothing to measure here",
                "pass --target v5e or --all-targets",
            )
        print(f"{device.kind}: measured here")
        limit_s = math.inf if args.budget is None else 60 * args.budget
        rows = measured(device, shapes, args.impl or (), seconds, limit_s)
        written = write(folder, device.kind, rows)
    return 0 if written else 1


def passes(
    device: Device, shapes: Sequence[Shape], names: Sequence[str]
) -> Iterator[tuple[Shape, tuning.Key]]:
    """Every shape, implementation and pass that there is something to choose for.

    Says which shapes an implementation leaves out and why, among them those with a logit cap where
    its tuned rows serve plain calls only.
    """
    chosen = list(names) or [n for n in OP.order[device.platform] if n in tuning.SPACES]
    if not chosen:
        raise ConfigError(
            f"attnlab tune for {device.kind}", "no implementation for it has block sizes",
            "name one with --impl",
        )
    for name in chosen:
        space = tuning.space(name)
        for shape in shapes:
            reason = OP.implementations[name].supports(shape.call(device))
            if reason is None and shape.logit_cap is not None and not space.modified:
                reason = "it has a logit cap, and tuned rows serve calls without"
            if reason is not None:
                print(f"{name} {shape.name}: left out: {reason}")
                continue
            directions = tuning.DIRECTIONS[: 1 if "forward_only" in shape.tags else 2]
            for direction in directions:
                yield shape, lab.key_of(shape, name, direction)


def _candidates(key: tuning.Key) -> list[tuning.Blocks]:
    space = tuning.space(key.implementation)
    return [b for b in space.candidates(key) if space.refuses(key, b) is None]


def predicted(
    target: Target, shapes: Sequence[Shape], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of a TPU target by the static model: kernel time of the pass alone."""
    for shape, key in passes(target.device, shapes, names):
        cell = {
            "target": target.name, "implementation": key.implementation,
            "direction": key.direction, "shape": dataclasses.asdict(shape),
        }
        candidates = _candidates(key)
        trials, compiler = [], {}
        results = aot.run([cell | {"blocks": blocks} for blocks in candidates])
        for blocks, result in zip(candidates, results):
            if "error" in result:
                trials.append(Trial(blocks, None, error=result["error"]))
                continue
            compiler = result["compiler"]
            mine = sum(
                kernel["seconds"] for kernel in result["kernels"]
                if (kernel["role"] == "forward") == (key.direction == "forward")
            )
            trials.append(Trial(blocks, mine * 1e3, result["vmem_bytes"] or 0))
        yield from _row(shape, key, trials, "predicted", compiler)


def measured(
    device: Device, shapes: Sequence[Shape], names: Sequence[str], timer: Timer,
    limit_s: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """The rows of the device that is here: each candidate is compared with XLA, then timed.

    Args:
        timer: ``(function, arguments) -> seconds`` of one call of a compiled function. Of a
            backward pass the whole of forward and backward is timed.
        limit_s: no pass is begun after so many seconds.
    """
    import jax

    from attnlab.analysis.aot_cell import program

    started = time.perf_counter()
    versions = {name: aot.version(name) for name in ("jax", "jaxlib")}
    waiting = list(passes(device, shapes, names))
    for done, (shape, key) in enumerate(waiting):
        if time.perf_counter() - started > limit_s:
            left = ", ".join(_label(shape, key) for shape, key in waiting[done:])
            print(f"the budget of {limit_s / 60:g} minutes is spent, left out: {left}")
            return
        candidates, usual = _candidates(key), tuning.space(key.implementation).default(key)
        if candidates == [usual]:
            print(f"{_label(shape, key)}: nothing to choose, only the heuristic fits")
            continue
        f, arrays = program(shape, key.implementation, key.direction)
        keys = jax.random.split(jax.random.key(0), len(arrays))
        args = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, arrays)]
        wanted = jax.jit(program(shape, "xla", key.direction)[0])(*args)
        trials: list[Trial] = []
        for group in independent(usual, candidates):
            base = best(trials)
            before = usual if base is None else base.blocks
            for changed in group:
                trials.append(_trial(shape, key, before | changed, f, args, wanted, timer))
        yield from _row(shape, key, trials, "measured", versions)


def independent(
    usual: tuning.Blocks, candidates: Sequence[tuning.Blocks]
) -> list[list[tuning.Blocks]]:
    """What the candidates change of the heuristic, nothing first, in groups that share no size."""
    groups: list[tuple[set[str], list[tuple[int, tuning.Blocks]]]] = []
    for place, blocks in enumerate(candidates):
        changed = {name: size for name, size in blocks.items() if size != usual[name]}
        names, members = set(changed), [(place, changed)]
        for other in [group for group in groups if group[0] & names]:
            groups.remove(other)
            names, members = names | other[0], other[1] + members
        groups.append((names, members))
    found = sorted(sorted(members, key=lambda m: m[0]) for _, members in groups)
    return [[changed for _, changed in members] for members in found]


def _trial(shape: Shape, key: tuning.Key, blocks, f, args, wanted, timer: Timer) -> Trial:
    """Compile, compare with what XLA ``wanted``, time; ImplementationError where they differ."""
    import jax
    import jax.numpy as jnp

    reason = tuning.space(key.implementation).refuses(key, blocks)
    if reason is not None:  # each change fits beside the heuristic, not all beside each other
        return Trial(blocks, None, error=reason)
    try:
        with tuning.forcing(blocks):
            run = jax.jit(lambda *a: f(*a)).lower(*args).compile()
        found = run(*args)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return Trial(blocks, None, error=str(error).splitlines()[0][:160])
    worst = max(
        float(jnp.linalg.norm((a - b).astype(jnp.float32).ravel())
              / jnp.linalg.norm(b.astype(jnp.float32).ravel()))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
    )
    if not worst <= ERROR:
        raise ImplementationError(
            f"{key.implementation} with {blocks} on {shape.name}",
            f"differs from XLA by {worst:.1e}, more than {ERROR:.0e}", "report it",
        )
    return Trial(blocks, timer(run, args) * 1e3)


def seconds(run: Callable[..., Any], args: Sequence[Any]) -> float:
    """Median time of one call, of groups that are dispatched together and waited for once."""
    import jax

    jax.block_until_ready(run(*args))
    started = time.perf_counter()
    jax.block_until_ready(run(*args))
    many = max(1, min(50, round(0.02 / max(time.perf_counter() - started, 1e-5))))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(many):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - started) / many)
    return statistics.median(times)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest candidate; of those within a hundredth of it the one with the least VMEM."""
    done = [trial for trial in trials if trial.ms is not None]
    if not done:
        return None
    fastest = min(trial.ms for trial in done if trial.ms is not None)
    near = [trial for trial in done if trial.ms is not None and trial.ms <= fastest * TIE]
    return min(near, key=lambda trial: (trial.vmem, trial.ms))


def _label(shape: Shape, key: tuning.Key) -> str:
    return f"{key.implementation} {key.direction} {shape.name}"


def _row(shape: Shape, key: tuning.Key, trials, basis: str, versions) -> Iterator[dict[str, Any]]:
    winner = best(trials)
    label = _label(shape, key)
    if winner is None:
        print(f"{label}: no candidate works: {trials[0].error if trials else 'there is none'}")
        return
    usual = tuning.space(key.implementation).default(key)
    plain = next((trial.ms for trial in trials if trial.blocks == usual), None)
    against = "" if plain is None else f", the heuristic {plain:.3f} ms"
    sizes = " ".join(f"{name}={size}" for name, size in winner.blocks.items())
    print(f"{label}: {sizes}: {winner.ms:.3f} ms {basis}{against}")
    _show(trials, usual, plain)
    yield {
        **dataclasses.asdict(key.bucket()), "blocks": winner.blocks, "ms": round(winner.ms, 4),
        "basis": basis, "shape": shape.name, "versions": dict(versions),
        "date": datetime.date.today().isoformat(),
    }


def _show(trials: Sequence[Trial], usual: tuning.Blocks, plain: float | None) -> None:
    """Print every candidate, fastest first: its time, also over the heuristic's, and its sizes."""
    lines = []
    for trial in sorted(trials, key=lambda t: math.inf if t.ms is None else t.ms):
        changed = [f"{n}={size}" for n, size in trial.blocks.items() if size != usual.get(n)]
        times = ["-", "-"] if trial.ms is None else [
            f"{trial.ms:.3f}", "-" if plain is None else f"{trial.ms / plain:.3f}"
        ]
        lines.append([*times, " ".join(changed) or "the heuristic", trial.error])
    table(("ms", "/ heuristic", "sizes", ""), lines)


def write(folder: Path, kind: str, rows: Iterator[dict[str, Any]]) -> int:
    """Put rows into the device's table as they come, over those of the same call; how many."""
    path = folder / f"{tuning.slug(kind)}.json"
    count = 0
    for row in rows:
        kept = [old for old in _stored(path) if tuning.row_key(old) != tuning.row_key(row)]
        kept = sorted([*kept, row], key=lambda r: str(dataclasses.astuple(tuning.row_key(r))))
        lines = ",\n".join("  " + json.dumps(r) for r in kept)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"device": {json.dumps(kind)},\n "rows": [\n{lines}\n]}}\n')
        count += 1
    tuning.table.cache_clear()
    if count:
        print(f"{count} rows in {path}")
    return count


def _stored(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"tuned table {path}", f"cannot be read ({error})", "delete it and tune again"
        ) from None
