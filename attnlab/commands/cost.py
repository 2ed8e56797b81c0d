"""``attnlab cost``: see ``attnlab.analysis.cost``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser


def parser(p: Parser) -> None:
    from attnlab.analysis.targets import DEVICES

    add = p.add_argument
    add("--variants", metavar="NAMES", help="comma-separated (default: all)")
    add("--target", default="h200", metavar="NAME", help=f"{', '.join(DEVICES)} (default: h200)")
    add("--mode", choices=("train", "prefill", "decode", "mix"), default="decode",
        help="default: decode; mix: 176 tokens read for each one answered")
    add("--contexts", metavar="LENGTHS", help="comma-separated, 4k is 4096 (default: 1k to 128k)")
    add("--batch", type=int, default=1, help="rows (default: 1)")
    add("--json", action="store_true", help="print JSON: FLOPs, bytes, intensity, bound, seconds")
    add("--plot", metavar="FILE", help="draw time against context length")


def run(args: Args) -> int:
    from attnlab.analysis import cost

    return cost.main(args)
