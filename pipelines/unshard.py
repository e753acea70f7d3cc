"""`tandemrec unshard`: a run's newest checkpoint as plain safetensors tables."""

from __future__ import annotations

from pathlib import Path

from pipelines.console import quiet_third_parties
from trainer.checkpoint.warm_start import unshard_run


def unshard(run: Path, out: Path) -> None:
    """Write the tables, accumulators and dense weights of `run` to `out`; see `trainer.checkpoint.unsharded`.

    Raises:
        CheckpointError: the run has no usable checkpoint, or `out` is there already.
    """
    quiet_third_parties()
    manifest = unshard_run(run, out)
    size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    print(f"{out}: {len(manifest.tables)} tables of step {manifest.step:,}, {size:,.1f} MB")
