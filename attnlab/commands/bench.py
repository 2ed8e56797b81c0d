"""``attnlab bench``: see ``attnlab.analysis.bench``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser


def parser(p: Parser) -> None:
    from attnlab.analysis import bench

    bench.add_arguments(p)


def run(args: Args) -> int:
    from attnlab.analysis import bench

    return bench.main(args)
