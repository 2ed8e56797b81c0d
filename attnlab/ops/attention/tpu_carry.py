"""The forward kernel for TPUs over keys in parts: a differentiable step from state to state.

With the state ``(o, m, l)`` of ``core.softmax`` and z the scores of the keys at hand, the kernel
starts from the old state and writes the new one::

    m' = max(m, rowmax z)      a = exp(m - m')      w = exp(z - m')
    l' = a l + sum_s w         o' = a o + sum_s w v

The result of ``finish`` or ``merge`` does not depend on which reference m' is taken, so m' counts
as constant and its own cotangent is not read. Of cotangents do' and dl'::

    dv = w^T do'       dz = w (v . do' + dl')
    do = a do'         dl = a dl'          dm = a (l dl' + o . do')

which is the backward kernel with m' for lse and -dl' for delta. dm is what a state is owed whose
own numbers hang on its reference (``xla.step`` gives such ones).
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attnlab.core.softmax import finite
from attnlab.ops.attention import tpu_blocks
from attnlab.ops.attention.tpu_attend import Problem, _Asked, _gradients, _plan, _shapes
from attnlab.ops.attention.tpu_forward import forward
from attnlab.ops.attention.tpu_tiles import padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def advance(problem: Problem, state, q, k, v, handed, fixed):
    """The state ``(o[B, N, T, V], m[B, N, T], l[B, N, T])`` of ``state`` (None: of no key) and
    these keys, float32; arrays and arguments as in ``tpu_attend.attend``."""
    plan, steps, arrays, sizes = _plan(problem, "forward", _shapes(q, k, v), handed, fixed)
    T = q.shape[2]
    pad_q = functools.partial(padded, size=plan.block_q, axis=2, mode="constant")
    pad_k = functools.partial(padded, size=plan.block_k, axis=2, mode="constant")
    new = forward(
        plan, pad_q(q), pad_k(k), pad_k(v), steps, arrays, sizes,
        vmem=tpu_blocks.vmem_limit(problem.kind), interpret=problem.interpret,
        state=() if state is None else tuple(pad_q(x) for x in state),
    )
    return tuple(x[:, :, :T] for x in new)


def _forward(problem: Problem, *given):
    def is_leaf(x):
        return hasattr(x, "perturbed")

    arguments = jax.tree.map(lambda x: x.value, given, is_leaf=is_leaf)
    asked = _Asked(False, tuple(x.perturbed for x in given[4]))
    o, m, l = advance(problem, *arguments)  # type: ignore[misc]
    o = checkpoint_name(o, "attention_out")
    m, l = (checkpoint_name(x, "attention_lse") for x in (m, l))
    return (o, m, l), (asked, arguments, m)


def _backward(problem: Problem, residuals, cotangents):
    asked, (state, q, k, v, handed, fixed), m = residuals
    do, _, dl = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    alive = m > -jnp.inf
    do = jnp.zeros((*m.shape, v.shape[-1]), jnp.float32) if do is None else do
    dl = jnp.zeros(m.shape, jnp.float32) if dl is None else jnp.where(alive, dl, 0)
    dq, dk, dv, dhanded = _gradients(problem, asked, q, k, v, do, m, -dl, handed, fixed)
    dstate = None
    if state is not None:
        old, before, share = state
        a = jnp.where(alive, jnp.exp(before - finite(m)), 0)
        dm = a * (share * dl + (old * do).sum(-1))
        dstate = (a[..., None] * do, dm, a * dl)
    return dstate, dq, dk, dv, dhanded, None


advance.defvjp(_forward, _backward, symbolic_zeros=True)
