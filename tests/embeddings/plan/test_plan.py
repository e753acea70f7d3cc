"""Offline plans: sizes, refusals, what would make them fit, and the file that training reuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    CacheAlgorithm,
    MultiPassPrefetchConfig,
)
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import DataType

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.rounding import Comms
from embeddings.lookup.sharding import attach_optimizer
from embeddings.optimizers import FusedOptimizer
from embeddings.plan.file import SavedPlan, from_tree, to_tree
from embeddings.plan.memory import memory_of_ranks
from embeddings.plan.planner import DoesNotFit, offline_plan, read_plan, saved_plan
from embeddings.plan.request import Cluster, PlanRequest, PlanRules, TableRule
from embeddings.plan.traffic import Lookup
from launch.cli import main
from pipelines.plan.plan import parse_size
from pipelines.plan.report import spans
from tests.helpers.launching import SETTINGS, losses, overrides, tandemrec
from tests.helpers.logs import small_log
from trainer.assemble import build_trainable
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.run_config import load_config
from trainer.step_size import StepSize, kept_behaviors, lookups, step_size

GB = 10**9
ITEMS, SMALL = 2_000_000_000, 1000
STRICT = PlanRules()


def task(
    hbm: int = 141 * GB,
    sharding: str = "row_wise",
    rules: PlanRules = STRICT,
    optimizer: str = "rowwise_adagrad",
    world: int = 16,
    device: str = "cuda",
    dim: int = 64,
    rows: int = ITEMS,
) -> PlanRequest:
    """One group of an item table of two billion rows and a small one, on nodes of eight."""
    kinds = FusedOptimizer(optimizer)
    group = TableGroup(
        "g", (TableSpec("item", rows, dim), TableSpec("small", SMALL, 16)), kinds, sharding=(sharding,)
    )
    model = nn.Module()
    model.g = make_collection(group, torch.device("meta"))
    attach_optimizer(model.g, kinds)
    lookups = {name: Lookup(100_000, 100_000) for name in ("g__item", "g__small")}
    return PlanRequest(model, (group,), Cluster(device, world, min(world, 8), hbm, 500 * GB), rules, lookups)


@pytest.mark.parametrize(
    ("sharding", "optimizer", "state"),
    [
        ("row_wise", "rowwise_adagrad", 4 * (ITEMS + SMALL)),
        ("row_wise", "adagrad", 4 * (64 * ITEMS + 16 * SMALL)),
        ("row_wise", "sgd", 0),
        ("table_row_wise", "rowwise_adagrad", 4 * (ITEMS + SMALL)),
    ],
)
def test_memory_adds_up_to_the_tables_and_to_what_torchrec_counts(
    sharding: str, optimizer: str, state: int
) -> None:
    found = offline_plan(task(700 * GB, sharding, optimizer=optimizer))
    held = memory_of_ranks(found.options, found.tables, 16, "cuda")
    assert sum(memory.weights for memory in held) == 4 * (64 * ITEMS + 16 * SMALL)
    assert sum(memory.optimizer for memory in held) == state
    counted = [0] * 16
    for option in found.options:
        for shard in option.shards:
            counted[shard.rank] += shard.storage.hbm
    assert [memory.total for memory in held] == counted
    assert all(memory.buffers >= 0 and memory.host == 0 for memory in held)


def test_column_shards_each_keep_their_own_row_state() -> None:
    rules = PlanRules(tables={"g__item": TableRule(("column_wise",))})
    found = offline_plan(task(rules=rules, dim=512, rows=1_000_000))
    item = next(option for option in found.options if option.name == "g__item")
    assert len(item.shards) > 1
    held = memory_of_ranks([item], found.tables, 16, "cuda")
    assert sum(memory.optimizer for memory in held) == 4 * 1_000_000 * len(item.shards)
    # What the planner packs by besides: an int64 id and a row's part for each of 100,000 bags.
    buffers = [100_000 * 8 + 100_000 * shard.size[1] * 4 for shard in item.shards]
    assert sum(memory.buffers for memory in held) == sum(buffers)


@pytest.mark.parametrize(
    "sharding", ["table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard"]
)
def test_a_plan_survives_json(sharding: str) -> None:
    asked = task(4000 * GB, sharding, dim=256)
    plan = offline_plan(asked).plan
    saved = saved_plan(asked, plan)
    back = from_tree(json.loads(json.dumps(to_tree(saved))), "here")
    assert back == saved and back.plan == plan
    assert {p.sharding_type for m in back.plan.plan.values() for p in m.values()} == {sharding}


def test_data_parallel_and_caches_survive_json_and_the_rest_is_refused() -> None:
    cache = CacheParams(
        CacheAlgorithm.LFU, UVM_CACHING_RATIO, 0.5, DataType.FP16, prefetch_pipeline=True,
        multipass_prefetch_config=MultiPassPrefetchConfig(3, 17),
    )  # fmt: skip
    spec = EnumerableShardingSpec([ShardMetadata([0, 0], [5, 8], "rank:1/cuda:1")])
    tables = {
        "a": ParameterSharding("data_parallel", "dense", ranks=[0, 1]),
        "b": ParameterSharding(
            "table_wise", "fused_uvm_caching", [1], spec, cache, True, False,
            BoundsCheckMode.WARNING, DataType.FP16,
        ),
    }  # fmt: skip
    plan = ShardingPlan({"m": EmbeddingModuleShardingPlan(tables)})
    saved = SavedPlan(plan, "cuda", 2, 2, {"a": (3, 4, 4), "b": (5, 8, 2)})
    assert from_tree(json.loads(json.dumps(to_tree(saved))), "here") == saved
    # Nothing of these was left out above, so a field that a newer TorchRec adds is noticed here.
    left_out = {field.name for field in fields(CacheParams) if getattr(cache, field.name) is None}
    left_out |= {f.name for f in fields(ParameterSharding) if getattr(tables["b"], f.name) is None}
    assert left_out == {"stats", "key_value_params"}
    tables["b"].cache_params = CacheParams(stats=object())
    with pytest.raises(ConfigError, match="table b: cache statistics"):
        to_tree(saved)


def test_a_plan_of_an_earlier_version_loads() -> None:
    """As written before multipass prefetch was kept."""
    cache = {"load_factor": 0.1, "reserved_memory": None, "prefetch_pipeline": None, "algorithm": "LRU",
             "precision": None}  # fmt: skip
    table = {
        "sharding_type": "table_wise", "compute_kernel": "fused_uvm_caching", "ranks": [0],
        "enforce_hbm": None, "stochastic_rounding": None, "bounds_check": None, "output": None,
        "cache": cache,
        "shards": [{"offsets": [0, 0], "sizes": [5, 8], "placement": "rank:0/cuda:0"}],
    }  # fmt: skip
    tree = {
        "format": "tandemrec.sharding-plan", "version": 1, "device": "cuda", "world_size": 1,
        "local_world_size": 1, "tables": {"a": [5, 8, 4]}, "modules": {"m": {"a": table}},
    }  # fmt: skip
    found = from_tree(tree, "here").plan.plan["m"]["a"]
    assert found.cache_params == CacheParams(CacheAlgorithm.LRU, 0.1) and found.ranks == [0]


def test_the_planner_counts_with_what_is_sent() -> None:
    """Half the bytes, half the time of communication, as TorchRec estimates it."""

    def estimates(comms: Comms) -> tuple[float, float]:
        found = offline_plan(replace(task(), comms=comms))
        perfs = [shard.perf for option in found.options for shard in option.shards]
        return sum(perf.fwd_comms for perf in perfs), sum(perf.bwd_comms for perf in perfs)

    (forward, backward), (half, same) = estimates(Comms()), estimates(Comms("fp16", "fp32"))
    assert (half, same) == (pytest.approx(forward / 2), pytest.approx(backward)) and forward > 0
    assert estimates(Comms("fp32", "bf16")) == (pytest.approx(forward), pytest.approx(backward / 2))


def test_unified_memory_is_never_used_unasked() -> None:
    tight = 30 * GB
    with pytest.raises(DoesNotFit, match=r"table g__item does not fit: its largest row_wise shard takes 3\d"):
        offline_plan(task(tight))
    with pytest.raises(ConfigError, match=r"set plan\.allow_unified_memory = true as well"):
        offline_plan(task(tight, rules=PlanRules(tables={"g__item": TableRule(kernels=("fused_uvm",))})))
    found = offline_plan(task(tight, rules=PlanRules(allow_unified_memory=True)))
    kernels = {option.name: option.compute_kernel for option in found.options}
    assert kernels["g__item"].startswith("fused_uvm")
    held = memory_of_ranks(found.options, found.tables, 16, "cuda")
    assert sum(memory.host for memory in held) > 4 * 64 * ITEMS


def test_a_saved_plan_with_unified_memory_is_refused_too(tmp_path: Path) -> None:
    file, loose = tmp_path / "plan.json", PlanRules(allow_unified_memory=True)
    asked = task(30 * GB, rules=loose)
    file.write_text(json.dumps(to_tree(saved_plan(asked, offline_plan(asked).plan))))
    assert read_plan(file, asked).tables["g__item"] == (ITEMS, 64, 4)
    with pytest.raises(ConfigError, match=r"plan.json: table g__item uses fused_uvm.*allow_unified_memory"):
        read_plan(file, task(30 * GB))


def test_rules_name_tables_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"plan.tables.g__itm: no such table; did you mean 'g__item'\?"):
        offline_plan(task(rules=PlanRules(tables={"g__itm": TableRule()})))


def test_what_no_sharder_offers_is_one_line_that_names_the_table() -> None:
    with pytest.raises(ConfigError, match="g__small can be none of table_wise with kernel fused_uvm there"):
        offline_plan(
            task(
                rules=PlanRules(True, tables={"g__small": TableRule(kernels=("fused_uvm",))}),
                device="cpu",
                sharding="table_wise",
            )
        )


def test_tables_that_fit_one_by_one_but_not_together() -> None:
    twins = TableGroup("g", (TableSpec("a", 10**9, 16), TableSpec("b", 10**9, 16)), sharding=("row_wise",))
    model = nn.Module()
    model.g = make_collection(twins, torch.device("meta"))
    attach_optimizer(model.g, twins.optimizer)
    # Two shards of 8.5 GB on each of eight ranks of 21 GB, of which 15 % stay free.
    asked = PlanRequest(model, (twins,), Cluster("cuda", 8, 8, 21 * GB, 500 * GB))
    offline_plan(asked)
    with pytest.raises(
        DoesNotFit, match=r"together they take 136\.0 GB, a rank has 16\.[12] GB.* 850\.0 MB missing"
    ):
        offline_plan(replace(asked, cluster=Cluster("cuda", 8, 8, 19 * GB, 500 * GB)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 8}, "made for world_size 16, this run has 8"),
        ({"device": "cpu", "sharding": "table_wise"}, "made for device cuda, this run has cpu"),
        (
            {"dim": 32},
            r"table g__item of 2,000,000,000 rows x 64 \(4 bytes a weight\), this config has .* x 32",
        ),
    ],
)
def test_a_plan_made_for_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file, asked = tmp_path / "plan.json", task()
    file.write_text(json.dumps(to_tree(saved_plan(asked, offline_plan(asked).plan))))
    read_plan(file, asked)
    with pytest.raises(ConfigError, match=message):
        read_plan(file, task(**change))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree: tree.pop("modules"), "damaged plan"),
        (lambda tree: tree.update(version=9), "plan version 9, only 1 is read"),
        (lambda tree: tree.update(format="x"), "not a sharding plan"),
        (
            lambda tree: tree["modules"]["g"]["g__item"]["shards"].pop(),
            "shards of table g__item are not the whole",
        ),
        (lambda tree: tree["modules"]["g"].pop("g__small"), "does not place table g__small"),
        (lambda tree: tree["modules"]["g"]["g__item"]["ranks"].append(16), "shards of table g__item"),
        (lambda tree: tree["modules"]["g"]["g__item"].update(odd=1), "damaged plan .*unknown key 'odd'"),
        (lambda tree: tree.update(modules={"other": tree["modules"]["g"]}), "does not place table"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    asked, file = task(), tmp_path / "plan.json"
    tree = json.loads(json.dumps(to_tree(saved_plan(asked, offline_plan(asked).plan))))
    damage(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        read_plan(file, asked)


def test_sizes_are_decimal_or_binary() -> None:
    assert parse_size("141GB", "--hbm") == 141 * GB and parse_size("1.5 TiB", "--ddr") == 3 * 2**39
    assert [parse_size(size, "--ddr") for size in (" 2 gb ", "3mib", "0.5Tb")] == [
        2 * GB,
        3 * 2**20,
        500 * GB,
    ]
    for wrong in ("12", "80G", "80GBit", "80GB/2", "1e3GB", "-1GB", "GB", ""):
        with pytest.raises(ConfigError, match=f"--ddr {re.escape(wrong)}: write a number and a unit"):
            parse_size(wrong, "--ddr")
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("plan") / "log", seed=1, users=40)


def words(log: Path, **more: Any) -> list[str]:
    settings = {**SETTINGS, "data.log": str(log), **{k.replace("__", "."): v for k, v in more.items()}}
    return ["--config", "configs/dare.toml", *overrides(settings)]


def test_the_print_of_two_billion_rows_in_both_groups(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    billions = words(
        log, tables__item_id__rows=ITEMS, groups__attention__dim=16, groups__representation__dim=64
    )
    sizes = ["--world-size", "16", "--local-world-size", "8", "--hbm", "141GB", "--ddr", "1TB"]
    sizes += ["--behaviors-per-step", "50000"]
    rule = ["--set", 'plan.tables.representation__item_id.sharding=["row_wise"]']
    out = tmp_path / "plan.json"
    assert main(["plan", *billions, *sizes, *rule, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if not line.startswith("plan written")]
    assert max(map(len, lines)) <= 110, max(lines, key=len)
    item = next(line for line in lines if line.startswith("representation__item_id "))
    assert item.split()[1:] == [
        "2,000,000,000",
        "64",
        "512.0",
        "GB",
        "row_wise",
        "fused",
        "125,000,000",
        "0-15",
    ]
    assert "(as given)" in shown and "optimizer state 16.0 GB" in shown
    assert (
        "warning: representation__item_id (2,000,000,000 rows) is row-wise through bags on 16 ranks" in shown
    )
    # Bags: each of 16 ranks sends 15/16 of a [B, 64] block, both ways; see embeddings/plan/traffic.py.
    bags = 50_000 + 24
    sent = 15 * bags * 64 * 4 * 2 / 1e6
    by_table = next(line for line in reversed(lines) if line.startswith("representation__item_id "))
    assert by_table.split()[1] == "bag" and not out.read_text().startswith("[")
    # `selected` asks for K = 4 behaviors a candidate, a few of them in common.
    assert 3.5 * 24 + 24 < int(by_table.split()[2]) < 4 * 24 + 24 and sent > 380
    assert json.loads(out.read_text())["tables"]["representation__item_id"] == [ITEMS, 64, 4]


def test_the_print_counts_with_what_is_sent(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--world-size", "16", "--hbm", "141GB", "--behaviors-per-step", "5000000"]
    # Of tables that lie the same way in each print.
    sizes += overrides({f"groups.{name}.sharding": ["row_wise"] for name in ("attention", "representation")})

    def exchange(*more: str) -> tuple[str, list[list[float]]]:
        assert main(["plan", *words(log), *sizes, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split() for line in lines if line.startswith(("full, ", "selected, "))]
        assert len(rows) == 4
        named = next(line for line in lines if line.startswith("vectors travel"))
        units = {"MB": 1.0, "GB": 1000.0}
        # Columns: ids, vectors, gradients.
        return named, [
            [float(row[at].replace(",", "")) * units[row[at + 1]] for at in (2, 4, 6)] for row in rows
        ]

    named, plain = exchange()
    assert named == "vectors travel in fp32, gradients in fp32"
    named, halved = exchange("--set", "comms.forward=fp16", "--set", "comms.backward=bf16")
    assert named == "vectors travel in fp16, gradients in bf16"
    for before, after in zip(plain[:2], halved[:2], strict=True):
        assert before[1] > 100 and after[0] == before[0]
        assert after[1:] == pytest.approx([before[1] / 2, before[2] / 2], rel=0.01)
    _, forward = exchange("--set", "comms.forward=bf16")
    assert [row[2] for row in forward] == [row[2] for row in plain]


def test_what_would_make_it_fit_is_tried_and_named(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    billions = words(
        log, tables__item_id__rows=ITEMS, groups__attention__dim=4, groups__representation__dim=64
    )
    sizes = ["--world-size", "16", "--local-world-size", "8", "--ddr", "1TB", "--hbm", "30GB"]
    assert main(["plan", *billions, *sizes]) == 2
    shown = capsys.readouterr()
    error = shown.err.strip()
    assert "\n" not in error and "table representation__item_id does not fit" in error
    assert "takes 32.5 GB, a rank has 25.5 GB for tables, 7.0 GB missing" in error
    named = [line.strip() for line in shown.out.split("(each tried):")[1].splitlines() if line]
    assert [line.split()[0] for line in named] == [
        "groups.representation.dtype", "groups.representation.dim", "--world-size", "--hbm",
        "plan.allow_unified_memory",
    ]  # fmt: skip
    # What it names does make it fit, and no width of the next step up would.
    assert main(["plan", *billions, *sizes, "--set", "groups.representation.dtype=fp16"]) == 0
    narrow = int(named[1].split()[-1])
    assert main(["plan", *billions, *sizes, "--set", f"groups.representation.dim={narrow}"]) == 0
    assert main(["plan", *billions, *sizes, "--set", f"groups.representation.dim={narrow + 8}"]) == 2


def test_a_table_that_may_lie_on_one_rank_only_is_told_to_spread(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    billions = words(
        log, tables__item_id__rows=ITEMS, groups__attention__dim=4, groups__representation__dim=64
    )
    rule = ["--set", 'plan.tables.representation__item_id.sharding=["table_wise"]']
    sizes = ["--world-size", "16", "--local-world-size", "8", "--ddr", "1TB", "--hbm", "100GB"]
    assert main(["plan", *billions, *rule, *sizes]) == 2
    assert 'plan.tables.representation__item_id.sharding = ["row_wise"]' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--world-size", "12", "--local-world-size", "8"], "no multiple of --local-world-size"),
        (["--world-size", "8", "--device", "cuda"], "--device cuda needs --hbm"),
        (["--world-size", "8", "--device", "tpu"], "give cpu or cuda"),
    ],
)
def test_wrong_clusters(log: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words(log), *more]) == 2
    assert message in capsys.readouterr().err


def test_training_by_a_saved_plan_changes_nothing_and_checkpoints_keep_it(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    placed = words(log, train__max_steps=4)
    assert main(["plan", *placed, "--world-size", "2", "--ddr", "16GB", "--json", str(out)]) == 0
    tree = json.loads(out.read_text())
    # What the plan says of its needs is for its reader.
    assert {need["stage"] for need in tree.pop("needs")} >= {"training", "resuming", "one checkpoint"}
    free, held = tmp_path / "free", tmp_path / "held"
    for run, more in ((free, []), (held, ["--plan", str(out)])):
        done = tandemrec("train", *placed, "--out", str(run), *more, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sharding plan for 2 rank(s)" in done.stdout
    assert losses(free) == losses(held) and len(losses(held)) == 4
    state = json.loads((held / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["plan"] == tree and state["config"]["plan"]["file"] == str(out)
    # Evaluating on one rank does not ask for the plan of two; training on one does.
    assert main(["evaluate", "--run", str(held)]) == 0
    capsys.readouterr()
    assert main(["train", *placed, "--out", str(tmp_path / "one"), "--plan", str(out)]) == 2
    assert "made for world_size 2, this run has 1" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_checkpoints_plan_whatever_the_planner_would_say(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan that the rules of the run would never give."""
    file, run = tmp_path / "plan.json", tmp_path / "run"
    wide = {"groups__representation__dim": 256, "checkpoint__every_steps": 2, "checkpoint__keep": 9}
    placed = words(log, train__max_steps=4, **wide)
    columns = ["--set", 'groups.representation.sharding=["column_wise"]', "--world-size", "1"]
    assert main(["plan", *placed, *columns, "--json", str(file)]) == 0
    tree = json.loads(file.read_text())
    del tree["needs"]
    assert main(["train", *placed, "--out", str(run), "--plan", str(file)]) == 0
    whole = losses(run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    capsys.readouterr()
    assert main(["train", *placed, "--out", str(run)]) == 0
    assert "tables lie as in the plan of step-00000002\n" in capsys.readouterr().out
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["plan"] == tree and "column_wise" in json.dumps(tree)
    assert state["config"]["plan"]["file"] == ""
    assert losses(run) == whole and len(whole) == 4
    # Another rule is a wish for another plan.
    more = words(log, train__max_steps=5, **wide, plan__reserve=0.5)
    assert main(["train", *more, "--out", str(run)]) == 0
    line = "the plan of step-00000004: made with plan.reserve = 0.15, now it is 0.5; tables are placed anew"
    assert line in capsys.readouterr().out
    state = json.loads((run / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert "column_wise" not in json.dumps(state["plan"])


@pytest.mark.parametrize("lookup", ["full", "selected"])
def test_lookups_are_the_bags_that_the_model_asks_for(log: Path, lookup: str) -> None:
    """The estimate of a step against the bags of real lookups."""
    settings = {**SETTINGS, "data.log": str(log), "model.lookup": lookup, "data.batch_candidates": 10**6}
    settings["model.k"] = 1
    config = load_config(Path("configs/dare.toml"), [f"{k}={json.dumps(v)}" for k, v in settings.items()])
    manifest = read_manifest(log)
    # Tables that are not sharded take their first weights, and so what is kept, from the global generator.
    torch.manual_seed(0)
    model, groups = build_trainable(config, manifest, torch.device("cpu"))
    asked: dict[str, int] = {}
    for name, collection in model.collections.items():
        collection.register_forward_pre_hook(
            lambda _, inputs, name=name: asked.update({name: inputs[0].stride()})
        )
    step = next(iter(SequenceLogReader(config.data, "train", None).steps()))
    model(step.batch)
    data = config.data.model_copy(update={"batch_candidates": step.batch.candidates})
    size = step_size(data, manifest)
    assert (size.behaviors, size.candidates) == (step.batch.behaviors, step.batch.candidates)
    assert size.requests == step.batch.requests
    said = lookups(config, groups, manifest, size, lookup)
    assert said["attention__item_id"].bags == asked["attention"]
    expected = said["representation__item_id"].bags
    if lookup == "full":
        assert asked["representation"] == expected == size.candidates + size.behaviors
    else:
        # Each of a block's candidates keeps one behavior, wherever in the block.
        kept = sum(n * (1 - (1 - 1 / n) ** c) for n, c in size.blocks if n)
        assert expected == size.candidates + round(kept)
        assert expected == pytest.approx(asked["representation"], rel=0.1)
    assert size.behaviors > size.candidates
    # On a device more are looked up, so that the host need not ask it how many.
    fewer, model.branches.pads = asked["representation"], True
    model(step.batch)
    said = lookups(config, groups, manifest, size, lookup, "cuda")
    assert said["representation__item_id"].bags == pytest.approx(asked["representation"], rel=0.05)
    assert asked["representation"] >= fewer


def test_candidates_of_a_block_are_taken_to_keep_much_in_common() -> None:
    """One candidate a block keeps K of its own; many keep nearly all of it together, and never more."""
    config = load_config(Path("configs/dare.toml"), ["model.k=20"]).model
    kept = [
        kept_behaviors(config, StepSize(1000 * b, 2000, 2000, ((1000, 2000 // b),) * b, ""))
        for b in (2000, 20, 2, 1)
    ]
    assert kept[0] == 2000 * 20
    padded = [
        kept_behaviors(config, StepSize(1000 * b, 2000, 2000, ((1000, 2000 // b),) * b, ""), "cuda")
        for b in (2000, 80, 20, 1)
    ]
    # A host that does not ask how many: K for each candidate, or the whole block.
    assert padded == [2000 * 20, 80 * 25 * 20, 20 * 1000, 1000]
    assert kept[1] == round(20_000 * (1 - 0.98**100)) < 2000 * 20
    assert [kept[2], kept[3]] == [2000, 1000]
