"""A recipe is a run, written down: model, data, optimizer, mesh and cadence in one config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from etils import epath

from attnlab.core import config as configs
from attnlab.core.errors import ConfigError
from attnlab.models import presets
from attnlab.models.decoder import DecoderConfig
from attnlab.train.data import DataConfig
from attnlab.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, size and cadence of a run.

    Args:
        steps: optimizer steps. batch: rows a step over all devices. seq_len: T tokens a row.
        accumulate: microbatches a step. seed: of initialisation and data order.
        mesh: "data=2,fsdp=2,..." with -1 for the rest; None = every device on data.
        impl: attention implementation, None = the first that serves the call.
        log_every, eval_every, checkpoint_every: steps (0 = only at the end).
        eval_rows: validation rows an evaluation, 0 = all of them. keep: checkpoints kept.
        sample_tokens: tokens generated when the run ends, 0 = none.
        init_from: run folder whose weights (alone) the run starts from, None = random.
    """

    steps: int
    batch: int
    seq_len: int
    accumulate: int = 1
    seed: int = 0
    mesh: str | None = None
    impl: str | None = None
    log_every: int = 10
    eval_every: int = 0
    eval_rows: int = 0
    checkpoint_every: int = 0
    keep: int = 3
    sample_tokens: int = 200
    init_from: str | None = None

    def __post_init__(self):
        for name, least in (
            ("steps", 1), ("batch", 1), ("seq_len", 2), ("accumulate", 1), ("log_every", 1),
            ("eval_every", 0), ("eval_rows", 0), ("checkpoint_every", 0), ("keep", 1),
            ("sample_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"TrainConfig.{name} = {getattr(self, name)}",
                    f"must be at least {least}", f"use {least} or more",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run; saved as ``config.json`` in its folder."""

    name: str
    model: DecoderConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig

    def to_json(self) -> str:
        return json.dumps(configs.to_dict(self), indent=2) + "\n"


def _quickstart() -> Recipe:
    return Recipe(
        name="quickstart",
        model=presets.preset("quickstart"),
        data=DataConfig(),
        # Tuned on the embedded corpus: 1.0 M tokens are what two cores read in under three minutes.
        optimizer=OptimizerConfig(
            name="muon", lr=1.2e-2, matrix_lr=1e-2, momentum=0.9, schedule="wsd", warmup=20,
            decay=0.5, final=0.02, weight_decay=0.0,
        ),
        train=TrainConfig(
            steps=500, batch=8, seq_len=256, log_every=10, eval_every=250, checkpoint_every=100,
        ),
    )


def _language_model(name: str, batch: int, steps: int) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return Recipe(
            name=name,
            model=presets.preset(name),
            data=DataConfig(),
            optimizer=OptimizerConfig(),
            train=TrainConfig(
                steps=steps, batch=batch, seq_len=4096, eval_every=1000, eval_rows=64,
                checkpoint_every=1000,
            ),
        )

    return recipe


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": _quickstart,
    "125m": _language_model("125m", 64, 20_000),
    "350m": _language_model("350m", 64, 30_000),
    "1b": _language_model("1b", 128, 50_000),
}


def load(name: str, assignments: list[str] | None = None) -> Recipe:
    """A recipe by name, or from a ``.json`` file written by a run, with fields changed."""
    if name in RECIPES:
        recipe = RECIPES[name]()
    elif name.endswith(".json"):
        recipe = from_json(name)
    else:
        raise ConfigError(
            f"recipe = {name!r}", "is neither a known recipe nor a .json file",
            f"use one of {', '.join(RECIPES)} or the config.json of a run",
        )
    return configs.override(recipe, assignments or [])


def from_json(path: Any) -> Recipe:
    """The recipe stored at ``path``."""
    try:
        data = json.loads(epath.Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"recipe file {path}", "does not exist", "check the path") from None
    except OSError as error:
        raise ConfigError(
            f"recipe file {path}", f"cannot be read ({error})", "pass a config.json"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recipe file {path}", f"is not JSON ({error})", "write it with `attnlab train`"
        ) from None
    return configs.from_dict(Recipe, data, "recipe")
