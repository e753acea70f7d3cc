"""What `tandemrec plan` says of host memory behind devices, of its caches, and of what nobody said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from tests.embeddings.plan.test_plan import ITEMS
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import small_log

CACHED = '["fused_uvm_caching"]'
CLUSTER = ["--world-size", "16", "--local-world-size", "8", "--hbm", "141GB", "--ddr", "1TB"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("plan") / "log", seed=1, users=40)


def planned(log: Path, *more: str) -> int:
    settings = overrides({**SETTINGS, "data.log": str(log)})
    changes = [word for change in more for word in ("--set", change)]
    return main(["plan", "--config", "configs/dare.toml", *settings, *CLUSTER, *changes])


UNIFIED = ("plan.allow_unified_memory=true", f"plan.tables.attention__item_id.kernels={CACHED}")


def test_rows_in_host_memory_are_counted_there(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(log, *UNIFIED, f"tables.item_id.rows={ITEMS}", "groups.attention.dim=16") == 0
    said = capsys.readouterr().out
    assert "host memory of a rank: 125.0 GB, for tables behind the device's" in said
    assert "in host memory: weights 128.0 GB, optimizer state 8.0 GB; their caches are among" in said
    assert planned(log) == 0
    said = capsys.readouterr().out
    assert "in host memory: weights" not in said and "host memory of a rank" not in said


def test_what_host_memory_lacks_is_named_and_more_of_it_tried(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = f"plan.tables.representation__item_id.kernels={CACHED}"
    wide = (
        f"tables.item_id.rows={2 * ITEMS}",
        "groups.representation.dim=128",
        "plan.allow_unified_memory=true",
    )
    assert planned(log, *wide, kernels, 'plan.tables.representation__item_id.sharding=["row_wise"]') == 2
    shown = capsys.readouterr()
    # 2,048 GB of weights and 16 GB of state over 16 ranks.
    assert "takes 1" in shown.err and "125.0 GB of host memory (--ddr) for those behind it" in shown.err
    assert "4.0 GB missing" in shown.err
    row = next(line for line in shown.out.splitlines() if line.startswith("representation__item_id"))
    assert row.endswith("  4.0 GB")
    assert "  --ddr 1100GB" in shown.out.splitlines()


def test_a_cache_that_cannot_be_filled_ahead_is_refused_before_there_is_a_cluster(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lfu = (*UNIFIED, "plan.tables.attention__item_id.cache_algorithm=lfu")
    assert planned(log, *lfu) == 0
    capsys.readouterr()
    assert planned(log, *lfu, "train.pipeline=prefetch") == 2
    assert "table attention__item_id: its cache has the algorithm LFU" in capsys.readouterr().err


def test_what_nobody_said_of_the_cluster_is_asked_for(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, asked in (
        ((), "; set plan.gpu and plan.inter_gb_per_s for yours"),
        (("plan.gpu=H200",), "; set plan.inter_gb_per_s for yours"),
        (("plan.gpu=H200", "plan.inter_gb_per_s=50"), ""),
    ):
        assert planned(log, *given) == 0
        assert f"and was not checked against any machine{asked}\n" in capsys.readouterr().out


def test_half_precision_is_shown_with_its_rounding(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(log, "groups.attention.dtype=fp16") == 0
    assert "\nrows of attention are fp16, rounded stochastically\n" in capsys.readouterr().out
    assert planned(log, "groups.attention.dtype=fp16", "groups.attention.stochastic_rounding=false") == 0
    assert "\nrows of attention are fp16, rounded to nearest\n" in capsys.readouterr().out


def test_a_value_of_several_forms_is_refused_by_its_name_alone(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(log, "groups.representation.dim=2050") == 2
    said = capsys.readouterr().err
    assert said.endswith("groups.representation.dim: must be a multiple of 4 (given: 2050)\n")
