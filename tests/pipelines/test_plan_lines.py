"""The table of where each table lies, at the start of a run."""

from __future__ import annotations

from embeddings.plan.planner import Placement
from pipelines.train import plan_lines


def test_long_names_of_sets_leave_columns_aligned() -> None:
    names = ["attention__item_id", "representation/of_a_task_with_a_long_name/department_id"]
    placed = [Placement(name, 68_261, 16, "table_wise", "fused", (0,), 4) for name in names]
    _, head, _, first, second, _ = plan_lines(placed, 1)
    assert first.index("68,261") == second.index("68,261") and len(first) == len(second) == len(head)
    assert second.startswith(names[1] + "  ")
