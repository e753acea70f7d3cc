"""`tandemrec export`: from a run's newest checkpoint to a serving snapshot that is shown to score alike."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from embeddings.errors import ConfigError, SnapshotError
from pipelines.console import quiet_third_parties
from pipelines.train import has
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.distributed import process_group
from trainer.restore import restore
from trainer.run import RunFolder, versions
from trainer.snapshot import load_snapshot, publish

_RECORDED_CANDIDATES = 512
# The snapshot's model does the same operations on the same fp32 numbers as the trainer's: here the scores
# must be bit-equal. Another processor rounds the same operations differently; the manifest allows for that.
_FP32_BOUND = 1e-6


def export(run: Path, out: Path) -> Path:
    """Publish the newest checkpoint of `run` as the next version under `out`, and check its scores.

    Raises:
        SnapshotError: the written snapshot does not score like the sharded model it was made from.
    """
    quiet_third_parties()
    with process_group() as ranks:
        if ranks.world_size > 1:
            raise ConfigError("export runs in one process; start it without torchrun")
        restored = restore(RunFolder(run), ranks)
        split = "validation" if has(restored.manifest, "validation") else "train"
        data = restored.config.data.model_copy(update={"batch_candidates": _RECORDED_CANDIDATES})
        recorded = _record(
            restored.sharded.model, SequenceLogReader(data, split, restored.rows), ranks.device
        )
        facts = {
            "step": restored.step,
            "tasks": tuple(restored.manifest.tasks),
            "numeric": tuple(restored.manifest.numeric),
            "vocabularies": restored.vocabularies(),
            "score_bound": _FP32_BOUND,
            "versions": versions(),
        }
        weights = restored.whole_weights()
        version = publish(out, restored.config, restored.sharded.groups, weights, recorded, facts)
    snapshot = load_snapshot(version)
    worst = snapshot.self_check()
    if worst > 0:
        raise SnapshotError(version, f"scores differ by {worst:.3g} from the trainer's on this very machine")
    size = sum(entry.bytes for entry in snapshot.manifest.files) / 1e6
    print(
        f"snapshot {version}: {size:.1f} MB, step {snapshot.manifest.step}; {recorded[0].candidates} "
        f"recorded candidates of {recorded[0].requests} requests score alike (difference {worst:.3g})"
    )
    return version


@torch.no_grad()
def _record(model: nn.Module, reader: SequenceLogReader, device: torch.device) -> tuple[RequestBatch, Tensor]:
    """The first batch of a split and the trainer's own probabilities for it."""
    with closing(reader.steps()) as steps:
        batch = next(steps).batch
    return batch, model(batch.to(device)).logits.sigmoid().cpu()
