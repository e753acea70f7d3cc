"""The machine itself, and FBGEMM's kernels on it against the same update on paper."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import fbgemm_gpu
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from benchmarks.gpu.check import Answer, Check, Row, answer
from benchmarks.gpu.measure import difference
from benchmarks.harness.timing import copy_rate, single_seconds

_ROWS, _DIM, _BAGS, _STEPS, _RATE, _EPS = 1000, 16, 400, 3, 0.1, 1e-8
_LARGEST = 1e-5


def environment(check: Check) -> Answer:
    """Which versions meet here, and how fast this card copies and multiplies.

    Expected: a copy reads and writes together about nine tenths of what the data sheet says (3.35 TB/s of an
    H100 SXM, 4.8 of an H200), bf16 products run at some three quarters of it (989 TFLOP/s, without sparsity).
    Shares of the copy rate in other steps are of this kind of rate.
    """
    device = check.device
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "fbgemm": f"{fbgemm_gpu.__version__} {getattr(fbgemm_gpu, '__variant__', '')}".strip(),
        "device": str(device),
        # Triton compiles its launchers when a kernel is first called.
        "C compiler": next(filter(None, map(shutil.which, ("gcc", "clang"))), "none"),
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    }
    if check.on_cuda:
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {"name": torch.cuda.get_device_name(device), "architecture": f"sm_{major}{minor}"}
        facts["devices"] = torch.cuda.device_count()
        facts["memory GB"] = torch.cuda.mem_get_info(device)[1] / 1e9
    facts["copy GB/s"] = copy_rate(device, check.size(1 << 30, 1 << 20), repeats=10, warm=3) / 1e9
    width = check.size(8192, 256)
    square = torch.randn(width, width, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        part = square.to(dtype)
        taken = single_seconds(lambda part=part: part @ part, repeats=10, warm=3)  # type: ignore[misc]
        facts[f"{str(dtype).removeprefix('torch.')} TFLOP/s"] = 2 * width**3 / taken / 1e12
    if check.on_cuda:
        host = torch.randn(check.size(1 << 28, 1 << 20)).pin_memory()
        target = torch.empty(host.shape, device=device)
        uploaded = single_seconds(lambda: target.copy_(host, non_blocking=True), repeats=10, warm=3)
        facts["upload GB/s"] = 4 * host.numel() / uploaded / 1e9
    return answer(**facts)


def tbe(check: Check) -> Answer:
    """Whether FBGEMM's kernels update rows as the optimizers are written on paper, tables in the device's
    memory and behind a cache there (host memory mapped), in fp32 and fp16.

    Expected: weights after three steps within 1e-5 of a reference in double precision; fp16 within 1e-3.
    """
    places = ("DEVICE", "MANAGED_CACHING") if check.on_cuda else ("HOST",)
    rows: list[Row] = []
    for place in places:
        for kind in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD):
            halves = (SparseType.FP16,) if kind is EmbOptimType.EXACT_ROWWISE_ADAGRAD else ()
            for dtype in (SparseType.FP32, *halves):
                found = _after_some_steps(place, kind, dtype, check.device)
                rows.append(
                    {"rows lie in": place, "optimizer": kind.name, "dtype": dtype.name, "difference": found}
                )
    limits = {"FP32": _LARGEST, "FP16": 1e-3}
    bad = [
        f"{r['rows lie in']} {r['optimizer']} {r['dtype']}"
        for r in rows
        if r["difference"] > limits[r["dtype"]]
    ]
    return answer(rows, bad)


def _after_some_steps(place: str, kind: EmbOptimType, dtype: SparseType, device: torch.device) -> float:
    """How far the weights of one table are from the reference."""
    rng = torch.Generator().manual_seed(1)
    compute = ComputeDevice.CUDA if device.type == "cuda" else ComputeDevice.CPU
    cached = place == "MANAGED_CACHING"
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(_ROWS, _DIM, EmbeddingLocation[place], compute)],
        optimizer=kind,
        learning_rate=_RATE,
        eps=_EPS,
        weights_precision=dtype,
        stochastic_rounding=False,
        device=device,
        **({"uvm_host_mapped": True} if cached else {}),
    )
    first = torch.randn(_ROWS, _DIM, generator=rng).to(
        torch.float16 if dtype is SparseType.FP16 else torch.float32
    )
    made.split_embedding_weights()[0].copy_(first)
    wanted, state = first.double(), torch.zeros(_ROWS, _DIM, dtype=torch.float64)
    for _ in range(_STEPS):
        lengths = torch.randint(0, 4, (_BAGS,), generator=rng)
        ids = torch.randint(0, _ROWS, (int(lengths.sum()),), generator=rng)
        gradient = torch.randn(_BAGS, _DIM, generator=rng)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        out = made(ids.to(device), offsets.to(device))
        out.backward(gradient.to(out))
        wanted = _on_paper(kind, wanted, state, ids, gradient.double()[torch.repeat_interleave(lengths)])
    if cached:
        made.flush()
    return difference(made.split_embedding_weights()[0].float(), wanted)


def _on_paper(kind: EmbOptimType, weight: Tensor, state: Tensor, ids: Tensor, of_uses: Tensor) -> Tensor:
    """The weights after a step; `state`, the sum of squares, changes in place. All in double precision."""
    gradient = torch.zeros_like(weight).index_add_(0, ids, of_uses)
    if kind is EmbOptimType.EXACT_SGD:
        return weight - _RATE * gradient
    square = gradient.square()
    state += square.mean(1, keepdim=True) if kind is EmbOptimType.EXACT_ROWWISE_ADAGRAD else square
    # Rows without a gradient divide zero by eps at least.
    return weight - _RATE * gradient / (state.sqrt() + _EPS)
