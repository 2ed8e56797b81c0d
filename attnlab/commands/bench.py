"""``attnlab bench``: see ``attnlab.analysis.bench``, ``bench_attention`` and ``lab``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser
from attnlab.core.errors import ConfigError


def parser(p: Parser) -> None:
    from attnlab.analysis import bench, bench_attention

    whats = p.add_subparsers(dest="what", required=True, metavar="WHAT", title="what to time")
    bench.add_arguments(whats.add_parser("train", help="the training step of a recipe"))
    attention = whats.add_parser(
        "attention", help="attention kernels: measured here, or judged by a target's compiler"
    )
    bench_attention.add_arguments(attention)
    _lab(attention)


def _lab(parser: Parser) -> None:
    """The flags of the laboratory; --impl and --out are shared with the measured benchmark."""
    from attnlab.analysis.targets import TARGETS

    add = parser.add_argument_group("compiled for a device that is not here").add_argument
    add("--target", metavar="NAME", help=f"compile for {', '.join(TARGETS)}; nothing is measured")
    add("--all-targets", action="store_true", help="compile for every target")
    add("--shape", nargs="+", metavar="NAME",
        help="shapes of ops/attention/shapes.py, or their tags (default: primary)")
    add("--blocks", nargs="+", metavar="SIZES",
        help="name=size,... a candidate; used: what a call takes (default); all: every candidate")
    add("--backward", action="store_true", help="forward and backward instead of forward")
    add("--golden", metavar="FILE", help="write the rows that CI compares schedules with")


def run(args: Args) -> int:
    if args.what == "train":
        from attnlab.analysis import bench

        return bench.main(args)
    measured = {"--case": args.case, "--seconds": args.seconds, "--again": args.again or None,
                "--seq-len": args.seq_len}
    compiled = {"--shape": args.shape, "--blocks": args.blocks, "--golden": args.golden,
                "--backward": args.backward or None}
    target = args.target or args.all_targets
    if args.target and args.all_targets:
        raise ConfigError("--target with --all-targets", "asks for one and for all", "drop one")
    for flag, value in (measured if target else compiled).items():
        if value is not None:
            rule = "measures, and nothing is measured with --target" if target else "needs --target"
            raise ConfigError(flag, rule, "leave it out")
    if target:
        from attnlab.analysis import lab

        return lab.main(args)
    from attnlab.analysis import bench_attention

    return bench_attention.main(args)
