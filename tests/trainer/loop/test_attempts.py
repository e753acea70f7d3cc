"""Starts that get nowhere are counted, and forgotten once one gets somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from trainer.loop.attempts import ending_well, note_start
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.run_folder import RunFolder

DARE = Path(__file__).parents[3] / "configs" / "dare.toml"


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture
def config() -> Config:
    return load_config(DARE, ["train.max_starts_without_progress=2"])


def test_starts_from_the_same_step_are_limited(tmp_path: Path, config: Config) -> None:
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        note_start(folder, config, 7)
    with pytest.raises(
        ConfigError, match=r"starts.jsonl: the last 2 starts began at step 7 .* delete this file"
    ):
        note_start(folder, config, 7)
    note_start(folder, config, 8)
    note_start(folder, config, 7)
    (folder.path / "starts.jsonl").unlink()
    note_start(folder, config, 7)


def test_a_changed_config_and_a_torn_line_do_not_count(tmp_path: Path, config: Config) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(2):
        note_start(folder, config, 7)
    note_start(folder, load_config(DARE, ["train.max_starts_without_progress=2", "train.epochs=9"]), 7)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 7, "conf\n')
    for _ in range(2):
        note_start(folder, config, 7)
    unlimited = load_config(DARE, ["train.max_starts_without_progress=0"])
    for _ in range(9):
        note_start(folder, unlimited, 7)


@pytest.mark.parametrize(
    ("error", "kept"), [(None, False), (KeyboardInterrupt(), False), (ValueError("boom"), True)]
)
def test_only_a_failure_is_remembered(
    tmp_path: Path, config: Config, error: BaseException | None, kept: bool
) -> None:
    folder = RunFolder(tmp_path)
    note_start(folder, config, 0)
    try:
        with ending_well(folder, speaks=True):
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    assert (tmp_path / "starts.jsonl").exists() == kept
