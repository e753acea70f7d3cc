"""Damaged checkpoints: told of, set aside, not counted as kept, and deleted when newer ones are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.train import run
from pipelines.unshard import unshard
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import small_log
from trainer.checkpoint import save_load as checkpoint
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group(device="cpu") as ranks:
        yield ranks


def names(folder: Path) -> list[str]:
    return sorted(
        re.sub(r"refused-\w+", "refused", path.name.removeprefix("step-0000000")) for path in folder.iterdir()
    )


def flip(path: Path) -> None:
    """Change a bit of the first shard, which keeps its size."""
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def save(folder: Path, step: int, keep: int = 9, refused: tuple[str, ...] = ()) -> Path:
    tensors = {"a": torch.full((50, 4), float(step))}
    return checkpoint.save(folder, step, tensors, {"step": step}, keep, refused=refused)


def test_what_is_set_aside_is_told_and_goes_when_newer_ones_are_kept(
    tmp_path: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    del ranks
    flip(save(tmp_path, 5))
    assert save(tmp_path, 5).name == "step-00000005" and names(tmp_path) == ["5", "5.refused"]
    said, aside = capfd.readouterr().err, next(tmp_path.glob("*.refused-*")).name
    assert f"step-00000005: saved anew; what was there is set aside as {aside} (" in said
    assert "does not match the manifest" in said and "deleted once checkpoint.keep newer" in said
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["5", "5.refused", "6"]
    save(tmp_path, 7, keep=2)
    assert names(tmp_path) == ["6", "7"] and capfd.readouterr().err == ""


def test_what_was_refused_does_not_count_as_kept(tmp_path: Path, ranks: Ranks) -> None:
    del ranks
    for step in (1, 2, 3):
        last = save(tmp_path, step)
    flip(last)
    found = checkpoint.find(tmp_path)
    assert found.path == tmp_path / "step-00000002" and found.refused_names == ("step-00000003",)
    save(tmp_path, 4, keep=2, refused=found.refused_names)
    # Two good ones, and the one that nobody can load.
    assert names(tmp_path) == ["2", "3", "4"]
    save(tmp_path, 5, keep=2, refused=found.refused_names)
    assert names(tmp_path) == ["4", "5"]


def config_of(log: Path, **settings: object) -> Config:
    words = {**SETTINGS, "data.log": str(log), "checkpoint.every_steps": 2, "train.epochs": 9}
    words |= {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(Path("configs/dare.toml"), overrides(words)[1::2])


def test_a_start_says_what_it_found_what_it_uses_and_when_the_rest_goes(
    tmp_path: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    log, folder = small_log(tmp_path / "log", users=8), tmp_path / "run" / "checkpoints"
    run(config_of(log, train__max_steps=4), tmp_path / "run", ranks)
    flip(folder / "step-00000004")
    capfd.readouterr()
    # Whoever uses the run says it, too.
    unshard(tmp_path / "run", tmp_path / "tables")
    assert re.search(r"refused checkpoint: .*; using step-00000002", capfd.readouterr().err)
    run(config_of(log, train__max_steps=5, checkpoint__every_steps=0), tmp_path / "run", ranks)
    said = capfd.readouterr().out
    assert re.search(
        r"refused checkpoint: \S+step-00000004/\S+: does not match .*; using step-00000002\n", said
    )
    stays = f"what was refused stays in {folder} and does not count for checkpoint.keep; it is deleted once 2"
    assert stays in said and f"resumed from {folder / 'step-00000002'}" in said
    # The damaged one is no reason to delete the one that was used.
    assert names(folder) == ["2", "4", "5"]
    run(config_of(log, train__max_steps=6), tmp_path / "run", ranks)
    assert names(folder) == ["5", "6"]
