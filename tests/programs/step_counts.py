"""Run under torchrun: what one training step of configs/dare.toml calls, sends and looks up; no times.

torchrun --nproc-per-node N -m tests.programs.step_counts LOG OUT.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.collectives import CollectiveCounter
from pipelines.console import quiet_third_parties
from tests.programs.step_cases import job
from trainer.data.reader import Step
from trainer.ranks.process_group import process_group

# Lazy buffers are made and first communication is done before this step.
COUNTED = 3


class Counted(CollectiveCounter):
    """Besides, every operator that torch's dispatcher is asked for: a kernel launch each, or a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if not name.startswith("profiler::"):
            self.operators[name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def graph_size(loss: Tensor) -> int:
    """Nodes of the autograd graph behind a loss."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def main() -> None:
    log, out = Path(sys.argv[1]), Path(sys.argv[2])
    quiet_third_parties()
    with process_group(60) as ranks:
        made = job(ranks, log, out.parent, "none", "data.batch_candidates=24")
        looked: Counter[str] = Counter()

        def note(name: str, width: int, _: object, given: tuple[Any, ...]) -> None:
            looked[f"{name} rows"] += given[0].values().numel()
            looked[f"{name} bytes"] += 4 * width * given[0].stride()

        shell = made.sharded.model.module
        # Closed, or its threads would still run while the interpreter ends.
        with closing(made.reader.steps()) as read:
            steps: list[Step] = list(islice(read, COUNTED))
        for number, step in enumerate(steps):
            if number == COUNTED - 1:
                for name, collection in shell.collections.items():
                    width = made.sharded.groups[name].width
                    collection.register_forward_pre_hook(
                        lambda *given, name=name, width=width: note(name, width, *given)
                    )
            with Counted() as counted:
                made.step.zero_grad()
                loss, _ = made.step.forward(step)
                nodes = graph_size(loss)
                loss.backward()
                made.step.step()
        tables = [sent for sent in counted.sent if sent.serves_tables]
        mine = {
            "operators": sum(counted.operators.values()),
            "collectives": len(counted.sent),
            "graph nodes": nodes,
            "bytes of ids": counted.bytes_of(floats=False),
            "bytes of vectors": counted.bytes_of(floats=True),
            "bytes besides": sum(sent.bytes for sent in counted.sent) - sum(sent.bytes for sent in tables),
            **looked,
        }
        every: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(every, mine)
        if ranks.rank == 0:
            out.write_text(json.dumps({"ranks": every, "operators": counted.operators.most_common()}))


if __name__ == "__main__":
    main()
