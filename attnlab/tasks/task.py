"""What a generated task is: rows of tokens with labels, drawn on the device from a key.

``draw`` gives one row and ``sample`` maps it over a batch; both are traced, so a training step
draws its own data and nothing lies on disk. Rows of different keys are independent: train and test
take different streams of keys.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.errors import ConfigError

NONE = -1  # a position without label


class Batch(NamedTuple):
    """Rows of a task.

    Args:
        tokens: int32 ``[B, T]``.
        labels: int32 ``[B, T]``, what the model is to say at that position (labels are not
            shifted), ``NONE`` where it is not asked.
        scored: bool ``[B, T]``, the labelled positions that count for accuracy: those whose label
            follows from the tokens before.
        groups: int32 ``[B]`` by name, to report accuracy by (for example the depth of a needle).
    """

    tokens: jax.Array
    labels: jax.Array
    scored: jax.Array
    groups: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A generated task over tokens."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """How many different tokens there are."""

    @property
    @abc.abstractmethod
    def seq_len(self) -> int:
        """Tokens of a row."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing evenly among the answers that the task has."""

    @abc.abstractmethod
    def draw(self, key: jax.Array) -> Batch:
        """One row, without the axis B."""

    @abc.abstractmethod
    def answers(self, tokens: np.ndarray) -> np.ndarray:
        """What is right at the scored positions of one row ``tokens[T]``, from the tokens up to
        each position alone, by plain search; anything elsewhere. Independent of ``draw``."""

    def group_size(self, name: str) -> int:
        """How many values the group of that name has."""
        raise ConfigError(f"group = {name!r}", "this task has no such group", "see its docstring")

    def sample(self, key: jax.Array, batch: int) -> Batch:
        """``batch`` rows."""
        return jax.vmap(self.draw)(jax.random.split(key, batch))


def row(tokens: Any, labels: Any, scored: Any = None, **groups: Any) -> Batch:
    """A row; ``scored`` None: wherever there is a label."""
    tokens, labels = jnp.asarray(tokens, jnp.int32), jnp.asarray(labels, jnp.int32)
    scored = labels != NONE if scored is None else scored
    return Batch(tokens, labels, scored, {n: jnp.asarray(x, jnp.int32) for n, x in groups.items()})


def distinct(key: jax.Array, count: int, first: int, end: int) -> jax.Array:
    """``count`` different tokens from ``first`` up to ``end``, in random order."""
    return first + jax.random.choice(key, end - first, (count,), replace=False)


def accuracy(batch: Batch, said: Any) -> float:
    """The part of the scored positions where ``said[B, T]`` is the label."""
    scored = np.asarray(batch.scored)
    return float((np.asarray(said) == np.asarray(batch.labels))[scored].mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(Task):
    """A task whose rows are as long as its field says."""

    length: int

    @property
    def seq_len(self) -> int:
        return self.length


def require(good: bool, what: str, rule: str, fix: str) -> None:
    """ConfigError unless ``good``."""
    if not good:
        raise ConfigError(what, rule, fix)


def require_positive(config: Any, *names: str) -> None:
    """ConfigError unless these fields are above 0."""
    for name in names:
        given = getattr(config, name)
        require(given > 0, f"{name} = {given}", "must be at least 1", f"use {name} = 8")
