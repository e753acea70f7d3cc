"""Safetensors files of a snapshot: read memory-mapped, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from embeddings.errors import SnapshotError

# Far more than any file here needs; a header of 100 MB would take seconds and gigabytes to parse.
_LARGEST_HEADER = 1 << 20


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped copy-on-write.

    Raises:
        SnapshotError: it is no safetensors file, or has an absurd header.
    """
    file = path / name
    try:
        with file.open("rb") as raw:
            if int.from_bytes(raw.read(8), "little") > _LARGEST_HEADER:
                raise SnapshotError(file, f"its header is larger than {_LARGEST_HEADER:,} bytes")
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SnapshotError(file, f"unreadable: {error}") from None
    return tensors


def read_one(path: Path, file: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The one tensor of a file.

    Raises:
        SnapshotError: it holds anything but that tensor.
    """
    tensors = read_tensors(path, file)
    if list(tensors) != [name]:
        raise SnapshotError(path / file, f"should hold the one tensor {name!r}")
    found = tensors[name]
    if found.dtype != dtype or tuple(found.shape) != shape:
        kinds = f"{found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
        raise SnapshotError(path / file, f"holds {kinds}")
    return found


def expect_like(path: Path, file: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Tensors must have the names, types and shapes of others, and be finite.

    Raises:
        SnapshotError: naming the first that has not.
    """
    missing, surplus = sorted(like.keys() - tensors.keys()), sorted(tensors.keys() - like.keys())
    for names, what in ((missing, "missing"), (surplus, "superfluous")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SnapshotError(path / file, f"does not fit the config: {names[0]}{others} {what}")
    for name, wanted in like.items():
        found = tensors[name]
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            kinds = f"{found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
            raise SnapshotError(path / file, f"does not fit the config: {name} is {kinds}")
        if found.is_floating_point() and not found.isfinite().all():
            raise SnapshotError(path / file, f"{name} holds numbers that are not finite")
