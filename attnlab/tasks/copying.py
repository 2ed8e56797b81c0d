"""Copying and selective copying, and counting of bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.tasks.task import NONE, Batch, Line, Task, require, require_positive, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """``data`` tokens, then ``noise`` zeros, then as many markers: at these, the data in order.

    Data are from 1 to ``alphabet - 2``, the marker is ``alphabet - 1``. Arjovsky et al. 2016,
    arXiv 1511.06464, in the sizes of Gu and Dao 2023, arXiv 2312.00752.
    """

    noise: int = 48
    data: int = 8
    alphabet: int = 16

    def __post_init__(self):
        require_positive(self, "data")
        require(self.noise >= 0, f"noise = {self.noise}", "must not be negative", "use 0")
        require(self.alphabet >= 4, f"alphabet = {self.alphabet}", "must be at least 4", "use 16")

    @property
    def vocab_size(self) -> int:
        return self.alphabet

    @property
    def seq_len(self) -> int:
        return self.noise + 2 * self.data

    @property
    def chance(self) -> float:
        return 1 / (self.alphabet - 2)

    def draw(self, key: jax.Array) -> Batch:
        data, places = jax.random.split(key)
        data = jax.random.randint(data, (self.data,), 1, self.alphabet - 1)
        tokens = jnp.zeros(self.seq_len, jnp.int32).at[self._places(places)].set(data)
        tokens = tokens.at[-self.data :].set(self.alphabet - 1)
        return row(tokens, jnp.full(self.seq_len, NONE).at[-self.data :].set(data))

    def _places(self, key: jax.Array) -> jax.Array:
        return jnp.arange(self.data)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        left, said = [], []
        for token in tokens.tolist():
            if 0 < token < self.alphabet - 1:
                left.append(token)
            said.append(left.pop(0) if token == self.alphabet - 1 else NONE)
        return np.array(said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Copying):
    """Copying whose data stand at random places among the noise: what is noise must be told from
    the token, and data must be counted. Gu and Dao 2023, arXiv 2312.00752."""

    def _places(self, key: jax.Array) -> jax.Array:
        among = self.noise + self.data
        return jnp.sort(jax.random.choice(key, among, (self.data,), replace=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Line):
    """Random bits; at each, whether the ones so far are odd in number (``last``: at the end only).

    Needs a state that flips: softmax attention and linear models with positive eigenvalues do not
    go beyond the length they were trained on (Grazzi et al. 2024, arXiv 2411.12537).
    """

    length: int = 64
    last: bool = False

    def __post_init__(self):
        require_positive(self, "length")

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 0.5

    def draw(self, key: jax.Array) -> Batch:
        bits = jax.random.bernoulli(key, 0.5, (self.length,)).astype(jnp.int32)
        labels = self._labels(jnp.cumsum(bits))
        if self.last:
            labels = jnp.full(self.length, NONE).at[-1].set(labels[-1])
        return row(bits, labels)

    def _labels(self, ones: jax.Array) -> jax.Array:
        return ones % 2

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        return np.array([sum(tokens[: i + 1].tolist()) % 2 for i in range(len(tokens))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Majority(Parity):
    """Random bits; at each, whether most so far are ones. No label where neither is in the
    majority, so that both answers are as likely. One layer of even attention does it."""

    def _labels(self, ones: jax.Array) -> jax.Array:
        seen = jnp.arange(1, self.length + 1)
        return jnp.where(2 * ones == seen, NONE, (2 * ones > seen).astype(jnp.int32))

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        seen = [tokens[: i + 1].tolist() for i in range(len(tokens))]
        return np.array([int(bits.count(1) > bits.count(0)) for bits in seen])
