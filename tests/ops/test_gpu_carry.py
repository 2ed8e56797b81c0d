"""The step of the Hopper kernels (interpreted, with races): a carry in, a carry out, and gradients.

Carries differ between implementations in their reference m, so everything goes through merge and
finish, as a ring does it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.core.dispatch import Device, compiling_for, recording
from attnlab.core.mask import Causal, Coords, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import JAX, make_mesh
from attnlab.ops.attention import attention, gpu, reference, xla
from attnlab.ops.attention.carry import Carry, attention_step, finish, merge

pytestmark = pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2")

T, S, N, K, H, V = 70, 133, 2, 1, 64, 64
WINDOW = Causal() & Window(60)
FIRST = -9  # position of the first query: the first nine see no key in any part


def draw():
    keys = iter(jax.random.split(jax.random.key(0), 12))
    shapes = {
        "q": (1, T, N, H), "k": (1, S, K, H), "v": (1, S, K, V), "slope": (N,), "sink": (N,),
        "bias": (N, T, S), "do": (1, T, N, V), "dlse": (1, T, N),
    }
    a = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    a |= {n: a[n].astype(jnp.bfloat16).astype(jnp.float32) for n in "qkv"}
    a["v"] += 2.0  # a common part, whose rounding must not reach the gradients of q and k
    a["v"] = a["v"].astype(jnp.bfloat16).astype(jnp.float32)
    return a


def part(forward, a, low, high, *carry, dtype=jnp.float32, mask=WINDOW, bias=False):
    """One call of ``forward`` (a step where there is a carry) over some keys."""
    q_index, k_index = (jnp.arange(n, dtype=jnp.int32) for n in (T, high - low))
    score = Mod.of(
        lambda s, head, q, k, *, q_index, k_index: (
            s + a["slope"][head] * (k - q) / 20
            + (a["bias"][head, q_index, k_index + low] if bias else 0)
        ), score_dtype=jnp.float32,
    )
    return forward(
        *carry, *(x.astype(dtype) for x in (a["q"], a["k"][:, low:high], a["v"][:, low:high])),
        mask=mask.bound(1, N), score=score.bound(1, N), sink_logits=None if carry else a["sink"],
        q_coords=Coords(q_index[None] + FIRST, None, q_index),
        k_coords=Coords(k_index[None] + low, None, k_index), scale=H**-0.5, logit_cap=None,
        return_lse=True, softmax_dtype=jnp.dtype("float32"), layout="any",
    )


def kernel_step():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return functools.partial(gpu.step, interpret=interpret)


def gradients(f, *args):
    def loss(*args):
        o, lse = f(*args)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o * args[0]["do"]).sum() + (seen * args[0]["dlse"]).sum(), (o, lse)

    wrt = tuple(range(len(args)))
    return jax.jit(jax.value_and_grad(loss, wrt, has_aux=True))(*args)


def close(found, expected, most=1e-2):
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        where = jax.tree_util.keystr(path)
        assert (np.isfinite(a) == np.isfinite(b)).all(), f"{where}: not finite alike"
        a, b = np.nan_to_num(a, neginf=0), np.nan_to_num(b, neginf=0)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
        assert error < most, f"{where}: relative error {error:.1e}"


@pytest.mark.parametrize("parts", [[(0, 70), (70, 133)], [(64, 133), (0, 64)]])
def test_parts_are_one_call(parts):
    """Also where a part, or all of them, hold no visible key of a row."""
    step, bias = kernel_step(), parts[0][0] == 0

    def ring(a):
        carry = None
        for low, high in parts:
            carry = part(step, a, low, high, carry, dtype=jnp.bfloat16, bias=bias)
        return finish(Carry(*carry), a["sink"])

    a = draw()
    found = gradients(ring, a)
    assert (np.asarray(found[0][1][1][0, :9]) == a["sink"]).all()
    assert (np.asarray(found[1][0]["q"])[:, :9] == 0).all()
    close(found, gradients(lambda a: part(reference.forward, a, 0, S, bias=bias), a))


def test_every_cotangent_of_a_state():
    """A carry from elsewhere, with references of its own, and the result merged with another."""
    keys = iter(jax.random.split(jax.random.key(3), 8))

    def state():
        m = jax.random.normal(next(keys), (1, T, N)) * 3
        l = jax.random.uniform(next(keys), (1, T, N), minval=0.5, maxval=9.0)
        o = jax.random.normal(next(keys), (1, T, N, V)) * l[..., None]
        none = jnp.arange(T)[None, :, None] % 5 == 3
        return Carry(
            jnp.where(none[..., None], 0, o), jnp.where(none, -jnp.inf, m), jnp.where(none, 0, l)
        )

    a, before, other = draw(), state(), state()

    def run(step, dtype):
        def f(a, before, other):
            before = before.o, before.m, before.l
            out = Carry(*part(step, a, 0, S, before, dtype=dtype))
            assert out.o.dtype == out.m.dtype == out.l.dtype == jnp.float32
            o, lse = finish(merge(out, other))
            return o, lse + jnp.isneginf(out.m)  # of rows that have seen no key at all

        return gradients(f, a, before, other)

    close(run(kernel_step(), jnp.bfloat16), run(xla.step, jnp.float32))


def test_a_ring_on_a_gpu_takes_the_kernel():
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))


    def ring(q, k):
        return attention_step(attention_step(None, q, k, k), q, k, k)

    with compiling_for(Device("gpu", "NVIDIA H200")), recording() as rows:
        out = jax.eval_shape(ring, q, k)
    assert [name for _, _, name in rows] == ["gpu", "gpu"]
    assert out.o.shape == (1, 256, 4, 64) and out.o.dtype == out.l.dtype == jnp.float32


def on_h200(f, *args):
    with compiling_for(Device("gpu", "NVIDIA H200")):
        return f(*args)


def test_gradients_inside_shard_map():
    """Their types say where they vary, which shard_map checks; what is replicated gets a sum."""
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    bias = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)
    mesh = make_mesh((1,), ("data",))

    def once(q, k, bias):
        mod = lambda s, h, i, j: s * bias[h, i, 0] + bias[h, 0, j] + bias[h, i, j]  # noqa: E731
        return attention(q, k, k, score_mod=mod, impl="gpu")

    def ring(q, k, bias):
        carry = None
        for _ in range(2):
            carry = attention_step(carry, q, k, k, score_mod=lambda s, h, i, j: s + bias[h, i, j])
        return finish(carry)[0]  # type: ignore[arg-type]

    for f in (once, ring):
        specs = (P("data"), P(), P())
        mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"))
        grad = jax.grad(lambda *x: mapped(*x).astype(jnp.float32).sum(), (0, 1, 2))  # noqa: B023
        shapes = [x.shape for x in on_h200(jax.eval_shape, grad, q, k, bias)]
        assert shapes == [q.shape, k.shape, bias.shape]


def test_only_gradients_that_are_asked_for_are_computed():
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    bias = jax.ShapeDtypeStruct((1, 256, 256), jnp.float32)

    def loss(q, k, bias):
        mod = lambda s, h, i, j: s + bias[0, i, j]  # noqa: E731
        return attention(q, k, k, score_mod=mod, impl="gpu").sum()

    def tables(wrt):
        program = on_h200(jax.make_jaxpr(jax.grad(loss, wrt)), q, k, bias)
        return str(program).count("f32[1,4,256,256]")

    assert tables((0, 1)) == 0 < tables((0, 1, 2))
