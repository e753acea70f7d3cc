"""Memory that the allocator reserves but tensors do not take, with segments of fixed size and expandable
ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

import torch

from benchmarks.gpu.check import ROOT, Answer, Check, Row, answer
from benchmarks.gpu.inputs import steps_of
from benchmarks.gpu.loops import Way, loops_of
from benchmarks.gpu.measure import forget_memory, memory
from benchmarks.harness.timing import wait_for_device
from benchmarks.inputs.cells import Cell
from trainer.data.batch import pinning
from trainer.ranks.process_group import process_group

SETTINGS = {"fixed segments": "", "expandable segments": "expandable_segments:True"}
# Steps of very unequal size, as logs with long and short histories make them.
_USERS, _TINY = (575, 36, 300, 900, 12, 575, 150), (3, 1, 4)


def segments(check: Check) -> Answer:
    """How much memory is reserved beyond what tensors take when steps differ much in size, with the
    allocator as it is and with expandable segments (PYTORCH_CUDA_ALLOC_CONF), each in a process of its own.

    Expected: with expandable segments less is reserved for the same peak of tensors, at the same speed.
    """
    rows: list[Row] = []
    for name, setting in SETTINGS.items():
        if check.dry and not setting:
            continue
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting}
        if not setting:
            del environment["PYTORCH_CUDA_ALLOC_CONF"]
        command = [sys.executable, "-m", "benchmarks.gpu.segments", *(["--dry"] if check.dry else [])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stderr[-4000:])
        if done.returncode:
            rows.append({"way": name, "error": done.stderr.strip().splitlines()[-1][:300]})
        else:
            rows.append({"way": name, **json.loads(done.stdout.strip().splitlines()[-1])})
    return answer(rows, [row["way"] for row in rows if "error" in row])


def measure(dry: bool) -> Row:
    """Steps of unequal size in turn; peaks of memory, and milliseconds of a step."""
    users: Sequence[int] = _TINY if dry else _USERS
    cells = [
        Cell(items=2_000 if dry else 4_068_790, length=30 if dry else 200, users=count) for count in users
    ]
    with process_group(60) as ranks, loops_of(cells[0], ranks, count=1) as loops:
        steps = [step for cell in cells for step in steps_of(cell, 1, pinning(ranks.device))]
        pipeline = loops.pipeline(Way("sparse_dist"))
        forget_memory()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else []
        for event, given in zip(events or [None, None], ([], steps * 3), strict=True):
            deque(pipeline.train(given), maxlen=0)
            if event is not None:
                event.record()
        wait_for_device()
        row: Row = {"steps": 3 * len(steps), **memory()}
        if events:
            row["ms"] = events[0].elapsed_time(events[1]) / row["steps"]
            row["reserved beyond tensors"] = row["reserved GB"] / row["allocated GB"] - 1
        return row


if __name__ == "__main__":
    print(json.dumps(measure("--dry" in sys.argv)))
