"""Script: tables so small that row shards leave ranks without rows, in all that is done with tables.

python -m tests.programs.tiny_tables FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.programs.tables_on_ranks as tables
from pipelines.export import export
from pipelines.score import score
from pipelines.unshard import unshard
from tests.helpers.forked import fork, fork_ranks, one_thread, wait_all
from tests.programs.saving_runs import Runs
from tests.trainer.test_ranks import parameters
from trainer.ranks.process_group import Ranks

# The last of three ranks gets no row of the last table, and of none.
ROWS = ({"item": 7, "tag": 4}, {"item": 1, "tag": 2})
WAYS = [("bag", "row_wise"), ("bag", "table_row_wise"), ("bag", "grid_shard"), ("sequence", "row_wise")]


def compare(root: Path) -> dict[str, Any]:
    """Three ranks beside plain tables, as in `tables_on_ranks`; -> way -> largest difference of each.

    Bags also with sets.
    """

    def work(ranks: Ranks) -> None:
        found = {}
        for kind, way in WAYS:
            for rows in ROWS:
                tables.ROWS.clear()
                tables.ROWS.update(rows)
                case = tables.case_of(kind, way, "adagrad")
                found[f"{kind} {way} {json.dumps(rows)}"] = max(tables.differences(case, ranks).values())
                if kind == "bag":
                    # Sets of two widths; Adagrad would magnify what three ranks round otherwise.
                    case = tables.case_of(kind, way, "sgd", sets=tables.SETS)
                    found[f"sets {way} {json.dumps(rows)}"] = max(tables.differences(case, ranks).values())
        (root / f"compared-{ranks.rank}").write_text(json.dumps(found))

    codes = fork_ranks(3, work)
    return {"codes": codes, "found": [json.loads((root / f"compared-{n}").read_text()) for n in range(3)]}


def apart(work: Callable[[], None]) -> int:
    """The exit code of a child that did it."""
    return wait_all([fork(work)])[0]


def without_last(runs: Runs, name: str, copy: str) -> None:
    """A run as it stood at its last but one checkpoint."""
    shutil.copytree(runs.root / name, runs.root / copy)
    shutil.rmtree(runs.root / copy / "checkpoints" / "step-00000004")


def differing(one: Path, other: Path) -> list[str]:
    """Tensors of tables, and of their optimizers, that are not the same bits in the newest checkpoints."""
    mine, theirs = parameters(one), parameters(other)
    assert mine.keys() == theirs.keys()
    return [n for n in mine if "collections." in n and not torch.equal(mine[n], theirs[n])]


def main(root: Path) -> None:
    """The log's second feature has 9 rows: three ranks of four have them."""
    report: dict[str, Any] = {"compared": compare(root)}
    runs = Runs(root)
    base = {"train__max_steps": 4, "checkpoint__every_steps": 3, "checkpoint__keep": 9}

    def lying(way: str) -> dict[str, Any]:
        return {**base, **{f"groups__{group}__sharding": [way] for group in ("attention", "representation")}}

    report["whole"] = runs.train("whole", 1, **lying("table_wise"))
    for way in ("row_wise", "grid_shard"):
        report[way] = runs.train(way, 4, **lying(way))
        without_last(runs, way, f"{way}-again")
        report[f"{way} again"] = runs.train(f"{way}-again", 4, **lying(way))
        report[f"{way} differ"] = differing(root / way, root / f"{way}-again")
        report[f"{way} export"] = apart(
            lambda way=way: export(root / way, root / f"{way}-snap", attention_dtype="fp32")  # type: ignore[misc]
        )
        report[f"{way} unshard"] = apart(lambda way=way: unshard(root / way, root / f"{way}-plain"))  # type: ignore[misc]
    snap, scores = root / "row_wise-snap", root / "scores.parquet"
    report["score"] = apart(lambda: score(snap, runs.log, "train", 0, scores, None))
    without_last(runs, "row_wise", "fewer")
    report["on 1"] = runs.train("fewer", 1, **lying("table_wise"))
    without_last(runs, "whole", "more")
    report["on 4"] = runs.train("more", 4, **lying("row_wise"))
    for source in ("row_wise", "grid_shard-plain"):
        warm = {**lying("row_wise"), "train__init_from": str(root / source)}
        report[f"from {source}"] = runs.train(f"from-{source}", 4, **warm)
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]))
