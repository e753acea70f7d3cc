"""The averaged dense weights that a checkpoint has beside its raw ones, see `trainer.update.averaging`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from embeddings.errors import CheckpointError
from trainer.checkpoint.tensors import TensorReader

Weights = Literal["raw", "averaged"]
# In the state dict and in the state of a checkpoint.
AVERAGE = "average"


def averaged_weights(reader: TensorReader, path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name in the model's state dict -> its average, in the type of the weight.

    Args:
        reader: of the checkpoint at `path`; state: its state.

    Raises:
        CheckpointError: it holds none.
    """
    if not state.get(AVERAGE):
        raise CheckpointError(
            path,
            "holds no averaged weights: its phase has no average; leave --weights out, or train with "
            'average.kind = "beta" or "ema" in the last of [[phases]]',
        )
    names = [name for name in reader.names() if f"{AVERAGE}.{name}" in reader]
    return {name: reader.whole(f"{AVERAGE}.{name}").to(reader.dtype(name)) for name in names}


def steps_missing(state: Mapping[str, Any]) -> int:
    """How many steps of its phase a Beta average has not seen; 0 of other averages."""
    average = state[AVERAGE]
    return int(average["steps"] - average["done"]) if average.get("steps") is not None else 0
