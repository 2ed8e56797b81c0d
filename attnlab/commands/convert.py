"""``attnlab convert``."""

from __future__ import annotations

import os
from typing import Any

from attnlab.commands.parsing import Args, Parser, run_argument
from attnlab.core.errors import ConfigError, DataError


def parser(p: Parser) -> None:
    run_argument(p)
    p.add_argument("--to", choices=("npz", "safetensors"), required=True, help="file format")
    p.add_argument("--out", required=True, metavar="FILE", help="file to write")
    p.add_argument(
        "--layout", choices=("stacked", "unstacked"), default="stacked",
        help="layers on a leading axis as in training, or one entry a layer (default: stacked)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the file")


def run(args: Args) -> int:
    if os.path.isdir(args.out):
        raise ConfigError(f"--out {args.out}", "is a folder", "name a file")
    if os.path.exists(args.out) and not args.overwrite:
        raise ConfigError(f"--out {args.out}", "exists", "pass --overwrite or another file")
    write = {"npz": write_npz, "safetensors": write_safetensors}[args.to]
    from attnlab.train.restore import load_run

    run = load_run(args.folder, step=args.step)
    arrays = named_arrays(run.params, args.layout)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    write(arrays, args.out, {"attnlab_recipe": run.recipe.to_json(), "step": str(int(run.step))})
    size = sum(a.nbytes for a in arrays.values())
    print(f"{args.out}: {len(arrays)} arrays, {size / 1e6:.1f} MB, step {int(run.step)}")
    return 0


def named_arrays(params: Any, layout: str = "stacked") -> dict[str, Any]:
    """Host arrays by dotted name, as ``blocks.0.attn.w_q``."""
    import jax
    import numpy as np

    if layout == "unstacked":
        from attnlab.convert import restack

        params = restack.unstack(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): np.asarray(leaf)
        for path, leaf in leaves
    }


def write_npz(arrays: dict[str, Any], out: str, meta: dict[str, str]) -> None:
    import numpy as np

    odd = sorted({a.dtype.name for a in arrays.values() if a.dtype.kind == "V"})
    if odd:
        raise ConfigError(f"--to npz with {odd[0]} parameters", "NumPy files have no such dtype",
                          "use --to safetensors")
    with open(out, "wb") as file:
        np.savez(file, **arrays, **{f"__{k}__": np.asarray(v) for k, v in meta.items()})


def write_safetensors(arrays: dict[str, Any], out: str, meta: dict[str, str]) -> None:
    try:
        from safetensors.flax import save_file
    except ImportError:
        raise DataError(
            "--to safetensors", "needs the safetensors package", 'pip install "attnlab[hf]"'
        ) from None
    save_file(arrays, out, metadata=meta)
