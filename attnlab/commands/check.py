"""``attnlab check``: see ``attnlab.analysis.check``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser


def parser(p: Parser) -> None:
    """No flags."""


def run(args: Args) -> int:
    from attnlab.analysis import check

    return check.main(debug=args.debug)
