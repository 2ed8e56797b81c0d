"""A finished or running run, opened for evaluation, generation or export."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnlab.core import config as configs
from attnlab.core.errors import CheckpointError
from attnlab.data.tokenizer import Tokenizer, load_tokenizer
from attnlab.train import recipe as recipes
from attnlab.train.checkpoint import restore_weights, run_folder
from attnlab.train.recipe import Recipe
from attnlab.train.setup import make_trainer
from attnlab.train.state import Trainer


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds."""

    recipe: Recipe
    trainer: Trainer
    params: Any
    layers: list  # explicit state of the layers
    tokenizer: Tokenizer
    corpus_fingerprint: str
    step: int


def load_run(path: str, step: int | None = None) -> LoadedRun:
    """Open run folder ``path`` at ``step`` (default: its newest good checkpoint) on this machine.

    Raises CheckpointError if there is no run, no such checkpoint, a damaged one, or the tokenizer
    is no longer the one of the run.
    """
    folder = run_folder(path)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{path}", "is not the folder of a run (no config.json)",
            "pass the --out folder of `attnlab train`",
        )
    recipe = recipes.from_json(str(folder / "config.json"))
    recipe = configs.override(recipe, ["train.mesh=None"])
    trainer = make_trainer(recipe)
    found = restore_weights(folder / "checkpoints", trainer, step)
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.bos_token)
    if tokenizer.fingerprint != found.meta.get("tokenizer"):
        raise CheckpointError(
            f"tokenizer {recipe.data.tokenizer} has fingerprint {tokenizer.fingerprint}",
            f"the run was trained with {found.meta.get('tokenizer')}",
            "put its tokenizer file back",
        )
    return LoadedRun(
        recipe, trainer, found.params, found.layers, tokenizer, found.meta.get("fingerprint", ""),
        found.step,
    )
