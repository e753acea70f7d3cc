"""A sharding plan for people: tables, memory of ranks, bytes of a step, what is lopsided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torchrec.distributed.planner.types import ShardingOption

from embeddings.groups import TableName
from embeddings.plan.bandwidths import TORCHREC
from embeddings.plan.constraints import rounding_of
from embeddings.plan.memory import RankMemory, TableNeed, gigabytes, memory_of_ranks
from embeddings.plan.planner import PlanEstimate
from embeddings.plan.request import Cluster, PlanRequest
from embeddings.plan.traffic import Lookup, Traffic, sending_ids, traffic
from embeddings.private import critical_path
from pipelines.console import table_lines
from pipelines.plan.more_even import imbalance, more_even
from trainer.step_size import StepSize

# Row-wise bags that send so many times what a sequence collection would are worth a warning.
_WASTE = 4.0


@dataclass(frozen=True)
class Report:
    """What is printed.

    Attributes:
        estimate: the plan; request: what it answers; size: of a step.
        lookups: lookup mode -> table -> what a step asks of it; lookup: the config's mode.
        mapped: the folder of a disk where tables lie in files; empty = in memory.
    """

    estimate: PlanEstimate
    request: PlanRequest
    size: StepSize
    lookups: Mapping[str, Mapping[str, Lookup]]
    lookup: str
    mapped: str = ""

    @property
    def cluster(self) -> Cluster:
        return self.request.cluster

    @property
    def options(self) -> list[ShardingOption]:
        """In the order of the groups and their tables."""
        names = [group.table_name(table) for group in self.request.groups for table in group.all_tables]
        return sorted(self.estimate.options, key=lambda option: names.index(option.name))

    def sent(self, option: ShardingOption, lookup: str, pooled: bool) -> Traffic:
        """Bytes that a table's lookups send in one step."""
        table, kind = self.estimate.tables[option.name], option.sharding_type
        ranks = self.cluster.world_size, self.cluster.local_world_size
        # Into how many blocks of columns the table is cut, and each of these into how many of rows.
        rows = {"column_wise": 1, "table_column_wise": 1, "grid_shard": ranks[1]}
        shards = len(option.shards) // rows[kind] if kind in rows else 1
        lookups, wire = self.lookups[lookup][option.name], self.request.comms.wire
        sends = self.sends_ids[option.name]
        # No feature is looked up twice in sequences, so several sets are bags.
        pooled = pooled or self.of_sets(option)
        return traffic((table.rows, table.dim), kind, shards, lookups, *ranks, pooled, wire, sends)

    @cached_property
    def sends_ids(self) -> dict[str, bool]:
        """Whether ids are sent for a table, and not for another one of its feature."""
        placed = [
            (each.name, each.sharding_type, [shard.rank for shard in each.shards])
            for each in self.estimate.options
        ]
        return sending_ids(placed, self.request.groups, self.cluster.device)

    def of_sets(self, option: ShardingOption) -> bool:
        """Whether a table is one of several sets or lanes."""
        name = TableName.of(option.name)
        lanes = {group.name for group in self.request.groups if group.lanes}
        return name is not None and bool(name.set or name.group in lanes)


def report_lines(report: Report) -> list[str]:
    """The whole print."""
    parts = [_head(report), _tables(report), _memory(report), _exchange(report), _by_table(report)]
    lines = [line for part in parts for line in (*part, "")]
    return [*lines, *_time(report), *waste_lines(report), *more_even(report.estimate, report.request)]


def waste_lines(report: Report) -> list[str]:
    """A warning for each table that is row-wise through bags on many ranks, with the numbers."""
    lines = []
    for option in report.options:
        table = report.estimate.tables[option.name]
        bag, sequence = (report.sent(option, report.lookup, pooled).total for pooled in (True, False))
        if report.of_sets(option):
            continue
        if table.pooled and option.sharding_type == "row_wise" and bag > _WASTE * sequence:
            lines += [
                f"warning: {option.name} ({table.rows:,} rows) is row-wise through bags on "
                f"{report.cluster.world_size} ranks: {gigabytes(bag)} a step,",
                f"  {bag / sequence:.1f} times the {gigabytes(sequence)} that a sequence collection sends",
            ]
    return lines


def need_lines(parts: Sequence[TableNeed], cluster: Cluster, mapped: str = "") -> list[str]:
    """What each table needs where no plan was found; `mapped` as in `Report`."""
    head = ("table", "all ranks", "best sharding", "its largest shard", "too much")
    rows = [
        (
            p.table,
            gigabytes(p.total),
            p.sharding,
            gigabytes(p.shard),
            gigabytes(p.missing) if p.missing else "-",
        )
        for p in parts
    ]
    room = gigabytes(cluster.memory)
    ranks = f"ranks of {room}" if not mapped else f"ranks with {room} each of {_disk(mapped)}"
    return [f"no plan fits {ranks}", *table_lines(head, rows)]


def _disk(mapped: str) -> str:
    return f"the disk of mapped files (plan.mapped_folder = {mapped})"


def _head(report: Report) -> list[str]:
    cluster, size = report.cluster, report.size
    reserve = report.request.rules.reserve
    room = f"{gigabytes(cluster.memory)} {'device' if cluster.device == 'cuda' else 'host'}"
    what = f"memory of a rank: {room}"
    if report.mapped:
        what = f"room of a rank: {gigabytes(cluster.memory)}, what is free now of {_disk(report.mapped)}"
    nodes = cluster.world_size // cluster.local_world_size
    host = []
    if cluster.device == "cuda" and report.request.rules.allow_unified_memory:
        host = [f"host memory of a rank: {gigabytes(cluster.ddr)}, for tables behind the device's"]
    return [
        f"plan for {cluster.world_size} rank(s) on {cluster.device}, {nodes} node(s) of "
        f"{cluster.local_world_size}",
        f"{what}, {gigabytes(report.estimate.usable)} of it for tables ({reserve:.0%} and the dense weights "
        "stay free)",
        *host,
        f"a step: {size.candidates:,} candidates of {size.requests:,} requests, {size.behaviors:,} behaviors "
        f"({size.source}); lookup = {report.lookup}",
    ]


def _tables(report: Report) -> list[str]:
    rows = []
    for option in report.options:
        table = report.estimate.tables[option.name]
        heights = sorted({shard.size[0] for shard in option.shards})
        height = f"{heights[-1]:,}" if len(heights) == 1 else f"{heights[0]:,}-{heights[-1]:,}"
        ranks = sorted({shard.rank for shard in option.shards})
        rows.append(
            (option.name, f"{table.rows:,}", str(table.dim), gigabytes(table.weights(table.rows, table.dim)),
             option.sharding_type, option.compute_kernel, height, spans(ranks))
        )  # fmt: skip
    head = ("table", "rows", "dim", "weights", "sharding", "kernel", "rows a rank", "ranks")
    lines = table_lines(head, sets_together(rows))
    for group in report.request.groups:
        if group.dtype == "fp16":
            how = "stochastically" if rounding_of(group, report.cluster.device) else "to nearest"
            lines.append(f"rows of {group.name} are fp16, rounded {how}")
    return lines


def _memory(report: Report) -> list[str]:
    cluster = report.cluster
    held = memory_of_ranks(report.options, report.estimate.tables, cluster.world_size, cluster.device)
    # Ranks that read alike share a line.
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, memory in enumerate(held):
        sizes = (memory.weights, memory.optimizer, memory.buffers, memory.total, memory.host)
        cells = (*(gigabytes(size) for size in sizes), f"{memory.total / cluster.memory:.0%}")
        alike.setdefault(cells, []).append(rank)
    what = "device memory" if cluster.device == "cuda" else "mapped files" if report.mapped else "memory"
    head = ("ranks", "weights", "optimizer", "buffers", f"in {what}", "in host memory", "share")
    total = sum(held, RankMemory())
    work = [0.0] * cluster.world_size
    for option in report.options:
        for shard in option.shards:
            work[shard.rank] += shard.perf.total
    behind = (
        f"in host memory: weights {gigabytes(total.host_weights)}, optimizer state "
        f"{gigabytes(total.host_optimizer)}; their caches are among the buffers"
    )
    return [
        *table_lines(head, [(spans(ranks), *cells) for cells, ranks in alike.items()]),
        f"all ranks: weights {gigabytes(total.weights)}, optimizer state {gigabytes(total.optimizer)}",
        *([behind] if total.host else []),
        f"largest rank over mean: memory {imbalance([memory.total + memory.host for memory in held]):.2f}, "
        f"estimated work {imbalance(work):.2f}",
        _chosen(report),
    ]


def _chosen(report: Report) -> str:
    """How the plan compares with the fastest."""
    taken, fastest = report.estimate.taken, report.estimate.fastest
    within = f"{report.request.rules.even_within:.0%}"
    if taken is fastest:
        return (
            f"the planner's fastest plan ({fastest.time:.2f} ms for the rank with most to do); none within "
            f"{within} is more even"
        )
    return (
        f"the most even plan within {within} of the fastest: {taken.time:.2f} ms and {taken.fullest:.0%} of "
        f"the room for tables, not {fastest.time:.2f} ms and {fastest.fullest:.0%}"
    )


def _exchange(report: Report) -> list[str]:
    rows = []
    for lookup in ("full", "selected"):
        for pooled, name in ((True, "bag"), (False, "sequence")):
            sent = sum((report.sent(option, lookup, pooled) for option in report.options), Traffic())
            sizes = (
                sent.ids,
                sent.forward,
                sent.backward,
                sent.total,
                sent.total / report.cluster.world_size,
            )
            rows.append((f"{lookup}, {name}", *map(gigabytes, sizes)))
    head = ("lookup, collection", "ids", "vectors", "gradients", "all ranks", "a rank")
    comms = report.request.comms
    return [
        "sent between ranks in a step (estimated), by lookup and kind of collection",
        f"vectors travel in {comms.forward}, gradients in {comms.backward}",
        *table_lines(head, rows),
    ]


def _by_table(report: Report) -> list[str]:
    rows = []
    for option in report.options:
        bag, sequence = (report.sent(option, report.lookup, pooled).total for pooled in (True, False))
        now = "bag" if report.estimate.tables[option.name].pooled else "sequence"
        possible = sequence > 0 and not report.of_sets(option)
        other = (gigabytes(sequence), f"{bag / sequence:.2f}") if possible else ("-", "-")
        bags = f"{report.lookups[report.lookup][option.name].bags:,}"
        rows.append((option.name, now, bags, gigabytes(bag), *other))
    head = ("table", "collection", "bags", "sent as bag", "as sequence", "bag / sequence")
    lines = [f"the same by table, lookup = {report.lookup}", *table_lines(head, sets_together(rows))]
    if not all(report.sends_ids.values()):
        lines.append("ids of a feature reach a rank once for all sets, and count for the first of its tables")
    return lines


def sets_together(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One line for the tables of a feature that differ in nothing but their set; rows begin with a name.

    The same for lanes that differ in nothing but their task.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        parts = TableName.of(name)
        if parts is None or not (parts.set or parts.lane):
            alike[(name, "", *cells)] = []
        elif parts.lane:
            alike.setdefault((str(parts.main), "/", *cells), []).append(parts.lane)
        else:
            alike.setdefault((f"{parts.group}/", f"/{parts.feature}", *cells), []).append(parts.set)
    lines = []
    for (before, after, *cells), names in alike.items():
        each = f"{{{','.join(names)}}}" if len(names) > 1 else "".join(names)
        lines.append((f"{before}{after}{each}" if after == "/" else f"{before}{each}{after}", *cells))
    return lines


def _time(report: Report) -> list[str]:
    path, cluster = critical_path(report.options), report.cluster
    unsaid = [name for name, number in cluster.bandwidths.items().items() if number is None]
    advice = []
    if cluster.device == "cuda" and unsaid not in ([], ["inter"]):
        advice = ["set plan.gpu and plan.inter_gb_per_s for yours"]
    elif cluster.device == "cuda" and unsaid and cluster.world_size > cluster.local_world_size:
        advice = ["set plan.inter_gb_per_s for yours"]
    return [
        f"TorchRec's estimate of the lookups' time in a step: {path.total():.2f} ms (communication "
        f"{path.comms_estimate:.2f}, computation {path.comp_estimate:.2f});",
        f"it assumes {_assumed(cluster)}",
        "; ".join(["and was not checked against any machine", *advice]),
    ]


def _assumed(cluster: Cluster) -> str:
    """The bandwidths that the planner counted with, each marked where nobody gave it."""
    if cluster.device == "cpu":
        return "TorchRec's default bandwidths"
    given, defaults = cluster.bandwidths.items(), TORCHREC.items()
    numbers = {
        name: f"{number or defaults[name]:,.0f}{'' if number else '*'}" for name, number in given.items()
    }
    marked = " (* TorchRec's)" if None in given.values() else ""
    return (
        f"{numbers['hbm']} GB/s of device memory, {numbers['host']} to host memory, {numbers['intra']} "
        f"in a node, {numbers['inter']} between nodes{marked}"
    )


def spans(ranks: Sequence[int]) -> str:
    """`0-7,9` for ascending ranks."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
