"""Recording a portable scorer's operators for any sizes of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.portable.scorer import PortableScorer
from trainer.portable.signature import Signature

_MOST = 1 << 20


def dimensions(signature: Signature) -> dict[str, dict[int, Any]]:
    """Input -> its free axes, as `torch.export` wants them."""
    dims: dict[str, Any] = {}
    found: dict[str, dict[int, Any]] = {}
    for each in signature.inputs:
        found[each.name] = {}
        for place, axis in enumerate(each.axes):
            if not axis.fixed:
                dims.setdefault(
                    axis.name, torch.export.Dim(axis.name.replace("@", "_"), min=1, max=axis.most or _MOST)
                )
                found[each.name][place] = dims[axis.name]
    return found


def example(signature: Signature) -> dict[str, Tensor]:
    """Inputs with sizes of free axes that are not taken for fixed ones: none is 1, no two are equal."""
    sizes: dict[str, int] = {}
    found = {}
    for each in signature.inputs:
        shape = [
            axis.least if axis.fixed else sizes.setdefault(axis.name, 2 + len(sizes)) for axis in each.axes
        ]
        dtype = torch.int64 if each.dtype == "int64" else torch.float32
        found[each.name] = torch.zeros(shape, dtype=dtype)
    return found


@torch.no_grad()
def traced(scorer: PortableScorer, signature: Signature) -> torch.export.ExportedProgram:
    """The scorer as a graph of operators."""
    given = example(signature)
    dims = dimensions(signature)
    shapes = tuple(dims[name] for name in signature.names)
    mha = torch.backends.mha
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        return torch.export.export(
            scorer.eval(), tuple(given.values()), dynamic_shapes=(shapes,), strict=False
        )
    finally:
        mha.set_fastpath_enabled(fast)
