"""The file of a version that holds the posteriors of its last maps."""

from __future__ import annotations

from pathlib import Path

import torch

from embeddings.errors import SnapshotError
from trainer.model.frame import TwoStageModel
from trainer.sealed_folder import MANIFEST
from trainer.snapshot.manifest import UNCERTAINTY, SnapshotManifest
from trainer.snapshot.rows import expect_like, read_tensors
from trainer.snapshot.uncertainty import Posterior, last_layer_obstacle


def read_posteriors(path: Path, manifest: SnapshotManifest, model: TwoStageModel) -> dict[str, Posterior]:
    """Task -> posterior, in the order of the tasks; empty where the version has none.

    Raises:
        SnapshotError: they do not fit the last maps of the model.
    """
    if manifest.uncertainty is None:
        return {}
    if problem := last_layer_obstacle(manifest.config.model, manifest.config.tasks):
        raise SnapshotError(path / MANIFEST, f"says how sure it is, but {problem}")
    found, layers = read_tensors(path, UNCERTAINTY), model.head.last_layers()
    like = {
        task: torch.empty((layer.map.in_features + 1,) * 2, device="meta")
        for task, layer in zip(manifest.tasks, layers, strict=True)
    }
    expect_like(path, UNCERTAINTY, found, like)
    return {task: Posterior(found[task].clone()) for task in manifest.tasks}
