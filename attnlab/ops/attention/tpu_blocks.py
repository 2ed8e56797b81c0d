"""Block sizes of the TPU kernels, and how much of a core's memory they may use."""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

from attnlab.core.mask import Blocks, Mask, conjuncts

LANES = 128
MIB = 2**20
VMEM = {"TPU v4": 16, "TPU v5 lite": 128, "TPU v5e": 128, "TPU v5": 64, "TPU v5p": 64,
        "TPU v6 lite": 128, "TPU v6e": 128, "TPU7x": 64}  # MiB a core


def vmem_limit(kind: str) -> int:
    """Bytes of VMEM that a kernel may take; interpreters on other devices get what a v5e has."""
    return VMEM.get(kind, 128) * MIB * 15 // 16


def sums_limit(kind: str) -> int:
    """Bytes of VMEM for the sums dk and dv of all keys at hand (backward)."""
    return VMEM.get(kind, 128) * MIB * 3 // 8


def _wide(width: int) -> int:
    return -(-width // LANES) * LANES


def forward_blocks(T: int, S: int, H: int, V: int, dtype: str, kind: str, mask: Mask):
    """``(block_q, block_k)`` of the forward."""
    most = 1024 if _roomy(H, V, dtype, kind) else 512
    return dividing(mask, _fitting(T, most, 16), _fitting(S, most, LANES))


def backward_blocks(T: int, S: int, H: int, V: int, dtype: str, kind: str, mask: Mask):
    """``(block_q, block_k)`` of the backward.

    Chips with matrix units 256 wide gain a tenth by larger tiles, the others a fiftieth.
    """
    q = k = 512 if _roomy(H, V, dtype, kind) else 256
    if q == 512 and kind in ("TPU v6 lite", "TPU v6e", "TPU7x"):
        q, k = (1024, 1024) if _wide(H) + _wide(V) <= 256 else (1024, 512)
    return dividing(mask, _fitting(T, q, LANES), _fitting(S, k, LANES))


def _roomy(H: int, V: int, dtype: str, kind: str) -> bool:
    """Whether large tiles fit."""
    return _wide(H) + _wide(V) <= 512 and dtype != "float32" and VMEM.get(kind, 128) >= 64


def _fitting(length: int, most: int, least: int) -> int:
    """The block up to ``most`` that pads ``length`` least, larger ones at a small discount."""
    if length <= LANES:
        return max(least, -(-length // least) * least)
    sizes = range(LANES, most + 1, LANES)
    return min(sizes, key=lambda size: -(-length // size) * (size + 16))


def dividing(mask: Mask, q: int, k: int) -> tuple[int, int]:
    """The sizes, or smaller ones that divide the blocks of a ``Blocks`` mask."""
    for part in conjuncts(mask):
        if isinstance(part, Blocks):
            q = next(b for b in range(max(q, LANES), 0, -LANES) if part.block_q % b == 0)
            k = next(b for b in range(max(k, LANES), 0, -LANES) if part.block_k % b == 0)
    return q, k
