"""Run under torchrun: a guard that reads its answer a step late, beside one that waits for it.

torchrun --nproc-per-node N -m tests.programs.late_cases LOG OUT.json [bad]

With `bad` only what holds on a device too, where sums are not rounded alike twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open

from embeddings.errors import DataError
from pipelines.console import quiet_third_parties
from pipelines.start import open_split
from tests.programs.step_cases import NAN, Job, job, nan_weight, spoil_dense, spoil_vectors
from tests.programs.step_counts import Counted
from trainer.assemble import feature_rows
from trainer.data.reader import Step
from trainer.quality.evaluate import score_split
from trainer.ranks.process_group import process_group
from trainer.update.guard import Check, Guard
from trainer.update.step import TrainStep

# Everything that a check touches: running statistics, clipping, and half precision on the way.
ALL = [
    "model.lookup=full", "model.norm=batch", "train.max_gradient_norm=0.01",
    "comms.backward=fp16", "comms.forward=fp16", "data.batch_candidates=18",
]  # fmt: skip
# What is spoiled, at which of six steps, and what the consumer does after that step.
BAD = {
    "loss, goes on": ("loss", 4, "goes on"),
    "vectors, goes on": ("vectors", 4, "goes on"),
    "dense, goes on": ("dense", 4, "goes on"),
    "loss, last step": ("loss", 6, "goes on"),
    "loss, evaluates": ("loss", 4, "evaluates"),
    "loss, stops": ("loss", 4, "stops"),
    "two in a row": ("both", 4, "goes on"),
}


def good_run(made: Job) -> dict[str, Any]:
    """An epoch in pieces, with an evaluation after each; no batch is read ahead of any of them."""
    validation = open_split(made.config, "validation", feature_rows(made.sharded.groups), made.ranks)
    losses: list[float] = []
    scores, ahead = [], []
    for _, tally in made.pipeline.train(made.reader.steps(), repeat(2)):
        losses.append(float(tally.total))
        if len(losses) % 2 == 0:
            ahead.append(made.pipeline.ahead)
            with made.pipeline.paused():
                for pipelined in (False, True):
                    scored = score_split(made.sharded.model, validation, made.ranks.device, pipelined)
                    scores.append(scored.score.tolist())
    return {"losses": losses, "scores": scores, "ahead": ahead, "digests": made.digests()}


def spoiled(made: Job, kind: str, at: int) -> Iterator[Step]:
    """Six steps; where gradients are spoiled, hooks do so from the given step on."""
    steps = list(islice(made.reader.steps(), 6))
    assert len(steps) == 6 and all(step.counted for step in steps)
    for number, step in enumerate(steps, 1):
        last = made.ranks.rank == made.ranks.world_size - 1
        bad = number in {"loss": (at,), "both": (at, at + 1)}.get(kind, ())
        yield nan_weight(step) if bad and last else step


def bad_run(made: Job, kind: str, at: int, then: str) -> dict[str, Any]:
    """What is said, and what differs from the state before the bad step."""
    folder = made.step._guard.folder
    folder.mkdir(parents=True, exist_ok=True)
    done, said, before = 0, "", made.digests()
    training = made.pipeline.train(spoiled(made, kind, at))
    try:
        for _ in training:
            done += 1
            if done < at:
                before = made.digests()
            if done == at - 1 and kind in ("vectors", "dense"):
                {"vectors": spoil_vectors, "dense": spoil_dense}[kind](made, NAN)
            if done == at and then == "evaluates":
                with made.pipeline.paused():
                    raise AssertionError("a model is measured whose last step is not known to be finite")
            if done == at and then == "stops":
                break
        training.close()
    except DataError as error:
        said = str(error).replace(str(folder), "FOLDER")
    messages: list[Any] = [None] * made.ranks.world_size
    dist.all_gather_object(messages, said)
    return {
        "done": done, "messages": messages, "before": before, "after": made.digests(),
        "kept": {path.name: weights_of(path) for path in sorted(folder.glob("nonfinite-*"))},
        "weights": next(islice(made.reader.steps(), at - 1, None)).batch.weight.tolist(),
    }  # fmt: skip


def weights_of(path: Path) -> list[Any]:
    """Of the batch that was kept; the one that was spoiled is again what it was, so that lists compare."""
    with safe_open(path, "pt") as file:
        weights: list[Any] = file.get_tensor("weight").nan_to_num(-1).tolist()
    return weights


def asked(made: Job) -> list[int]:
    """How often tensors are asked for a number in each of three steps, as a device would be waited for."""
    counts = []
    for step in islice(made.reader.steps(), 3):
        made.step.zero_grad()
        loss, _ = made.step.forward(step)
        loss.backward()
        with Counted() as counted:
            made.step.step()
        counts.append(counted.operators["aten::_local_scalar_dense"])
    made.step.settle()
    return counts


class Deaf(Guard):
    """A guard that never tells: what is left is what the device does by itself."""

    def judge(self, check: Check) -> None:
        del check


def left_out(made: Job, bad: bool) -> dict[str, Any]:
    """Losses of the third and fourth step, and the state after them; the second is bad, or not there."""
    made.step._guard = Deaf(made.ranks, made.step._guard.folder, True)
    steps = list(islice(made.reader.steps(), 4))
    chosen = [steps[0], nan_weight(steps[1]), *steps[2:]] if bad else [steps[0], *steps[2:]]
    losses = [loss for _, loss in made.train(iter(chosen))]
    return {"losses": losses[-2:], "digests": made.digests()}


def main() -> None:
    log, out = Path(sys.argv[1]), Path(sys.argv[2])
    quiet_third_parties()
    found: dict[str, Any] = {"good": {}, "bad": {}}
    with process_group(60) as ranks:
        made = job(ranks, log, out.parent, "none", *ALL)
        try:
            TrainStep(made.config, made.sharded.model, made.optimizer, 1, Guard(ranks, out.parent, late=True))
        except ValueError as error:
            found["unfused"] = str(error)
        for late in (False, True) if sys.argv[3:] != ["bad"] else ():
            for way in ("none", "sparse_dist"):
                found["good"][f"{late} {way}"] = good_run(job(ranks, log, out.parent, way, *ALL, late=late))
        for name, (kind, at, then) in BAD.items():
            for late, way in ((False, "none"), (True, "none"), (True, "sparse_dist")):
                folder = out.parent / f"{name}-{late}-{way}-{ranks.world_size}"
                made = job(ranks, log, folder, way, *ALL, late=late)
                found["bad"][f"{name} {late} {way}"] = bad_run(made, kind, at, then)
        found["asked"] = {
            late: asked(job(ranks, log, out.parent, "none", *ALL, late=late)) for late in (False, True)
        }
        found["left out"] = [
            left_out(job(ranks, log, out.parent, "none", *ALL, late=True), bad) for bad in (True, False)
        ]
        if ranks.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
