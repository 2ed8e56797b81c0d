"""``attnlab cost``: see ``attnlab.analysis.cost``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser


def parser(p: Parser) -> None:
    from attnlab.analysis import cost

    cost.add_arguments(p)


def run(args: Args) -> int:
    from attnlab.analysis import cost

    return cost.main(args)
