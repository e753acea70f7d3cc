"""The head of a model as machine code for servers in C++: the only code a snapshot can hold, on request."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from embeddings.errors import SnapshotError
from trainer.durable import file_digest
from trainer.model.head import Head
from trainer.model.two_stage import TwoStageModel
from trainer.snapshot.manifest import CodeFile

_PATH = "code/head.pt2"
_MOST_CANDIDATES = 1 << 20
_ALLOWED_DIFFERENCE = 1e-6


class _Probabilities(nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, parts_CW: Tensor) -> Tensor:
        logits: Tensor = self.head([parts_CW])
        return logits.sigmoid()


def check_compiler(root: Path) -> None:
    """Raises SnapshotError where there is no C++ compiler."""
    if shutil.which("g++") is None:
        raise SnapshotError(root, "--aoti compiles C++ and finds no g++; install it or export without --aoti")


@torch.no_grad()
def write_head(folder: Path, model: TwoStageModel) -> CodeFile:
    """Compile the head with AOTInductor into `folder`; any number of candidates, fixed width.

    Raises:
        SnapshotError: the model has another head, or the compiled one computes something else.
    """
    if not isinstance(model.head, Head):
        raise SnapshotError(folder, '--aoti compiles head = "mlp"; head = "dot" is one product')
    width = next(layer for layer in model.head.layers if isinstance(layer, nn.Linear)).in_features
    whole = _Probabilities(model.head).eval()
    sample = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    candidates = torch.export.Dim("candidates", min=1, max=_MOST_CANDIDATES)
    traced = torch.export.export(whole, (sample,), dynamic_shapes=({0: candidates},))
    file = folder / _PATH
    file.parent.mkdir()
    torch._inductor.aoti_compile_and_package(traced, package_path=str(file))
    difference = float((torch._inductor.aoti_load_package(str(file))(sample) - whole(sample)).abs().max())
    if not difference <= _ALLOWED_DIFFERENCE:
        raise SnapshotError(file, f"the compiled head differs by {difference:.3g}")
    describes = f"head and sigmoid: float32 [candidates, {width}] -> probabilities [candidates, tasks]"
    return CodeFile(path=_PATH, bytes=file.stat().st_size, sha256=file_digest(file), describes=describes)
