"""Whether a preset fits a log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from embeddings.errors import TandemError
from trainer.assemble import build_trainable, feature_rows
from trainer.config.tasks import resolve_tasks
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.run_config import load_config


def misfit(config: Path, log: Path, overrides: Sequence[str]) -> str:
    """Why a preset cannot be trained on a log, in one line; empty if it can.

    It reads the config, builds the model without memory for its tables, and opens the training split.
    """
    manifest = read_manifest(log)
    try:
        settings = load_config(config, [*overrides, f"data.log={log}"])
        _, groups = build_trainable(settings, manifest, torch.device("meta"))
        tasks = resolve_tasks(settings.tasks, manifest.tasks)
        SequenceLogReader(settings.data, "train", feature_rows(groups), tasks=tasks)
    except TandemError as error:
        return str(error).splitlines()[0].replace(f"{log}", "the log")
    return ""
