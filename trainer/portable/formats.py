"""The portable formats: a new one is a function that writes it, one that runs it, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.portable import onnx_model, package
from trainer.portable.building import Portable
from trainer.portable.runtimes import Run, compiled, onnx_runtime


@dataclass(frozen=True)
class Format:
    """How a portable model is written and run.

    Attributes:
        model: its file; write: (folder, model, bytes of tables that the file may hold itself).
        load: of the file.
    """

    model: str
    write: Callable[[Path, Portable, int], None]
    load: Callable[[Path], Run]


FORMATS: dict[str, Format] = {
    "onnx": Format(onnx_model.MODEL, onnx_model.write_onnx, onnx_runtime),
    "pt2": Format(package.MODEL, package.write_package, compiled),
}
