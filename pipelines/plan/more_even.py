"""What would make a lopsided plan more even: changes of the config, each tried by planning again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from embeddings.errors import ConfigError
from embeddings.plan.memory import gigabytes, memory_of, memory_of_ranks
from embeddings.plan.planner import PlanEstimate, offline_plan
from embeddings.plan.request import PlanRequest, PlanRules, TableRule
from pipelines.console import table_lines

# Largest rank over mean, and the share of its room for tables that the fullest rank holds.
_LOPSIDED, _FULL = 1.2, 0.1
# Tables that take so much of the fullest rank are changed together.
_LARGE = 0.1
_KINDS = ("grid_shard", "row_wise")
_CUT = "rows of a table cut by columns have a state for each part, which no other plan can load"


def imbalance(values: Sequence[float]) -> float:
    """The largest over the mean; 1 where there is nothing."""
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def held_by_ranks(found: PlanEstimate, request: PlanRequest) -> list[int]:
    """Bytes of device and host memory that each rank has for its tables."""
    cluster = request.cluster
    held = memory_of_ranks(found.options, found.tables, cluster.world_size, cluster.device)
    return [memory.total + memory.host for memory in held]


def more_even(found: PlanEstimate, request: PlanRequest) -> list[str]:
    """What would make a lopsided plan more even; nothing where it is even, or the tables are small."""
    held = held_by_ranks(found, request)
    if imbalance(held) < _LOPSIDED or found.taken.fullest < _FULL:
        return []
    rows = [_row("as it is", found, request)]
    cut = False
    for name, rules in _attempts(found, request):
        with suppress(ConfigError):
            other = offline_plan(replace(request, rules=rules))
            if other.taken.fullest < found.taken.fullest:
                rows.append(_row(name, other, request))
                cut = cut or _KINDS[0] in name
    if len(rows) == 1:
        return []
    head = ("more even with (each tried)", "largest over mean", "fullest rank", "lookups")
    large = [f"  plan.tables.{name}" for name in _large_tables(found, request)]
    return ["", *table_lines(head, rows), "large tables:", *large, *([f"grid_shard: {_CUT}"] if cut else [])]


def _row(name: str, found: PlanEstimate, request: PlanRequest) -> tuple[str, ...]:
    held = held_by_ranks(found, request)
    return name, f"{imbalance(held):.2f}", gigabytes(max(held)), f"{found.taken.time:.2f} ms"


def _attempts(found: PlanEstimate, request: PlanRequest) -> Iterator[tuple[str, PlanRules]]:
    """A change in words, and the rules with it."""
    large = _large_tables(found, request)
    pooled = [name for name in large if found.tables[name].pooled]
    for kind in _KINDS:
        names = pooled if kind == _KINDS[0] else large
        own = dict(request.rules.tables)
        for name in names:
            own[name] = replace(own.get(name, TableRule()), sharding=(kind,))
        if names:
            yield f'sharding = ["{kind}"] of large tables', replace(request.rules, tables=own)
    for plan in found.front:
        needed = plan.time / found.fastest.time - 1
        if plan.fullest < 0.9 * found.taken.fullest and needed > request.rules.even_within:
            # The next hundredth that lets it in.
            within = int(needed * 100 + 1) / 100
            yield f"plan.even_within = {within:g}", replace(request.rules, even_within=within)
            return


def _large_tables(found: PlanEstimate, request: PlanRequest) -> list[str]:
    """Tables that take much of a rank, in the order of their names."""
    most = max(held_by_ranks(found, request))
    return sorted(
        option.name
        for option in found.options
        if max(memory_of(s.storage, request.cluster.device) + s.storage.ddr for s in option.shards)
        > _LARGE * most
    )
