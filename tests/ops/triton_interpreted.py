"""In a process of its own: the Triton kernels in Triton's CPU interpreter, against fp64.

    TRITON_INTERPRET=1 python -m tests.ops.triton_interpreted 0/3     (every third case from 0 on)

Prints a JSON object: case -> what ``triton_cases.errors`` says. The kernels are launched by the
implementation itself, with its grids and constants; only the launcher is another.
"""

from __future__ import annotations

import functools
import json
import sys
import threading

import jax
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from attnlab.ops.attention import triton, tuning
from tests.triton_cases import CASES, errors

TYPES = {
    "bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32, "int32": tl.int32,
}
ONE = threading.Lock()  # the interpreter keeps its state in a module


# Triton 3.6 makes loop bounds from arrays of one element, which numpy 2.5 refuses, and multiplies
# the bits of bfloat16 as if they were integers.


def _index_tensors(tensor, scope, patch=interpreter._patch_lang_tensor):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(self, a, b, acc, *rest, dot=interpreter.InterpreterBuilder.create_dot):
    def floats(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        wide = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    return dot(self, floats(a), floats(b), acc, *rest)


interpreter._patch_lang_tensor = _index_tensors
interpreter.InterpreterBuilder.create_dot = _dot


def interpreted(call: triton.Launch):
    """Run a kernel in the interpreter, on the host."""

    def pointer(x: np.ndarray):
        kind, at = tl.pointer_type(TYPES[x.dtype.name]), np.asarray([x.ctypes.data], np.uint64)
        return tl.tensor(interpreter.TensorHandle(at, kind), kind)

    def host(*arrays):
        arrays = [np.ascontiguousarray(x) for x in arrays]
        outs = [np.full(x.shape, np.nan, x.dtype) for x in call.outs]
        with ONE:
            call.kernel[call.grid](*map(pointer, (*arrays, *outs)), **call.constants)
        return outs

    return jax.pure_callback(host, list(call.outs), *call.arrays)


def main(part: str) -> dict:
    sizes = {f"{name}{end}": size for end in ("", "_dq", "_dkv")
             for name, size in (("block_q", 32), ("block_k", 16))}
    first, step = map(int, part.split("/"))
    kernel = functools.partial(triton.forward, launch=interpreted)
    with tuning.forcing(sizes):
        return {name: errors(kernel, CASES[name]) for name in list(CASES)[first::step]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
