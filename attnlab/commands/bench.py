"""``attnlab bench``: see ``attnlab.analysis.bench``, ``bench_attention`` and ``lab``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser
from attnlab.core.errors import ConfigError

# Flags of the laboratory alone, and their defaults.
_LAB = {"shape": None, "blocks": None, "backward": False, "golden": None}


def parser(p: Parser) -> None:
    from attnlab.analysis import bench
    from attnlab.analysis.targets import TARGETS

    bench.add_arguments(p)
    lab = p.add_argument_group(
        "attention by its compiler", "nothing is measured; --impl and --out as above"
    )
    where = lab.add_mutually_exclusive_group()
    where.add_argument("--target", metavar="NAME", help=f"compile for {', '.join(TARGETS)}")
    where.add_argument("--all-targets", action="store_true", help="compile for every target")
    lab.add_argument("--shape", nargs="+", metavar="NAME",
                     help="shapes of ops/attention/shapes.py, or their tags (default: primary)")
    lab.add_argument("--blocks", nargs="+", metavar="SIZES",
                     help="name=size,... a candidate; used: what a call takes (default); all")
    lab.add_argument("--backward", action="store_true",
                     help="forward and backward instead of forward")
    lab.add_argument("--golden", metavar="FILE",
                     help="write the rows that CI compares schedules with")


def run(args: Args) -> int:
    from attnlab.analysis import bench

    wanted = args.target or args.all_targets
    if not wanted:
        for name, default in _LAB.items():
            if getattr(args, name) != default:
                rule = "means nothing without --target or --all-targets"
                raise ConfigError(f"--{name}", rule, "pass --target v5e")
        return bench.main(args)
    if args.what != "attention":
        raise ConfigError(
            f"bench {args.what} with a target", "only attention is compiled for absent devices",
            "use bench attention",
        )
    measured = bench.TRAIN | bench.ATTENTION | {"seq_len": None}
    bench.refuse(args, measured, "bench attention --target")
    from attnlab.analysis import lab

    return lab.main(args)
