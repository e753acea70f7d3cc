"""Recorded requests of a snapshot: a RequestBatch as named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import SnapshotError
from trainer.data.batch import Clusters, RequestBatch, Retrieval

_BATCH_TENSORS = (
    "behavior_time",
    "request_time",
    "window_start",
    "window_end",
    "seen",
    "user_id",
    "request_id",
    "candidate_request",
    "labels",
    "weight",
    "numeric",
)
_NESTED = {"retrieval": Retrieval, "clusters": Clusters}


def pack(batch: RequestBatch) -> dict[str, Tensor]:
    """A batch as named tensors, for a safetensors file."""
    tensors = {name: getattr(batch, name) for name in _BATCH_TENSORS}
    for part, kjt in (("features", batch.features), ("context", batch.context)):
        if kjt is not None:
            tensors |= {f"{part}.ids": kjt.values(), f"{part}.counts": kjt.lengths()}
    for part in _NESTED:
        whole = getattr(batch, part)
        if whole is not None:
            tensors |= {f"{part}.{name}": tensor for name, tensor in vars(whole).items()}
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
    try:
        plain: dict[str, Any] = {name: tensors[name] for name in _BATCH_TENSORS}
        requests, candidates = plain["request_time"].numel(), plain["candidate_request"].numel()
        features = _bags(tensors, "features", keys[0], plain["behavior_time"].numel() + candidates)
        context = _bags(tensors, "context", keys[1], requests) if keys[1] else None
        batch = RequestBatch(
            features=features,
            context=context,
            **{part: _nested(tensors, part, kind) for part, kind in _NESTED.items()},
            **plain,
            step_candidates=candidates,
        )
        return batch, tensors["scores"]
    except (KeyError, RuntimeError, AssertionError, TypeError) as error:
        raise SnapshotError(path / "recorded.safetensors", f"holds no usable requests: {error}") from None


def _bags(tensors: Mapping[str, Tensor], part: str, keys: Sequence[str], stride: int) -> KeyedJaggedTensor:
    values, lengths = tensors[f"{part}.ids"], tensors[f"{part}.counts"]
    return KeyedJaggedTensor(keys=list(keys), values=values, lengths=lengths, stride=stride)


def _nested(tensors: Mapping[str, Tensor], part: str, kind: type[Retrieval] | type[Clusters]) -> Any:
    names = [f"{part}.{field.name}" for field in fields(kind)]
    return kind(*(tensors[name] for name in names)) if any(name in tensors for name in names) else None
