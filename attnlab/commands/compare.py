"""``attnlab compare``: see ``attnlab.compare.grid``."""

from __future__ import annotations

from pathlib import Path

from attnlab.commands.parsing import Args, Parser, whole


def parser(p: Parser) -> None:
    add = p.add_argument
    add("--variants", required=True, metavar="NAMES", help="comma-separated; the first is the "
        "baseline of significance")
    add("--task", default="mqar", metavar="NAMES", help="comma-separated (default: mqar); attnlab "
        "list names them")
    add("--seeds", type=whole, default=3, help="default: 3")
    add("--rates", default="3e-3", metavar="NUMBERS",
        help="peak learning rates; each variant is judged at its best (default: 3e-3)")
    add("--steps", type=whole, default=600, help="of 64 rows (default: 600)")
    add("--dim", type=whole, default=64, help="width of the models (default: 64)")
    add("--heads", type=whole, default=2, help="default: 2")
    add("--layers", type=whole, default=2, help="default: 2")
    add("--short-conv", default="on", choices=("on", "off"),
        help="a gated convolution over 3 tokens in front of every mixer (default: on)")
    add("--match", default="parameters", choices=("parameters", "none"),
        help="widen the MLP of smaller models until all have as many parameters (default), or not")
    add("--out", type=Path, default=Path("compare"), metavar="FOLDER",
        help="rows, table, grid; an interrupted comparison goes on (default: compare)")


def run(args: Args) -> int:
    from attnlab.compare import grid as grids
    from attnlab.compare.fit import Budget
    from attnlab.core.errors import ConfigError

    try:
        rates = tuple(float(x) for x in args.rates.split(","))
    except ValueError:
        raise ConfigError(f"--rates {args.rates}", "are no numbers", "use 1e-3,3e-3") from None
    grid = grids.Grid(
        variants=tuple(args.variants.split(",")), tasks=tuple(args.task.split(",")),
        seeds=args.seeds, rates=rates, budget=Budget(steps=args.steps), dim=args.dim,
        heads=args.heads, layers=args.layers, mlp_dim=args.dim, match=args.match,
        short_conv=3 if args.short_conv == "on" else 0,
    )
    rows = grids.run(grid, args.out, lambda line: print(line, flush=True))
    table = grids.markdown(grids.summary(rows, grid.variants[0]))
    note = grids.note(grid)
    (args.out / "table.md").write_text(f"{table}\n\n{note}\n")
    print(f"\n{table}\n\n{note}\n{args.out / 'table.md'}, {args.out / 'results.json'}")
    return 0
