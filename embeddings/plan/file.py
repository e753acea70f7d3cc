"""A sharding plan as JSON: written by `plan`, read by `train --plan`, kept in every checkpoint.

TorchRec's own plan holds objects that JSON does not know. Here every field of a `ParameterSharding` either
round-trips or is refused by name: a plan that comes back with less than it had would train otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    CacheAlgorithm,
    MultiPassPrefetchConfig,
)
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import DataType

from embeddings.errors import ConfigError
from embeddings.private import EnumerableShardingSpec, ShardMetadata

FORMAT: Final = "tandemrec.sharding-plan"
VERSION: Final = 1
_PLAIN = ("sharding_type", "compute_kernel", "ranks", "enforce_hbm", "stochastic_rounding")
_CACHE_PLAIN = ("load_factor", "reserved_memory", "prefetch_pipeline")
# What a file may hold of a table, and of its cache. `multipass` is missing in files of earlier versions.
_TABLE_KEYS = {*_PLAIN, "bounds_check", "output", "cache", "shards"}
_CACHE_KEYS = {*_CACHE_PLAIN, "algorithm", "precision", "multipass"}


@dataclass(frozen=True)
class SavedPlan:
    """A plan and what it was made for.

    Attributes:
        plan: TorchRec's.
        device: `cpu` or `cuda`; world_size, local_world_size: ranks, and those of a node.
        tables: name -> (rows, dim, bytes of a weight).
    """

    plan: ShardingPlan
    device: str
    world_size: int
    local_world_size: int
    tables: Mapping[str, tuple[int, int, int]]


def to_tree(saved: SavedPlan) -> dict[str, Any]:
    """The plan as a tree of plain values.

    Raises:
        ConfigError: it has parts that have no JSON form here (key-value tables, cache statistics).
    """
    modules = {
        module: {table: _sharding_tree(table, sharding) for table, sharding in tables.items()}
        for module, tables in saved.plan.plan.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "device": saved.device,
        "world_size": saved.world_size,
        "local_world_size": saved.local_world_size,
        "tables": {name: list(shape) for name, shape in saved.tables.items()},
        "modules": modules,
    }


def from_tree(tree: Any, where: str) -> SavedPlan:
    """The plan back; `where` leads every message.

    Raises:
        ConfigError: this is no such tree, or of another version.
    """
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ConfigError(f"{where}: not a sharding plan; write one with `tandemrec plan --json FILE`")
    if tree.get("version") != VERSION:
        raise ConfigError(
            f"{where}: plan version {tree.get('version')!r}, only {VERSION} is read; plan again"
        )
    try:
        modules = {
            module: EmbeddingModuleShardingPlan({table: _sharding(part) for table, part in tables.items()})
            for module, tables in tree["modules"].items()
        }
        tables = {
            name: (int(shape[0]), int(shape[1]), int(shape[2])) for name, shape in tree["tables"].items()
        }
        return SavedPlan(
            ShardingPlan(modules),
            tree["device"],
            int(tree["world_size"]),
            int(tree["local_world_size"]),
            tables,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(f"{where}: damaged plan ({type(error).__name__}: {error}); plan again") from None


def read_plan_file(path: Path) -> SavedPlan:
    """Read a plan that `tandemrec plan --json` wrote.

    Raises:
        ConfigError: missing, unreadable or no plan.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such plan; write one with `tandemrec plan --json {path}`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    return from_tree(tree, str(path))


def check_fits(saved: SavedPlan, wanted: SavedPlan, modules: Mapping[str, str], where: str) -> None:
    """Refuse a saved plan that was made for something else.

    Args:
        wanted: what this run has (its own plan is not looked at); modules: table -> module of this run.

    Raises:
        ConfigError: naming the first thing that differs.
    """
    for name in ("device", "world_size", "local_world_size"):
        before, now = getattr(saved, name), getattr(wanted, name)
        if before != now:
            raise ConfigError(f"{where}: made for {name} {before}, this run has {now}; plan again for it")
    for table in sorted({**saved.tables, **wanted.tables}):
        if table not in saved.tables:
            raise ConfigError(f"{where}: knows no table {table!r}; plan again with this config")
        if table not in wanted.tables:
            raise ConfigError(f"{where}: places a table {table!r} that this config lacks; plan again with it")
        if saved.tables[table] != wanted.tables[table]:
            raise ConfigError(
                f"{where}: made for table {table} of {_shape(saved.tables[table])}, this config has "
                f"{_shape(wanted.tables[table])}; plan again with it"
            )
    placed = {table: module for module, tables in saved.plan.plan.items() for table in tables}
    if placed != dict(modules):
        odd = sorted(set(placed.items()) ^ set(modules.items()))[0][0]
        raise ConfigError(f"{where}: does not place table {odd} in the module that has it; plan again")
    for module in saved.plan.plan.values():
        for table, sharding in module.items():
            _check_shards(table, sharding, saved, where)


def _check_shards(table: str, sharding: ParameterSharding, saved: SavedPlan, where: str) -> None:
    """An edited file must not leave rows without a rank."""
    rows, dim, _ = saved.tables[table]
    held = [rank for rank in sharding.ranks or [] if not 0 <= rank < saved.world_size]
    spec = sharding.sharding_spec
    cells = rows * dim if spec is None else sum(math.prod(s.shard_sizes) for s in spec.shards)
    whole = spec is not None or sharding.sharding_type == "data_parallel"
    if held or not whole or cells != rows * dim:
        raise ConfigError(f"{where}: the shards of table {table} are not the whole table; plan again")


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]:,} rows x {shape[1]} ({shape[2]} bytes a weight)"


def _sharding_tree(table: str, sharding: ParameterSharding) -> dict[str, Any]:
    if sharding.key_value_params is not None:
        raise ConfigError(f"table {table}: kernel {sharding.compute_kernel} has no JSON form; use another")
    tree = {name: getattr(sharding, name) for name in _PLAIN}
    tree["bounds_check"] = sharding.bounds_check_mode and sharding.bounds_check_mode.name
    tree["output"] = sharding.output_dtype and sharding.output_dtype.name
    tree["cache"] = _cache_tree(table, sharding.cache_params)
    spec = sharding.sharding_spec
    if spec is None:
        tree["shards"] = None
    elif isinstance(spec, EnumerableShardingSpec):
        tree["shards"] = [
            {"offsets": list(s.shard_offsets), "sizes": list(s.shard_sizes), "placement": str(s.placement)}
            for s in spec.shards
        ]
    else:
        raise ConfigError(f"table {table}: a {type(spec).__name__} has no JSON form")
    return tree


def _sharding(tree: Mapping[str, Any]) -> ParameterSharding:
    _check_keys(tree, _TABLE_KEYS)
    shards = tree["shards"]
    return ParameterSharding(
        **{name: tree[name] for name in _PLAIN},
        bounds_check_mode=_named(BoundsCheckMode, tree["bounds_check"]),
        output_dtype=_named(DataType, tree["output"]),
        cache_params=_cache(tree["cache"]),
        sharding_spec=None
        if shards is None
        else EnumerableShardingSpec(
            [
                ShardMetadata(shard_offsets=s["offsets"], shard_sizes=s["sizes"], placement=s["placement"])
                for s in shards
            ]
        ),
    )


def _cache_tree(table: str, cache: CacheParams | None) -> dict[str, Any] | None:
    if cache is None:
        return None
    if cache.stats is not None:
        raise ConfigError(f"table {table}: cache statistics have no JSON form")
    passes = cache.multipass_prefetch_config
    return {
        **{name: getattr(cache, name) for name in _CACHE_PLAIN},
        "algorithm": cache.algorithm and cache.algorithm.name,
        "precision": cache.precision and cache.precision.name,
        "multipass": passes and passes._asdict(),
    }


def _cache(tree: Mapping[str, Any] | None) -> CacheParams | None:
    if tree is None:
        return None
    _check_keys(tree, _CACHE_KEYS)
    passes = tree.get("multipass")
    return CacheParams(
        **{name: tree[name] for name in _CACHE_PLAIN},
        algorithm=_named(CacheAlgorithm, tree["algorithm"]),
        precision=_named(DataType, tree["precision"]),
        multipass_prefetch_config=None if passes is None else MultiPassPrefetchConfig(**passes),
    )


def _check_keys(tree: Mapping[str, Any], known: set[str]) -> None:
    """Raises ValueError: a key that is not known here would be dropped, and the tables trained otherwise."""
    if unknown := sorted(set(tree) - known):
        raise ValueError(f"unknown key {unknown[0]!r}")


def _named(kind: Any, name: str | None) -> Any:
    return None if name is None else kind[name]
