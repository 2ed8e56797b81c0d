"""The fallback's memory is linear in the sequence: read off the compiled program, never run."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from attnlab.core.mask import Causal, SinkTokens, Window
from attnlab.ops.attention import attention

LENGTHS = (8192, 16384, 32768)
LIMIT = 32 * 2**20  # temporary bytes at 32768; the logits alone would be 4 GiB


@pytest.mark.parametrize("mask", [Causal(), Causal() & (Window(512) | SinkTokens(4))])
def test_forward_and_backward_memory_is_linear(mask):
    @jax.jit
    @jax.value_and_grad
    def loss(qkv):
        return attention(*qkv, mask=mask, impl="xla").sum()

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
        return loss.lower((x, x, x)).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporaries(T) for T in LENGTHS]
    for short, long in itertools.pairwise(sizes):
        assert long <= 2.2 * short, sizes
    assert sizes[-1] <= LIMIT, sizes
