"""What would make tables fit: single changes of the config or the cluster, each tried by planning again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from embeddings.errors import ConfigError
from embeddings.plan.memory import TableNeed, gigabytes
from embeddings.plan.planner import offline_plan
from embeddings.plan.request import Cluster, PlanRequest
from trainer.config.tables import PlanTableConfig
from trainer.run_config import Config

# A remedy at a time, from its gentlest form on, so often at most.
_TRIES = 6
_GIGABYTE = 10**9
_LARGER = (1.1, 1.25, 1.5, 2, 3, 4)

Build = Callable[[Config, Cluster], PlanRequest]
Attempt = tuple[str, Config, Cluster]


def remedies(config: Config, cluster: Cluster, parts: Sequence[TableNeed], build: Build) -> list[str]:
    """Lines that name the changes under which a plan was found; one that says so where there is none.

    Args:
        parts: what each table needs, largest first; build: the planner's question for a config and a cluster.
    """
    table = max(parts, key=lambda part: part.shard).table
    lines = []
    for attempts in _attempts(config, cluster, table):
        for name, changed, larger in attempts[:_TRIES]:
            with suppress(ConfigError):
                offline_plan(build(changed, larger))
                lines.append(f"  {name}")
                break
    if not lines:
        return [
            "no single change of sharding, width, ranks (up to 8 times as many) or memory (up to 4 times as "
            "much) makes it fit; combine them"
        ]
    return ["it fits with one of (each tried):", *lines]


def _attempts(config: Config, cluster: Cluster, table: str) -> Iterator[list[Attempt]]:
    """For each remedy its forms, from the gentlest on; none where it cannot be had."""

    def with_plan(**changes: object) -> Config:
        return config.model_copy(update={"plan": config.plan.model_copy(update=changes)})

    def with_group(**changes: object) -> Config:
        groups = {**config.groups, group: config.groups[group].model_copy(update=changes)}
        return config.model_copy(update={"groups": groups})

    kinds = ("row_wise", "column_wise")
    rules = {kind: {**config.plan.tables, table: PlanTableConfig(sharding=(kind,))} for kind in kinds}
    yield [
        (f'plan.tables.{table}.sharding = ["{kind}"]', with_plan(tables=rules[kind]), cluster)
        for kind in kinds
    ]
    starts = [name for name in config.groups if table.startswith((f"{name}__", f"{name}/"))]
    group = max(starts, key=len)
    yield [(f'groups.{group}.dtype = "fp16"', with_group(dtype="fp16"), cluster)]
    dim = config.groups[group].dim
    if isinstance(dim, int):
        # Multiples of 4, narrower by as much each time; of groups that have one width.
        step = max(4, dim // _TRIES // 4 * 4)
        widths = range(dim - step, 0, -step)
        yield [(f"groups.{group}.dim = {width}", with_group(dim=width), cluster) for width in widths]
    local = cluster.local_world_size
    nodes = [int(-(-cluster.world_size * times // local)) for times in (1.25, 1.5, 2, 3, 4, 8)]
    yield [
        (f"--world-size {count * local}", config, replace(cluster, world_size=count * local))
        for count in nodes
    ]
    sizes = [-(-int(cluster.memory * times) // _GIGABYTE) for times in _LARGER]
    if cluster.device == "cpu" and config.plan.mapped_folder:
        disk = "plan.mapped_folder on a disk with {}GB free"
        yield [(disk.format(size * local), config, replace(cluster, ddr=size * _GIGABYTE)) for size in sizes]
        return
    if cluster.device == "cpu":
        yield [(f"--ddr {size * local}GB", config, replace(cluster, ddr=size * _GIGABYTE)) for size in sizes]
        return
    yield [(f"--hbm {size}GB", config, replace(cluster, hbm=size * _GIGABYTE)) for size in sizes]
    if config.plan.allow_unified_memory:
        # Of all ranks of a node, behind their devices.
        sizes = [-(-int(cluster.ddr * times) * local // _GIGABYTE) for times in _LARGER]
        yield [(f"--ddr {size}GB", config, replace(cluster, ddr=size * _GIGABYTE // local)) for size in sizes]
    else:
        speed = f"at the speed of host memory ({gigabytes(cluster.ddr)} a rank)"
        unified = with_plan(allow_unified_memory=True)
        yield [(f"plan.allow_unified_memory = true, {speed}", unified, cluster)]
