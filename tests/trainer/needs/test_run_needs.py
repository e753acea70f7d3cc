"""What a run needs, by hand and as measured; what does not fit is refused or said before the first step."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embeddings.disk import free_disk
from embeddings.errors import ConfigError
from embeddings.plan.memory import DENSE_COPIES, RankMemory
from embeddings.plan.request import Cluster
from launch.cli import main
from tests.helpers.launching import SETTINGS, overrides, reported
from tests.helpers.logs import small_log
from tests.trainer.test_presets import log_of_tasks
from trainer.needs import run_needs
from trainer.needs.run_needs import FITS, PROCESS, TIGHT, TOO_MUCH, Need, check_disk, check_memory

GB = 10**9


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("needs") / "log", seed=1, users=40)


def words(log: Path, **more: Any) -> list[str]:
    settings = {**SETTINGS, "data.log": str(log), **{k.replace("__", "."): v for k, v in more.items()}}
    return ["--config", "configs/dare.toml", *overrides(settings)]


def planned(log: Path, tmp_path: Path, *cluster: str, **more: Any) -> dict[str, dict[str, Any]]:
    """Stage -> its need in the plan's JSON; of one stage in two places, the last."""
    out = tmp_path / "plan.json"
    assert main(["plan", *words(log, **more), *cluster, "--json", str(out)]) == 0
    return {need["stage"]: need for need in json.loads(out.read_text())["needs"]}


BILLIONS = {
    "tables__item_id__rows": 2_000_000_000,
    "groups__attention__dim": 16,
    "groups__representation__dim": 64,
}
NODES = ("--world-size", "16", "--local-world-size", "8", "--hbm", "141GB")


def test_a_copy_that_no_node_has_memory_for_does_not_pass(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 ranks x 65 GB of a node are copied to page-locked memory: 520 GB on a node of 128 GB."""
    needs = planned(log, tmp_path, *NODES, "--ddr", "128GB", checkpoint__mode="async", **BILLIONS)
    # 2,000,000,000 rows x 64 columns x 4 B, and 4 B of state a row, all on the eight ranks of one node.
    copy = 2_000_000_000 * (64 * 4 + 4)
    saving = needs["saving (async)"]
    assert saving["verdict"] == TOO_MUCH and saving["room"] == 128 * GB
    assert saving["parts"]["copy of the shards, page-locked"] == pytest.approx(copy, rel=1e-3)
    said = capsys.readouterr().out
    assert "verdict: does not fit: saving (async)" in said.splitlines(), said[-3000:]
    assert 'set checkpoint.mode = "sync"' in " ".join(said.split())
    # By default such a run is saved from where its tables lie, and the plan says so.
    needs = planned(log, tmp_path, *NODES, "--ddr", "128GB", **BILLIONS)
    assert needs["saving (auto: sync; no room for 520.0 GB more)"]["verdict"] == FITS
    needs = planned(log, tmp_path, *NODES, "--ddr", "1TB", **BILLIONS)
    assert needs["saving (auto: async)"]["verdict"] == FITS
    # Both tables, 656 GB with their state, twice kept and once being written; int8 rows have 4 B of scale.
    one = needs["one checkpoint"]["bytes"]
    assert one == pytest.approx(2_000_000_000 * (80 * 4 + 8), rel=1e-3)
    assert needs["checkpoints (2 kept, one being written)"]["bytes"] == 3 * one
    assert needs["snapshot (int8)"]["bytes"] == pytest.approx(2_000_000_000 * (80 + 2 * 8), rel=0.1)


def test_verdicts_and_their_lines() -> None:
    need = Need("training", "host memory", 95, 100, "take more", {"tables": 90, "step": 5})
    assert need.verdict == TIGHT and replace(need, bytes=90).verdict == FITS
    assert replace(need, room=None).verdict == ""
    large = Need(
        "training", "host memory", 105 * GB, 100 * GB, "take more", {"tables": 90 * GB, "step": 15 * GB}
    )
    line = (
        "training does not fit: it needs 105.0 GB (tables 90.0 GB, step 15.0 GB) of host memory, there are "
        "100.0 GB; take more"
    )
    # An estimate is a warning, what is certain an error.
    assert check_memory([large]) == [f"warning: {line}"] and check_memory([need]) == []
    with pytest.raises(
        ConfigError, match=r"it needs 110.0 GB \(tables 60.0 GB, copy of the shards 50.0 GB\)"
    ):
        check_memory([replace(large, parts={"tables": 60 * GB, "copy of the shards": 50 * GB, "step": 1})])
    one = Need("one checkpoint", "disk", 50, 100, "give more")
    kept = Need("checkpoints", "disk", 150, 100, "give more")
    assert check_disk([one, kept], new=True)[0].startswith("warning: checkpoints does not fit")
    with pytest.raises(ConfigError, match="one checkpoint does not fit"):
        check_disk([replace(one, bytes=101), kept], new=True)
    # A run that goes on may have nothing left to save.
    assert len(check_disk([replace(one, bytes=101), kept], new=False)) == 1


def test_a_run_whose_first_save_would_fail_is_refused_before_its_first_step(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"tables__item_id__rows": 200_000, "train__max_steps": 1}
    monkeypatch.setattr("trainer.needs.run_needs.free_disk", lambda _: 1_000_000)
    for more in ([], ["--check"]):
        assert main(["train", *words(log, **wide), "--out", str(tmp_path / "disk"), *more]) == 2
        assert "one checkpoint does not fit: it needs" in capsys.readouterr().err
    assert not (tmp_path / "disk" / "metrics.jsonl").exists()
    monkeypatch.undo()
    # 200,000 rows x (12 columns x 4 B + 2 x 4 B) = 11.2 MB, and their copy; 15 % stay free for the planner.
    monkeypatch.setattr("trainer.assemble.memory_bytes", lambda: 20_000_000)
    run = ["--out", str(tmp_path / "memory")]
    assert main(["train", *words(log, checkpoint__mode="async", **wide), *run]) == 2
    said = capsys.readouterr().err
    assert "saving (async) does not fit" in said and 'set checkpoint.mode = "sync"' in said
    code = main(["train", *words(log, checkpoint__mode="sync", **wide), *run])
    assert code == 0, capsys.readouterr().err
    assert "warning: training does not fit" in capsys.readouterr().out


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    free = free_disk(tmp_path / "a" / "b")
    assert free is not None and free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_changed_rows_bound_an_incremental_checkpoint(log: Path) -> None:
    """100 ids a step and table, 50 steps: 5,000 of 1,000,000 rows and all of 300, with 8 B for each id."""
    from embeddings.optimizers import ROW_OPTIMIZERS
    from embeddings.plan.tables import Table
    from embeddings.plan.traffic import Lookup

    tables = {
        name: Table(name, "m", rows, 4, 4, ROW_OPTIMIZERS["rowwise_adagrad"], True)
        for name, rows in (("large", 1_000_000), ("small", 300))
    }
    checkpoint = SimpleNamespace(every_steps=50, keep=2, full_every=4)
    train = SimpleNamespace(early_stopping=SimpleNamespace(on=False))
    run = run_needs.Run(
        SimpleNamespace(checkpoint=checkpoint, train=train, phases=(), rules={"summed"}),  # type: ignore[arg-type]
        {}, tables, 1000, None,  # type: ignore[arg-type]
        {name: Lookup(100, 100) for name in tables}, 1, 1,
    )  # fmt: skip
    assert run_needs.delta_bytes(run) == (5_000 + 300) * (16 + 4 + 8) + 3_000
    one, kept = run_needs.disk_needs(run, [], "cuda", None)
    assert one.bytes == 1_000_300 * 20 + 3_000
    # At most two whole ones: a delta that is kept needs its base, and a new one is being written.
    assert kept.parts == {"full": 2 * one.bytes, "deltas": 5 * run_needs.delta_bytes(run)}
    assert kept.bytes == sum(kept.parts.values())
    there = one.bytes // 2
    assert run_needs.disk_needs(run, [], "cuda", None, there)[1].bytes == kept.bytes - there


def test_states_of_tasks_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two tasks: tables and their state twice; of each dense weight six numbers more for two of Adam's."""
    log, found = log_of_tasks(tmp_path / "log"), {}
    for rule in ("summed", "per_task"):
        out = tmp_path / f"{rule}.json"
        given = overrides({**SETTINGS, "data.log": str(log), "train.update": rule})
        words = [
            "plan",
            "--config",
            "configs/mmoe.toml",
            *given,
            "--json",
            str(out),
            "--world-size",
            "1",
            "--device",
            "cpu",
        ]
        assert main(words) == 0, capsys.readouterr().err
        found[rule] = {need["stage"]: need for need in json.loads(out.read_text())["needs"]}
    plain, lanes = found["summed"], found["per_task"]
    tables, dense = (plain["training"]["parts"][part] for part in ("tables", "dense"))
    assert lanes["training"]["parts"]["tables"] == 2 * tables
    # Beside weights and means, a gradient of each task and the update of one.
    copies = DENSE_COPIES + 3 * 2 - 2 + 2 + 1
    assert lanes["training"]["parts"]["dense"] == dense * copies / DENSE_COPIES
    grown = lanes["one checkpoint"]["bytes"] - plain["one checkpoint"]["bytes"]
    assert grown == tables + (3 * 2 - 2) * dense / DENSE_COPIES
    for stage in ("snapshot (fp32, attention fp16)", "snapshot (int8)"):
        assert lanes[stage]["bytes"] == plain[stage]["bytes"]
    said = capsys.readouterr().out
    assert "representation__item_id/conversion" in said


@pytest.mark.slow
def test_the_forecast_against_measured_peaks(log: Path, tmp_path: Path) -> None:
    """Train, save both ways, resume and export, each in a fresh process, with few and with many rows."""
    few, many = 2_000, 3_000_000
    train = words(log, train__max_steps=2, checkpoint__every_steps=0)
    (tmp_path / "settings.json").write_text(json.dumps({"train": train, "rows": [few, many]}))
    peaks = reported("tests.programs.measured_needs", tmp_path)
    needs = {need["stage"]: need for need in json.loads((tmp_path / "plan.json").read_text())["needs"]}
    # 3,000,000 rows x (4 + 8 columns) x 4 B and 4 B of state in both tables.
    tables = many * (12 * 4 + 8)
    saving, blocks = needs["saving (async)"]["parts"], run_needs.BLOCKS
    assert saving["tables"] == pytest.approx(tables, rel=0.01) == saving["copy of the shards"]
    for stage, copies in (("sync", 1), ("async", 2), ("resume", 1)):
        grown = peaks[f"{stage} {many}"] - peaks[f"sync {few}"]
        assert 0.95 * copies * tables < grown < copies * tables + blocks, (stage, grown)
    # An export holds blocks of rows, however many there are.
    assert peaks[f"export {many}"] - peaks[f"export {few}"] < blocks < 1.25 * tables
    for stage, need in {
        "async": "saving (async)",
        "resume": "resuming",
        "export": "export (one process)",
    }.items():
        assert peaks[f"{stage} {many}"] < needs[need]["bytes"] < 2 * peaks[f"{stage} {many}"], stage
    assert 0.5 * PROCESS < peaks[f"sync {few}"] < PROCESS


def test_cluster_memory_counts_all_ranks_of_a_node() -> None:
    held = [RankMemory(weights=10 * GB, optimizer=GB)] * 4
    assert run_needs.on_host(held[0], gpus=False) == 11 * GB and run_needs.on_host(held[0], gpus=True) == 0
    uvm = RankMemory(host=33 * GB, host_weights=30 * GB, host_optimizer=3 * GB)
    assert run_needs.on_host(uvm, gpus=True) == 33 * GB
    assert run_needs.copy_bytes(uvm, 100) == 33 * GB + 300
    assert Cluster("cpu", 4, 2, 0, 7).memory == 7


def test_a_check_says_what_does_not_fit_and_a_bit_for_each_row_counts(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """40,000,000 rows are planned and not built: 2.2 GB with their state, and as much for the copy."""
    monkeypatch.setattr("trainer.assemble.memory_bytes", lambda: 4 * GB)
    wide = {"tables__item_id__rows": 40_000_000, "checkpoint__mode": "async"}
    check = ["--check", "--out", str(tmp_path / "run")]
    assert main(["train", *words(log, **wide), *check]) == 0
    said = capsys.readouterr().out
    assert "saving (async) does not fit" in said and "more ranks may hold them" in said
    needs = planned(log, tmp_path, "--world-size", "1", "--device", "cpu", checkpoint__full_every=4, **wide)
    # 40,000,000 rows in two tables, and some of the small ones.
    assert needs["training"]["parts"]["touched rows"] == pytest.approx(2 * 40_000_000 / 8, rel=0.01)
    assert any("with changed rows" in stage for stage in needs)


def test_tables_in_mapped_files_need_disk_and_no_memory(log: Path, tmp_path: Path) -> None:
    """100,000,000 rows, 5.6 GB with their state, on a node of 2 GB."""
    cluster = ("--world-size", "1", "--device", "cpu", "--ddr", "2GB")
    wide = {"tables__item_id__rows": 100_000_000, "plan__mapped_folder": str(tmp_path)}
    needs = planned(log, tmp_path, *cluster, checkpoint__mode="sync", **wide)
    mapped = needs["tables in mapped files"]
    assert (
        mapped["bytes"] == pytest.approx(100_000_000 * (12 * 4 + 8), rel=0.01)
        and mapped["where"] == "disk, node 0"
    )
    for stage in ("training", "saving (sync)", "resuming"):
        assert needs[stage]["verdict"] == FITS and "tables" not in needs[stage]["parts"]
    assert needs["training"]["room"] == 2 * GB
    # The copy of an asynchronous save is memory all the same.
    needs = planned(log, tmp_path, *cluster, checkpoint__mode="async", **wide)
    assert needs["saving (async)"]["verdict"] == TOO_MUCH


def test_mapped_files_have_the_room_of_their_disk_however_much_memory_there_is(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("embeddings.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=10 * GB))
    cluster = ("--world-size", "1", "--device", "cpu", "--ddr", "1TB")
    wide = {"tables__item_id__rows": 100_000_000, "plan__mapped_folder": str(tmp_path)}
    needs = planned(log, tmp_path, *cluster, **wide)
    assert needs["tables in mapped files"]["room"] == 10 * GB
    # The head names the disk, and not memory that the tables do not take.
    said = capsys.readouterr().out
    disk = f"the disk of mapped files (plan.mapped_folder = {tmp_path})"
    head = f"room of a rank: 10.0 GB, what is free now of {disk}"
    assert f"{head}, 8.5 GB of it for tables" in said and "  in mapped files  " in said
    assert "host" not in said.partition("what a run needs")[0].replace("in host memory", "")
    # A run on the same disk has what the 5.6 GB of tables leave.
    needs = planned(log, tmp_path, *cluster, "--out", str(tmp_path / "run"), **wide)
    one, files = needs["one checkpoint"], needs["tables in mapped files"]
    assert one["room"] == 10 * GB - files["bytes"] and one["verdict"] == TOO_MUCH
    # Host memory is no remedy for a disk that is too small.
    wide["tables__item_id__rows"] = 300_000_000
    capsys.readouterr()
    assert main(["plan", *words(log, **wide), *cluster]) == 2
    said = capsys.readouterr().out
    assert "plan.mapped_folder on a disk with" in said and "--ddr" not in said
    assert "no plan fits ranks with 10.0 GB each of the disk of mapped files" in said
    # GPUs have no such files.
    assert main(["plan", *words(log, **wide), "--world-size", "1", "--hbm", "141GB"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is for tables of CPU ranks, and these are GPUs; set it to" in said


def test_checkpoints_have_what_tables_in_mapped_files_leave_of_their_disk(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """11.2 MB of tables with their state, and a checkpoint of as much, where 20 MB are free."""
    wide = {"tables__item_id__rows": 200_000, "plan__mapped_folder": str(tmp_path)}
    monkeypatch.setattr("embeddings.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    # Nothing of the tables is made before the start is refused.
    monkeypatch.setattr("trainer.assemble.shard", None)
    for more in (["--check"], []):
        run = [*words(log, checkpoint__mode="sync", **wide), "--out", str(tmp_path / "run"), *more]
        assert main(["train", *run]) == 2
        problem = "one checkpoint does not fit: it needs 11.2 MB of disk, beside mapped files, there are 8."
        assert problem in capsys.readouterr().err
    monkeypatch.setattr("trainer.needs.run_needs.same_disk", lambda *_: False)
    assert main(["train", *run]) == 1 and "TypeError: 'NoneType'" in capsys.readouterr().err


def test_only_checkpoints_of_a_run_count_as_what_new_ones_replace(log: Path, tmp_path: Path) -> None:
    cluster, run = ("--world-size", "1", "--device", "cpu"), tmp_path / "run"
    one = planned(log, tmp_path, *cluster)["one checkpoint"]["bytes"]
    sizes = {"1": one, "2.refused-0123abcd": one, "3.tmp-0123abcd": one, "4": 10}
    for name, size in sizes.items():
        folder = run / "checkpoints" / f"step-0000000{name}"
        folder.mkdir(parents=True)
        with (folder / "__0_0.distcp").open("wb") as file:
            file.truncate(size)
    (run / "checkpoints" / "step-notes.txt").write_text("mine")
    needs = planned(log, tmp_path, *cluster, "--out", str(run))
    # One that is whole and a delta of ten bytes; what was set aside or half written stays beside new ones.
    assert needs["checkpoints (2 kept, one being written)"]["bytes"] == 3 * one - (one + 10)


def test_the_command_after_a_plan_can_be_typed(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plan, given = tmp_path / "my run", tmp_path / "my plan.json", words(log, train__max_steps=1)
    assert main(["plan", *given, "--world-size", "1", "--json", str(plan), "--out", str(run)]) == 0
    told, _, command = capsys.readouterr().out.splitlines()[-1].partition("; next: tandemrec ")
    assert told == f"plan written to {plan}" and main(shlex.split(command)) == 0
    assert (run / "summary.json").exists()
    assert main(["plan", *given, "--world-size", "2", "--device", "cpu", "--hbm", "9GB"]) == 0
    assert "--hbm 9GB has no effect: these ranks have no GPU" in capsys.readouterr().out


def test_advice_is_for_what_takes_most_of_a_node(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(log, tmp_path, *NODES, "--ddr", "1GB", **BILLIONS)
    said = " ".join(capsys.readouterr().out.split())
    assert "there are 1.0 GB; give nodes more memory, or fewer ranks" in said
    assert "make data.shuffle_row_groups smaller" not in said
