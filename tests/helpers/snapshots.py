"""Runs that were never trained, and snapshots of them, made in this process to save seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embeddings.ids.stage import IdStage
from pipelines.export import export
from tests.helpers.models import drawing, preset
from trainer.assemble import build_sharded
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.id_files import IdFiles
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_config import Config
from trainer.run_folder import RunFolder
from trainer.sealed_folder import DIGEST, MANIFEST
from trainer.snapshot.publishing import drafting, publish
from trainer.snapshot.reading import read_manifest as read_version

Change = Callable[[dict[str, Tensor]], None]


def save_run(
    folder: Path,
    log: Path,
    name: str = "dare",
    *overrides: str,
    step: int = 1,
    change: Change | None = None,
    ids: IdStage | None = None,
) -> Path:
    """A run folder with one checkpoint more: seeded weights, those that would be zero drawn, then `change`d.

    `change` is given every weight by the name of its table or dense tensor; `ids`: the maps that are saved.
    """
    config: Config = preset(name, log, *overrides)
    RunFolder(folder).write_config(config)
    with process_group() as ranks:
        model = build_sharded(config, read_manifest(log), ranks).model
        state: dict[str, Any] = model.state_dict()
        weights, rng = {}, drawing(5)
        for key, weight in state.items():
            if hasattr(weight, "local_shards"):
                (shard,) = weight.local_shards()
                weights[key.split(".")[-2]] = shard.tensor
            else:
                weights[key] = weight
                if weight.is_floating_point() and (weight == 0).all():
                    nn.init.normal_(weight, std=0.5, generator=rng)
        with torch.no_grad():
            (change or (lambda _: None))(weights)
        besides = [] if ids is None else [IdFiles.of(ids).write]
        checkpoint.save(folder / "checkpoints", step, {"model": state}, {"step": step}, 9, besides=besides)
    return folder


def exported(run: Path, out: Path, dtype: str = "fp32", attention: str = "fp32", **more: Any) -> Path:
    """The version that `export` publishes, compared on the recorded requests alone."""
    return export(run, out, dtype, attention, **{"parity_requests": 0, **more})  # type: ignore[arg-type]


def publish_copy(root: Path, version: Path, keep: int = 0) -> Path:
    """Publish a whole version once more, under the next number."""
    with drafting(root) as part:
        shutil.copytree(version, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, DIGEST))
        return publish(root, part, read_version(version), keep)
