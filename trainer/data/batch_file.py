"""Recorded requests of a snapshot: a RequestBatch as named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import SnapshotError
from trainer.data.batch import Clusters, RequestBatch, Retrieval

# Type and number of dimensions of each tensor.
_BATCH_TENSORS = {
    "behavior_time": (torch.int64, 1),
    "request_time": (torch.int64, 1),
    "window_start": (torch.int64, 1),
    "window_end": (torch.int64, 1),
    "seen": (torch.int64, 1),
    "user_id": (torch.int64, 1),
    "request_id": (torch.int64, 1),
    "candidate_request": (torch.int64, 1),
    "labels": (torch.float32, 2),
    "weight": (torch.float32, 1),
    "numeric": (torch.float32, 2),
}
# Those that a batch may lack.
_OPTIONAL = {"task_weight": (torch.float32, 2), "domain": (torch.int64, 1)}
_NESTED = {"retrieval": (Retrieval, 2), "clusters": (Clusters, 1)}
_BAGS = {"ids": torch.int64, "counts": torch.int32}


def pack(batch: RequestBatch) -> dict[str, Tensor]:
    """A batch as named tensors, for a safetensors file."""
    tensors = {name: getattr(batch, name) for name in _BATCH_TENSORS}
    tensors |= {name: part for name in _OPTIONAL if (part := getattr(batch, name)) is not None}
    for part, kjt in (("features", batch.features), ("context", batch.context)):
        if kjt is not None:
            tensors |= {f"{part}.ids": kjt.values(), f"{part}.counts": kjt.lengths().to(torch.int32)}
    for part in _NESTED:
        whole = getattr(batch, part)
        if whole is not None:
            tensors |= {f"{part}.{name}": tensor.to(torch.int64) for name, tensor in vars(whole).items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack(
    path: Path, tensors: Mapping[str, Tensor], keys: tuple[Sequence[str], Sequence[str]]
) -> tuple[RequestBatch, Tensor]:
    """What `pack` made, and the scores beside it.

    Args:
        path: of the version, for the error; keys: of the features and of the context.

    Raises:
        SnapshotError: something is missing or does not fit together.
    """
    file = path / "recorded.safetensors"
    problem = _problem(tensors, bool(keys[1]))
    if problem:
        raise SnapshotError(file, problem)
    try:
        plain: dict[str, Any] = {name: tensors[name] for name in _BATCH_TENSORS}
        plain |= {name: tensors[name] for name in _OPTIONAL if name in tensors}
        requests, candidates = plain["request_time"].numel(), plain["candidate_request"].numel()
        features = _bags(tensors, "features", keys[0], plain["behavior_time"].numel() + candidates)
        context = _bags(tensors, "context", keys[1], requests) if keys[1] else None
        for part, (kind, _) in _NESTED.items():
            names = [f"{part}.{field.name}" for field in fields(kind)]
            present = any(name in tensors for name in names)
            plain[part] = kind(*(tensors[name] for name in names)) if present else None
        batch = RequestBatch(features=features, context=context, **plain, step_candidates=candidates)
        if batch.weight.numel() != candidates:
            raise SnapshotError(file, "its weights are not those of its candidates")
        return batch, tensors["scores"]
    except (KeyError, RuntimeError, AssertionError, TypeError) as error:
        raise SnapshotError(file, f"holds no usable requests: {error}") from None


def _problem(tensors: Mapping[str, Tensor], context: bool) -> str:
    """Which tensor is missing, superfluous or of another kind; empty if none is."""
    wanted = {**_BATCH_TENSORS, "scores": (torch.float32, 2)}
    wanted |= {name: kind for name, kind in _OPTIONAL.items() if name in tensors}
    for part in ("features", "context") if context else ("features",):
        wanted |= {f"{part}.{name}": (dtype, 1) for name, dtype in _BAGS.items()}
    for part, (kind, dims) in _NESTED.items():
        names = [f"{part}.{field.name}" for field in fields(kind)]
        if any(name in tensors for name in names):
            wanted |= dict.fromkeys(names, (torch.int64, dims))
            if len({tensors[name].shape for name in names if name in tensors}) > (2 if dims == 1 else 1):
                return f"the tensors of {part} differ in shape"
    if different := sorted(wanted.keys() ^ tensors.keys()):
        return f"{different[0]} is missing or superfluous"
    for name, (dtype, dims) in wanted.items():
        if tensors[name].dtype != dtype or tensors[name].dim() != dims:
            return f"{name} is {tensors[name].dtype} of {tensors[name].dim()} dimensions"
    return ""


def _bags(tensors: Mapping[str, Tensor], part: str, keys: Sequence[str], stride: int) -> KeyedJaggedTensor:
    values, lengths = tensors[f"{part}.ids"], tensors[f"{part}.counts"]
    return KeyedJaggedTensor(keys=list(keys), values=values, lengths=lengths, stride=stride)
