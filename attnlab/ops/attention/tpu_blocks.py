"""Block sizes of the TPU kernels, and how much of a core's memory they may use."""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

from attnlab.core.dispatch import Device
from attnlab.core.mask import Blocks, Mask, conjuncts
from attnlab.ops.attention import tuning

LANES = 128
MIB = 2**20
VMEM = {"TPU v4": 16, "TPU v5 lite": 128, "TPU v5e": 128, "TPU v5": 64, "TPU v5p": 64,
        "TPU v6 lite": 128, "TPU v6e": 128, "TPU7x": 64}  # MiB a core
WIDE_UNITS = ("TPU v6 lite", "TPU v6e", "TPU7x")  # matrix units 256 wide


def vmem_limit(kind: str) -> int:
    """Bytes of VMEM that a kernel may take; interpreters on other devices get what a v5e has."""
    return VMEM.get(kind, 128) * MIB * 15 // 16


def sums_limit(kind: str) -> int:
    """Bytes of VMEM for the sums dk and dv of all keys at hand (backward)."""
    return VMEM.get(kind, 128) * MIB * 3 // 8


def _wide(width: int) -> int:
    return -(-width // LANES) * LANES


def forward_blocks(T: int, S: int, H: int, V: int, dtype: str, mask: Mask) -> tuple[int, int]:
    """``(block_q, block_k)`` of the forward."""
    return _chosen("forward", T, S, H, V, dtype, mask)


def backward_blocks(T: int, S: int, H: int, V: int, dtype: str, mask: Mask) -> tuple[int, int]:
    """``(block_q, block_k)`` of the backward."""
    return _chosen("backward", T, S, H, V, dtype, mask)


def _chosen(direction: tuning.Direction, T, S, H, V, dtype, mask) -> tuple[int, int]:
    """Forced, tuned or default sizes, made to divide the blocks of the mask."""
    key = tuning.Key("tpu", direction, H, V, 1, dtype, T, S, tuning.mask_class(mask))
    blocks = tuning.choose(key).blocks
    return dividing(mask, *(blocks[name] for name in _NAMES[direction]))


_NAMES = {"forward": ("block_q", "block_k"), "backward": ("block_q_bwd", "block_k_bwd")}


def _default(key: tuning.Key) -> tuning.Blocks:
    """The heuristic. Chips with matrix units 256 wide gain a tenth of the backward by larger tiles,
    the others a fiftieth."""
    kind = Device.default().kind
    roomy = _roomy(key.H, key.V, key.dtype, kind)
    if key.direction == "forward":
        most, least = (1024,) * 2 if roomy else (512,) * 2, (16, LANES)
    elif roomy and kind in WIDE_UNITS:
        narrow = _wide(key.H) + _wide(key.V) <= 256
        most, least = (1024, 1024 if narrow else 512), (LANES, LANES)
    else:
        most, least = (512,) * 2 if roomy else (256,) * 2, (LANES, LANES)
    sizes = map(_fitting, (key.T, key.S), most, least)
    return dict(zip(_NAMES[key.direction], sizes))


def _candidates(key: tuning.Key) -> list[tuning.Blocks]:
    sizes = (256, 512, 1024, 2048)
    found = [
        dict(zip(_NAMES[key.direction], (q, k))) for q in tuning.fitting(sizes, key.T)
        for k in tuning.fitting(sizes, key.S) if q * k <= 2**21
    ]
    usual = _default(key)
    return [usual, *(blocks for blocks in found if blocks != usual)]


def _refuses(key: tuning.Key, blocks: tuning.Blocks) -> str | None:
    for name, least in zip(_NAMES[key.direction], (16 if key.direction == "forward" else 128, 128)):
        if blocks[name] < least or blocks[name] % least:
            return f"{name} = {blocks[name]} is not a multiple of {least}"
    return None


def _tile(role: str, blocks: tuning.Blocks) -> tuning.Tile:
    q, k = _NAMES["forward" if role == "forward" else "backward"]
    return tuning.Tile(blocks[q], blocks[k])


tuning.register("tpu", tuning.Space(_default, _candidates, _refuses, _tile))


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
