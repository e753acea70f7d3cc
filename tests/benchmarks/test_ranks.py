"""`bench ranks`: what it says of a few ranks, small."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.ranks import main


def test_steps_and_tables_of_several_world_sizes(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    small = ["ranks=[8, 16]", "candidates=[512]", "users=40", "rows=100000000"]
    main(["--json", str(out), *(word for change in small for word in ("--set", change))])
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    for ranks in (8, 16):
        alone, several, all_of_them = (
            rows[f"{ranks} ranks, 512 candidates, {name}"]["mean"]
            for name in ("one rank a row group", "row_groups", "steps")
        )
        assert 1 <= all_of_them <= several < 1.1 < alone
    # Every rank has as many rows of both tables, or a node of two has most.
    assert (
        rows["16 ranks, tables, row_wise"]["memory"] < 1.01 < rows["16 ranks, tables, as planned"]["memory"]
    )
    assert rows["16 ranks, tables, grid_shard"]["memory"] < 1.05
