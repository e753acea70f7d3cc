"""The sharded model on the device against the same steps on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.caches import Place, place_tables
from benchmarks.gpu.check import Answer, Check, Row, answer, each_way
from benchmarks.gpu.measure import memory
from benchmarks.gpu.training import small_job
from embeddings.errors import DataError
from trainer.data.reader import Step
from trainer.ranks.process_group import process_group

_STEPS, _SEED, _TIMEOUT_S = 12, 3, 60.0
_GROUPS = ("attention", "representation")
# Largest relative difference of a loss; of what rounds, another.
_EXACT, _ROUNDED = 1e-3, 5e-2


def _all_groups(setting: str) -> list[str]:
    return [f"groups.{group}.{setting}" for group in _GROUPS]


# Items' rows in host memory with a cache on the device, as the product sets it.
CACHED = (
    "plan.allow_unified_memory=true",
    *(f'plan.tables.{group}__item_id.kernels=["fused_uvm_caching"]' for group in _GROUPS),
)
# name -> pipeline, settings, largest difference
WAYS: Mapping[str, tuple[str, Sequence[str], float]] = {
    "none": ("none", [], _EXACT),
    "sparse_dist": ("sparse_dist", [], _EXACT),
    "full": ("none", ["model.lookup=full"], _EXACT),
    "full, sparse_dist": ("sparse_dist", ["model.lookup=full"], _EXACT),
    "sequence tables": ("none", _all_groups('kind="sequence"'), _EXACT),
    "sequence tables, sparse_dist": ("sparse_dist", _all_groups('kind="sequence"'), _EXACT),
    "row_wise": ("none", _all_groups('sharding=["row_wise"]'), _EXACT),
    "column_wise": ("none", _all_groups('sharding=["column_wise"]'), _EXACT),
    "data_parallel": ("none", _all_groups('sharding=["data_parallel"]'), _EXACT),
    "fp16 tables": ("none", _all_groups('dtype="fp16"'), _ROUNDED),
    "comms fp16": ("none", ['comms.forward="fp16"', 'comms.backward="fp16"'], _ROUNDED),
    "comms bf16": ("none", ['comms.forward="bf16"', 'comms.backward="bf16"'], _ROUNDED),
    "bf16": ("sparse_dist", ['train.precision="bf16"'], _ROUNDED),
}
# On CUDA only.
CACHED_WAYS: Mapping[str, tuple[str, Sequence[str], float]] = {
    "cached tables": ("none", CACHED, _EXACT),
    "cached tables, sparse_dist": ("sparse_dist", CACHED, _EXACT),
    "cached tables, prefetch": ("prefetch", [*CACHED, 'train.pipeline="prefetch"'], _EXACT),
}
# A CPU has these forms; row_wise bags and data-parallel updates are a device's alone, or need more ranks.
_DRY = ("sparse_dist", "sequence tables", "fp16 tables", "bf16")


def _reference_file(check: Check) -> Path:
    return check.work / "reference.json"


def reference(check: Check) -> Answer:
    """What the CPU makes of twelve steps and of a validation after them, for `sharded` to compare with.

    Expected: it ends; the numbers are kept, not judged.
    """
    losses, scores = _train(check, "none", [])
    _reference_file(check).write_text(json.dumps({"losses": losses, "scores": scores}))
    return answer(**{"first loss": losses[0], "last loss": losses[-1], "scores": len(scores)})


def sharded(check: Check) -> Answer:
    """Whether the sharded model trains on one device as on the CPU, by pipeline, kind of tables, sharding,
    precision of rows, of what travels, and of the dense part, and with cached tables.

    Expected: losses within 1e-3 of the CPU's (relative), within 5e-2 where something is rounded to 16 bits.
    """
    wanted = json.loads(_reference_file(check).read_text())
    ways = {**WAYS, **(CACHED_WAYS if check.on_cuda else {})}

    def compare(way: tuple[str, Sequence[str], float]) -> Row:
        kind, settings, limit = way
        with place_tables(Place("fused")):
            losses, scores = _train(check, kind, settings)
        loss, score = _relative(losses, wanted["losses"]), _largest(scores, wanted["scores"])
        return {"loss": loss, "score": score, "alike": loss <= limit}

    rows = each_way({name: way for name, way in ways.items() if name in _DRY or not check.dry}, compare)
    return answer(rows, [row["way"] for row in rows if not row.get("alike")], **memory())


def _train(check: Check, kind: str, settings: Sequence[str]) -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory() as folder, process_group(_TIMEOUT_S) as ranks:
        made = small_job(check, ranks, Path(folder), kind, settings)
        losses = made.train(islice(made.reader("train", _SEED).steps(), _STEPS))
        return losses, made.scores()


def _relative(found: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def _largest(found: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


def midepoch(check: Check) -> Answer:
    """Whether an evaluation in the midst of an epoch changes what comes after it, by pipeline, and with
    cached tables as the product places them: losses of steps with one after the fourth, against the same
    without.

    Expected: differences of rounding alone (a device adds in no fixed order), 1e-5 at most.
    """
    ways: dict[str, tuple[str, Sequence[str]]] = {"none": ("none", []), "sparse_dist": ("sparse_dist", [])}
    if check.on_cuda:
        ways["sparse_dist, cached tables"] = "sparse_dist", CACHED
        ways["prefetch, cached tables"] = "prefetch", [*CACHED, 'train.pipeline="prefetch"']
    with place_tables(Place("fused_uvm_caching")):
        rows = each_way(ways, lambda way: _interrupt(check, *way))
    return answer(rows, [row["way"] for row in rows if "error" in row or row["loss"] > 1e-5])


def _interrupt(check: Check, kind: str, settings: Sequence[str]) -> Row:
    found = []
    for after in (None, 4):
        with tempfile.TemporaryDirectory() as folder, process_group(_TIMEOUT_S) as ranks:
            made = small_job(check, ranks, Path(folder), kind, settings)
            found.append(made.train_and_pause(islice(made.reader("train", _SEED).steps(), _STEPS), after))
    return {"steps": len(found[0]), "loss": _relative(found[1], found[0])}


def guard(check: Check) -> Answer:
    """Whether a label that is no number stops its step on the device before any weight or state changes.

    Expected: both pipelines stop with an error that names the loss; no tensor has changed by a bit.
    """
    rows = [_stop(check, kind) for kind in ("none", "sparse_dist")]
    return answer(rows, [row["pipeline"] for row in rows if "the loss" not in row["said"] or row["changed"]])


def _stop(check: Check, kind: str) -> Row:
    """Two steps, then a bad one: what is said, and how many tensors it has changed."""
    with tempfile.TemporaryDirectory() as folder, process_group(_TIMEOUT_S) as ranks:
        made = small_job(check, ranks, Path(folder), kind)
        steps = list(islice(made.reader("train", _SEED).steps(), 6))
        steps[2] = _with_nan(steps[2])
        before: dict[str, Any] = {}
        said = ""
        try:
            for number, _ in enumerate(made.pipeline.train(iter(steps))):
                if number == 1:
                    before = made.tensors()
        except DataError as error:
            said = " ".join(str(error).split())[:80]
        after = made.tensors()
        changed = sum(not torch.equal(tensor, after[name]) for name, tensor in before.items())
        return {"pipeline": kind, "tensors": len(before), "changed": changed, "said": said}


def _with_nan(step: Step) -> Step:
    weight = step.batch.weight.clone()
    weight[-1] = torch.nan
    return replace(step, batch=replace(step.batch, weight=weight))
