"""Which Hopper kernel serves which head widths, and the sizes of the one above 256.

Backward, where nothing else is chosen:

| max(H, V) | forward | dq | dk, dv |
|---|---|---|---|
| 64 or 128, causal or full | ``gpu_forward`` | ``gpu_backward_fused`` | the same |
| up to 128 | ``gpu_forward`` | ``gpu_backward`` | ``gpu_backward`` |
| 192 / 128 | ``gpu_forward`` | ``gpu_backward`` | ``gpu_backward_wide_kv`` |
| up to 256 | ``gpu_forward`` | ``gpu_backward_wide`` | ``gpu_backward_wide_kv`` |
| up to 576 / 512 | ``gpu_wide`` | none | none |

The kernel follows from the type of its sizes, which ``gpu_sizes`` chooses up to 256: tuned or
forced ones may take the other kernel of dq or of dk, dv. The fused one needs H = V, and heads
enough.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

from attnlab.ops.attention import (
    gpu_backward,
    gpu_backward_fused,
    gpu_backward_wide,
    gpu_backward_wide_kv,
    gpu_forward,
    gpu_wide,
)

SHARED_MEMORY = 230_400  # bytes of a block for tiles; 2 KB are left for vectors and barriers


def forward_config(H: int, V: int, value_is_prefix: bool) -> gpu_wide.Config:
    """Sizes above 256: as many stages as shared memory has room for."""
    for stages, stages_v in ((3, 3), (3, 2), (2, 2), (2, 1), (1, 1)):
        columns = max(H, V) + stages * H + (0 if value_is_prefix else stages_v * V) + 64
        if 128 * columns <= SHARED_MEMORY:
            break
    return gpu_wide.Config(128, 64, stages, stages_v, value_is_prefix=value_is_prefix)


def forward_of(config):
    """The forward kernel of these sizes."""
    return gpu_wide.forward if isinstance(config, gpu_wide.Config) else gpu_forward.forward


def is_fused(configs) -> bool:
    """Whether sizes are of the kernel that has dq, dk and dv."""
    return isinstance(configs[0], gpu_backward_fused.Config)


def backward_of(config_q, config_kv):
    """``(kernel, sizes, transposed lists)`` of dq and of dk, dv."""
    narrow_q, narrow_kv = (isinstance(c, gpu_backward.Config) for c in (config_q, config_kv))
    return (
        ((gpu_backward if narrow_q else gpu_backward_wide).grad_q, config_q, False),
        ((gpu_backward if narrow_kv else gpu_backward_wide_kv).grad_kv, config_kv, True),
    )
