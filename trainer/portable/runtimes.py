"""Running a portable model by the runtime that it is for, as any caller would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from embeddings.private import load_package
from trainer.portable.requests import Arrays

# Inputs by name -> probabilities, float32 [B, C, T].
Run = Callable[[Arrays], npt.NDArray[np.float32]]


def onnx_runtime(file: Path, threads: int = 0) -> Run:
    """By ONNX Runtime on the CPU; `threads`: 0 = as many as it likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Arrays) -> npt.NDArray[np.float32]:
        (output,) = session.run(None, inputs)
        return np.asarray(output)

    return run


def compiled(file: Path, threads: int = 0) -> Run:
    """By AOTInductor's loader; `threads`: those of torch."""
    package = load_package(str(file))

    def run(inputs: Arrays) -> npt.NDArray[np.float32]:
        output = package(*(torch.from_numpy(part) for part in inputs.values()))
        found: npt.NDArray[np.float32] = output.numpy()
        return found

    return run
