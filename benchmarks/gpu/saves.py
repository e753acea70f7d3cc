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
from trainer.checkpoint.background import Saver
from trainer.checkpoint.save_load import load_tensors
from trainer.config.sections import CheckpointConfig
from trainer.ranks.process_group import process_group


def saves(check: Check) -> Answer:
    """Whether a save in the background holds what the model was when it began, though training goes on at
    once, as a save that training waits for does; twice each, since the second fills memory that the first has
    set aside.

    Expected: no tensor differs by a bit, while most have changed in the model meanwhile.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, process_group(60) as ranks:
        made = small_job(check, ranks, Path(folder) / "guard")
        made.train(islice(made.reader("train", 3).steps(), 4))
        for mode in ("sync", "async"):
            config = CheckpointConfig.model_validate({"mode": mode})
            with Saver(Path(folder) / mode, config, lambda line: None) as saver:
                rows += [{"mode": mode, "save": step, **_save(made, saver, step)} for step in (1, 2)]
    bad = [f"{row['mode']} {row['save']}" for row in rows if row["different"] or not row["changed meanwhile"]]
    return answer(rows, bad)


def _save(made: Job, saver: Saver, step: int) -> Row:
    """Save, train on, and compare what was saved with what was there before."""
    before = made.tensors()
    started = time.perf_counter()
    saver.save(step, made.state(), {})
    returned = time.perf_counter() - started
    made.train(islice(made.reader("train", 3 + step).steps(), 3))
    saver.settle(last=True)
    went_on, read = made.tensors(), made.state()
    load_tensors(saver.folder / f"step-{step:08d}", read)
    found = on_cpu(read)
    return {
        "tensors": len(before),
        "different": sum(not torch.equal(tensor, found[name]) for name, tensor in before.items()),
        "changed meanwhile": sum(not torch.equal(tensor, went_on[name]) for name, tensor in before.items()),
        "returned after ms": 1000 * returned,
    }


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
