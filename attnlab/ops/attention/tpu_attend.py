"""Attention by the TPU kernels as one differentiable function.

A *problem* is a call as the kernels see it. Where there are few query tokens, the G query heads of
a key/value head are folded into rows, ``(token, head)`` in this order: then rows fill the tile, N
is K, and what was handed over a head is handed over a row.

The score's handed values and the sinks are arguments of the custom derivative; that of captured
arrays follows from theirs in plain JAX.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attnlab.core.errors import UnsupportedError
from attnlab.core.mask import Blocks, Coords, Mask, MaskMod, parts
from attnlab.core.mods import Program
from attnlab.core.staging import Body, split, values
from attnlab.ops.attention import tpu_blocks
from attnlab.ops.attention.blocks import block_lists
from attnlab.ops.attention.pairs import pair_mod
from attnlab.ops.attention.tpu_backward import backward
from attnlab.ops.attention.tpu_forward import forward
from attnlab.ops.attention.tpu_scores import LOG2E
from attnlab.ops.attention.tpu_steps import backward_steps, forward_steps
from attnlab.ops.attention.tpu_tiles import (
    LANES,
    Plan,
    leads,
    make_plan,
    operands,
    padded,
    strip,
)

FOLD_TOKENS, FOLD_ROWS = 64, 1024


def folds(mask: Mask, body: Body | None, handed: list, T: int, G: int, layout: str) -> bool:
    """Whether to fold the heads of a group into rows: few tokens, and nothing that forbids it."""
    if G == 1 or T > FOLD_TOKENS or T * G > FOLD_ROWS:
        return False
    for part in parts(mask):
        if isinstance(part, MaskMod) or (isinstance(part, Blocks) and part.lists.shape[1] > 1):
            return False
    groups = [] if body is None else [h.group for h in body.handed]
    return not any(
        group in ("distances", "dense") or (group == "columns" and x.shape[1] > 1)
        for group, x in zip(groups, handed)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is fixed when the kernels are traced.

    Args:
        score: the cap and the score_mod as one program, or None. T, S, N: of the call. fold: query
            heads folded into rows, or 1. kind: of the device. interpret: see ``tpu.forward``.
    """

    score: Program | None
    T: int
    S: int
    N: int
    fold: int
    scale: float
    layout: str
    kind: str
    interpret: Any

    def rows_of(self, x):
        """``[B, N, T, W]`` to ``[B, N/fold, T fold, W]``."""
        if self.fold == 1:
            return x
        B, N, T, W = x.shape
        x = x.reshape(B, N // self.fold, self.fold, T, W).swapaxes(2, 3)
        return x.reshape(B, N // self.fold, T * self.fold, W)

    def tokens_of(self, x):
        """The inverse of ``rows_of``."""
        if self.fold == 1:
            return x
        B, K, R, W = x.shape
        x = x.reshape(B, K, R // self.fold, self.fold, W).swapaxes(2, 3)
        return x.reshape(B, K * self.fold, R // self.fold, W)

    def group(self, group: str, heads: int) -> str:
        """The group of a hoisted value of so many heads after folding."""
        return "rows" if self.fold > 1 and group == "heads" and heads > 1 else group

    def folded(self, group: str, x):
        """A hoisted value as the kernels index it."""
        if self.fold == 1 or group in ("columns", "distances", "dense"):
            return x
        heads = x.shape[1]
        if group == "heads":
            if heads == 1:
                return x
            x = jnp.broadcast_to(x[..., None], (*x.shape, self.T))
        if heads == 1:
            return jnp.repeat(x, self.fold, -1)
        return self.rows_of(x[..., None])[..., 0]


def _plan(problem: Problem, direction: str, shapes, handed, fixed, grads=(), sink=None):
    """``(plan, steps, operands, leads)`` of a kernel."""
    mask, q, k = fixed
    B, rows, H, V, K, dtype = shapes
    forward_pass = direction == "forward"
    choose = tpu_blocks.forward_blocks if forward_pass else tpu_blocks.backward_blocks
    block_q, block_k = choose(rows, problem.S, H, V, dtype, mask)
    T, S, fold = problem.T, problem.S, problem.fold
    if problem.score is not None:
        known = {h.group for h in split(problem.score, T, S).handed}
        if "distances" in known:  # Toeplitz tiles are made of whole vectors
            block_q += -block_q % LANES
    pair = pair_mod(mask, S if S % block_k else None)
    pair = pair.bound(B, problem.N)
    bodies = [None if p is None else split(p, T, S) for p in (problem.score, pair.program)]
    seen = values(pair, bodies[1], q, k)  # type: ignore[arg-type]
    groups = tuple(
        tuple(
            problem.group(h.group, x.shape[1] if x.ndim == 2 else 2)
            for h, x in zip(body.handed if body else (), given)
        )
        for body, given in zip(bodies, (handed, seen))
    )
    seen = [problem.folded(h.group, x) for h, x in zip(bodies[1].handed, seen)]  # type: ignore
    free = {"k_index"} | ({"k_pos"} if problem.layout == "full" else set())
    if fold == 1:
        free |= {"q_index"} | ({"q_pos"} if problem.layout == "full" else set())
    plan = make_plan(
        bodies[0], bodies[1], groups, rows, S, block_q, block_k, 0 if forward_pass else 1,  # type: ignore[arg-type]
        problem.scale, frozenset(free), tuple(grads),
        None if sink is None else "rows" if sink.ndim == 3 else "heads",
    )
    plan = dataclasses.replace(plan, vector_bound=problem.kind in tpu_blocks.WIDE_UNITS)
    lists = block_lists(
        mask, q, k, block_q=T if fold > 1 else block_q, block_k=block_k, layout=problem.layout
    )
    listed = any(isinstance(part, Blocks) for part in parts(mask))
    columns = plan.columns // block_k
    if forward_pass:
        steps = forward_steps(lists, columns, listed)
    else:
        wide = sum(-(-w // LANES) * LANES for w in (H, V)) * 4 * block_k
        most = max(1, tpu_blocks.sums_limit(problem.kind) // wide)
        steps = backward_steps(lists, columns, listed, problem.N // fold // K, most)
    sides = [_coordinates(problem, q, True), _coordinates(problem, k, False)]
    return (
        plan, steps, operands(plan, handed, seen, *sides, sink), leads(plan, handed, seen, sink)
    )


def _coordinates(problem: Problem, x: Coords, queries: bool) -> Coords:
    """Coordinates ``[B or 1, 1, T]``, a row each where heads are folded."""

    def one(x):
        x = x.reshape(-1, 1, x.shape[-1])
        return problem.folded("rows", x) if queries else x

    return jax.tree.map(one, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(problem: Problem, q, k, v, sink, handed, fixed):
    """``(o[B, N, T, V], lse[B, N, T])`` of ``q[B, N, T, H]``, ``k[B, K, S, H]``, ``v[B, K, S, V]``.

    Args:
        sink: logits ``[1, N]`` (``[1, N, T]`` where folded) or None. handed: the score's hoisted
            values. fixed: mask, coordinates of queries and keys.
    """
    plan, steps, arrays, sizes = _plan(
        problem, "forward", _shapes(q, k, v), handed, fixed, (), sink
    )
    T = q.shape[2]
    o, lse = forward(
        plan, padded(q, plan.block_q, 2, "constant"), padded(k, plan.block_k, 2, "constant"),
        padded(v, plan.block_k, 2, "constant"), steps, arrays, sizes,
        vmem=tpu_blocks.vmem_limit(problem.kind), interpret=problem.interpret,
    )
    return o[:, :, :T], lse[:, :, :T]


def _shapes(q, k, v):
    return q.shape[0], q.shape[2], q.shape[3], v.shape[3], k.shape[1], q.dtype.name


@jax.tree_util.register_pytree_node_class
class _Asked:
    """Which gradients are asked for; static."""

    def __init__(self, sink: bool, handed: tuple[bool, ...]):
        self.sink, self.handed = sink, handed

    def tree_flatten(self):
        return (), (self.sink, self.handed)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*static)


def _forward(problem: Problem, *given):
    def is_leaf(x):
        return hasattr(x, "perturbed")

    arguments = jax.tree.map(lambda x: x.value, given, is_leaf=is_leaf)
    _, _, _, sink, handed, _ = given
    asked = _Asked(sink is not None and sink.perturbed, tuple(x.perturbed for x in handed))
    o, lse = attend(problem, *arguments)  # type: ignore[misc]
    o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (o, lse), (asked, arguments, o, lse)


def _backward(problem: Problem, residuals, cotangents):
    asked, arguments, o, lse = residuals
    do, dlse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    q, k, v, sink, handed, fixed = arguments
    alive = lse > -jnp.inf
    delta = jnp.zeros(lse.shape, jnp.float32) if dlse is None else -dlse
    if do is None:
        do = jnp.zeros(o.shape, o.dtype)
    else:
        delta += (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)
    delta = jnp.where(alive, delta, 0)
    grads = _gradients(problem, asked, q, k, v, do, lse, delta, handed, fixed)
    dsink = None
    if sink is not None:
        each = sink if sink.ndim == 3 else sink[..., None]
        d = -(jnp.where(alive, jnp.exp(each - jnp.where(alive, lse, 0)), 0) * delta)
        dsink = d.sum(0, keepdims=True) if sink.ndim == 3 else d.sum((0, 2))[None]
    dq, dk, dv, dhanded = grads
    return dq, dk, dv, dsink, dhanded, None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(problem: Problem, asked: _Asked, q, k, v, do, lse, delta, handed, fixed):
    """``(dq, dk, dv, dhanded)``."""
    wanted = tuple(i for i, x in enumerate(asked.handed) if x)
    plan, steps, arrays, sizes = _plan(
        problem, "backward", _shapes(q, k, v), handed, fixed, wanted
    )
    T, S = q.shape[2], k.shape[2]
    alive = lse > -jnp.inf
    base2 = jnp.where(alive, lse * LOG2E, 1e30)
    pad_q = functools.partial(padded, size=plan.block_q, axis=2, mode="constant")
    pad_k = functools.partial(padded, size=plan.block_k, axis=2, mode="constant")
    rows = [padded(x[:, :, None], plan.block_q) for x in (base2, delta)]
    rows[1] = pad_q(delta[..., None])[..., 0][:, :, None]
    dq, dk, dv, sums = backward(
        plan, pad_q(q), pad_k(k), pad_k(v), pad_q(do.astype(q.dtype)), *rows, steps, arrays, sizes,
        vmem=tpu_blocks.vmem_limit(problem.kind), interpret=problem.interpret,
    )
    found = dict(zip(wanted, sums))
    dhanded = [
        _of_sums(plan, plan.groups()[wanted.index(i)], found[i], x) if i in found else None
        for i, x in enumerate(handed)
    ]
    return dq[:, :, :T], dk[:, :, :S], dv[:, :, :S], dhanded


@_gradients.defjvp
def _twice(problem, asked, primals, tangents):
    raise UnsupportedError(
        "a second derivative of attention with impl = 'tpu'", "its kernels have none",
        "use impl='xla'",
    )


def _of_sums(plan: Plan, group: str, x, given):
    """The cotangent of a handed value from the kernel's sums; axes that it lacks are summed."""
    if group == "heads":
        x = x.sum((-1, -2))
    elif group == "rows":
        x = x.sum(-2)[..., : given.shape[-1]]
    elif group == "columns":
        x = x.sum(-2).reshape(*x.shape[:2], -1)[..., : given.shape[-1]]
    elif group == "dense":
        x = x.swapaxes(-1, -2)[..., : given.shape[-2], : given.shape[-1]]
    for axis in (0, 1):
        if given.shape[axis] == 1:
            x = x.sum(axis, keepdims=True)
    if group == "distances":
        x = x.swapaxes(2, 3).reshape(*x.shape[:2], 8, -1)
        shape = jax.ShapeDtypeStruct(given.shape, jnp.float32)
        (x,) = jax.linear_transpose(lambda y: strip(plan, y), shape)(x)
    return x


attend.defvjp(_forward, _backward, symbolic_zeros=True)
