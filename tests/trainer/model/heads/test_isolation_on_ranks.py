"""STEM on sharded tables: a step by one task's loss moves no row of another task, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.launching import launched
from tests.programs.stem_isolation import CASES
from tests.trainer.test_presets import log_of_tasks

TASKS = ("click", "conversion")


def test_a_step_on_two_ranks_moves_no_foreign_table(tmp_path: Path) -> None:
    log, out = log_of_tasks(tmp_path / "log"), tmp_path / "found.json"
    done = launched("tests.programs.stem_isolation", str(log), str(out), ranks=2, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert len(found) == len(TASKS) * len(CASES)
    for case, of_ranks in found.items():
        own = TASKS[int(case[-1])]
        assert all(set(each) & {"shared", *TASKS} for each in of_ranks), "rows lie on both ranks"
        moved = {name for each in of_ranks for name, changed in each.items() if changed}
        assert moved == ({"shared", own} if case.startswith("stopped") else {"shared", *TASKS}), case
