"""`bench memory`: the stages of a run are measured in processes of their own, beside what arithmetic says."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.launching import tandemrec
from tests.helpers.logs import small_log


def test_stages_are_measured_and_nothing_stays(tmp_path: Path) -> None:
    log, page = small_log(tmp_path / "log", users=8), tmp_path / "memory.json"
    words = [
        "--set",
        f"data.log={log}",
        "--rows",
        200_000,
        "--steps",
        1,
        "--alone",
        "--dir",
        tmp_path / "work",
    ]
    few = ["data.history_length=20", "data.batch_candidates=16", "model.k=4", "model.branches.recent.k=2"]
    stages = ["--stages", "save sync", "export"]
    sets = [word for each in few for word in ("--set", each)]
    tandemrec("bench", "memory", *map(str, [*words, *sets, *stages, "--json", page]))
    rows = {row["stage"]: row for row in json.loads(page.read_text())["rows"]}
    assert [*rows] == ["train", "save sync", "export"]
    # fp16 rows of 4 numbers and an accumulator in fp32, beside the log's few categories.
    least = rows["save sync"]["least_mb"]
    assert 200_000 * 12e-6 <= least < 200_000 * 12e-6 + 0.1
    assert least <= rows["save sync"]["disk_mb"] < least + 3
    assert rows["export"]["disk_least_mb"] > 0 == rows["export"]["least_mb"]
    assert all(row["peak_mb"] > row["own_mb"] > least for row in rows.values())
    assert not [*(tmp_path / "work").iterdir()]
