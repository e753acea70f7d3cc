"""What plans for GPUs know of their kernels and of their speed: widths, rounding, caches, bandwidths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.planner.constants import HBM_MEM_BW, INTRA_NODE_BANDWIDTH
from torchrec.distributed.types import CacheParams, ParameterSharding

from embeddings.errors import ConfigError
from embeddings.first_rows import FirstWeights
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.jagged import one_id_bags
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.optimizers import FusedOptimizer
from embeddings.plan.bandwidths import KNOWN, TORCHREC, Bandwidths, of_device
from embeddings.plan.constraints import WIDEST_ON_CUDA, constraints_of
from embeddings.plan.file import to_tree
from embeddings.plan.planner import make_plan, offline_plan, read_plan, saved_plan
from embeddings.plan.request import Cluster, PlanRequest, PlanRules, TableRule
from embeddings.plan.traffic import Lookup
from launch.cli import main
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import small_log
from tests.helpers.tables import whole_tensor
from trainer.assemble import check_same_rules, cluster_of, plan_request
from trainer.checkpoint.compatible import check_resumable, log_fingerprint
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import load_config
from trainer.step_size import step_size

GB = 10**9
_MISSING = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_a_gpu(test: Any) -> Any:
    return pytest.mark.gpu(_MISSING(test))


CONFIG = "configs/dare.toml"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("gpu") / "log", seed=1, users=40)


def task_of(
    group: TableGroup, device: str = "cuda", world: int = 4, hbm: int = 80 * GB, **given: Any
) -> PlanRequest:
    model = nn.Module()
    model.g = make_collection(group, torch.device("meta"))
    attach_optimizer(model.g, group.optimizer)
    asked = {group.table_name(table): Lookup(100_000, 100_000) for table in group.tables}
    cluster = Cluster(device, world, min(world, 8), hbm, 500 * GB)
    return PlanRequest(model, (group,), cluster, lookups=asked, **given)


def group_of(dim: int = 64, rows: int = 1000, **given: Any) -> TableGroup:
    return TableGroup("g", (TableSpec("item", rows, dim),), FusedOptimizer("adagrad"), **given)


def placed(task: PlanRequest) -> ParameterSharding:
    return offline_plan(task).plan.plan["g"]["g__item"]


# Widths.


def test_a_config_for_gpus_is_planned_for_gpus(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", CONFIG, *overrides({**SETTINGS, "data.log": str(log)}), "--world-size", "2"]
    words += ["--set", "train.device=cuda"]
    assert main(words) == 2
    assert 'train.device = "cuda" (without --device cpu) needs --hbm' in capsys.readouterr().err
    assert main([*words, "--device", "cpu"]) == 0
    assert main([*words, "--hbm", "80GB"]) == 0


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_rows_too_wide_for_a_gpu_are_refused_there_alone(kind: str) -> None:
    wide = group_of(2 * WIDEST_ON_CUDA, kind=kind)
    assert placed(task_of(wide, "cpu")).sharding_type == "table_wise"
    assert placed(task_of(group_of(WIDEST_ON_CUDA, kind=kind))).sharding_type
    with pytest.raises(ConfigError) as caught:
        offline_plan(task_of(wide))
    message = str(caught.value)
    assert "groups.g: feature item has dim = 4096" in message and "at most 2048" in message
    assert 'plan.tables.g__item.sharding = ["column_wise"]' in message and "\n" not in message


@pytest.mark.parametrize(
    ("dim", "world", "shards"),
    [(4096, 1, 2), (4096, 2, 2), (4096, 3, 2), (4096, 16, 16), (2052, 1, 3), (2052, 8, 3), (1024, 1, 1)],
)
@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_its_remedy_cuts_them_into_shards_that_are_narrow_enough(
    kind: str, dim: int, world: int, shards: int
) -> None:
    """On one rank too, where a shard a rank would be too wide; TorchRec makes shards of one width."""
    rules = PlanRules(tables={"g__item": TableRule(("column_wise",))})
    task = task_of(group_of(dim, kind=kind), world=world, rules=rules)
    sharding = placed(task)
    widths = [found.shard_sizes[1] for found in sharding.sharding_spec.shards]
    assert sum(widths) == dim and max(widths) <= WIDEST_ON_CUDA
    assert len(widths) == shards and not any(width % 4 for width in widths)


def test_of_the_ways_a_table_may_lie_those_that_keep_it_whole_fall_away() -> None:
    wide = group_of(2 * WIDEST_ON_CUDA, sharding=("row_wise", "column_wise"))
    assert constraints_of(task_of(wide))["g__item"].sharding_types == ["column_wise"]
    assert constraints_of(task_of(wide, "cpu"))["g__item"].sharding_types == ["row_wise", "column_wise"]


def test_a_plan_file_with_wide_shards_is_refused_on_a_gpu(tmp_path: Path) -> None:
    rules = PlanRules(tables={"g__item": TableRule(("column_wise",))})
    task, file = task_of(group_of(2 * WIDEST_ON_CUDA), world=2, rules=rules), tmp_path / "plan.json"
    tree = to_tree(saved_plan(task, offline_plan(task).plan))
    file.write_text(json.dumps(tree))
    read_plan(file, task)
    table = tree["modules"]["g"]["g__item"]
    table.update(sharding_type="table_wise", ranks=[0])
    table["shards"] = [{"offsets": [0, 0], "sizes": [1000, 4096], "placement": "rank:0/cuda:0"}]
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"plan.json: groups.g: feature item has dim = 4096.*plan again"):
        read_plan(file, task)


def test_the_verb_says_it_before_a_gpu_is_booked(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", CONFIG, *overrides({**SETTINGS, "data.log": str(log)})]
    words += ["--world-size", "2", "--set", "groups.attention.dim={item_id = 4096, category_id = 8}"]
    assert main(["plan", *words, "--ddr", "64GB"]) == 0
    assert main(["plan", *words, "--hbm", "80GB"]) == 2
    error = capsys.readouterr().err
    assert "feature item_id has dim = 4096" in error and "plan.tables.attention__item_id" in error


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_column_shards_on_one_rank_are_the_whole_table(ranks: Ranks, kind: str) -> None:
    """As a GPU gets them for a wide table; lookups and updates, against the table in one piece."""
    ids = one_id_bags(["item"], torch.tensor([[3, 7, 3, 9]]))
    found = []
    for width in (16, 4):
        group = replace(group_of(16, 10, kind=kind), first=FirstWeights(scale=1.0))
        task = replace(task_of(group, "cpu", 1), cluster=cluster_of(ranks))
        plan = make_plan(task).plan
        if width < 16:
            sharding = plan.plan["g"]["g__item"]
            (whole,) = sharding.sharding_spec.shards
            sharding.sharding_type, sharding.ranks = "column_wise", [0] * 4
            sharding.sharding_spec.shards = [
                replace(whole, shard_offsets=[0, at], shard_sizes=[10, width]) for at in range(0, 16, width)
            ]
        model = shard(task.model, {"g": group}, plan, ranks.device, seed=3)
        for _ in range(2):
            vectors = model.module.g(ids).values()
            vectors.square().sum().backward()
        (rows,) = (whole_tensor(weight) for name, weight in model.state_dict().items())
        found.append((vectors.detach(), rows))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def kernel_of(dim: int, **given: Any) -> SplitTableBatchedEmbeddingBagsCodegen:
    """A table of eight rows of ones on a GPU."""
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(8, dim, *place)], optimizer=OptimType.EXACT_SGD, learning_rate=2.0**-14, **given
    )
    (weights,) = kernel.split_embedding_weights()
    weights.fill_(1.0)
    return kernel


@on_a_gpu
def test_kernels_of_a_gpu_bear_that_width_and_no_other() -> None:
    for dim in (WIDEST_ON_CUDA, WIDEST_ON_CUDA + 4):
        kernel = kernel_of(dim)
        ids, offsets = torch.arange(8, device="cuda"), torch.arange(9, device="cuda")
        with nullcontext() if dim == WIDEST_ON_CUDA else pytest.raises(RuntimeError, match="2048"):
            kernel(ids, offsets).sum().backward()


# Rounding.


@pytest.mark.parametrize(
    ("given", "dtype", "device", "told"),
    [
        (None, "fp16", "cuda", True),
        (True, "fp16", "cuda", True),
        (False, "fp16", "cuda", False),
        (None, "fp16", "cpu", None),
        (False, "fp16", "cpu", None),
        (None, "fp32", "cuda", None),
    ],
)
def test_fp16_rows_of_gpus_are_rounded_as_their_group_says(
    given: bool | None, dtype: str, device: str, told: bool | None
) -> None:
    group = group_of(dtype=dtype, stochastic_rounding=given)
    assert placed(task_of(group, device)).stochastic_rounding is told


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_kernels_are_made_as_the_plan_says(ranks: Ranks, kind: str) -> None:
    """Two tables that differ get kernels of their own; the options reach them."""
    tables = tuple(TableSpec(name, 9, 8) for name in ("a", "b"))
    group = TableGroup("g", tables, FusedOptimizer(), kind=kind, dtype="fp16")
    task = replace(task_of(group, "cpu", 1), cluster=cluster_of(ranks))
    plan = make_plan(task).plan
    table = plan.plan["g"]["g__a"]
    table.stochastic_rounding = False
    table.cache_params = CacheParams(algorithm=CacheAlgorithm.LFU)
    model = shard(task.model, {"g": group}, plan, ranks.device, seed=3)
    inside = [module for lookup in model.module.g._lookups for module in lookup.modules()]
    kernels = [m for m in inside if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
    found = {(kernel.stochastic_rounding, kernel.cache_algorithm) for kernel in kernels}
    assert found == {(False, CacheAlgorithm.LFU), (True, CacheAlgorithm.LRU)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stochastic_rounding=true"], "stochastic_rounding is for dtype"),
        (["stochastic_rounding=false"], "stochastic_rounding is for dtype"),
        (
            ["stochastic_rounding=true", "dtype=fp16", 'sharding=["data_parallel"]'],
            '"data_parallel" tables do not have',
        ),
    ],
)
def test_rounding_that_has_no_effect_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Path(CONFIG), [f"groups.attention.{word}" for word in words])


def test_rounding_that_a_cpu_does_not_have_is_refused_where_it_trains(log: Path) -> None:
    words = [f"data.log={log}", "groups.attention.dtype=fp16", "groups.attention.stochastic_rounding=true"]
    config, manifest = load_config(Path(CONFIG), words), read_manifest(log)
    group = replace(group_of(dtype="fp16", stochastic_rounding=True), name="attention")
    built, size = (nn.Module(), {"attention": group}), step_size(config.data, manifest)
    cpu, cuda = (Cluster(device, 1, 1, GB, GB) for device in ("cpu", "cuda"))
    # Scoring rounds nothing.
    plan_request(config, manifest, built, cpu)
    with pytest.raises(ConfigError, match=r"groups.attention.stochastic_rounding = true needs a GPU"):
        plan_request(config, manifest, built, cpu, size)
    empty = (built[0], {})
    assert plan_request(config, manifest, empty, cuda, size).cluster.device == "cuda"


@pytest.mark.parametrize(
    ("rule", "given"), [("max_gradient", {"max_gradient": 1.0}), ("stochastic_rounding", {})]
)
def test_what_fused_kernels_do_is_no_matter_for_data_parallel_tables(
    rule: str, given: dict[str, float]
) -> None:
    group = group_of(dtype="fp16", stochastic_rounding=rule == "stochastic_rounding" or None)
    group = replace(group, optimizer=FusedOptimizer("adagrad", **given))
    rules = PlanRules(tables={"g__item": TableRule(("data_parallel",))})
    with pytest.raises(ConfigError, match=rf"plan.tables.g__item.sharding: data_parallel.*groups.g.{rule}"):
        offline_plan(task_of(group, rules=rules))


def test_a_plan_file_that_rounds_otherwise_is_refused(tmp_path: Path) -> None:
    random, nearest = (task_of(group_of(dtype="fp16", stochastic_rounding=given)) for given in (None, False))
    file = tmp_path / "plan.json"
    tree = to_tree(saved_plan(random, offline_plan(random).plan))
    file.write_text(json.dumps(tree))
    read_plan(file, random)
    with pytest.raises(ConfigError, match=r"is rounded stochastically there, to nearest by groups\.g\.stoch"):
        read_plan(file, nearest)
    # Plans of earlier versions do not say: their kernels rounded at random.
    tree["modules"]["g"]["g__item"]["stochastic_rounding"] = None
    file.write_text(json.dumps(tree))
    assert read_plan(file, random).plan.plan["g"]["g__item"].stochastic_rounding is None


@on_a_gpu
def test_random_rounding_keeps_small_updates_on_average_and_is_seeded() -> None:
    """An update of an eighth of the distance between fp16 numbers below 1."""

    def after(random: bool, seed: int) -> torch.Tensor:
        kernel = kernel_of(512, weights_precision=SparseType.FP16, stochastic_rounding=random)
        torch.manual_seed(seed)
        ids, offsets = torch.arange(8, device="cuda"), torch.arange(9, device="cuda")
        kernel(ids, offsets).float().sum().backward()
        (weights,) = kernel.split_embedding_weights()
        return weights.float().cpu()

    assert torch.equal(after(False, 1), torch.ones(8, 512))
    once, again, other = after(True, 1), after(True, 1), after(True, 2)
    assert torch.equal(once, again) and not torch.equal(once, other)
    # Of 4,096 numbers an eighth is a step lower, with a standard deviation of 21.
    lower = (once < 1).sum()
    assert set(once.unique().tolist()) == {1.0, 1.0 - 2.0**-11} and abs(int(lower) - 512) < 130


def test_a_run_may_go_on_with_another_rounding_and_plans_anew(log: Path) -> None:
    words = [f"data.log={log}", "groups.attention.dtype=fp16"]
    before = load_config(Path(CONFIG), words)
    after = load_config(Path(CONFIG), [*words, "groups.attention.stochastic_rounding=false"])
    state = {"config": before.model_dump(mode="json"), "log": log_fingerprint(read_manifest(log)),
             "cursor": {"blocks": 1}}  # fmt: skip
    # As a checkpoint of an earlier version: no such key, and nothing to plan anew.
    del state["config"]["groups"]["attention"]["stochastic_rounding"]
    check_resumable(state, before, state["log"])
    check_same_rules(state["config"], before, "here")
    check_resumable(state, after, state["log"])
    with pytest.raises(ConfigError, match=r"here: made with groups.attention.stochastic_rounding = None"):
        check_same_rules(state["config"], after, "here")


# Caches.


def test_caches_of_tables_in_host_memory_are_as_told_and_weigh_as_much() -> None:
    kernels = ("fused_uvm_caching",)
    found = {}
    for share in (None, 0.1, 0.5):
        rule = TableRule(("row_wise",), kernels, share, "lfu" if share else None)
        rules = PlanRules(True, tables={"g__item": rule})
        group = replace(group_of(64, 10**8), optimizer=FusedOptimizer("sgd"))
        result = offline_plan(task_of(group, rules=rules))
        sharding = result.plan.plan["g"]["g__item"]
        cache = sharding.cache_params
        assert cache == (CacheParams(CacheAlgorithm.LFU, share) if share else None)
        assert sharding.compute_kernel == "fused_uvm_caching"
        found[share] = sum(part.storage.hbm for option in result.options for part in option.shards)
    # 25.6 GB of rows, of which the planner counts so much on the device, and what its cache notes of each.
    assert found[0.5] - found[0.1] == pytest.approx(0.4 * (25.6 + 16 * 0.1) * GB)
    assert found[0.1] < found[None] < found[0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache_load_factor=0.1"], "is for tables in host memory: set plan.allow_unified_memory"),
        (
            ["cache_algorithm=lfu", 'kernels=["fused"]'],
            'cache_algorithm is for kernel "fused_uvm_caching", which kernels does not name',
        ),
        (["cache_load_factor=1.5"], "less than or equal to 1"),
    ],
)
def test_a_cache_without_a_cached_table_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Path(CONFIG), [f"plan.tables.attention__item_id.{word}" for word in words])


def test_rules_reach_the_planner() -> None:
    words = [f"plan.tables.x.{word}" for word in ("cache_load_factor=0.1", "cache_algorithm=lfu")]
    rules = load_config(Path(CONFIG), ["plan.allow_unified_memory=true", *words]).plan.rules()
    assert rules.tables["x"] == TableRule((), (), 0.1, "lfu")


# Bandwidths.


@pytest.mark.parametrize(
    ("name", "bus_bits", "clock_khz", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 5120, 2_619_000, Bandwidths(3352.32, 64, 450)),
        ("NVIDIA H200", 6144, 3_201_000, Bandwidths(4916.736, 64, 450)),
        ("NVIDIA A100-SXM4-40GB", 5120, 1_215_000, Bandwidths(1555.2, 32, 300)),
        ("NVIDIA A100 80GB PCIe", 5120, 1_512_000, Bandwidths(1935.36, 32, 32)),
        ("NVIDIA H100 NVL", 0, 0, Bandwidths(3350, 64, 64)),
        ("NVIDIA B200", 0, 0, KNOWN["B200"]),
        ("NVIDIA GeForce RTX 4090", 384, 10_501_000, Bandwidths(1008.096)),
        ("Some Other", 0, 0, Bandwidths()),
    ],
)
def test_a_gpu_is_asked_for_its_bandwidths(
    name: str, bus_bits: int, clock_khz: int, expected: Bandwidths
) -> None:
    assert of_device(name, bus_bits, clock_khz) == expected


def test_running_ranks_ask_their_gpu_and_the_config_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 2))
    cluster = cluster_of(Ranks(0, 8, 4, torch.device("cuda", 0)))
    assert cluster.hbm == 2 and cluster.bandwidths == KNOWN["H100"]
    gpu.memory_bus_width, gpu.memory_clock_rate = 5120, 1_000_000
    assert cluster_of(Ranks(0, 8, 4, torch.device("cuda", 0))).bandwidths.hbm == 1280
    plan = load_config(Path(CONFIG), ["plan.gpu=H200", "plan.inter_gb_per_s=50"]).plan
    assert plan.bandwidths(cluster.bandwidths) == replace(KNOWN["H200"], inter=50)
    plan = load_config(Path(CONFIG), ["plan.hbm_gb_per_s=1"]).plan
    assert plan.bandwidths(cluster.bandwidths) == replace(KNOWN["H100"], hbm=1)


@on_a_gpu
def test_a_real_gpu_answers() -> None:
    gpu = torch.cuda.get_device_properties(0)
    found = of_device(gpu.name, gpu.memory_bus_width, gpu.memory_clock_rate)
    assert found.hbm is not None and 100 < found.hbm < 20_000


def test_the_planner_counts_with_them_on_gpus_alone() -> None:
    def times(device: str, bandwidths: Bandwidths) -> tuple[float, float]:
        task = task_of(group_of(sharding=("row_wise",)), device)
        found = offline_plan(replace(task, cluster=replace(task.cluster, bandwidths=bandwidths)))
        perfs = [part.perf for option in found.options for part in option.shards]
        return sum(perf.fwd_comms for perf in perfs), sum(perf.fwd_compute for perf in perfs)

    comms, compute = times("cuda", Bandwidths())
    assert comms > 0 < compute and times("cuda", TORCHREC) == pytest.approx((comms, compute))
    twice = replace(TORCHREC, intra=2 * INTRA_NODE_BANDWIDTH / 1e6, hbm=2 * HBM_MEM_BW / 1e6)
    assert times("cuda", twice) == pytest.approx((comms / 2, compute / 2))
    assert times("cpu", twice) == times("cpu", Bandwidths())


def test_the_print_says_which_they_were(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", CONFIG, *overrides({**SETTINGS, "data.log": str(log)})]
    words += ["--world-size", "2", "--hbm", "80GB"]

    def said(*more: str) -> str:
        assert main(["plan", *words, *more]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("it assumes "))

    assert said() == (
        "it assumes 963* GB/s of device memory, 34* to host memory, 644* in a node, 13* between nodes "
        "(* TorchRec's)"
    )
    given = ["--set", "plan.gpu=H100", "--set", "plan.inter_gb_per_s=50"]
    assert said(*given) == (
        "it assumes 3,350 GB/s of device memory, 64 to host memory, 450 in a node, 50 between nodes"
    )
    assert said("--device", "cpu") == "it assumes TorchRec's default bandwidths"
