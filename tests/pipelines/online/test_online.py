"""A stream is trained window by window, whatever happens to the run, and versions of it are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import ConfigError
from pipelines.online.online import for_stream
from tests.helpers.launching import reported, tandemrec
from tests.helpers.streams import write_stream
from tests.programs.online_runs import WINDOWS
from trainer.run_config import Config

NAMES = [f"w{number}" for number in range(WINDOWS)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = reported("tests.programs.online_runs", tmp_path_factory.mktemp("online"))
    return found


def test_each_window_is_measured_and_trained_once_in_order(report: dict[str, Any]) -> None:
    facts = report["facts"]["whole"]
    assert facts["counts"] == {"trained": WINDOWS, "empty": 1}
    trained = [[name, step] for name, outcome, step in facts["windows"] if outcome == "trained"]
    assert [name for name, _ in trained] == NAMES and facts["cursor"] == [WINDOWS, 0, 0]
    # Before its first step, which is after the last one of the window before.
    starts = [0, *(step for _, step in trained[:-1])]
    assert [[step, name] for step, name, _ in facts["measured"]] == [
        [start, name] for start, name in zip(starts, NAMES, strict=True)
    ]
    assert facts["candidates"] == sum(samples for _, _, samples in facts["measured"])
    # Nothing was known of the first window's items; of a later one's, most.
    first, *later = facts["cold"]
    assert first == facts["measured"][0][2] and all(0 < cold < first for cold in later)


def test_a_run_that_is_killed_ends_with_the_same_bits(report: dict[str, Any]) -> None:
    codes = dict(report["codes"])
    assert codes.pop("to its end") == [0]
    assert set(map(tuple, codes.values())) == {(-9,)}, codes
    assert report["facts"]["killed"] == report["facts"]["whole"]
    assert report["said"]["killed"].count("resumed from") >= 5


def test_versions_rise_with_one_a_window_and_every_fourth_whole(report: dict[str, Any]) -> None:
    for name in ("whole", "killed"):
        facts = report["facts"][name]
        steps = [step for _, outcome, step in facts["windows"] if outcome == "trained"]
        assert facts["versions"] == [
            [number, step, number % 4 == 1] for number, step in enumerate(steps, start=1)
        ]


def test_other_ranks_go_on_with_the_same_maps(report: dict[str, Any]) -> None:
    """Two ranks, then one, then three."""
    whole, moved = report["facts"]["whole"], report["facts"]["moved"]
    for key in ("maps", "windows", "counts", "measured", "cold", "cursor", "candidates"):
        assert moved[key] == whole[key], key
    # Sums of gradients round differently.
    assert report["apart"] < 1e-5


def test_a_stream_is_trained_at_constant_rates_in_one_phase(tmp_path: Path) -> None:
    given = Config.model_validate(
        {"train": {"decay": "linear", "warmup": 0.1, "epochs": 3, "tables": {"decay": "cosine"}}}
    )
    config, lines = for_stream(given, tmp_path)
    assert (config.train.decay, config.train.warmup, config.train.epochs) == ("none", 0.0, 1)
    assert config.train.tables.decay is None and config.data.log == tmp_path
    assert lines == [
        "learning rates of a stream are constant: train.warmup, train.decay, train.tables.decay left aside"
    ]
    for section, key in (
        ({"phases": [{"name": "a", "passes": 1}]}, "phases"),
        ({"train": {"early_stopping": {"patience": 2}, "validate_every": 5}}, "train.early_stopping"),
    ):
        with pytest.raises(ConfigError, match=key):
            for_stream(Config.model_validate(section), tmp_path)


def test_lag_is_counted_in_windows_and_in_seconds_of_events(report: dict[str, Any]) -> None:
    windows, seconds = zip(*report["facts"]["whole"]["lag"], strict=True)
    # The empty window lies before the last three.
    assert windows == (6, 5, 4, 2, 1, 0)
    assert list(seconds) == sorted(seconds, reverse=True) and seconds[-1] == 0 < seconds[-2]


def test_a_stream_without_a_window_is_said(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "stream")
    words = [
        "online",
        "--config",
        "configs/dare.toml",
        "--stream",
        str(stream),
        "--out",
        str(tmp_path / "run"),
    ]
    nothing = tandemrec(*words)
    assert nothing.returncode == 2 and "no window with requests is there yet" in nothing.stderr
    assert not (tmp_path / "run").exists()
