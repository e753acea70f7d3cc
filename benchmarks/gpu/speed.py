"""What a training step costs on the device, and what of it is the trainer's own."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.check import Answer, Check, Row, answer, reason_of
from benchmarks.gpu.loops import Loops, Way, loops_of
from benchmarks.inputs.cells import Cell
from trainer.ranks.process_group import Ranks, process_group

_AIM = 0.95
WAYS = (
    Way("none", guarded=False),
    Way("none"),
    Way("sparse_dist", guarded=False),
    Way("sparse_dist"),
    Way("sparse_dist", bf16=True),
)
# A user has 19 requests of 3 candidates; 4,068,790 items are Taobao's.
GRID: Mapping[str, Cell] = {
    "DARE, 4M items, L 200, dim 16": Cell(items=4_068_790, length=200, users=36),
    "the same, 33k candidates": Cell(items=4_068_790, length=200, users=575),
    "the same, 131k candidates": Cell(items=4_068_790, length=200, users=2300),
    "DARE, 40M items, L 200, dim 64": Cell(items=40_000_000, length=200, dim=64, users=575),
    "DARE, 4M items, L 1,000, dim 16": Cell(items=4_068_790, length=1_000, users=288),
    "DARE, 4M items, L 10,000, dim 16": Cell(items=4_068_790, length=10_000, users=32),
    "DIN, 1M items, L 200, dim 16": Cell(model="din", items=1_000_000, length=200, users=288),
}
TINY: Mapping[str, Cell] = {
    "DARE, tiny": Cell(items=2_000, length=30, users=3),
    "DIN, tiny": Cell(model="din", items=2_000, length=30, users=3),
}


def step(check: Check) -> Answer:
    """Samples a second of a training step, from 2 k to 131 k candidates, by pipeline, with and without the
    guard, in bf16, each as a share of a bare TorchRec loop over the same model and batches in pinned
    memory; memory; and where the host waits (facts: waits a step, by line).

    Expected: sparse_dist with the guard at 0.95 of the bare loop or more (`different` names cells below
    that); no wait outside of the guard.
    """
    rows: list[Row] = []
    waits: dict[str, float] = {}
    with process_group(60) as ranks:
        for name, cell in (TINY if check.dry else GRID).items():
            try:
                with loops_of(cell, ranks, count=check.size(4, 2), rounds=check.size(3, 1)) as loops:
                    rows += _of_cell(name, loops, ranks)
                    for line, times in loops.waits(Way("sparse_dist")).most_common(8):
                        waits[f"waits a step, {name}, {line}"] = times / len(loops.steps)
            except Exception as error:
                rows.append({"cell": name, "error": reason_of(error)})
            check.keep(_judge(check, rows, waits))
    return _judge(check, rows, waits)


def _of_cell(name: str, loops: Loops, ranks: Ranks) -> list[Row]:
    cell = {"cell": name, "candidates": round(loops.candidates)}
    bare = loops.bare()
    rows: list[Row] = [{**cell, "way": "bare TorchRec", **bare, "of bare": 1.0}]
    for way in WAYS:
        found = loops.train_steps(way)
        rows.append({**cell, "way": way.name, **found, "of bare": found["samples/s"] / bare["samples/s"]})
    return rows


def _judge(check: Check, rows: list[Row], waits: dict[str, float]) -> Answer:
    failed = [row["cell"] for row in rows if "error" in row]
    slow = [row["cell"] for row in rows if row.get("way") == "sparse_dist" and row["of bare"] < _AIM]
    return answer(rows, failed if check.dry else [*failed, *slow], **waits)
