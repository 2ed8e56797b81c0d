"""``attnlab bench``: see ``attnlab.analysis.bench``, ``bench_attention`` and ``lab``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from attnlab.commands.parsing import Args, Parser
from attnlab.core.errors import ConfigError

MEASURED = "attnlab.analysis.bench_attention"


def parser(p: Parser) -> None:
    from attnlab.analysis import bench

    whats = p.add_subparsers(dest="what", required=True, metavar="WHAT", title="what to time")
    bench.add_arguments(whats.add_parser("train", help="the training step of a recipe"))
    attention = whats.add_parser(
        "attention", help="attention kernels: measured here, or judged by a target's compiler"
    )
    if importlib.util.find_spec(MEASURED):
        importlib.import_module(MEASURED).add_arguments(attention)
    _lab(attention)


def _lab(parser: Parser) -> None:
    """The flags of the laboratory; those that the measured benchmark has too are shared."""
    from attnlab.analysis.targets import TARGETS

    def add(flag: str, **keywords: Any) -> None:
        if flag not in parser._option_string_actions:
            parser.add_argument(flag, **keywords)

    add("--target", metavar="NAME", help=f"compile for {', '.join(TARGETS)}; nothing is measured")
    add("--all-targets", action="store_true", help="compile for every target")
    add("--shape", nargs="+", metavar="NAME",
        help="shapes of ops/attention/shapes.py, or their tags (default: primary)")
    add("--impl", nargs="+", metavar="NAME",
        help="implementations (default: those with block sizes on the target)")
    add("--blocks", nargs="+", metavar="SIZES",
        help="name=size,... a candidate; used: what a call takes (default); all: every candidate")
    add("--backward", action="store_true", help="forward and backward instead of forward")
    add("--golden", metavar="FILE", help="write the rows that CI compares schedules with")
    add("--out", metavar="FILE", help="append the rows to this JSON file")


def run(args: Args) -> int:
    if args.what == "train":
        from attnlab.analysis import bench

        return bench.main(args)
    if args.target or args.all_targets:
        from attnlab.analysis import lab

        return lab.main(args)
    if not importlib.util.find_spec(MEASURED):
        raise ConfigError(
            "bench attention without --target", "would measure on this device, which is not built",
            "pass --target v5e or --all-targets",
        )
    return importlib.import_module(MEASURED).main(args)
