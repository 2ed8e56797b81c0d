"""What ``attnlab bench attention`` times: the cases, their data, visible pairs and FLOPs.

Data are NumPy arrays, the same for every framework. One case is one call on ``B`` rows of ``S``
tokens; forward costs ``2 N pairs (H + V)`` FLOPs and backward ``2 N pairs (3 H + 2 V)``, where
``pairs`` counts the visible (query, key) pairs of one head: no credit for what a mask hides.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from attnlab.core.errors import ConfigError

FORWARD, BOTH = "fwd", "fwd+bwd"
OURS = ("gpu", "gpu-wide", "triton", "xla")  # attnlab's; every other name is a peer
CAP = 3.0  # logit cap; logits have deviation 1 here, so a larger one would go unnoticed
# T5: buckets, those of one distance each (below 16), and buckets an octave up to 128 = 16 * 2**3.
BUCKETS, EXACT, STEPS = 32, 16, 16 / 3
DOCUMENTS, SINKS, SHARE = 16, 4, 0.1
SAMPLE = 1024  # tokens whose outputs are compared with the reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call, bf16, queries and keys the same ``S`` tokens.

    Args:
        name: what ``--case`` says. N, K, H, V: see the legend. mod: what happens to a logit, None,
            "cap" (``CAP tanh(z / CAP)``), "alibi" (``z + slopes[n] (s - t)``) or "t5"
            (``z + table[n, bucket(t - s)]``, the table differentiated). sight: what a query sees
            besides being causal, "causal" (all), "documents", "window" or "blocks".
        backward: whether the gradient is timed too. S: tokens. B: rows.
    """

    name: str
    N: int = 16
    K: int = 16
    H: int = 128
    V: int = 128
    mod: str | None = None
    sight: str = "causal"
    backward: bool = True
    S: int = 16384
    B: int = 1

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if self.backward else (FORWARD,)

    @property
    def window(self) -> int:
        """Keys a query sees in front of the sinks' rule: 1024, less on toy lengths."""
        return min(1024, self.S // 4)

    @property
    def block(self) -> int:
        """Tokens of a block of the block-sparse case: 128, less on toy lengths."""
        return min(128, self.S // 16)

    def flops(self, direction: str, pairs: float) -> float:
        """FLOPs of one call over ``pairs`` visible pairs a head, all rows and heads."""
        each = self.H + self.V
        if direction == BOTH:
            each += 3 * self.H + 2 * self.V
        return 2.0 * self.B * self.N * pairs * each

    def bytes(self, direction: str) -> float:
        """Bytes that q, k, v, o (and their gradients) take when each moves once."""
        numbers = self.S * (self.N * (self.H + self.V) + self.K * (self.H + self.V))
        return 2.0 * self.B * numbers * (2 if direction == BOTH else 1)


@dataclasses.dataclass(frozen=True)
class Decode:
    """One decoding step: a query a row over a paged cache of ``S`` tokens a row."""

    name: str = "decode"
    B: int = 64
    S: int = 32768
    N: int = 32
    K: int = 8
    H: int = 128
    V: int = 128
    page: int = 128
    directions: tuple[str, ...] = (FORWARD,)

    def flops(self, direction: str, pairs: float) -> float:
        """FLOPs of one step over ``pairs`` keys a row."""
        return 2.0 * self.B * self.N * pairs * (self.H + self.V)

    def bytes(self, direction: str) -> float:
        """Bytes of the cache, read once, and of q and o."""
        cache = self.S * self.K * (self.H + self.V)
        return 2.0 * self.B * (cache + self.N * (self.H + self.V))


CASES: tuple[Case | Decode, ...] = (
    Case("causal-128"),
    Case("cap", mod="cap"),
    Case("alibi", mod="alibi"),
    Case("t5", mod="t5"),
    Case("documents", sight="documents"),
    Case("window-sinks", sight="window"),
    Case("gqa-128", K=4),
    Case("causal-64", H=64, V=64),
    Case("causal-256", N=8, K=8, H=256, V=256),
    Case("mla-192", H=192, V=128),
    Case("mla-576", K=1, H=576, V=512, backward=False),
    Case("blocks", sight="blocks"),
    Decode(),
)


def chosen(names: str | None, seq_len: int | None) -> list[Case | Decode]:
    """The cases of a comma-separated list (None: all), on ``seq_len`` tokens.

    Raises:
        ConfigError: an unknown name, or a length that is not a multiple of 128.
    """
    known = {case.name: case for case in CASES}
    wanted = list(known) if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--case {name}", "is not a case", f"use {', '.join(known)}")
    cases = [known[name] for name in dict.fromkeys(wanted)]
    if seq_len is None:
        return cases
    if seq_len < 128 or seq_len % 128:
        raise ConfigError(
            f"--seq-len {seq_len}", "must be a multiple of 128", "use 16384 for the claims"
        )
    return [dataclasses.replace(case, S=seq_len) for case in cases]


def arrays(case: Case) -> dict[str, np.ndarray]:
    """The data of a case.

    ``q[B, S, N, H]``, ``k[B, S, K, H]``, ``v[B, S, K, V]`` and the cotangent ``do[B, S, N, V]`` in
    bf16; ``slopes[N]`` or ``table[N, 32]`` in fp32; ``segments[S]`` (documents from 1) and
    ``positions[S]``; ``lists[1, N, S/block, M]`` (key blocks, below 0 empty), int32.
    """
    rng = np.random.default_rng(0)

    def normal(heads: int, width: int) -> np.ndarray:
        x = rng.standard_normal((case.B, case.S, heads, width), np.float32)
        return x.astype(ml_dtypes.bfloat16)

    data = {
        "q": normal(case.N, case.H), "k": normal(case.K, case.H), "v": normal(case.K, case.V),
        "do": normal(case.N, case.V),
    }
    if case.mod == "alibi":
        data["slopes"] = (2.0 ** (-8 * np.arange(1, case.N + 1) / case.N)).astype(np.float32)
    if case.mod == "t5":
        data["table"] = rng.standard_normal((case.N, BUCKETS), np.float32)
    if case.sight == "documents":
        inside = rng.choice(np.arange(1, case.S), DOCUMENTS - 1, replace=False)
        cuts = np.concatenate([[0], np.sort(inside)])
        segments = np.searchsorted(cuts, np.arange(case.S), side="right")
        data["segments"] = segments.astype(np.int32)
        data["positions"] = (np.arange(case.S) - cuts[segments - 1]).astype(np.int32)
    if case.sight == "blocks":
        data["lists"] = _lists(case, rng)
    return data


def _lists(case: Case, rng) -> np.ndarray:
    """Key blocks of every query block: its own, and others before it drawn for each head."""
    rows = case.S // case.block
    counts = np.maximum(1, np.round(SHARE * np.arange(1, rows + 1))).astype(int)
    lists = np.full((1, case.N, rows, counts.max()), -1, np.int32)
    for head in range(case.N):
        for row, count in enumerate(counts):
            others = rng.choice(row, count - 1, replace=False) if count > 1 else []
            lists[0, head, row, :count] = [*np.sort(others), row]
    return lists


def pairs(case: Case | Decode, data: dict[str, np.ndarray]) -> float:
    """Visible (query, key) pairs of one head and row; keys of one query for a decoding step."""
    if isinstance(case, Decode):
        return float(case.S)
    S = case.S
    if case.sight == "documents":
        lengths = np.bincount(data["segments"])[1:].astype(float)
        return float((lengths * (lengths + 1) / 2).sum())
    if case.sight == "window":
        t = np.arange(S)
        hidden = np.maximum(t + 1 - case.window, 0)  # keys in front of the window
        return float((t + 1 - hidden + np.minimum(hidden, SINKS)).sum())
    if case.sight == "blocks":
        size, rows = case.block, S // case.block
        others = (data["lists"] >= 0).sum() / case.N - rows
        return float(others * size**2 + rows * size * (size + 1) / 2)
    return S * (S + 1) / 2


def bucket_of(distance: np.ndarray) -> np.ndarray:
    """T5's causal bucket of ``t - s``: one each below 16, then logarithmic up to 128."""
    n = np.maximum(distance, 0)
    steps = EXACT + np.floor(np.log2(np.maximum(n, 1) / EXACT) * STEPS)
    return np.where(n < EXACT, n, np.minimum(steps, BUCKETS - 1)).astype(np.int32)


def sample(S: int) -> np.ndarray:
    """The tokens whose outputs are compared: the first 64, the last 64 and random others."""
    if S <= SAMPLE:
        return np.arange(S)
    middle = np.random.default_rng(1).choice(np.arange(64, S - 64), SAMPLE - 128, replace=False)
    return np.concatenate([np.arange(64), np.sort(middle), np.arange(S - 64, S)])
