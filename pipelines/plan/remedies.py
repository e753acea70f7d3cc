"""What would make tables fit: single changes of the config or the cluster, each tried by planning again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from embeddings.errors import ConfigError
from embeddings.plan.memory import TableNeed, gigabytes
from embeddings.plan.planner import offline_plan
from embeddings.plan.request import Cluster, PlanRequest
from trainer.config.tables import GroupConfig, PlanTableConfig
from trainer.run_config import Config

# A remedy at a time, from its gentlest form on, so often at most.
_TRIES = 6
_GIGABYTE = 10**9

Build = Callable[[Config, Cluster], PlanRequest]
Attempt = tuple[str, Config, Cluster]


def remedies(config: Config, cluster: Cluster, parts: Sequence[TableNeed], build: Build) -> list[str]:
    """Lines that name the changes under which a plan was found; one that says so where there is none.

    Args:
        parts: what each table needs, largest first; build: the planner's question for a config and a cluster.
    """
    table = max(parts, key=lambda part: part.shard).table
    found = []
    for attempts in (
        _sharding(config, cluster, table),
        _half_precision(config, cluster, table),
        _narrower(config, cluster, table),
        _ranks(config, cluster),
        _memory(config, cluster),
        _host_memory(config, cluster),
        _unified(config, cluster),
    ):
        for _, (name, changed, larger) in zip(range(_TRIES), attempts, strict=False):
            if _fits(build, changed, larger):
                found.append(f"  {name}")
                break
    if not found:
        return ["no single change of sharding, width, ranks or memory makes it fit; combine them"]
    return ["it fits with one of (each tried):", *found]


def _fits(build: Build, config: Config, cluster: Cluster) -> bool:
    try:
        offline_plan(build(config, cluster))
    except ConfigError:
        return False
    return True


def _sharding(config: Config, cluster: Cluster, table: str) -> Iterator[Attempt]:
    for sharding in ("row_wise", "column_wise"):
        rule = PlanTableConfig(sharding=(sharding,))
        plan = config.plan.model_copy(update={"tables": {**config.plan.tables, table: rule}})
        name = f'plan.tables.{table}.sharding = ["{sharding}"]'
        yield name, config.model_copy(update={"plan": plan}), cluster


def _half_precision(config: Config, cluster: Cluster, table: str) -> Iterator[Attempt]:
    group = _group_of(config, table)
    if "dtype" in GroupConfig.model_fields:
        yield f'groups.{group}.dtype = "fp16"', _with_group(config, group, {"dtype": "fp16"}), cluster


def _narrower(config: Config, cluster: Cluster, table: str) -> Iterator[Attempt]:
    """Multiples of 4, at an eighth of the width each time; groups with one width only."""
    group = _group_of(config, table)
    dim = config.groups[group].dim
    if not isinstance(dim, int):
        return
    step = max(4, dim // _TRIES // 4 * 4)
    for narrow in range(dim - step, 0, -step):
        yield f"groups.{group}.dim = {narrow}", _with_group(config, group, {"dim": narrow}), cluster


def _ranks(config: Config, cluster: Cluster) -> Iterator[Attempt]:
    for times in (1.25, 1.5, 2, 3, 4, 8):
        nodes = -(-cluster.world_size * times // cluster.local_world_size)
        ranks = int(nodes) * cluster.local_world_size
        yield f"--world-size {ranks}", config, replace(cluster, world_size=ranks)


def _memory(config: Config, cluster: Cluster) -> Iterator[Attempt]:
    for times in (1.1, 1.25, 1.5, 2, 3, 4):
        size = -(-int(cluster.memory * times) // _GIGABYTE) * _GIGABYTE
        if cluster.device == "cuda":
            yield f"--hbm {size // _GIGABYTE}GB", config, replace(cluster, hbm=size)
        else:
            node = size * cluster.local_world_size // _GIGABYTE
            yield f"--ddr {node}GB", config, replace(cluster, ddr=size)


def _host_memory(config: Config, cluster: Cluster) -> Iterator[Attempt]:
    """More of it behind the devices, where that is allowed."""
    if cluster.device == "cuda" and config.plan.allow_unified_memory:
        for times in (1.1, 1.25, 1.5, 2, 3, 4):
            node = -(-int(cluster.ddr * times) * cluster.local_world_size // _GIGABYTE)
            larger = replace(cluster, ddr=node * _GIGABYTE // cluster.local_world_size)
            yield f"--ddr {node}GB", config, larger


def _unified(config: Config, cluster: Cluster) -> Iterator[Attempt]:
    if cluster.device == "cuda" and not config.plan.allow_unified_memory:
        plan = config.plan.model_copy(update={"allow_unified_memory": True})
        name = (
            f"plan.allow_unified_memory = true, at the speed of host memory ({gigabytes(cluster.ddr)} a rank)"
        )
        yield name, config.model_copy(update={"plan": plan}), cluster


def _group_of(config: Config, table: str) -> str:
    return max((name for name in config.groups if table.startswith(f"{name}__")), key=len)


def _with_group(config: Config, name: str, changes: dict[str, object]) -> Config:
    group = config.groups[name].model_copy(update=changes)
    return config.model_copy(update={"groups": {**config.groups, name: group}})
