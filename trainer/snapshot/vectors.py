"""Pre-trained vectors in a version of a snapshot, as the directions that training compared.

    vectors/<name>.safetensors   `ids` int64 [n], ascending, of the log, and `directions` int16 [n, dim], see
                                 `trainer.data.similarity.directions`

They are the same bits as in training, so that scoring and serving find the same similarities. A version that
builds on another one has the file only if it is another file than that one's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from embeddings.errors import SnapshotError
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.data.similarity.directions import LENGTH
from trainer.data.similarity.vectors import Vectors
from trainer.snapshot.rows import read_tensors
from trainer.snapshot.vector_entries import SnapshotVectors, vectors_path

_IDS, _DIRECTIONS = "ids", "directions"
# Rows that are written or checked at once.
_SOME = 1 << 16


def write_vectors(folder: Path, name: str, vectors: Vectors) -> tuple[SnapshotVectors, dict[str, Any]]:
    """Write vectors -> their description, and size and digest of the file."""
    path = folder / vectors_path(name)
    path.parent.mkdir(exist_ok=True)
    rows, dim = vectors.directions.shape
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        _IDS: (torch.int64, ()),
        _DIRECTIONS: (torch.int16, (dim,)),
    }
    with TensorStream(path, layout, rows) as stream:
        for tensor, array in ((_IDS, vectors.ids), (_DIRECTIONS, vectors.directions)):
            for begin in range(0, rows, _SOME):
                # Copied, since mapped arrays may not be written to.
                stream.append(tensor, torch.from_numpy(array[begin : begin + _SOME].copy()))
    return SnapshotVectors(rows=rows, dim=dim), stream.entry


def read_vectors(folder: Path, name: str, described: SnapshotVectors) -> Vectors:
    """Vectors of a file whose digest was checked; memory-mapped.

    Raises:
        SnapshotError: it does not hold what the manifest says, or no directions.
    """
    path = vectors_path(name)
    tensors = read_tensors(folder, path)
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    wanted = {
        _IDS: (torch.int64, (described.rows,)),
        _DIRECTIONS: (torch.int16, (described.rows, described.dim)),
    }
    if found != wanted:
        raise SnapshotError(folder / path, f"holds {found}, expected {wanted}")
    vectors = Vectors(tensors[_IDS].numpy(), tensors[_DIRECTIONS].numpy())
    if not (vectors.ids[1:] > vectors.ids[:-1]).all():
        raise SnapshotError(folder / path, "names ids twice, or not in ascending order")
    for begin in range(0, described.rows, _SOME):
        some = vectors.directions[begin : begin + _SOME].astype(np.int64)
        squares = np.einsum("nd,nd->n", some, some)
        if squares.min() < 1 or squares.max() > LENGTH**2:
            raise SnapshotError(folder / path, "holds what is no direction: zeros, or too large numbers")
    return vectors
