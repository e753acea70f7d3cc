"""From a config and a log's manifest to a model, sharded for training or plain for everything else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.agreement import from_every_rank, from_rank_0
from embeddings.disk import free_disk
from embeddings.errors import ConfigError, hint_of
from embeddings.groups import TableGroup, with_lanes
from embeddings.lookup.caches import with_prefetch
from embeddings.lookup.compile import make_collection
from embeddings.lookup.rounding import Comms
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.plan.bandwidths import of_device
from embeddings.plan.file import SavedPlan, from_tree
from embeddings.plan.memory import RankMemory, memory_of_plan
from embeddings.plan.planner import Placement, check_plan, make_plan, placements, read_plan
from embeddings.plan.request import Cluster, PlanRequest
from embeddings.plan.tables import dense_bytes, tables_of
from trainer.config.ids import check_features
from trainer.config.model import section_of
from trainer.config.places import place_of
from trainer.config.tasks import Task, resolve_tasks
from trainer.config.toml import flat_settings
from trainer.data.domain import DomainColumn
from trainer.data.parts import with_parts
from trainer.data.similarity.encoding import features_of_tables
from trainer.data.similarity.given_rows import set_rows_of_vectors
from trainer.log.schema import ANY_ID, LogManifest
from trainer.model.frame import TwoStageModel
from trainer.model.sizes import Dimensions
from trainer.needs.model_memory import check_dense, check_step
from trainer.needs.run_needs import Run, check_memory, memory_needs, more_dense
from trainer.ranks.machine import memory_bytes
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config, build_groups
from trainer.sealed_folder import voice
from trainer.step_size import StepSize, lookups, step_size


@dataclass(frozen=True)
class ShardedModel:
    """A model ready to train, and how its tables lie.

    Attributes:
        origin: lines that say where a checkpoint had a say in it, and what of the run may not fit.
    """

    model: DistributedModelParallel
    groups: Mapping[str, TableGroup]
    placements: list[Placement]
    plan: SavedPlan
    origin: str = ""


@dataclass(frozen=True)
class FormerPlan:
    """What a checkpoint knows of how its tables lay.

    Attributes:
        checkpoint: its name; settings: its config, as JSON holds it; plan: as JSON, None where it has none.
    """

    checkpoint: str
    settings: Mapping[str, Any]
    plan: Any


def resolve_groups(config: Config, manifest: LogManifest) -> dict[str, TableGroup]:
    """The config's groups with the table rows that the log's ids need; see `build_groups`.

    Raises:
        ConfigError: as `build_groups`; or a group of kind `sequence` has a feature whose bags need not hold
            exactly one id; or candidates cannot be grouped, or behaviors matched, by a branch's feature.
    """
    of_items = features_of_tables(config.data, manifest)
    items = {name: info.rows for name, info in of_items.items()}
    contexts = {name: info.rows for name, info in manifest.table_context.items()}
    features = {**of_items, **manifest.table_context}
    named: dict[str, Collection[str]] = {"tables": config.tables, "ids": config.ids}
    config = config.model_copy(update={"groups": with_parts(config.groups, features, named)})
    tasks = resolve_tasks(config.tasks, manifest.tasks)
    if config.data.domain:
        # Before a group or a gate misses it.
        DomainColumn.of(manifest, config.data.domain)
    check_features(config.ids, {name: info.raw for name, info in features.items()}, config.groups)
    groups = build_groups(config, items, contexts, tasks)
    for group in groups.values():
        for feature in group.features if group.kind == "sequence" else ():
            info = features[feature]
            if info.multi or info.side != "both":
                side = f"has none on one side (side = {info.side!r})"
                why = "has any number of ids" if info.multi else side
                raise ConfigError(
                    f'groups.{group.name}.kind = "sequence" needs one id in every bag, but feature '
                    f'{feature!r} {why}; use kind = "bag", or name other groups.{group.name}.features'
                )
    for name, branch in config.model.all_branches().items():
        for key, (feature, needs) in branch.compared_features().items():
            where = f"{section_of(name)}.{key} = {feature!r}"
            _check_compared(where, feature, needs, key == "time_group", manifest)
        _check_owner(name, branch.attention_owner, [task.name for task in tasks if task.has_tower])
    kind = config.model.auxiliary_kind
    for key, feature in {} if kind is None else kind.features(config.model).items():
        _check_compared(f"model.{key} = {feature!r}", feature, "candidates", True, manifest)
    return groups


def _check_owner(branch: str, owner: str, tasks: Sequence[str]) -> None:
    if owner and owner not in tasks:
        where = f"{section_of(branch)}.attention_owner = {owner!r}"
        known = hint_of(owner, tasks, f"they are {', '.join(tasks)}")
        raise ConfigError(f"{where}: no task with a tower has that name; {known}")


def _check_compared(where: str, feature: str, needs: str, single: bool, manifest: LogManifest) -> None:
    """`needs`: who must have the feature; `single`: with one id."""
    info = manifest.table_features.get(feature)
    if feature in manifest.features and (info is None or info.field):
        problem = "it holds numbers, which are not compared like ids"
        raise ConfigError(f"{where}: {problem}; name a feature of ids, or ingest it without an encoder")
    if info is None:
        known = ", ".join(manifest.table_features)
        raise ConfigError(f"{where}: the log's {needs} have no such feature; they have {known}")
    if not info.of_candidates or ("behaviors" in needs and not info.of_behaviors):
        raise ConfigError(
            f"{where}: {needs} need it, but it has side = {info.side!r} in the log; name a feature of "
            'side = "both", or ingest the log again with that'
        )
    if single and info.multi:
        raise ConfigError(
            f"{where}: a candidate has any number of its ids, but belongs to one; name a feature with one id"
        )


def count_numbers(config: Config, numeric: Sequence[str]) -> int:
    """X: the log's numbers and those that the hard search adds."""
    return len(numeric) + len(config.data.search.count_names)


def count_domains(config: Config, manifest: LogManifest) -> int:
    """Ids that a domain may have, whether or not there is a table of it; 0 where candidates have none.

    Where `tables.<feature>.rows` asks for more rows than the log has ids, there may be as many.
    """
    info = {**manifest.context, **manifest.features}.get(config.data.domain)
    table = config.tables.get(config.data.domain)
    return max(info.rows, (table.rows if table is not None else None) or 0) if info is not None else 0


def feature_rows(groups: Mapping[str, TableGroup]) -> dict[str, int]:
    """Feature -> rows of its tables."""
    return {table.feature: table.rows for group in groups.values() for table in group.tables}


def id_bounds(groups: Mapping[str, TableGroup], config: Config) -> dict[str, int]:
    """Feature -> the ids that the reader lets pass: rows of its tables, or any where ids come and go."""
    return {name: ANY_ID if name in config.ids else rows for name, rows in feature_rows(groups).items()}


def build_model(
    config: Config,
    groups: Mapping[str, TableGroup],
    collections: Mapping[str, nn.Module],
    tasks: Sequence[Task],
    numbers: int = 0,
) -> TwoStageModel:
    """The model around given lookups; its dense weights come from train.seed alone."""
    state = torch.get_rng_state()
    torch.manual_seed(config.train.seed)
    levels = len(config.data.search.levels)
    domains = feature_rows(groups).get(config.data.domain, 0)
    dimensions = Dimensions(groups, config.data.history_length, levels, config.train.seed, domains)
    model = TwoStageModel(config.model, dimensions, collections, tasks, numbers)
    torch.set_rng_state(state)
    return model


def build_trainable(
    config: Config, manifest: LogManifest, device: torch.device
) -> tuple[TwoStageModel, dict[str, TableGroup]]:
    """The model over collections on `device` whose rows are updated in the backward pass, and its groups.

    On the meta device the tables take no memory until they are sharded.

    Raises:
        ConfigError: the dense weights do not fit into this machine's memory while they are trained.
    """
    tasks = resolve_tasks(config.tasks, manifest.tasks, manifest.partial)
    groups = with_lanes(resolve_groups(config, manifest), partial(config.losses_of, tasks))
    collections = {}
    for name, group in groups.items():
        collections[name] = make_collection(group, device)
        attach_optimizer(collections[name], group.optimizer)
    numbers = count_numbers(config, manifest.numeric)

    def build() -> TwoStageModel:
        model = build_model(config, groups, collections, tasks, numbers)
        model.domains = count_domains(config, manifest)
        return model

    check_dense(build)
    return build(), groups


def build_sharded(
    config: Config,
    manifest: LogManifest,
    ranks: Ranks,
    training: bool = False,
    former: FormerPlan | None = None,
    first_rows: bool = True,
    disk_lines: Callable[[Run, Sequence[RankMemory]], Sequence[str]] | None = None,
) -> ShardedModel:
    """Plan, shard and initialise; collective over all ranks.

    Args:
        training: the plan weighs what a step of training asks of the tables, and may come from `plan.file`.
        former: the plan of the checkpoint that training goes on from; it is taken again where it still suits.
        first_rows: compute the tables' first weights; False: a checkpoint fills every row right after.
        disk_lines: what is to be said of the disk of a run to train with so much of the tables on each rank;
            rank 0 asks before any table is made, and an error is every rank's.
    """
    model, groups = build_trainable(config, manifest, torch.device("meta"))
    size = step_size(config.data, manifest) if training else None
    cluster = cluster_of(ranks)
    if size is not None:
        check_step(config, size, cluster.world_size, cluster.memory)
    roomy = room_for_tables(cluster, config)
    request = plan_request(config, manifest, (model, groups), roomy, size)
    if training and config.plan.file:
        plan, origin = read_plan(place_of("plan.file", config.plan.file), request), ""
    else:
        plan, origin = _plan(config, request, former)
    lines: list[str] = []
    if size is not None:
        run = run_of(config, manifest, request, size)
        held = memory_of_plan(plan, run.tables)
        # Memory differs from node to node: all ranks hear of one that has not enough.
        lines = [
            *dict.fromkeys(
                chain(*from_every_rank(lambda: check_memory(memory_needs(run, held, cluster, roomy.ddr))))
            )
        ]
        if disk_lines is not None:
            lines += from_rank_0(lambda: disk_lines(run, held))
    if training:
        plan, line = fit_caches(plan, config.train.pipeline == "prefetch", model)
        origin = "\n".join(filter(None, (origin, line, *lines)))
    sharded = shard(
        model,
        groups,
        plan.plan,
        ranks.device,
        config.train.seed,
        request.comms,
        first_rows=first_rows,
        mapped_folder=_mapped_folder(config, ranks.device.type),
    )
    if first_rows:
        names = {name: group.vectors for name, group in config.groups.items()}
        found = set_rows_of_vectors(sharded.state_dict(), groups, names, config.data, manifest)
        origin = "\n".join(filter(None, (origin, *found)))
    return ShardedModel(sharded, groups, placements(plan, groups.values()), plan, origin)


def room_for_tables(cluster: Cluster, config: Config) -> Cluster:
    """The same, with the room that tables have: that of a disk, where they lie in mapped files.

    Raises:
        ConfigError: they cannot.
    """
    folder = _mapped_folder(config, cluster.device)
    if folder is None:
        return cluster
    return replace(cluster, ddr=(free_disk(folder) or 0) // cluster.local_world_size)


def _mapped_folder(config: Config, device: str) -> Path | None:
    """Where tables lie that are not in memory; None: all are.

    Raises:
        ConfigError: there is no such folder, or the ranks are no CPUs.
    """
    if not config.plan.mapped_folder:
        return None
    folder = Path(config.plan.mapped_folder)
    if device != "cpu" or not folder.is_dir():
        why = (
            "is no folder; make it first"
            if device == "cpu"
            else 'is for tables of CPU ranks, and these are GPUs; set it to "", or take CPUs'
        )
        raise ConfigError(f"plan.mapped_folder = {str(folder)!r} {why}")
    return folder


def _plan(config: Config, request: PlanRequest, former: FormerPlan | None) -> tuple[SavedPlan, str]:
    """The checkpoint's plan or a new one, and a line that says which; empty without a checkpoint.

    On other memory, or after an upgrade of TorchRec, the planner may answer otherwise than it did; a run goes
    on bit for bit only where its tables lie as before.
    """
    if former is None:
        return make_plan(request), ""
    where = f"the plan of {former.checkpoint}"
    try:
        check_same_rules(former.settings, config, where)
        plan = check_plan(from_tree(former.plan, where), request, where)
    except ConfigError as problem:
        # Without its advice, which is followed here.
        reason, _, _ = str(problem).rpartition("; ")
        return make_plan(request), f"{reason}; tables are placed anew"
    return plan, f"tables lie as in {where}"


def check_same_rules(settings: Mapping[str, Any], config: Config, where: str) -> None:
    """Whether a checkpoint's plan was made under the rules of this start; `plan.file` is none.

    Args:
        settings: the config of the checkpoint, as JSON holds it; where: leads the message.

    Raises:
        ConfigError: a rule differs.
    """
    before, now = dict(flat_settings(settings)), dict(flat_settings(config.model_dump(mode="json")))
    for key in {**before, **now}:
        of_group = key.startswith("groups.") and key.endswith((".sharding", ".stochastic_rounding"))
        of_plan = key.startswith("plan.") and key != "plan.file"
        if (of_group or of_plan) and before.get(key) != now.get(key):
            raise ConfigError(
                f"{where}: made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; plan again"
            )


def fit_caches(saved: SavedPlan, ahead: bool, model: TwoStageModel) -> tuple[SavedPlan, str]:
    """The plan with caches that are filled ahead, or with none of these, and a line where that is a change.

    A plan file or checkpoint may have been made for a run with another `train.pipeline`.

    Args:
        ahead: `train.pipeline` fills the caches of whatever is looked up before the search.

    Raises:
        ConfigError: such a cache keeps other rows than the last used.
    """
    modules = [f"collections.{group}" for group in model.collections if group not in model.late]
    plan, changed = with_prefetch(saved.plan, modules if ahead else [])
    if not changed:
        return saved, ""
    how = "filled ahead of their batch" if ahead else "no longer filled ahead of their batch"
    return replace(saved, plan=plan), f"train.pipeline: caches are {how}: {', '.join(changed)}"


def plan_request(
    config: Config,
    manifest: LogManifest,
    built: tuple[nn.Module, Mapping[str, TableGroup]],
    cluster: Cluster,
    size: StepSize | None = None,
) -> PlanRequest:
    """The planner's question for a model and its groups; without a step's size it looks at memory only.

    Raises:
        ConfigError: a group is to be trained with a rounding that this device does not have.
    """
    model, groups = built
    for name, group in groups.items() if size is not None else ():
        if group.stochastic_rounding and cluster.device == "cpu":
            raise ConfigError(
                f"groups.{name}.stochastic_rounding = true needs a GPU: on a CPU, FBGEMM's kernels round to "
                "nearest; leave it out, or set it to false for the same rounding on both"
            )
    cluster = replace(cluster, bandwidths=config.plan.bandwidths(cluster.bandwidths))
    place = config.model.lookup, cluster.device
    step_lookups = {} if size is None else lookups(config, groups, manifest, size, *place)
    comms = Comms(config.comms.forward, config.comms.backward)
    rules, more = config.plan.rules(), more_dense(config, groups.values()).held
    return PlanRequest(model, tuple(groups.values()), cluster, rules, step_lookups, comms, voice.say, more)


def run_of(config: Config, manifest: LogManifest, request: PlanRequest, size: StepSize) -> Run:
    """What a run's needs follow from."""
    tables = tables_of(request.model)
    groups = {group.name: group for group in request.groups}
    columns = 2 + len(manifest.features) + len(manifest.numeric)
    dense = dense_bytes(request.model, tables)
    layers = [p for name, p in request.model.named_parameters() if not name.startswith("collections.")]
    outputs = sum(layer.shape[0] for layer in layers if layer.dim() == 2)
    return Run(config, groups, tables, dense, size, request.lookups, columns, outputs)


def cluster_of(ranks: Ranks) -> Cluster:
    """The ranks as they run: the device's own memory, and an equal part of what this node lets them have."""
    local = ranks.local_world_size
    host = memory_bytes() // local
    if ranks.device.type == "cpu":
        return Cluster("cpu", ranks.world_size, local, 0, host)
    gpu = torch.cuda.get_device_properties(ranks.device)
    # Some releases of torch leave these two out.
    memory = (getattr(gpu, "memory_bus_width", 0), getattr(gpu, "memory_clock_rate", 0))
    hbm = torch.cuda.mem_get_info(ranks.device)[1]
    return Cluster(ranks.device.type, ranks.world_size, local, hbm, host, of_device(gpu.name, *memory))
