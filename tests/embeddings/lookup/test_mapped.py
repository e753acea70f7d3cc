"""Tables in mapped files train as those in memory, bit for bit, and take no memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from embeddings.errors import ConfigError
from embeddings.lookup.mapped import mapped_rows, read_in_order
from embeddings.lookup.shards import local_shards
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import small_log
from trainer.assemble import ShardedModel, build_sharded
from trainer.checkpoint import background, save_load
from trainer.checkpoint.delta import TouchedShard
from trainer.checkpoint.restore import restore
from trainer.checkpoint.staging import StagedCopy
from trainer.checkpoint.tensors import TensorReader
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group(device="cpu") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("mapped") / "log", users=8)


def config_of(log: Path, **settings: object) -> Config:
    words = {**SETTINGS, "data.log": str(log), "train.max_steps": 3}
    words |= {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(Path("configs/dare.toml"), overrides(words)[1::2])


def files_in(folder: Path) -> int:
    """Files of a folder that this process has mapped, names or none."""
    return sum(f"{folder}/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_trained_bit_for_bit_as_in_memory(log: Path, tmp_path: Path, ranks: Ranks) -> None:
    from pipelines.train import run

    disk = tmp_path / "disk"
    disk.mkdir()
    for name, settings in (("memory", {}), ("mapped", {"plan__mapped_folder": str(disk)})):
        run(config_of(log, **settings), tmp_path / name, ranks)
    assert not [*disk.iterdir()]
    one, other = (
        TensorReader(tmp_path / name / "checkpoints" / "step-00000003") for name in ("memory", "mapped")
    )
    states = [f"optim.state.fused.{name}" for name in one.names() if "collections" in name]
    assert states and one.names() == other.names()
    for name in one._tensors:
        assert torch.equal(one.whole(name), other.whole(name)), name


def test_gpus_that_use_a_run_have_its_tables_in_their_memory(
    log: Path,
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The CPU stands in for the GPU where the model is built."""
    from pipelines.train import run

    disk = tmp_path / "disk"
    disk.mkdir()
    run(config_of(log, plan__mapped_folder=str(disk), train__max_steps=1), tmp_path / "run", ranks)
    disk.rmdir()
    folder, built = RunFolder(tmp_path / "run"), list[str | None]()

    def on_cpu(config: Config, manifest: LogManifest, _: Ranks, **more: Any) -> ShardedModel:
        built.append(config.plan.mapped_folder)
        return build_sharded(config, manifest, ranks, **more)

    monkeypatch.setattr("trainer.checkpoint.restore.build_sharded", on_cpu)
    restored = restore(folder, replace(ranks, device=torch.device("cuda")))
    assert restored.step == 1 and built == [None]
    said = capsys.readouterr().out
    assert "plan.mapped_folder is for CPUs: the tables lie in the GPUs' memory here" in said
    with pytest.raises(ConfigError, match=r"plan.mapped_folder = '.*disk' is no folder; make it first"):
        restore(folder, ranks)


def test_rows_and_their_state_lie_in_the_folder(log: Path, tmp_path: Path, ranks: Ranks) -> None:
    config = config_of(log, plan__mapped_folder=str(tmp_path))
    manifest = read_manifest(log)
    model = build_sharded(config, manifest, ranks).model
    # Two groups, each with rows and a state.
    assert files_in(tmp_path) == 4
    expected = build_sharded(config_of(log), manifest, ranks).model.state_dict()
    for name, weight in model.state_dict().items():
        for one, two in zip(local_shards(weight), local_shards(expected[name]), strict=True):
            assert torch.equal(one.tensor, two.tensor)


def test_what_cannot_be_mapped_is_one_clear_error(log: Path, tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"plan.mapped_folder = '.*nowhere' is no folder"):
        build_sharded(
            config_of(log, plan__mapped_folder=str(tmp_path / "nowhere")), read_manifest(log), ranks
        )
    with pytest.raises(ConfigError, match=r"GB of tables cannot lie there: .* \([\d,.]+ GB are free\)"):
        mapped_rows(tmp_path, 1 << 50, torch.float32)


def read_ahead(folder: Path) -> list[bool]:
    """Of each mapped file of a folder, whether the system reads more of it than was asked for."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = f"{folder}/" in line
        elif ours and line.startswith("VmFlags:"):
            # Of proc(5): random read advise provided.
            found.append("rr" not in line.split())
    return found


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_only_what_reads_all_rows_has_the_system_read_ahead(
    log: Path, tmp_path: Path, ranks: Ranks, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save in the background reads its copy, and training asks for rows in no order meanwhile."""
    from pipelines.train import run

    seen = dict[str, list[list[bool]]]()
    disk = tmp_path / "disk"
    disk.mkdir()

    def watch(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def watched(*words: Any, **more: Any) -> Any:
            seen.setdefault(name, []).append(read_ahead(disk))
            return call(*words, **more)

        monkeypatch.setattr(owner, name, watched)

    for place in ((dcp, "save"), (save_load, "write_rows"), (StagedCopy, "take"), (TouchedShard, "hold")):
        watch(*place)
    # A whole save, and one of touched rows, however many there are.
    monkeypatch.setattr(background, "_MOST", 9)
    settings: dict[str, object] = {"plan__mapped_folder": str(disk), "train__max_steps": 2}
    settings |= {
        f"checkpoint__{key}": n for key, n in (("every_steps", 1), ("full_every", 2), ("mode", mode))
    }
    steps = list[list[bool]]()
    run(config_of(log, **settings), tmp_path / "run", ranks, lambda step: steps.append(read_ahead(disk)))
    assert steps == [[False] * 4] * 2 and len(list((tmp_path / "run").glob("checkpoints/*/delta-*"))) == 1
    copied, written = {"take", "hold"}, {"save", "write_rows"}
    assert seen.keys() == (written if mode == "sync" else written | copied)
    for name, found in seen.items():
        expected = mode == "sync" or name in copied
        assert found == [[expected] * 4] * len(found), name


def test_reading_ahead_ends_with_what_reads_in_order(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    rows = mapped_rows(other, 10_000, torch.float32)
    with pytest.raises(RuntimeError), read_in_order():
        assert read_ahead(other) == [True]
        raise RuntimeError
    assert read_ahead(other) == [False] and not rows.any()
