"""``attnlab eval``."""

from __future__ import annotations

import json
import sys

from attnlab.analysis.printing import table
from attnlab.commands.parsing import Args, Parser, run_argument, whole
from attnlab.core.errors import ConfigError


def parser(p: Parser) -> None:
    run_argument(p)
    what = p.add_argument_group("what to evaluate on").add_mutually_exclusive_group()
    what.add_argument(
        "--split", choices=("validation", "train"), default="validation",
        help="of the run's own corpus (default: validation)",
    )
    what.add_argument(
        "--data", "--val-data", nargs="+", metavar="PATH", dest="data",
        help="other files, folders or globs, all of them",
    )
    p.add_argument(
        "--batch", type=whole, metavar="N",
        help="rows a batch (as in the run, filled up to a multiple of the devices)",
    )
    p.add_argument("--json", action="store_true", help="also print one line of JSON")


def run(args: Args) -> int:
    from attnlab.infer.evaluate import evaluate
    from attnlab.models.mlp import round_up
    from attnlab.parallel.feed import batch_shard
    from attnlab.train.data import eval_batches
    from attnlab.train.restore import load_run

    run = load_run(args.folder, step=args.step)
    rows, fingerprint = _eval_rows(args, run)
    batch = args.batch
    if batch is None:  # the run's, filled up to what these devices divide
        batch = round_up(run.recipe.train.batch, run.trainer.mesh.size)
    if batch < 1:
        raise ConfigError(f"--batch {batch}", "is a number of rows, at least 1", "leave it out")
    shape = (batch, run.recipe.train.seq_len)
    index, count = batch_shard(run.trainer.batch_sharding, shape)
    batches = eval_batches(rows, batch, shard_index=index, shard_count=count)
    found = evaluate(
        run.trainer, run.params, batches, layers=run.layers, bytes_per_token=rows.bytes_per_token
    )
    row = {
        "run": args.folder, "step": int(run.step), "on": args.data or args.split,
        "nats_per_token": found.nats_per_token, "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens, "fingerprint": fingerprint,
    }
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    table(
        ("step", "nats/token", "bits/byte", "tokens", "corpus"),
        [(row["step"], f"{found.nats_per_token:.4f}", bits, f"{found.tokens:,}", fingerprint)],
    )
    if args.json:
        print(json.dumps(row))
    return 0


def _eval_rows(args: Args, run):
    from attnlab.data.corpus import load_corpus
    from attnlab.train.data import build_rows
    from attnlab.train.setup import read_data

    data, train = run.recipe.data, run.recipe.train
    if args.data:
        corpus = load_corpus(
            args.data, text_field=data.text_field, token_dtype=data.token_dtype, val_fraction=0
        )
        rows = build_rows(
            corpus.train, run.tokenizer, train.seq_len, packing=data.packing,
            document_mask=data.document_mask,
        )
        return rows, corpus.fingerprint
    _, on_train, on_val, fingerprint, _ = read_data(run.recipe)
    if fingerprint != run.corpus_fingerprint:
        print(
            f"note: this corpus ({fingerprint}) is not the one of the run "
            f"({run.corpus_fingerprint}); the split may differ", file=sys.stderr,
        )
    return (on_val if args.split == "validation" else on_train), fingerprint
