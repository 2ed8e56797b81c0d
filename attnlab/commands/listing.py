"""``attnlab list``."""

from __future__ import annotations

import json
from typing import Any

from attnlab.analysis.printing import table
from attnlab.commands.parsing import Args, Parser


def parser(p: Parser) -> None:
    how = p.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--readme", action="store_true", help="print the variant table of the README")


def run(args: Args) -> int:
    from attnlab.analysis import listing

    if args.readme:
        print(listing.variant_table(), end="")
        return 0
    rows = listing.rows()
    if args.json:
        everything = {
            "variants": rows, "recipes": _recipes(), "presets": _presets(), "tasks": _tasks()
        }
        print(json.dumps(everything, indent=1))
        return 0
    table(
        ("variant", "what it is", "paper", "cache B/token", "supports", "implementations"),
        [
            (r["name"], r["summary"], r["paper"], r["cache_bytes_per_token_bf16"],
             " ".join(r["supports"]), listing.backends(r))
            for r in rows
        ],
    )
    print(f"cache: bytes a token of one layer in bf16 at {listing.Shape()}\n")
    table(
        ("recipe", "parameters", "attention", "steps", "batch", "seq_len"),
        [tuple(_shown(value) for value in r.values()) for r in _recipes()],
    )
    print()
    table(
        ("preset", "parameters", "attention", "layers", "dim"),
        [tuple(_shown(value) for value in r.values()) for r in _presets()],
    )
    print()
    table(
        ("task", "tokens", "vocabulary", "chance", "what it shows"),
        [tuple(_shown(value) for value in r.values()) for r in _tasks()],
    )
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _attention(model) -> str:
    from attnlab.core.registry import name_of

    return ", ".join(name_of(type(layer)) for layer in model.period)


def _recipes() -> list[dict[str, Any]]:
    from attnlab.train.recipe import RECIPES

    return [
        {"name": name, "parameters": r.model.param_count(), "attention": _attention(r.model),
         "steps": r.train.steps, "batch": r.train.batch, "seq_len": r.train.seq_len}
        for name, r in ((name, make()) for name, make in RECIPES.items())
    ]


def _tasks() -> list[dict[str, Any]]:
    from attnlab import tasks

    return [
        {"name": name, "tokens": task.seq_len, "vocabulary": task.vocab_size,
         "chance": task.chance, "shows": row.shows}
        for name, row, task in ((name, row, tasks.get(name)) for name, row in tasks.TASKS.items())
    ]


def _presets() -> list[dict[str, Any]]:
    from attnlab.models.presets import PRESETS

    return [
        {"name": name, "parameters": m.param_count(), "attention": _attention(m),
         "layers": m.layers, "dim": m.dim}
        for name, m in ((name, make()) for name, make in PRESETS.items())
    ]
