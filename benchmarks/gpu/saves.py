"""Checkpoints on the device: what is saved, and what goes on from it."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.check import Answer, Check, Row, answer
from benchmarks.gpu.jobs import run_of
from benchmarks.gpu.training import Job, on_cpu, small_job
from trainer.checkpoint import load_tensors
from trainer.distributed import process_group
from trainer.saver import Saver
from trainer.sections import CheckpointConfig


def saves(check: Check) -> Answer:
    """Whether a save in the background holds what the model was when it began, though training goes on at
    once, and the same as a save that training waits for; also the device that the saving thread leaves a
    context on.

    Expected: no tensor differs by a bit, by mode; at most one device has memory in use by this process.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, process_group(60) as ranks:
        made = small_job(check, ranks, Path(folder) / "guard")
        made.train(islice(made.reader("train", 3).steps(), 4))
        for mode in ("sync", "async", "async"):
            # The second one in the background fills the host memory that the first has set aside.
            rows.append(_saved(made, mode, Path(folder) / f"{mode}-{len(rows)}"))
    used = _contexts()
    different = [row["mode"] for row in rows if row["different"]]
    return answer(rows, [*different, *(["contexts"] if used > 1 else [])], **{"devices in use": used})


def _saved(made: Job, mode: str, folder: Path) -> Row:
    """Save, train on, and compare what was saved with what was there before."""
    before = made.tensors()
    config = CheckpointConfig.model_validate({"mode": mode})
    tensors = {"model": made.sharded.model.state_dict(), "optim": made.optimizer.state_dict()}
    with Saver(folder, config, lambda line: None) as saver:
        started = time.perf_counter()
        saver.save(1, tensors, {})
        returned = time.perf_counter() - started
        made.train(islice(made.reader("train", 4).steps(), 3))
        saver.settle(last=True)
    went_on = made.tensors()
    path = max(folder.glob("step-*"))
    load_tensors(path, tensors)
    found = on_cpu(tensors)
    different = [name for name, tensor in before.items() if not torch.equal(tensor, found[name])]
    moved = sum(not torch.equal(tensor, went_on[name]) for name, tensor in before.items())
    return {
        "mode": mode,
        "tensors": len(before),
        "changed meanwhile": moved,
        "different": len(different),
        "returned after ms": 1000 * returned,
    }


def _contexts() -> int:
    """Devices on which torch has memory of this process."""
    return sum(torch.cuda.memory_reserved(number) > 0 for number in range(torch.cuda.device_count()))


def resume(check: Check) -> Answer:
    """How far a run that was stopped and continued is from one that was not, beside how far two equal runs
    are from each other.

    Expected: not bit-equal on a GPU, which adds gradients of rows in no fixed order; both differences of
    losses alike, below 1e-3. On a CPU both are 0.
    """
    few = [f"data.batch_candidates={check.size(2048, 256)}"]
    common = ["train.log_every=1", "train.decay=none", "checkpoint.every_steps=10", *few]
    whole, half = (f"train.max_steps={count}" for count in (check.size(20, 8), check.size(10, 4)))
    once = run_of(check, "resume-once", [*common, whole]).losses
    again = run_of(check, "resume-again", [*common, whole]).losses
    run_of(check, "resume-twice", [*common, half])
    twice = run_of(check, "resume-twice", [*common, whole], fresh=False).losses
    apart, resumed = _apart(once, again), _apart(once, twice)
    different = [
        *(["two equal runs"] if apart > 1e-3 else []),
        *(["a resumed run"] if resumed > 1e-3 else []),
    ]
    facts: dict[str, Any] = {"steps": len(once), "two equal runs": apart, "a resumed run": resumed}
    return answer([], different, **facts)


def _apart(some: list[float], other: list[float]) -> float:
    """The largest difference of two runs' losses; runs of unequal length are apart altogether."""
    if len(some) != len(other):
        return float("inf")
    return max(abs(a - b) for a, b in zip(some, other, strict=True))
