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
from typing import Annotated, Any, Literal

from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    CacheAlgorithm,
    MultiPassPrefetchConfig,
)
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
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


def _by_name(kind: Any) -> Any:
    """The JSON form of a member of an enumeration, or of none: its name."""

    def member(value: Any) -> Any:
        if isinstance(value, str) and value not in kind.__members__:
            raise ValueError(f"no {kind.__name__} is called {value!r}")
        return kind[value] if isinstance(value, str) else value

    form = PlainSerializer(lambda value: value and value.name)
    return Annotated[kind | None, BeforeValidator(member), form]


def _called(name: str, *path: str) -> Any:
    """A field that JSON and TorchRec call otherwise; `path`: of attributes in TorchRec's object."""
    return Field(validation_alias=AliasChoices(name, AliasPath(*path)))


class _Form(BaseModel):
    """A part of the JSON tree. A key that is unknown here would be dropped, so it is refused."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class _Passes(_Form):
    num_passes: int
    min_splitable_pass_size: int


class _Cache(_Form):
    """`CacheParams`; `multipass` is missing in files of earlier versions."""

    load_factor: float | None
    reserved_memory: float | None
    prefetch_pipeline: bool | None
    algorithm: _by_name(CacheAlgorithm)  # type: ignore[valid-type]
    precision: _by_name(DataType)  # type: ignore[valid-type]
    multipass: Annotated[_Passes | None, _called("multipass", "multipass_prefetch_config")] = None


class _Shard(_Form):
    offsets: Annotated[list[int], _called("offsets", "shard_offsets")]
    sizes: Annotated[list[int], _called("sizes", "shard_sizes")]
    placement: Annotated[str, BeforeValidator(str)]


class _Table(_Form):
    """`ParameterSharding`."""

    sharding_type: str
    compute_kernel: str
    ranks: list[int] | None
    enforce_hbm: bool | None
    stochastic_rounding: bool | None
    bounds_check: Annotated[_by_name(BoundsCheckMode), _called("bounds_check", "bounds_check_mode")]  # type: ignore[valid-type]
    output: Annotated[_by_name(DataType), _called("output", "output_dtype")]  # type: ignore[valid-type]
    cache: Annotated[_Cache | None, _called("cache", "cache_params")]
    shards: Annotated[list[_Shard] | None, _called("shards", "sharding_spec", "shards")] = None


class _Plan(_Form):
    format: Literal["tandemrec.sharding-plan"] = "tandemrec.sharding-plan"
    version: Literal[1] = 1
    device: str
    world_size: int
    local_world_size: int
    tables: dict[str, tuple[int, int, int]]
    modules: dict[str, dict[str, _Table]]
    # What `tandemrec plan` adds for its reader.
    needs: Any = None


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
    modules: dict[str, dict[str, _Table]] = {}
    for module, tables in saved.plan.plan.items():
        modules[module] = {}
        for table, sharding in tables.items():
            spec, cache = sharding.sharding_spec, sharding.cache_params
            if sharding.key_value_params is not None:
                kernel = sharding.compute_kernel
                raise ConfigError(f"table {table}: kernel {kernel} has no JSON form; use another")
            if cache is not None and cache.stats is not None:
                raise ConfigError(f"table {table}: cache statistics have no JSON form")
            if spec is not None and not isinstance(spec, EnumerableShardingSpec):
                raise ConfigError(f"table {table}: a {type(spec).__name__} has no JSON form")
            modules[module][table] = _Table.model_validate(sharding)
    plan = _Plan(
        device=saved.device,
        world_size=saved.world_size,
        local_world_size=saved.local_world_size,
        tables=dict(saved.tables),
        modules=modules,
    )
    return plan.model_dump(mode="json", exclude={"needs"})


def from_tree(tree: Any, where: str) -> SavedPlan:
    """The plan back; `where` leads every message.

    Raises:
        ConfigError: this is no such tree, or of another version.
    """
    form, version = (_Plan.model_fields[name].default for name in ("format", "version"))
    if not isinstance(tree, dict) or tree.get("format") != form:
        raise ConfigError(f"{where}: not a sharding plan; write one with `tandemrec plan --json FILE`")
    if tree.get("version") != version:
        raise ConfigError(
            f"{where}: plan version {tree.get('version')!r}, only {version} is read; plan again"
        )
    try:
        plan = _Plan.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        odd = first["type"] == "extra_forbidden"
        problem = f"unknown key {first['loc'][-1]!r}" if odd else first["msg"]
        raise ConfigError(f"{where}: damaged plan ({place}: {problem}); plan again") from None
    modules = {
        module: EmbeddingModuleShardingPlan({table: _sharding(part) for table, part in tables.items()})
        for module, tables in plan.modules.items()
    }
    return SavedPlan(ShardingPlan(modules), plan.device, plan.world_size, plan.local_world_size, plan.tables)


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
            option = f"`tandemrec plan --{name.replace('_', '-')} {now}`"
            raise ConfigError(
                f"{where}: made for {name} {before}, this run has {now}; plan again for it, with {option}"
            )
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
    # An edited file must not leave rows without a rank.
    for table, sharding in ((t, s) for tables in saved.plan.plan.values() for t, s in tables.items()):
        rows, dim, _ = saved.tables[table]
        spec = sharding.sharding_spec
        cells = rows * dim if spec is None else sum(math.prod(s.shard_sizes) for s in spec.shards)
        whole = cells == rows * dim and (spec is not None or sharding.sharding_type == "data_parallel")
        if not whole or not all(0 <= rank < saved.world_size for rank in sharding.ranks or []):
            raise ConfigError(f"{where}: the shards of table {table} are not the whole table; plan again")


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]:,} rows x {shape[1]} ({shape[2]} bytes a weight)"


def _sharding(table: _Table) -> ParameterSharding:
    spec = cache = None
    if table.shards is not None:
        spec = EnumerableShardingSpec([ShardMetadata(s.offsets, s.sizes, s.placement) for s in table.shards])
    if table.cache is not None:
        values = {name: getattr(table.cache, name) for name in _Cache.model_fields}
        passes = values.pop("multipass")
        several = passes and MultiPassPrefetchConfig(**passes.model_dump())
        cache = CacheParams(**values, multipass_prefetch_config=several)
    return ParameterSharding(
        table.sharding_type,
        table.compute_kernel,
        table.ranks,
        spec,
        cache,
        table.enforce_hbm,
        table.stochastic_rounding,
        table.bounds_check,
        table.output,
    )
