"""The torch side of ``attnlab bench attention``: FlexAttention and cuDNN through torch.

Torch is no dependency of attnlab and is imported on use; it runs in a process of its own, so that
the two frameworks share neither CUPTI nor a CUDA context. Arrays are ``[B, N, S, H]``, contiguous,
as torch's kernels like them best; that copy is outside the timed call.

- ``flex``: ``torch.compile(flex_attention)``, Triton back end, default tile heuristics.
- ``flex-exp``: the same, the cap's tanh written with exp, which Triton computes faster.
- ``flex-tuned``: ``flex`` with inductor's max-autotune over tiles.
- ``flex-fa4``: FlexAttention with its FlashAttention-4 back end.
- ``torch-cudnn``: ``scaled_dot_product_attention`` held to the cuDNN back end.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from attnlab.analysis import bench_cases as cases
from attnlab.analysis import bench_timing
from attnlab.analysis.bench_cases import BOTH, Case, Decode
from attnlab.analysis.bench_oracle import compare
from attnlab.analysis.bench_worker import versions
from attnlab.core.errors import UnsupportedError

PACKAGES = ("torch", "triton", "nvidia-cudnn-cu13", "flash-attn-4", "nvidia-cutlass-dsl", "numpy")


class Engine:
    """Measures torch's attention on one device; keeps the data of one case there, and the calls of
    it in one direction that are ready to be timed.

    Args:
        device: "cuda", or "cpu" to try the harness (FlexAttention has no gradient there).

    Raises:
        ImportError: torch is not installed. UnsupportedError: torch sees no GPU.
    """

    def __init__(self, device: str = "cuda") -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("torch", "sees no GPU here", "run it where there is one")
        self.torch: Any = torch
        self.device = device
        self.case: Case | None = None
        self.data: dict[str, Any] = {}
        self.ready: dict[tuple[str, str], Callable[[], dict]] = {}
        self.pairs = 0.0

    def stamp(self) -> dict[str, Any]:
        """The device and the versions that stand in every row of this engine."""
        found = versions(PACKAGES) | {"cuda": self.torch.version.cuda}
        found["torch"] = self.torch.__version__
        found["cudnn"] = str(self.torch.backends.cudnn.version())
        name = self.torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": name, "platform": self.device, "versions": found}

    def healthy(self) -> bool:
        """Whether the device still computes; a CUDA fault is final for its process."""
        try:
            return float(self.torch.ones(8, device=self.device).sum()) == 8.0
        except Exception:  # whatever it is, the process is of no more use
            return False

    def prepare(
        self, case: Case | Decode, impl: str, direction: str, reference: str
    ) -> dict[str, Any]:
        """Compile one cell and compare it with the reference file: a part of its row. A cell that
        agrees can be timed until another case or direction is prepared."""
        if isinstance(case, Decode):
            raise UnsupportedError(impl, "has no paged decoding step here", "leave the case out")
        torch = self.torch
        if self.case != case or any(way != direction for _, way in self.ready):
            self.ready = {}
            torch._dynamo.reset()
        data = self._load(case)
        row: dict[str, Any] = {"pairs": self.pairs}
        try:
            forward, lists_ms = self._forward(case, impl, data)
            if lists_ms is not None:
                row["lists_ms"] = lists_ms
            call = self._call(case, direction, forward, data)
            started = time.perf_counter()
            first = self._first(call, impl)
            row["compile_s"] = time.perf_counter() - started
            finite = all(bool(x.isfinite().all()) for x in first.values())
            with np.load(reference) as exact:
                found = {n: self._host(n, x, exact["tokens"]) for n, x in first.items()}
                row["errors"], wrong = compare(found, exact)
            if wrong or not finite:
                return row | {"reason": wrong or "results are not finite"}
            again = call()
            row["repeatable"] = all(bool((again[n] == x).all()) for n, x in first.items())
            del first, again, found
            self.ready[impl, direction] = call
            return row
        finally:
            self._collect()

    def time(self, impl: str, direction: str) -> dict[str, Any]:
        """A round of timing a cell that is ready; the rest of its row."""
        call = self.ready[impl, direction]
        try:
            return bench_timing.take(
                call, self._wait, lambda count: bench_timing.torch_kernels(call, count)
            ).row()
        finally:
            self._collect()

    def _collect(self) -> None:
        gc.collect()
        self.torch.cuda.empty_cache()

    def _first(self, call: Callable[[], dict], impl: str) -> dict[str, Any]:
        """The first call, compilation included; cuDNN's reasons for no come as warnings."""
        if impl != "torch-cudnn":
            results = call()
        else:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                try:
                    results = call()
                except RuntimeError as error:
                    why = "\n".join(str(w.message) for w in heard[-2:])
                    raise RuntimeError(f"{error}\n{why}") from error
        self._wait(results)
        return results

    def _wait(self, results: Any = None) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _load(self, case: Case) -> dict[str, Any]:
        """Tensors of a case on the device, ``q, k, v, do`` as ``[B, N, S, H]``."""
        if self.case != case:
            self.case, self.data = None, {}
            self.torch.cuda.empty_cache()
            host = cases.arrays(case)
            self.pairs = cases.pairs(case, host)
            self.data = {
                n: self._halves(x) if n in ("q", "k", "v", "do") else self._tensor(x)
                for n, x in host.items()
            }
            self.case = case
        return self.data

    def _tensor(self, x: np.ndarray):
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def _halves(self, x: np.ndarray):
        """NumPy's bf16 is a stranger to torch: the bits travel as int16."""
        return self._tensor(x.swapaxes(1, 2).view(np.int16)).view(self.torch.bfloat16)

    def _host(self, name: str, x, tokens: np.ndarray) -> np.ndarray:
        """A result as the reference stores it."""
        if name == "dtable":
            return x.float().cpu().numpy()
        return x[:, :, self._tensor(tokens)].transpose(1, 2).float().cpu().numpy()

    def _call(self, case: Case, direction: str, forward: Callable, data) -> Callable[[], dict]:
        torch = self.torch
        q, k, v = (data[n].detach().requires_grad_(direction == BOTH) for n in ("q", "k", "v"))
        if direction != BOTH:

            def run():
                with torch.no_grad():
                    return {"o": forward(q, k, v)}

            return run
        names, wrt = ["dq", "dk", "dv"], [q, k, v]
        if case.mod == "t5":
            names, wrt = [*names, "dtable"], [*wrt, data["table"]]

        def both():
            o = forward(q, k, v)
            grads = torch.autograd.grad(o, wrt, data["do"])
            return {"o": o.detach()} | dict(zip(names, grads, strict=True))

        if case.mod == "t5":
            data["table"].requires_grad_(True)
        return both

    def _forward(self, case: Case, impl: str, data) -> tuple[Callable, float | None]:
        """``o = f(q, k, v)`` and the milliseconds its block lists took to build (None: no lists).

        Raises:
            UnsupportedError: the peer does not compute this case, or is not installed.
        """
        if impl == "torch-cudnn":
            return self._cudnn(case), None
        from torch.nn.attention.flex_attention import flex_attention

        if "table" in data:
            data["table"].requires_grad_(False)
        options = None
        if impl == "flex-fa4":
            if not _installed("flash_attn.cute"):
                raise UnsupportedError(
                    "flex-fa4", "flash_attn.cute is not installed", "install flash-attn-4"
                )
            options = {"BACKEND": "FLASH"}
        mode = "max-autotune-no-cudagraphs" if impl == "flex-tuned" else None
        compiled = self.torch.compile(flex_attention, dynamic=False, mode=mode)
        block_mask, times = None, []
        for _ in range(4):  # the first builds the lists cold
            self._wait()
            started = time.perf_counter()
            block_mask = self._block_mask(case, data)
            self._wait()
            times.append((time.perf_counter() - started) * 1e3)
        score_mod, grouped = self._score_mod(case, impl, data), case.N != case.K

        def forward(q, k, v):
            return compiled(
                q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped,
                kernel_options=options,
            )

        return forward, statistics.median(times[1:])

    def _cudnn(self, case: Case) -> Callable:
        if case.mod or case.sight != "causal":
            raise UnsupportedError(
                "torch-cudnn", "serves plain causal attention alone", "leave the case out"
            )
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def forward(q, k, v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=case.N != case.K
                )

        return forward

    def _block_mask(self, case: Case, data):
        from torch.nn.attention.flex_attention import create_block_mask

        def causal(b, h, t, s):
            return t >= s

        def documents(b, h, t, s):
            return (t >= s) & (segments[t] == segments[s])

        def window(b, h, t, s):
            return (t >= s) & ((t - s < case.window) | (s < cases.SINKS))

        if case.sight == "blocks":
            return self._listed(case, data["lists"], causal)
        segments = data.get("segments")
        rule = {"causal": causal, "documents": documents, "window": window}[case.sight]
        return create_block_mask(rule, None, None, case.S, case.S, device=self.device)

    def _listed(self, case: Case, lists, causal):
        """A BlockMask from lists whose last block is the query's own; torch transposes it."""
        from torch.nn.attention.flex_attention import BlockMask

        torch = self.torch
        rows, most = lists.shape[2:]
        own = torch.arange(rows, dtype=torch.int32, device=self.device)
        counts = (lists >= 0).sum(-1).to(torch.int32)
        full = torch.zeros((*lists.shape[:3], rows), dtype=torch.int32, device=self.device)
        full[..., :most] = torch.where(lists >= 0, lists, 0)
        partial = torch.zeros_like(full)
        partial[..., 0] = own
        return BlockMask.from_kv_blocks(
            torch.ones_like(counts), partial, counts - 1, full, BLOCK_SIZE=case.block,
            mask_mod=causal,
        )

    def _score_mod(self, case: Case, impl: str, data) -> Callable | None:
        torch, double = self.torch, 2 / cases.CAP
        if impl == "flex-exp":
            if case.mod != "cap":
                raise UnsupportedError(impl, "differs from flex in the cap alone", "use flex")
            return lambda z, b, h, t, s: cases.CAP * (1 - 2 / (torch.exp(double * z) + 1))
        if case.mod == "cap":
            return lambda z, b, h, t, s: cases.CAP * torch.tanh(z / cases.CAP)
        if case.mod == "alibi":
            slopes = data["slopes"]
            return lambda z, b, h, t, s: z + slopes[h] * (s - t)
        if case.mod == "t5":
            table = data["table"]

            def biased(z, b, h, t, s):
                n = torch.clamp(t - s, min=0)
                octaves = torch.log2(torch.clamp(n, min=1).to(torch.float32) / cases.EXACT)
                far = cases.EXACT + (octaves * cases.STEPS).to(torch.int32)
                bucket = torch.where(n < cases.EXACT, n, torch.clamp(far, max=cases.BUCKETS - 1))
                return z + table[h, bucket]

            return biased
        return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
