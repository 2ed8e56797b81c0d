"""The two differentiable functions behind the Hopper kernels: a whole call, and one step of a ring.

**Call.** ``o, lse`` of all keys; backward with ``delta = rowsum(o do) - dlse``.

**Step.** With a = exp(m - m') the state ``(o, m, l)`` of ``core.softmax`` becomes, by these keys::

    m' = max(m, rowmax z)     w = exp(z - m')     l' = a l + rowsum w     o' = a o + w v

m' is a reference: what merge and finish compute does not change with it, so it counts as constant,
its cotangent is not read (it equals ``l' dl' + o' . do'``), and that of m is of the same form::

    do = a do'    dl = a dl'    dm = dl l + do . o    dv = w^T do'    dz = w (v . do' + dl')

The last two are those of a call with ``lse = m'`` and ``delta = -dl'``. Both factors of dv are
moved by l', so that they keep the range of a call's, and delta is written so that the rounding e of
``l' do'`` to the dtype of q counts with ``v - o' / l'``, as it does there::

    lse = m' + log l'     do <- l' do' + e     delta = rowsum(o' / l' do) - (l' dl' + o' . do')
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attnlab.core.axes import vary
from attnlab.core.errors import UnsupportedError
from attnlab.ops.attention import gpu_backward, gpu_backward_fused, gpu_distance, gpu_widths
from attnlab.ops.attention.blocks import block_lists
from attnlab.ops.attention.gpu_plan import coordinates, handed_operands
from attnlab.ops.attention.gpu_sizes import Sizes
from attnlab.ops.attention.gpu_tiles import LOG2E


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """What a custom derivative is specialised to.

    Args:
        make: ``gpu_plan.make_plan`` without the facts of a kernel. sizes: of all its kernels.
    """

    make: Any
    layout: str
    sizes: Sizes
    interpret: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Asked:
    """Which handed values need a gradient."""

    handed: tuple[bool, ...]


def _perturbed(given, handed):
    """``given`` without the marks of ``symbolic_zeros``, and what they say of ``handed``."""

    def is_leaf(x):
        return hasattr(x, "perturbed")

    plain = jax.tree.map(lambda x: x.value, given, is_leaf=is_leaf)
    floating = (jnp.issubdtype(x.value.dtype, jnp.floating) for x in handed)
    return plain, _Asked(tuple(bool(x.perturbed) and f for x, f in zip(handed, floating)))


def _as_varying(tree, like):
    """What kernels return does not say that it varies inside shard_map as their inputs do."""
    return vary((tree, like))[0]


def _real(x: Any):
    given: Any = x
    return jnp.zeros(given.shape, given.dtype) if isinstance(x, SymbolicZero) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: Static, q, k, v, sink, handed, fixed):
    """``(o[B, T, N, V], lse[B, N, T'])``; T' is T in whole tiles.

    Args:
        sink: float32 ``[N]`` or None. handed: the score's hoisted values. fixed: those of the mask,
            the mask, coordinates of queries and keys.
    """
    return _run(static, q, k, v, handed, fixed, sink=sink)


def _run(static: Static, q, k, v, handed, fixed, *, sink=None, **how):
    config = static.sizes.forward
    kernel: Any = gpu_widths.forward_of(config)
    plan, lists, operands = _prepared(static, config, handed, fixed, False, whole="state" in how)
    out = kernel(plan, config, q, k, v, sink, lists, operands, interpret=static.interpret, **how)
    return _as_varying(tuple(out), q)


def _attend_fwd(static, *given):
    (q, k, v, sink, handed, fixed), asked = _perturbed(given, given[4])
    o, lse = _run(static, q, k, v, handed, fixed, sink=sink)
    o = checkpoint_name(o, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return (o, lse), (asked, q, k, v, sink, handed, fixed, o, lse)


def _attend_bwd(static, residuals, cotangents):
    asked, q, k, v, sink, handed, fixed, o, lse = residuals
    do, dlse = map(_real, cotangents)
    T = q.shape[1]
    alive = lse > -jnp.inf
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta = jnp.pad(delta, [(0, 0), (0, 0), (0, lse.shape[-1] - T)]) - dlse
    delta = jnp.where(alive, delta, 0)
    dsink, owed = None, dlse  # owed: what dz of a query adds up to
    if sink is not None:
        p = jnp.where(alive, jnp.exp(sink[:, None] - lse), 0)
        dsink = -(p * delta)[..., :T].sum((0, 2))
        owed = dlse + p * delta
    base2 = jnp.where(alive, lse * LOG2E, 1e30)
    do = do.astype(q.dtype)
    dq, dk, dv, dhanded = _gradients(
        static, asked, q, k, v, do, base2, delta, handed, fixed, jnp.where(alive, owed, 0)
    )
    return dq, dk, dv, dsink, dhanded, None


attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def advance(static: Static, q, k, v, carry, handed, fixed):
    """The state after these keys, ``(o[B, T', N, V], m[B, N, T'], l[B, N, T'])``, float32.

    ``carry``: the state before, in this form, or None. Other arguments: see ``attend``.
    """
    return _run(static, q, k, v, handed, fixed, state=True, carry=carry)


def _advance_fwd(static, *given):
    (q, k, v, carry, handed, fixed), asked = _perturbed(given, given[4])
    o, m, l = _run(static, q, k, v, handed, fixed, state=True, carry=carry)
    o = checkpoint_name(o, "attention_out")
    m, l = (checkpoint_name(x, "attention_lse") for x in (m, l))
    return (o, m, l), (asked, q, k, v, carry, handed, fixed, o, m, l)


def _advance_bwd(static, residuals, cotangents):
    asked, q, k, v, carry, handed, fixed, o, m, l = residuals
    do, _, dl = map(_real, cotangents)

    def product(x, y):
        return (x * y).sum(-1).swapaxes(1, 2)

    def beside(x):
        return x.swapaxes(1, 2)[..., None]

    dcarry = None
    if carry is not None:
        o0, m0, l0 = carry
        a = jnp.where(m0 > -jnp.inf, jnp.exp(m0 - m), 0)
        do0, dl0 = beside(a) * do, a * dl
        dcarry = do0, dl0 * l0 + product(do0, o0), dl0
    alive = l > 0
    total = jnp.where(alive, l, 1)
    narrow = (beside(jnp.where(alive, l, 0)) * do).astype(q.dtype)
    delta = product(o, narrow.astype(jnp.float32)) / total - (l * dl + product(o, do))
    delta = jnp.where(alive, delta, 0)
    base2 = jnp.where(alive, (m + jnp.log(total)) * LOG2E, 1e30)
    narrow = narrow[:, : q.shape[1]]
    dq, dk, dv, dhanded = _gradients(static, asked, q, k, v, narrow, base2, delta, handed, fixed)
    return dq, dk, dv, dcarry, dhanded, None


advance.defvjp(_advance_fwd, _advance_bwd, symbolic_zeros=True)


def _gradients(static, asked: _Asked, q, k, v, do, base2, delta, handed, fixed, owed=None):
    """``(dq, dk, dv, dhanded)``; lse in base 2. ``owed[B, N, T']``: what dz of a query adds up to,
    where that is known; it shows the error of delta, see ``gpu_backward.row_vectors``."""
    H, V = q.shape[-1], v.shape[-1]
    if max(H, V) > 256:
        raise UnsupportedError(
            f"gradient of attention with H = {H}, V = {V} and impl = 'gpu'",
            "above 256 the kernel has a forward pass only",
            "train the expanded form (heads up to 256), or use impl='xla'",
        )
    def run(kernel, config, transposed):
        plan, lists, operands = _prepared(
            static, config, handed, fixed, transposed, asked.handed
        )
        out = kernel(plan, config, q, k, v, do, base2, delta, lists, operands,
                     interpret=static.interpret)
        return plan, operands, _as_varying(out, q)

    configs = static.sizes.backward
    if gpu_widths.is_fused(configs):
        _, _, (dq, dk, dv) = run(gpu_backward_fused.grads, configs[0], True)
        return dq, dk, dv, [None] * len(handed)
    rows, columns = gpu_widths.backward_of(*configs)
    plan, operands, (dq, *row_sums) = run(*rows)
    vectors = gpu_backward.row_vectors(plan)
    row_sums, tables = row_sums[:vectors], row_sums[vectors:]
    if vectors:
        half, error = vectors // 2, 0.0 if owed is None else row_sums[-1] - owed
        row_sums = [x - error * w for x, w in zip(row_sums[:half], row_sums[half:-1], strict=True)]
        delta = delta + error
    _, _, (dk, dv, *column_sums) = run(*columns)
    dhanded: list[Any] = [None] * len(handed)
    for i, x in zip(gpu_backward.asked(plan, ("columns",)), column_sums, strict=True):
        dhanded[i] = _like(x, handed[i])
    tiles = {}
    if wanted := gpu_backward.asked(plan, ("distances",)):
        found = gpu_distance.grad_tiles(
            plan, plan.diagonals, q, k, v, do, base2, delta, operands, interpret=static.interpret
        )
        tiles = dict(zip(wanted, _as_varying(found, q), strict=True))
    counts = gpu_backward.row_sums(plan)
    for i, count in zip(gpu_backward.asked(plan, gpu_backward.ROW_GROUPS), counts, strict=True):
        sums, row_sums = row_sums[:count], row_sums[count:]
        if i in tiles:
            numbers = jnp.stack([x.sum(-1) for x in sums], -1)
            x = gpu_distance.folded(plan.diagonals, numbers, tiles[i], plan.T, plan.S)
            dhanded[i] = _like(x, handed[i], whole=True)
        else:
            dhanded[i] = _like(sums[0], handed[i])
    for i, x in zip(gpu_backward.asked(plan, ("dense",)), tables, strict=True):
        dhanded[i] = _like(x[..., : plan.T, : plan.S], handed[i], whole=True)
    for i, x in enumerate(handed):
        if dhanded[i] is None and not jnp.issubdtype(x.dtype, jnp.floating):
            dhanded[i] = np.zeros(x.shape, jax.dtypes.float0)
    return dq, dk, dv, dhanded


def _like(x, given, whole: bool = False):
    """Sums ``[B, N, T']`` in the shape of the handed value: the axes it lacks are summed."""
    if not whole:
        x = x.sum(-1) if given.ndim == 2 else x[..., : given.shape[-1]]
    for axis in (0, 1):
        if given.shape[axis] == 1:
            x = x.sum(axis, keepdims=True)
    return x


def _prepared(static: Static, config, handed, fixed, transposed: bool, wanted=(), whole=False):
    """Plan, lists and operands of a kernel."""
    seen, mask, q_coords, k_coords = fixed
    plan = static.make(
        block_q=config.block_q, block_k=config.block_k, transposed=transposed, wanted=wanted,
        whole=whole,
    )
    operands = [
        *handed_operands(plan, "score", handed), *handed_operands(plan, "mask", seen),
        *coordinates(plan, q_coords, k_coords),
    ]
    lists = block_lists(
        mask, q_coords, k_coords, block_q=config.block_q, block_k=config.block_k,
        layout=static.layout, transposed=transposed,
    )
    return plan, lists, operands
