"""A traced scorer as machine code, which torch's C++ and Python libraries load."""

from __future__ import annotations

import shutil
from pathlib import Path

from embeddings.errors import SnapshotError
from embeddings.private import compile_package
from trainer.portable.building import Portable
from trainer.portable.tracing import traced

MODEL = "model.pt2"


def write_package(folder: Path, portable: Portable, inside: int) -> None:
    """Compile `model.pt2`, which holds its tables itself.

    Raises:
        SnapshotError: there is no C++ compiler.
    """
    if shutil.which("g++") is None:
        raise SnapshotError(folder, "--format pt2 compiles C++ and finds no g++; install it, or take onnx")
    print("compiling the model, which takes a minute or more of a processor", flush=True)
    compile_package(traced(portable.scorer, portable.signature), str(folder / MODEL))
