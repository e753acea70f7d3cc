"""Script: trainings that save deltas, and beside each delta all tensors in full; one JSON report.

python -m tests.programs.delta_runs FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import local_shards
from pipelines.export import export
from tests.helpers.forked import fork, one_thread, wait_all
from tests.programs.saving_runs import Runs
from trainer.checkpoint import files
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.background import Saver
from trainer.checkpoint.restore import restore
from trainer.checkpoint.tensors import TensorReader
from trainer.checkpoint.unsharded import open_plain_tables
from trainer.checkpoint.warm_start import unshard_run
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_folder import RunFolder

MANY_ROWS = {"tables__item_id__rows": 4000, "checkpoint__full_every": 99, "checkpoint__keep": 99}
SAVES = {**MANY_ROWS, "checkpoint__every_steps": 1}


def also_in_full(beside: Path) -> Callable[[Ranks], None]:
    """Have every save leave all tensors in full in another folder, too."""

    def before(ranks: Ranks) -> None:
        save = Saver.save

        def saving(self: Saver, step: int, tensors: Any, state: Any, **more: Any) -> None:
            self.settle()
            checkpoint.save(beside, step, tensors, {"step": step}, 99, group=self._group)
            save(self, step, tensors, state, **more)

        Saver.save = saving  # type: ignore[method-assign]

    return before


def compared(run: Path, beside: Path) -> dict[str, dict[str, Any]]:
    """Of each checkpoint: what it builds on, which tensors differ from the full ones, its rows and others."""
    report = {}
    for path in sorted(files.checkpoints(run / "checkpoints")):
        checkpoint.verify(path)
        chain, full = TensorReader(path), TensorReader(beside / path.name)
        names = sorted(full._tensors)
        assert sorted(chain._tensors) == names
        base = files.read_state(path).get("base", {})
        report[path.name] = {
            "base": base.get("name"),
            "rows of": base.get("rows_of", []),
            "names": names,
            "differ": [name for name in names if not torch.equal(chain.whole(name), full.whole(name))],
        }
    return report


def used(run: Path, beside: Path, out: Path) -> dict[str, Any]:
    """What those make of a run's newest delta that use checkpoints."""
    manifest = unshard_run(run, out / "plain")
    tables = open_plain_tables(out / "plain")
    full = TensorReader(beside / files.final_name(manifest.step))
    names = {table_of(name): name for name in full.names() if table_of(name) in manifest.tables}
    unsharded = [
        torch.equal(tables.table(table)["weight"], full.whole(name)) for table, name in names.items()
    ]
    # It compares its scores with the trainer's, of which fp32 ones must be bit-equal.
    version = export(run, out / "snapshot", "fp32", "fp32", parity_requests=5)
    with process_group() as ranks:
        model = restore(RunFolder(run), ranks).sharded.model.state_dict()
        restored = [
            torch.equal(next(local_shards(weight)).tensor, full.whole(name)) for name, weight in model.items()
        ]
    return {"unsharded": unsharded, "exported": version.name, "restored": restored}


def main(root: Path) -> None:
    runs, report = Runs(root), dict[str, Any]()

    def train(name: str, ranks: int, steps: int, **changes: Any) -> None:
        done = runs.train(name, ranks, also_in_full(root / f"{name} full"), train__max_steps=steps, **changes)
        assert done["codes"] == [0] * ranks, done["said"]

    rows = {**SAVES, "groups__attention__sharding": ["row_wise"], "checkpoint__mode": "sync"}
    rows |= {"groups__representation__sharding": ["table_wise", "row_wise"], "train__pipeline": "sparse_dist"}
    for ranks, steps in ((2, 3), (1, 5), (3, 7)):
        train("resharded", ranks, steps, **rows)
    report["resharded"] = compared(root / "resharded", root / "resharded full")
    columns = {**SAVES, "groups__representation__dim": 256, "groups__representation__sets": 2}
    columns |= {"groups__representation__sharding": ["column_wise"], "checkpoint__mode": "async"}
    columns |= {"groups__attention__sharding": ["data_parallel"]}
    columns |= {"groups__attention__optimizer": "adagrad", "train__validate_every": 2}
    train("columns", 2, 4, **columns)
    report["columns"] = compared(root / "columns", root / "columns full")
    sgd = {**SAVES, "groups__attention__optimizer": "sgd", "groups__attention__dtype": "fp16"}
    train("sgd", 1, 3, **sgd)
    report["sgd"] = compared(root / "sgd", root / "sgd full")
    told = root / "used.json"
    work = partial(used, root / "sgd", root / "sgd full", root / "used")
    assert wait_all([fork(lambda: print(json.dumps(work()), file=told.open("w"), flush=True))]) == [0]
    report["used"] = json.loads(told.read_text())
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]))
