"""Bigram-backcopy, the task on which attention sinks appear."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.tasks.task import NONE, Batch, Line, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigramBackcopy(Line):
    """A Markov chain with triggers: what follows a trigger is a copy of what came before it.

    Token 0 begins the row; tokens 1 to ``triggers`` are the triggers. What follows another token is
    drawn from its row of a fixed table, a draw of a Dirichlet distribution of ``concentration``.
    Labels are the next tokens; scored are those after a trigger, which alone can be known. A model
    attends to the token before at triggers and has nothing to look for elsewhere: there the first
    token becomes a sink. Guo et al. 2024, arXiv 2410.13835.

    Args:
        table: seed of the table.
    """

    length: int = 64
    vocab: int = 64
    triggers: int = 3
    concentration: float = 0.1
    table: int = 0

    def __post_init__(self):
        require(self.length >= 4, f"length = {self.length}", "must be at least 4", "use 64")
        require(
            0 < self.triggers < self.vocab - 2, f"triggers = {self.triggers}",
            f"must leave two other tokens of vocab = {self.vocab}", "use 3",
        )
        require(
            self.concentration > 0, f"concentration = {self.concentration}", "must be positive",
            "use 0.1",
        )

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 1)

    def probabilities(self) -> np.ndarray:
        """The table ``[vocab, vocab]``: of each token, what follows it; never the first token."""
        return _table(self.vocab, self.concentration, self.table)

    def draw(self, key: jax.Array) -> Batch:
        logits = jnp.log(jnp.asarray(self.probabilities()))
        second, key = jax.random.split(key)
        start = jax.random.randint(second, (), self.triggers + 1, self.vocab)

        def follow(pair, key):
            before, last = pair
            drawn = jax.random.categorical(key, logits[last])
            after = jnp.where(self._trigger(last), before, drawn)
            return (last, after), after

        keys = jax.random.split(key, self.length - 1)
        first = jnp.int32(0)
        _, rest = jax.lax.scan(follow, (first, start), keys)
        tokens = jnp.concatenate([jnp.stack([first, start]), rest])
        return row(tokens[:-1], tokens[1:], self._trigger(tokens[:-1]))

    def _trigger(self, token):
        return (token >= 1) & (token <= self.triggers)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([[NONE], tokens[:-1]])


@functools.cache
def _table(vocab: int, concentration: float, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).dirichlet(np.full(vocab - 1, concentration), vocab)
    return np.pad(drawn, ((0, 0), (1, 0))).astype(np.float32)
