"""Which sharding plans can take up each other's optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embeddings.errors import CheckpointError
from embeddings.optimizers import ROW_OPTIMIZERS

# Written by `embeddings.plan.file`: its "modules" are module -> table -> {"sharding_type", "shards", ...}.
PlanTree = Mapping[str, Any]


def check_reshardable(path: Path, state: Mapping[str, Any], now: PlanTree) -> None:
    """Refuse state that its optimizer cannot bring to tables that are cut into columns differently.

    Row-wise Adagrad keeps an accumulator for each row *and column shard* (the mean square of the gradients
    in those columns), so the saved ones are not those of other columns. Everything else reshards.

    Args:
        path: the checkpoint; state: its state, whose `plan` may be missing; now: the plan of this start.

    Raises:
        CheckpointError: naming the table, before anything is loaded.
    """
    groups = state["config"]["groups"]
    before, after = _tables(state.get("plan", {})), _tables(now)
    for table in sorted(before.keys() & after.keys()):
        optimizer = groups.get(table.split("__")[0], {}).get("optimizer", "")
        types = [str(entry.get("sharding_type")) for entry in (before[table], after[table])]
        if _columns(before[table]) == _columns(after[table]) or not optimizer:
            continue
        rule = ROW_OPTIMIZERS[optimizer]
        if rule.state_reshards(*types):
            continue
        was, now_ = _layout(before[table]), _layout(after[table])
        raise CheckpointError(
            path,
            f"table {table} lay {was}, now {now_}: {rule.title} has one accumulator a row and column "
            "shard, so its state cannot follow; set groups.<name>.sharding and the number of ranks back, or "
            "start a new run from these weights with --init-from",
        )


def _tables(plan: PlanTree) -> dict[str, Mapping[str, Any]]:
    return {table: entry for tables in plan.get("modules", {}).values() for table, entry in tables.items()}


def _columns(entry: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shards of a table that is cut into columns; one of all where it is not, however rows are cut."""
    shards = entry.get("shards") or []
    found = {(*shard["offsets"], *shard["sizes"]) for shard in shards}
    return sorted(found) if len({place[1:2] for place in found}) > 1 else [()]


def _layout(entry: Mapping[str, Any]) -> str:
    count = len(_columns(entry))
    return f"{entry.get('sharding_type')} in {f'{count} pieces' if count > 1 else 'whole rows'}"
