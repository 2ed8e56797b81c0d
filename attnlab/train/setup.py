"""From a recipe to everything a run needs: corpus, tokenizer, rows, mesh, compiled trainer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import attnlab
from attnlab.core import config as configs
from attnlab.core.errors import ConfigError, MeshError
from attnlab.data.corpus import load_corpus
from attnlab.data.packing import PackedRows
from attnlab.data.tokenizer import Tokenizer, load_tokenizer
from attnlab.parallel import processes
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train.data import build_rows
from attnlab.train.recipe import Recipe
from attnlab.train.state import Trainer, TrainState, check_batch


@dataclasses.dataclass(frozen=True)
class Run:
    """A prepared run."""

    recipe: Recipe
    trainer: Trainer
    tokenizer: Tokenizer
    train_rows: PackedRows
    val_rows: PackedRows
    fingerprint: str
    prompt: np.ndarray

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says about where it comes from."""
        versions = {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax")}
        versions["attnlab"] = attnlab.__version__
        return {
            "recipe": configs.to_dict(self.recipe), "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.fingerprint, "versions": versions,
        }

    def sample(self, state: TrainState) -> str:
        """A continuation of the first validation tokens, through the prefill/decode path."""
        from attnlab.infer.generate import generate
        from attnlab.infer.sample import SampleConfig

        params, layers = jax.device_put((state.params, state.layers), self.trainer.replicated)
        out = generate(
            (self.trainer.graphdef, params), [self.prompt.tolist()],
            new_tokens=self.recipe.train.sample_tokens, state=layers,
            sample=SampleConfig(temperature=0.8, top_k=40), key=jax.random.key(0),
            stop_ids=[self.tokenizer.bos],
        )
        text = [t for t in self.prompt.tolist() if t != self.tokenizer.bos]
        return self.tokenizer.decode(text + out.tokens[0])


def make_trainer(recipe: Recipe) -> Trainer:
    """The compiled part of a run: needs no data."""
    c = recipe.train
    mesh = make_mesh(c.mesh)
    cut = {axis for axes in RULES.values() for axis in axes}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in cut:
            raise MeshError(
                f"mesh {axis}={size}", "nothing in this version is cut over that axis",
                f"use {', '.join(sorted(cut))}",
            )
    return Trainer(
        recipe.model, recipe.optimizer, c.steps, mesh, RULES, accumulate=c.accumulate,
        layout="packed" if recipe.data.document_mask else "full", impl=c.impl, seed=c.seed,
    )


def read_data(recipe: Recipe) -> tuple[Tokenizer, PackedRows, PackedRows, str, str]:
    """``(tokenizer, train rows, validation rows, fingerprint, description)``."""
    d, c = recipe.data, recipe.train
    tokenizer = load_tokenizer(d.tokenizer, d.bos_token)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {recipe.model.vocab_size}",
            f"the tokenizer {d.tokenizer!r} has {tokenizer.vocab_size} ids",
            f"--set model.vocab_size={tokenizer.vocab_size}",
        )
    corpus = load_corpus(
        d.data, val_data=d.val_data, text_field=d.text_field, token_dtype=d.token_dtype
    )

    def rows(documents, batch):
        return build_rows(
            documents, tokenizer, c.seq_len, packing=d.packing, document_mask=d.document_mask,
            batch=batch,
        )

    train, val = rows(corpus.train, c.batch), rows(corpus.val, 1)
    return tokenizer, train, val, corpus.fingerprint, corpus.description


def prepare(recipe: Recipe, say: Callable[[str], None]) -> Run:
    """Read the data, build the mesh and the trainer; all processes must agree on all of it."""
    trainer = make_trainer(recipe)
    check_batch(recipe.train.batch, recipe.train.accumulate, trainer.mesh, RULES)
    tokenizer, train, val, fingerprint, description = read_data(recipe)
    processes.agree("the recipe or the corpus", recipe.to_json() + fingerprint)
    mesh = ",".join(f"{k}={v}" for k, v in trainer.mesh.shape.items() if v > 1) or "one device"
    say(f"{recipe.name}: {recipe.model.param_count():,} parameters, {recipe.model.layers} layers")
    say(f"data: {description}, fingerprint {fingerprint}")
    say(f"mesh: {mesh} ({jax.devices()[0].device_kind}), {jax.process_count()} process(es)")
    prompt = np.asarray(val[0]["tokens"][: min(32, recipe.train.seq_len // 2)])
    return Run(recipe, trainer, tokenizer, train, val, fingerprint, prompt)
