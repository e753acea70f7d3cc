"""Stage two alone, as a function of what look-ups and search gave: for servers that have these themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.private import compile_package
from trainer.config.toml import Settings
from trainer.portable.building import Portable
from trainer.portable.onnx_model import converted
from trainer.portable.parity import BOUND
from trainer.portable.signature import CANDIDATES, KINDS, Axis, PortTensor
from trainer.snapshot.code import DensePart, dense_obstacle, dense_part

FILES = {"onnx": "dense.onnx", "pt2": "dense.pt2"}
NAMES = "dense.json"


def write(folder: Path, portable: Portable, form: str) -> tuple[str, str]:
    """Write the dense part in a format: its file, or empty and the reason why there is none.

    Raises:
        SnapshotError: it computes something else.
    """
    snapshot = portable.snapshot
    if reason := dense_obstacle(snapshot.model):
        return "", reason
    part, file = dense_part(snapshot), FILES[form]
    _WRITERS[form](folder / file, part)
    inputs = DenseInputs(inputs=described(part), describes=part.describes)
    (folder / NAMES).write_text(inputs.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return file, ""


class DenseInputs(Settings):
    """What the dense part is given; `describes`: arguments and result, for people."""

    inputs: tuple[PortTensor, ...]
    describes: str


def described(part: DensePart) -> tuple[PortTensor, ...]:
    """Its inputs."""
    return tuple(
        PortTensor(
            name=name,
            dtype=KINDS[tensor.dtype],
            axes=(Axis(name=CANDIDATES), *(Axis(name="fixed", least=n, most=n) for n in tensor.shape[1:])),
            meaning=name,
        )
        for name, tensor in part.inputs.items()
    )


def write_onnx(file: Path, part: DensePart) -> None:
    """As an ONNX model.

    Raises:
        SnapshotError: it computes something else.
    """
    import onnxruntime

    model = converted(part.traced(), list(part.inputs), ["probability"])
    for value in model.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([CANDIDATES, *value.shape[1:]])
    ir.save(model, file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> Tensor:
        named = zip(part.inputs, (each.numpy() for each in given), strict=True)
        return torch.from_numpy(session.run(None, dict(named))[0])

    _check(file, part, run)


def write_package(file: Path, part: DensePart) -> None:
    """As machine code.

    Raises:
        SnapshotError: it computes something else.
    """
    _check(file, part, compile_package(part.traced(), str(file)))


_WRITERS = {"onnx": write_onnx, "pt2": write_package}


def _check(file: Path, part: DensePart, run: Callable[..., Tensor]) -> None:
    for count in (1, len(part.expected)):
        found = run(*(each[:count] for each in part.inputs.values()))
        worst = float((found - part.expected[:count]).abs().max())
        if not worst <= BOUND:
            raise SnapshotError(file, f"the dense part differs by {worst:.3g} for {count} candidates")
