"""Loss over held-out batches, summed on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from attnlab.core.errors import ConfigError, DataError, NonFiniteError
from attnlab.parallel.feed import place


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss of a model on a data set.

    Args:
        nats_per_token: mean negative log-likelihood. tokens: that counted.
        bits_per_byte: comparable over tokenizers; None where bytes per token are unknown.
    """

    nats_per_token: float
    tokens: int
    bits_per_byte: float | None = None


def evaluate(
    trainer: Any,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    layers: Any = None,
    bytes_per_token: float | None = None,
) -> Evaluation:
    """Evaluate ``params`` on ``batches`` (this process's rows, as from ``data.eval_batches``).

    Every process must pass the same number of batches. ``layers``: explicit state of the layers,
    None where no layer has one. Sums over batches are fp64. With
    ``bytes_per_token`` of the text (``PackedRows.bytes_per_token``),
    ``bits_per_byte = nats_per_token / ln 2 / bytes_per_token``.
    """
    if bytes_per_token is not None and not bytes_per_token > 0:
        raise ConfigError(
            f"bytes_per_token = {bytes_per_token}", "must be positive",
            "pass None where the text behind the tokens is unknown",
        )
    nll = count = 0.0
    waiting = None  # the host fetches a batch while the device works on the next
    for batch in batches:
        sums = trainer.evaluate(params, place(batch, trainer.batch_sharding), layers)
        if waiting is not None:
            nll, count = nll + float(waiting[0]), count + float(waiting[1])
        waiting = sums
    if waiting is not None:
        nll, count = nll + float(waiting[0]), count + float(waiting[1])
    if not count > 0:
        raise DataError(
            "the evaluation batches", "hold no token with a loss",
            "give the validation split more text, or evaluate more rows",
        )
    if not math.isfinite(nll):
        raise NonFiniteError(
            f"evaluation loss = {nll / count}", f"over {count:.0f} tokens it must be finite",
            "evaluate an earlier checkpoint",
        )
    nats = nll / count
    bits = None if bytes_per_token is None else nats / math.log(2) / bytes_per_token
    return Evaluation(nats, round(count), bits)
