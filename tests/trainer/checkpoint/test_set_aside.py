"""Damaged checkpoints: told of, set aside, not counted as kept, and deleted when newer ones are there."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.errors import CheckpointError
from pipelines.train import run
from pipelines.unshard import unshard
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import small_log
from trainer.checkpoint import files
from trainer.checkpoint import save_load as checkpoint
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.sealed_folder import remove_folder
from trainer.storage import place


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


@pytest.mark.parametrize("harm", ["files stay", "the folder stays", "the manifest of the store"])
def test_what_cannot_be_deleted_fails_no_save(
    tmp_path: Path,
    ranks: Ranks,
    harm: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    del ranks
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    place = {
        "files stay": "trainer.sealed_folder.remove_folder",
        "the folder stays": "trainer.checkpoint.files.retire_folder",
        "the manifest of the store": "trainer.checkpoint.files.read_manifest",
    }[harm]
    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        assert save(tmp_path, 3, keep=1).name == "step-00000003"
    said = capfd.readouterr().err
    assert said and "could not be deleted: Device or resource busy; the new checkpoint is in place" in said
    assert checkpoint.find(tmp_path).path == tmp_path / "step-00000003"
    # A later save deletes it.
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["4"]


def test_what_could_not_be_deleted_keeps_what_it_builds_on(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    del ranks
    for step in (1, 2, 3):
        last = save(tmp_path, step)
    link = {"base": {"name": "step-00000001", "sha256": "0" * 64, "links": 1, "rows_of": []}}
    (tmp_path / "step-00000002" / "state.json").write_text(json.dumps(link))
    retire = files.retire_folder

    def all_but_2(path: Path, *words: Any, **more: Any) -> None:
        if path.name.endswith("2"):
            raise OSError(errno.EBUSY, "busy", str(path))
        retire(path, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(files, "retire_folder", all_but_2)
        files.retire(tmp_path, last, 1)
    assert names(tmp_path) == ["1", "2", "3"]
    files.retire(tmp_path, last, 1)
    assert names(tmp_path) == ["3"]


def test_of_two_of_a_step_in_a_store_the_good_one_is_used_and_kept(ranks: Ranks) -> None:
    pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
    del ranks
    folder = place("memory://twice/checkpoints")
    flip(damaged := save(folder, 5))
    # The damaged one is to be found first; names end in random.
    while (good := save(folder, 5)).name > damaged.name:
        remove_folder(good)
    checkpoint.save(folder, 6, {"a": torch.zeros(50, 4)}, {"step": 6, "best": {"step": 5}}, 9, best=5)
    for which in ("", "best", "5"):
        found = checkpoint.find_to_use(folder, which)
        assert found.path == good and found.state == {"step": 5}
        assert len(found.refused) == 1 and damaged.name in found.refused[0]
    # Of the same size, so that only the time tells which one is good.
    for step in (7, 8):
        checkpoint.save(folder, step, {"a": torch.zeros(50, 4)}, {"step": step}, 1, best=5)
    left = files.checkpoints(folder)
    assert left[1:] == [good] and files.step_of(left[0]) == 8
    flip(good)
    with pytest.raises(CheckpointError, match=rf"{good.name}: cannot be used: .*does not match"):
        checkpoint.find_to_use(folder, "5")


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
