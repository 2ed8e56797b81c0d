"""Associative recall: MQAR and its variants, induction heads."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.tasks.task import NONE, Batch, Line, distinct, require, require_positive, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Line):
    """Multi-query associative recall: pairs of key and value, then every key once more.

    A row is ``k1 v1 ... km vm`` and queries: the rest is cut into slots of two cells, a key stands
    in the first cell of its slot, and the label there is its value. Slot x (from 1) is chosen with
    a weight of ``alpha x^(alpha - 1)``, without replacement: most queries come soon. Keys are
    below ``vocab / 2``, values above, 0 fills. A model that knows which values there are, but not
    whose they are, has ``plateau = 1 / pairs``.

    Arora et al. 2023 (Zoology), arXiv 2312.04927. Differs: with ``random_filler`` no filler is a
    key or value of its row.

    Raises:
        ConfigError: ``4 pairs > length``, an odd length, or too few tokens for that many pairs.
    """

    length: int = 64
    pairs: int = 8
    vocab: int = 256
    alpha: float = 0.01
    random_filler: bool = False

    def __post_init__(self):
        _checked(self, 2)
        require(
            self.length % 2 == 0, f"length = {self.length}", "must be even", "add a token"
        )

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - self.vocab // 2)

    @property
    def plateau(self) -> float:
        """Accuracy of guessing among the values of the row."""
        return 1 / self.pairs

    @property
    def _records(self) -> int:
        return self.pairs

    def draw(self, key: jax.Array) -> Batch:
        names, values, slots, filler = jax.random.split(key, 4)
        names = distinct(names, self.pairs, 1, self.vocab // 2)
        values = distinct(values, self.pairs, self.vocab // 2, self.vocab)
        records = jnp.stack([names, values], 1)
        return _asked(self, records, names[:, None], values, slots, filler)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        context, half = 2 * self._records, self.vocab // 2
        known = {k: v for k, v in tokens[:context].reshape(-1, 2).tolist()}
        return np.array([
            known.get(t, NONE) if i >= context and t < half else NONE
            for i, t in enumerate(tokens.tolist())
        ])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(MQAR):
    """MQAR where ``rebound`` keys get another value later in the context; the last one counts.

    Separates states that overwrite (delta rules, gates) from those that only add.
    """

    rebound: int = 2

    @property
    def _records(self) -> int:
        return self.pairs + self.rebound

    def __post_init__(self):
        require(
            0 <= self.rebound <= self.pairs, f"rebound = {self.rebound}",
            f"must be from 0 to pairs = {self.pairs}", "take fewer",
        )
        super().__post_init__()

    def draw(self, key: jax.Array) -> Batch:
        names, values, slots, filler = jax.random.split(key, 4)
        m, u = self.pairs, self.rebound
        names = distinct(names, m, 1, self.vocab // 2)
        values = distinct(values, m + u, self.vocab // 2, self.vocab)
        # Names are in random order: the first u are any u of them.
        records = jnp.stack([jnp.concatenate([names, names[:u]]), values], 1)
        last = values[:m].at[:u].set(values[m:])
        return _asked(self, records, names[:, None], last, slots, filler)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositionalMQAR(MQAR):
    """MQAR whose keys are two tokens: a square grid of ``pairs`` names, neither half of which
    suffices. A record is ``k1 k2 v``; a query is ``k1 k2`` with the label at ``k2``. First halves
    are below ``vocab / 4``, second ones below ``vocab / 2``.
    """

    pairs: int = 9

    def __post_init__(self):
        side = math.isqrt(self.pairs)
        require(
            side * side == self.pairs, f"pairs = {self.pairs}", "must be a square",
            f"use {side * side} or {(side + 1) ** 2}",
        )
        _checked(self, 3)
        quarter = self.vocab // 4
        require(
            side < quarter, f"vocab = {self.vocab}", f"has no {side} halves of a name of each kind",
            f"use {4 * (side + 1)}",
        )

    def draw(self, key: jax.Array) -> Batch:
        first, second, values, order, slots, filler = jax.random.split(key, 6)
        side, quarter, half = math.isqrt(self.pairs), self.vocab // 4, self.vocab // 2
        first, second = distinct(first, side, 1, quarter), distinct(second, side, quarter, half)
        names = jnp.stack([x.ravel() for x in jnp.meshgrid(first, second, indexing="ij")], 1)
        names = jax.random.permutation(order, names)
        values = distinct(values, self.pairs, half, self.vocab)
        records = jnp.concatenate([names, values[:, None]], 1)
        return _asked(self, records, names, values, slots, filler)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        context = 3 * self.pairs
        known = {(a, b): v for a, b, v in tokens[:context].reshape(-1, 3).tolist()}
        before = [NONE, *tokens.tolist()]
        return np.array([
            known.get((before[i], t), NONE) if i > context else NONE
            for i, t in enumerate(tokens.tolist())
        ])


def _checked(task: MQAR, width: int) -> None:
    """Whether records and queries of ``width`` cells fit, and there are names and values enough."""
    require_positive(task, "pairs")
    records, pairs = task._records, task.pairs
    need = width * (records + pairs)
    require(
        need <= task.length, f"length = {task.length}",
        f"does not hold {records} records and {pairs} queries of {width} tokens",
        f"use length = {need} or fewer pairs",
    )
    most = max(pairs + 1, records)
    require(
        most <= task.vocab // 2, f"vocab = {task.vocab}",
        f"has fewer than {pairs} names and {records} values", f"use vocab = {2 * most}",
    )
    require(task.alpha > 0, f"alpha = {task.alpha}", "must be positive", "use 0.01")


def _asked(task: MQAR, records, names, values, slots: jax.Array, filler: jax.Array) -> Batch:
    """The row of ``records[m, w]`` and, behind them, ``names[m, ...]`` in slots of w cells."""
    context, width = records.size, records.shape[1]
    count = (task.length - context) // width
    x = jnp.arange(1, count + 1, dtype=jnp.float32)
    weight = task.alpha * x ** (task.alpha - 1)
    chosen = jax.random.choice(slots, count, (len(values),), replace=False, p=weight / weight.sum())
    at = context + width * chosen
    tokens = jnp.zeros(task.length, jnp.int32)
    if task.random_filler:
        drawn = jax.random.randint(filler, (task.length,), 0, task.vocab)
        tokens = jnp.where(jnp.isin(drawn, records), 0, drawn)
    tokens = tokens.at[:context].set(records.ravel())
    for cell in range(names.shape[1]):
        tokens = tokens.at[at + cell].set(names[:, cell])
    labels = jnp.full(task.length, NONE).at[at + names.shape[1] - 1].set(values)
    return row(tokens, labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeads(Line):
    """Random tokens, a trigger at a random place and once more at the end: what followed it?

    Gu and Dao 2023 (Mamba), arXiv 2312.00752. The trigger is the last token of the vocabulary;
    ``groups``: distance, from the answer to the end.
    """

    length: int = 64
    vocab: int = 16

    def __post_init__(self):
        require(self.length >= 3, f"length = {self.length}", "must be at least 3", "use 64")
        require(self.vocab >= 3, f"vocab = {self.vocab}", "must be at least 3", "use 16")

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 1)

    def group_size(self, name: str) -> int:
        return self.length - 1 if name == "distance" else super().group_size(name)

    def draw(self, key: jax.Array) -> Batch:
        others, place = jax.random.split(key)
        tokens = jax.random.randint(others, (self.length,), 0, self.vocab - 1)
        place = jax.random.randint(place, (), 0, self.length - 2)
        tokens = tokens.at[jnp.stack([place, jnp.int32(self.length - 1)])].set(self.vocab - 1)
        labels = jnp.full(self.length, NONE).at[-1].set(tokens[place + 1])
        return row(tokens, labels, distance=self.length - 2 - place)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        (place, *_) = np.flatnonzero(tokens == self.vocab - 1)
        return np.where(np.arange(len(tokens)) == len(tokens) - 1, tokens[place + 1], NONE)
