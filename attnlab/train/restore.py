"""A finished or running run, opened for evaluation, generation or export."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from attnlab.core import config as configs
from attnlab.core.errors import CheckpointError
from attnlab.data.tokenizer import Tokenizer, load_tokenizer
from attnlab.train import recipe as recipes
from attnlab.train.checkpoint import Checkpoints, restore_weights
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
    """Open run folder ``path`` at ``step`` (default: its newest checkpoint) on this machine.

    Raises CheckpointError if there is no run, no such checkpoint, or the checkpoint is damaged.
    """
    folder = epath.Path(path)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{path}", "is not the folder of a run (no config.json)",
            "pass the --out folder of `attnlab train`",
        )
    recipe = recipes.from_json(str(folder / "config.json"))
    recipe = configs.override(recipe, ["train.mesh=None"])
    trainer = make_trainer(recipe)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{path}", "holds no complete checkpoint yet", "let the run reach its first checkpoint"
        )
    chosen = steps[-1] if step is None else step
    params, layers = restore_weights(folder / "checkpoints", trainer, chosen)
    meta = checkpoints.meta(chosen)
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.bos_token)
    return LoadedRun(recipe, trainer, params, layers, tokenizer, meta["fingerprint"], chosen)
