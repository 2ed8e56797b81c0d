"""``attnlab tune``: see ``attnlab.analysis.tune``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser, number


def parser(p: Parser) -> None:
    from attnlab.analysis.targets import TARGETS

    names = ", ".join(name for name, target in TARGETS.items() if target.platform == "tpu")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--target", metavar="NAME", help=f"predict for {names} (default: measure)")
    where.add_argument("--all-targets", action="store_true", help="predict for every TPU")
    p.add_argument("--shape", nargs="+", metavar="NAME",
                   help="shapes of ops/attention/shapes.py, or their tags (default: primary)")
    p.add_argument("--impl", nargs="+", metavar="NAME",
                   help="implementations (default: those with block sizes on the device)")
    p.add_argument("--budget", type=number, metavar="MINUTES",
                   help="measuring: begin no pass after so many (default: no limit)")
    p.add_argument("--out", metavar="FOLDER",
                   help="where the tables are (default: the package's own, attnlab/data/tuned)")


def run(args: Args) -> int:
    from attnlab.analysis import tune

    return tune.main(args)
