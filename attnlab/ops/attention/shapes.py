"""Attention shapes of real models, for benchmarks, tuning and compile tests."""

from __future__ import annotations

import dataclasses

from attnlab.core.dispatch import Device
from attnlab.core.mask import Causal, Full, Mask, Window
from attnlab.ops.attention import Call


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention call of a model, in bf16.

    Args:
        name: model and setting. B, T, N, K, H, V: see the legend; S = T. causal, window: the mask.
        tags: "primary" (claims are made on these), "ci" (small enough to compile in every run),
            "forward_only" (inference).
    """

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    V: int
    causal: bool = True
    window: int | None = None
    logit_cap: float | None = None
    tags: tuple[str, ...] = ()

    @property
    def mask(self) -> Mask:
        mask: Mask = Causal() if self.causal else Full()
        return mask if self.window is None else mask & Window(self.window)

    def call(self, device: Device) -> Call:
        """The static facts of this shape on ``device``."""
        return Call(
            self.B, self.T, self.T, self.N, self.K, self.H, self.V, "bfloat16", self.mask, "full",
            False, False, self.logit_cap, False, device,
        )


SHAPES: tuple[Shape, ...] = (
    Shape("gpt2-small-1k", 16, 1024, 12, 12, 64, 64, tags=("primary", "ci")),
    Shape("llama2-7b-4k", 4, 4096, 32, 32, 128, 128, tags=("primary",)),
    Shape("llama3-8b-8k", 2, 8192, 32, 8, 128, 128, tags=("primary",)),
    Shape("llama3-70b-8k", 1, 8192, 64, 8, 128, 128),
    Shape("llama3.2-1b-4k", 4, 4096, 32, 8, 64, 64, tags=("ci",)),
    Shape("mistral-7b-32k-window", 1, 32768, 32, 8, 128, 128, window=4096, tags=("primary",)),
    Shape("gemma-2b-8k", 1, 8192, 8, 1, 256, 256),
    Shape("gemma2-9b-8k-window-cap", 1, 8192, 16, 8, 256, 256, window=4096, logit_cap=50.0),
    Shape("deepseek-v3-mla-4k", 1, 4096, 128, 128, 192, 128, tags=("primary",)),
    Shape("deepseek-v3-mla-absorbed-4k", 1, 4096, 128, 1, 576, 512, tags=("forward_only",)),
    Shape("qwen3-8b-32k", 1, 32768, 32, 8, 128, 128, tags=("forward_only",)),
    Shape("vit-l14-257", 64, 257, 16, 16, 64, 64, causal=False, tags=("ci",)),
)
