"""``attnlab bench attention --target``: kernels judged by their compiler, without the accelerator.

Every candidate (implementation and block sizes) is compiled for the target by its real compiler.
On TPUs the static cycle model predicts its time from the schedule (``tpu_model``); on the H200
there is no such model, and registers, spills and shared memory say which candidates are hopeless.
Nothing here is measured, and every output says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attnlab.analysis import aot, bench, golden
from attnlab.analysis.targets import TARGETS, Target, find
from attnlab.core.errors import ConfigError
from attnlab.ops.attention import OP, tuning
from attnlab.ops.attention.shapes import SHAPES, Shape

BASIS = "predicted (static model), nothing measured"
COMPILED = "compiled, nothing predicted or measured"
OURS = ("tpu", "gpu")
BASELINE = "splash"  # what kernels for TPUs are compared with


def main(args: argparse.Namespace) -> int:
    """Compile and print the tables; 1 where no candidate compiled."""
    targets = installed() if args.all_targets else [find(args.target)]
    if args.golden:
        return golden.main(Path(args.golden), targets)
    if args.out:
        bench.stored(Path(args.out))  # a file that cannot take rows is no use after the compiles
    shapes = shapes_of(args.shape or ["primary"])
    direction = "backward" if args.backward else "forward"
    names = args.impl.split(",") if args.impl else []
    cells = [
        cell for target in targets for shape in shapes
        for cell in candidates(target, shape, direction, names, args.blocks or ())
    ]
    rows: list[dict[str, Any]] = [cell for cell in cells if "error" in cell]
    waiting = [cell for cell in cells if "error" not in cell]
    basis = BASIS if any(t.platform == "tpu" for t in targets) else COMPILED
    print(f"{basis}; compiled for {', '.join(t.name for t in targets)} without the device")
    for done, row in enumerate(aot.run(waiting), start=1):
        rows.append(row)
        if sys.stderr.isatty():
            end = "\n" if done == len(waiting) else ""
            print(f"\r{done} of {len(waiting)} candidates", end=end, file=sys.stderr, flush=True)
    for target in targets:
        for shape in shapes:
            key = (target.name, shape.name)
            report(target, shape, direction, [
                row for row in rows if (row["target"], row["shape"]["name"]) == key
            ])
    if args.out:
        for row in rows:
            bench.append(Path(args.out), stored(row))
    return 0 if any("error" not in row for row in rows) else 1


def installed() -> list[Target]:
    """The targets whose compiler is here; says which are left out and why.

    Raises:
        ConfigError: there is no compiler at all.
    """
    found = []
    for target in TARGETS.values():
        try:
            aot.require(target)
            found.append(target)
        except ConfigError as error:
            print(f"left out: {error}")
            last = error
    if not found:
        raise last
    return found


def shapes_of(names: Sequence[str]) -> list[Shape]:
    """The shapes with these names or tags, in the order of the table."""
    known = {shape.name for shape in SHAPES} | {tag for shape in SHAPES for tag in shape.tags}
    for name in names:
        if name not in known:
            fix = f"use one of {', '.join(sorted(known))}"
            raise ConfigError(f"--shape {name}", "unknown", fix)
    wanted = set(names)
    return [shape for shape in SHAPES if shape.name in wanted or wanted & set(shape.tags)]


def key_of(shape: Shape, implementation: str, direction: tuning.Direction) -> tuning.Key:
    """The tuning key of a shape."""
    return tuning.Key(
        implementation, direction, shape.H, shape.V, shape.N // shape.K, "bfloat16", shape.T,
        shape.T, tuning.mask_class(shape.mask),
    )


def candidates(
    target: Target, shape: Shape, direction: tuning.Direction, names: Sequence[str] = (),
    blocks: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """The cells to compile; a cell that its implementation refuses carries an ``error``.

    Args:
        names: implementations, none for ours and those with block sizes. blocks: ``used``,
            ``all`` or ``name=size,...``, none for ``used``.

    Raises:
        ConfigError: a name or a size is unknown.
    """
    usual = [  # jax-triton cannot compile for a device that is not here
        n for n in OP.order[target.platform]
        if n in OURS or (n in tuning.SPACES and n != "triton")
    ]
    for name in names:
        if name not in OP.implementations:
            raise ConfigError(
                f"--impl {name}", "unknown", f"use one of {', '.join(OP.implementations)}"
            )
    chosen = list(names) or usual
    if target.platform == "tpu" and BASELINE not in chosen:
        chosen.append(BASELINE)
    for name in chosen:
        cell = {
            "target": target.name, "implementation": name, "direction": direction,
            "shape": dataclasses.asdict(shape), "blocks": None, "forced": False,
        }
        reason = OP.implementations[name].supports(shape.call(target.device))
        if reason is None and direction == "backward" and "forward_only" in shape.tags:
            reason = f"{shape.name} is a shape of inference"
        if reason is not None:
            yield cell | {"error": f"refused: {reason}"}
            continue
        words = [*blocks, "used"] if name == BASELINE or not blocks else blocks
        for sizes in _sizes(key_of(shape, name, direction), target, words):
            yield cell | {"blocks": sizes, "forced": sizes is not None}


def _sizes(
    key: tuning.Key, target: Target, words: Sequence[str]
) -> list[tuning.Blocks | None]:
    """The candidates that ``words`` name, without repetition; None is what a call would use."""
    if key.implementation not in tuning.SPACES:
        return [None]
    space, found = tuning.space(key.implementation), []
    for word in words:
        if word == "all":
            found += [b for b in space.candidates(key) if space.refuses(key, b) is None]
        elif word != "used":
            found.append(parse_blocks(word))
    used = tuning.choose(key, target.device).blocks
    if "used" in words or used in found:
        found = [None, *(sizes for sizes in found if sizes != used)]
    return [sizes for i, sizes in enumerate(found) if sizes not in found[:i]]


def parse_blocks(text: str) -> tuning.Blocks:
    """``block_q=512,block_kv=1024`` as a dict; ConfigError where it is something else."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and size.isascii() and size.isdecimal() for name, _, size in pairs):
        raise ConfigError(
            f"--blocks {text}", "is not name=size,...", "write --blocks block_q=512,block_kv=1024"
        )
    return {name: int(size) for name, _, size in pairs}


def stored(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a file: what it rests on, and when."""
    shape = {k: list(v) if isinstance(v, tuple) else v for k, v in row["shape"].items()}
    today = datetime.date.today().isoformat()
    basis = BASIS if "ms" in row else COMPILED
    return {"bench": "attention", "basis": basis, **row, "shape": shape, "date": today}


def report(target: Target, shape: Shape, direction: str, rows: list[dict[str, Any]]) -> None:
    """Print the candidates of one target and shape, fastest first, then those that failed."""
    from attnlab.analysis import lab_table

    passes = "forward" if direction == "forward" else "forward + backward"
    print(f"\n{target.name} ({target.kind})  {shape.name}  {passes}")
    lab_table.show(target, rows, BASELINE, direction)
    for row in rows:
        if "error" in row:
            print(f"  {row['implementation']} {lab_table.sizes(row['blocks'])}: {row['error']}")
