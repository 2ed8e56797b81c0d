"""The Triton kernels on a real GPU: masks, layouts, sinks, caps, log-sum-exp, the same bit for bit.

    pytest -n 0 tests/gpu
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from triton_cases import CASES, errors, judge

from attnlab import Causal, attention
from attnlab.core.dispatch import Device
from attnlab.ops.attention import triton, triton_sizes, tuning
from attnlab.testing.budget import identical

DEVICE = Device.default()
MISSING = (
    "needs an NVIDIA GPU; CI has none" if triton_sizes.capability(DEVICE.kind) is None
    else triton._missing()
)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SMALL = {
    f"{name}{end}": size for end in ("", "_dq", "_dkv")
    for name, size in (("block_q", 64), ("block_k", 32), ("warps", 4), ("stages", 2))
}


@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("name", CASES)
def test_cases(name, sizes):
    if name == "planned" and sizes:
        pytest.skip(reason="lists of other sizes are built in the call, as in the default")
    with tuning.forcing(sizes):
        judge(name, CASES[name], errors(triton.forward, CASES[name]))


def test_the_same_bit_for_bit():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((8, 128), (2, 128), (2, 128))
    args = [jax.random.normal(k, (2, 3000, *s), jnp.bfloat16) for k, s in zip(keys, shapes)]

    def loss(q, k, v):
        o = attention(q, k, v, mask=Causal(), impl="triton")
        return (o.astype(jnp.float32) ** 2).sum(), o

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    first = jax.device_get(step(*args))
    for _ in range(3):
        identical(jax.device_get(step(*args)), first)
