"""In-context linear regression: the model sees pairs (x, y) of a linear function and a new x.

Inputs are vectors, so these are no ``Task``; rows are drawn the same way.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.tasks.task import require, require_positive


class Vectors(NamedTuple):
    """Rows of a regression.

    Args:
        inputs: float32 ``[B, T, d]``. targets: float32 ``[B, T]``. asked: bool ``[B, T]``.
    """

    inputs: jax.Array
    targets: jax.Array
    asked: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRegression:
    """``y = w x``, with ``x, w ~ N(0, I)``: the row is ``x1, y1, x2, y2, ...``, y in the first of
    ``dims`` coordinates, and y is asked at every x. Garg et al. 2022, arXiv 2208.01066.

    Args:
        noise: standard deviation of what is added to y.
    """

    dims: int = 20
    points: int = 41
    noise: float = 0.0

    def __post_init__(self):
        require_positive(self, "dims", "points")
        require(self.noise >= 0, f"noise = {self.noise}", "must not be negative", "use 0")

    @property
    def seq_len(self) -> int:
        return 2 * self.points

    def sample(self, key: jax.Array, batch: int) -> Vectors:
        """``batch`` rows."""
        x, w, noise = jax.random.split(key, 3)
        x = jax.random.normal(x, (batch, self.points, self.dims))
        w = jax.random.normal(w, (batch, self.dims))
        y = jnp.einsum("bpd,bd->bp", x, w, precision="highest")
        y += self.noise * jax.random.normal(noise, y.shape)
        padded = jnp.zeros_like(x).at[..., 0].set(y)
        inputs = jnp.stack([x, padded], 2).reshape(batch, self.seq_len, self.dims)
        asked = jnp.arange(self.seq_len) % 2 == 0
        targets = jnp.repeat(y, 2, 1) * asked
        return Vectors(inputs, targets, jnp.broadcast_to(asked, targets.shape))

    def least_squares(self, batch: Vectors) -> np.ndarray:
        """Predictions ``[B, points]`` of the smallest w that fits the pairs before: what a model
        that has learned the task does. 0 for the first."""
        inputs = np.asarray(batch.inputs, np.float64)
        x, y = inputs[:, ::2], inputs[:, 1::2, 0]
        said = np.zeros(y.shape)
        for p in range(1, self.points):
            w = np.linalg.pinv(x[:, :p]) @ y[:, :p, None]
            said[:, p] = (x[:, p, None] @ w)[:, 0, 0]
        return said


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryRegression:
    """``pairs`` vectors ``[x; y]`` and the query ``[x; 0]``, which is the last: its y is asked.

    ``x ~ N(0, I)``, ``w ~ N(0, I / dims)``, ``y = w x + e``, ``e ~ N(0, noise)``, also in what is
    asked. Small enough for one layer of softmax attention to be trained in seconds and to be known:
    squared losses are 1.10 for nothing, 0.41 for one head, 0.24 for two or more, 0.114 for
    ``ridge``. He et al. 2025, arXiv 2503.12734.

    Args:
        noise: variance of e.
    """

    dims: int = 5
    pairs: int = 40
    noise: float = 0.1

    def __post_init__(self):
        require_positive(self, "dims", "pairs")
        require(self.noise >= 0, f"noise = {self.noise}", "must not be negative", "use 0.1")

    @property
    def seq_len(self) -> int:
        return self.pairs + 1

    def sample(self, key: jax.Array, batch: int) -> Vectors:
        """``batch`` rows, ``inputs[B, pairs + 1, dims + 1]``."""
        x, w, noise = jax.random.split(key, 3)
        x = jax.random.normal(x, (batch, self.seq_len, self.dims))
        w = jax.random.normal(w, (batch, self.dims)) / np.sqrt(self.dims)
        y = jnp.einsum("bpd,bd->bp", x, w, precision="highest")
        y += np.sqrt(self.noise) * jax.random.normal(noise, y.shape)
        asked = jnp.arange(self.seq_len) == self.pairs
        inputs = jnp.concatenate([x, jnp.where(asked, 0, y)[..., None]], 2)
        return Vectors(inputs, y * asked, jnp.broadcast_to(asked, y.shape))

    def ridge(self, batch: Vectors) -> np.ndarray:
        """Predictions ``[B]`` of the posterior mean of w, the best there is."""
        x, y, query = _taken_apart(batch)
        gram = x.swapaxes(1, 2) @ x + self.dims * self.noise * np.eye(self.dims)
        w = np.linalg.solve(gram, x.swapaxes(1, 2) @ y[..., None])
        return (query[:, None] @ w)[:, 0, 0]

    def gradient_step(self, batch: Vectors, rate: float) -> np.ndarray:
        """Predictions ``[B]`` of one step of gradient descent from 0: ``rate / pairs sum y x``."""
        x, y, query = _taken_apart(batch)
        w = rate / self.pairs * (y[:, None] @ x)[:, 0]
        return (w * query).sum(1)


def _taken_apart(batch: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``x[B, pairs, dims]``, ``y[B, pairs]`` and the query ``[B, dims]`` in float64."""
    inputs = np.asarray(batch.inputs, np.float64)
    return inputs[:, :-1, :-1], inputs[:, :-1, -1], inputs[:, -1, :-1]
