"""The section on quality: its numbers are those of `measure`, and what it cannot say it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.quality import analyse
from pipelines.analyze.report.model import Figure, Intervals, Section, Table
from pipelines.analyze.runs import AnalysedRun, open_runs
from pipelines.analyze.scores import RunScores, common, read_sample, scores_of
from tests.helpers.logs import Shape, random_rows, small_log, write_log
from tests.helpers.snapshots import save_run
from trainer.quality.metrics import group_keys, measure
from trainer.quality.scored import Scored, read_scores, write_scores
from trainer.ranks.process_group import process_group

OPTIONS = AnalyzeOptions(device="cpu", sample=0, seed=4)


@contextmanager
def opened(*folders: Path) -> Iterator[tuple[AnalysedRun, ...]]:
    with process_group(device="cpu", alone=True) as ranks:
        yield open_runs(folders, ranks)


def kept(run: AnalysedRun, scored: Scored, step: int = 1, **entry: object) -> Path:
    """As `evaluate` keeps scores of the test split."""
    file = run.folder.scores("test", "sampled" in entry)
    write_scores(scored, file)
    run.folder.update_summary({"test_step": step, "test": entry})
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one config, and another config, of one log, with scores as `evaluate` keeps them."""
    folder = tmp_path_factory.mktemp("quality")
    log = small_log(folder / "log", users=30)
    made = [
        save_run(folder / "dare-1", log, "dare", "train.seed=1"),
        save_run(folder / "dare-2", log, "dare", "train.seed=2"),
        save_run(folder / "twin", log, "twin"),
    ]
    with opened(*made) as runs:
        own, rng = scores_of(runs[0], "test", 0).scored, np.random.default_rng(0)
        for run in runs:
            noise = rng.normal(0, 0.2, own.score.shape)
            kept(run, replace(own, score=(own.score + noise).clip(0, 1).astype(np.float32)))
    return made


@pytest.fixture(scope="module")
def section(folders: list[Path]) -> Section:
    with opened(*folders) as runs:
        return analyse(runs, OPTIONS)


def figure(section: Section, name: str) -> Figure | Table:
    (found,) = (each for each in section.figures if each.name == name)
    return found


def table(section: Section, name: str) -> list[dict[str, object]]:
    found = figure(section, name)
    assert isinstance(found, Table)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def test_the_table_of_runs_has_what_measure_says(section: Section, folders: list[Path]) -> None:
    rows = table(section, "quality_runs")
    assert [row["run"] for row in rows] == ["dare-1", "dare-2", "twin"]
    for row, folder in zip(rows, folders, strict=True):
        scored = read_scores(folder / "scores-test.parquet")
        groups, users = group_keys(scored.user_id, scored.request_id), group_keys(scored.user_id)
        whole = measure(scored.score[:, 0], scored.label[:, 0], groups, users)
        for metric, title in (("auc", "AUC"), ("gauc", "GAUC"), ("logloss", "logloss"), ("pcoc", "PCOC")):
            assert row[title] == pytest.approx(getattr(whole, metric))
            assert row[f"{title} from"] < row[title] < row[f"{title} to"]  # type: ignore[operator]
        assert (row["candidates"], row["users"]) == (whole.samples, scored.users)


def test_slices_are_a_partition_and_seeds_are_one_config(section: Section) -> None:
    rows, whole = table(section, "quality_slices"), table(section, "quality_runs")
    titles = dict.fromkeys(row["slices by"] for row in rows)
    assert [*titles] == [
        "behaviors that the request saw",
        "age of the newest behavior",
        "candidates of the training split with this item",
    ]
    for title in titles:
        of_twin = [row for row in rows if (row["slices by"], row["config"]) == (title, "twin")]
        assert sum(row["candidates"] for row in of_twin) == whole[2]["candidates"]  # type: ignore[misc]
    found = figure(section, "quality_whole")
    assert isinstance(found, Figure)
    auc = found.charts[0]
    assert isinstance(auc, Intervals) and [row.name for row in auc.rows] == ["dare", "twin"]
    assert auc.rows[0].value == pytest.approx(np.mean([row["AUC"] for row in whole[:2]]))  # type: ignore[arg-type]
    assert "no behavior" in {row["slice"] for row in rows}


def test_configs_are_compared_in_a_sentence(section: Section) -> None:
    (auc, gauc, logloss) = table(section, "quality_comparisons")
    assert (auc["first"], auc["second"], auc["metric"]) == ("dare", "twin", "AUC")
    whole = table(section, "quality_runs")
    mean = np.mean([row["AUC"] for row in whole[:2]])  # type: ignore[arg-type]
    assert auc["difference"] == pytest.approx(mean - whole[2]["AUC"])  # type: ignore[operator]
    assert auc["from"] < auc["difference"] < auc["to"]  # type: ignore[operator]
    assert auc["in words"] in [finding.text for finding in section.findings]
    assert (gauc["metric"], logloss["metric"]) == ("GAUC", "logloss")
    assert not section.skipped


def test_the_same_seed_gives_the_same_section(section: Section, folders: list[Path]) -> None:
    with opened(*folders) as runs:
        assert analyse(runs, OPTIONS) == section
        other = analyse(runs, replace(OPTIONS, seed=5))
    assert figure(other, "quality_runs") != figure(section, "quality_runs")


def test_scores_of_evaluate_are_taken_if_they_are_of_this_checkpoint(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", small_log(tmp_path / "log"))
    with opened(folder) as (run,):
        own = scores_of(run, "test", 0)
        assert own.source == f"{own.scored.size} candidates, scored for this report"
        assert own.scored.size == run.manifest.splits["test"].candidates
        better = replace(own.scored, score=(0.1 + 0.8 * own.scored.label).astype(np.float32))
        for step, found in ((1, better), (2, own.scored)):
            kept(run, better, step)
            again = replace(run)  # it has not read the summary yet
            assert np.array_equal(scores_of(again, "test", 0).scored.score, found.score), step
        part = better.part(better.user_id % 2 == 0)
        file = kept(run, part, 1, sampled={"candidates": part.size, "of": better.size})
        assert scores_of(replace(run), "test", 0).source == f"{part.size} candidates of {file.name}"
        file.write_bytes(b"no parquet")
        section = analyse([replace(run)], OPTIONS)
    assert len(section.skipped) == 1 and "holds no scores" in section.skipped[0] and not section.figures


def test_a_sample_of_a_file_has_whole_users_the_same_in_every_file(
    folders: list[Path], tmp_path: Path
) -> None:
    own = read_scores(folders[0] / "scores-test.parquet")
    write_scores(own.part(np.random.default_rng(0).permutation(own.size)), tmp_path / "mixed.parquet")
    limit = own.size // 2
    files = folders[0] / "scores-test.parquet", tmp_path / "mixed.parquet"
    (one, of), (two, _) = (read_sample(file, limit) for file in files)
    assert of == own.size and 0 < one.size < own.size
    assert np.array_equal(one.user_id, two.user_id) and np.array_equal(one.score, two.score)
    assert np.isin(own.user_id, one.user_id).sum() == one.size
    with opened(folders[0]) as (run,):
        some = [RunScores(run, "test", each, "") for each in (own, two.part(two.candidate == 0))]
        shared, every = common(some)
    assert every == own.size and (shared[0].scored.candidate == 0).all()
    assert np.array_equal(shared[0].scored.request_id, shared[1].scored.request_id)


def test_other_labels_and_other_logs_are_not_compared(tmp_path: Path) -> None:
    rows = random_rows(8, Shape(users=9))
    logs = [small_log(tmp_path / "log"), write_log(tmp_path / "other", {"test": rows})]
    folders = [save_run(tmp_path / name, log) for name, log in zip("abc", (logs[0], *logs), strict=True)]
    with opened(*folders) as runs:
        turned = scores_of(runs[1], "test", 0).scored
        kept(runs[1], replace(turned, label=1 - turned.label))
        section = analyse([replace(run) for run in runs], OPTIONS)
    said = "\n".join(section.skipped)
    assert "click is not compared: the runs have different labels of it" in said
    assert "runs of different logs are not compared" in said
    assert "slices by item frequency: " in said  # the other log has no training split
    assert {"quality_whole_1", "quality_whole_2"} <= {each.name for each in section.figures}
    assert not any(each.name.startswith("quality_differences") for each in section.figures)


def test_runs_without_a_candidate_in_common_are_not_measured(folders: list[Path], tmp_path: Path) -> None:
    for number in range(2):
        shutil.copytree(folders[number], tmp_path / str(number))
    own = read_scores(folders[0] / "scores-test.parquet")
    with opened(tmp_path / "0", tmp_path / "1") as runs:
        for run, chosen in zip(runs, (own.user_id < 20, own.user_id >= 20), strict=True):
            kept(run, own.part(chosen))
        section = analyse(runs, OPTIONS)
    assert not section.figures and not section.findings
    assert "no candidate in common" in section.skipped[0] and len(section.skipped) == 1


def test_runs_that_should_be_evaluated_are_named(folders: list[Path], tmp_path: Path) -> None:
    for number in range(2):
        shutil.copytree(folders[number], tmp_path / str(number))
    own = read_scores(folders[0] / "scores-test.parquet")
    with opened(tmp_path / "0", tmp_path / "1") as runs:
        kept(runs[1], own.part(own.user_id < 20))
        section = analyse(runs, OPTIONS)
    assert len(section.skipped) == 1
    assert section.skipped[0].endswith(f"run `tandemrec evaluate` on {runs[1].name} for narrower intervals")


def test_a_split_that_the_log_lacks_is_said(folders: list[Path]) -> None:
    with opened(folders[0]) as runs:
        section = analyse(runs, replace(OPTIONS, split="nothing"))
    assert len(section.skipped) == 1 and "--split nothing" in section.skipped[0]


@pytest.mark.parametrize(("scale", "level"), [(0.4, "alarm"), (1.0, "")])
def test_predictions_out_of_scale_are_an_alarm(
    folders: list[Path], tmp_path: Path, scale: float, level: str
) -> None:
    shutil.copytree(folders[0], tmp_path / "run")
    own = read_scores(folders[0] / "scores-test.parquet")
    score = scale * (own.label.mean() + 0.3 * (own.label - own.label.mean()))
    with opened(tmp_path / "run") as (run,):
        kept(run, replace(own, score=score.astype(np.float32)))
        section = analyse([run], OPTIONS)
    alarms = [finding.level for finding in section.findings if finding.level == "alarm"]
    assert alarms == [level] * bool(level)


def test_predictions_that_fit_the_weights_of_the_loss_are_no_alarm(
    folders: list[Path], tmp_path: Path
) -> None:
    """Negatives that count a third are predicted as a third as many."""
    shutil.copytree(folders[0], tmp_path / "run")
    own = read_scores(folders[0] / "scores-test.parquet")
    weight = np.where(own.label > 0, 1.0, 1 / 3).astype(np.float32)
    score = np.full_like(own.label, (weight * own.label).sum() / weight.sum())
    with opened(tmp_path / "run") as (run,):
        kept(run, replace(own, score=score, weight=weight))
        section = analyse([run], OPTIONS)
    (found,) = (each for each in section.findings if each.figure == "quality_calibration")
    assert found.level == "notice" and found.text.endswith("; with the weights of the loss, 1.00 times")


def test_a_slice_that_is_out_of_scale_is_named(folders: list[Path], tmp_path: Path) -> None:
    """Of a model that is calibrated on the whole."""
    shutil.copytree(folders[0], tmp_path / "run")
    own = read_scores(folders[0] / "scores-test.parquet")
    few = own.history < 10
    score = np.where(few, 0.4 * own.label[few].mean(), 1.0)[:, None]
    score[~few] = (own.label.sum() - score[few].sum()) / (~few).sum()
    with opened(tmp_path / "run") as (run,):
        kept(run, replace(own, score=score.astype(np.float32)))
        section = analyse([run], OPTIONS)
    found = [finding for finding in section.findings if "behaviors that the request saw" in finding.text]
    assert {finding.level for finding in found} == {"notice"}
    assert (
        found[0].text.startswith("behaviors that the request saw, ") and "times the labels" in found[0].text
    )
    rates = re.search(r"positive are ([\d.]+)% of these candidates and ([\d.]+)% of all", found[0].text)
    assert rates and float(rates[2]) == pytest.approx(100 * own.label.mean(), abs=0.06)
