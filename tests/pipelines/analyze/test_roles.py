"""The sections on roles: entanglement, gradients and search, of runs with different models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.analyze import entanglement, gradients, search
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Figure, Section, Table
from pipelines.analyze.runs import open_runs
from tests.helpers.logs import FeatureInfo, Shape, random_rows, write_log
from tests.helpers.snapshots import save_run
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder

OPTIONS = AnalyzeOptions(split="train", sample=0)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks and three domains."""
    rows, rng = random_rows(4, Shape(users=20, candidates=15)), np.random.default_rng(4)
    for row in rows:
        counts = row["request_num_candidates"]
        row["candidate_domain_id"] = [rng.integers(0, 3, count).tolist() for count in counts]
        row["label_buy"] = [rng.choice([0.0, 1.0], count).tolist() for count in counts]
    domain = {"domain_id": FeatureInfo(rows=3, side="candidate")}
    place = tmp_path_factory.mktemp("roles") / "log"
    return write_log(place, {"train": rows}, more=domain, tasks=["click", "buy"])


def by_name(section: Section) -> dict[str, Figure | Table]:
    return {figure.name: figure for figure in section.figures}


def entry(attention: float, cosine: float) -> dict[str, Any]:
    return {
        "norm": {"groups.shared": {"attention": attention, "representation": 1.0}},
        "cosine": {"groups.shared": cosine},
        "conflict": {"groups.shared": {"rows": 0.75, "steps": 1.0}},
        "steps": 2,
    }


def test_runs_of_several_models_side_by_side(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ENOUGH", 8)
    paths = [save_run(tmp_path / "twin-17", log, "twin_paper_dare", "train.seed=17"), tmp_path / "twin-18"]
    shutil.copytree(*paths)
    twin = RunFolder(paths[1]).read_config()
    again = twin.train.model_copy(update={"seed": 18})
    RunFolder(paths[1]).write_config(twin.model_copy(update={"train": again}))
    for path, norm in zip(paths, (0.1, 0.3), strict=True):
        lines = [{"step": step, "split": "train", "gradients": entry(norm, -0.1)} for step in (2, 4)]
        lines[0]["dominance"] = {"mean": {"groups.shared": {"click": 0.9, "buy": 0.1}}, "dominated": {}}
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    paths.append(
        save_run(tmp_path / "stem", log, "stem", "tasks.click.weight=1", "tasks.conversion.label=buy")
    )
    with process_group(device="cpu", alone=True) as ranks:
        runs = open_runs(paths, ranks)
        assert [run.label for run in runs] == ["twin", "twin", "stem"]
        _gradients(gradients.analyse(runs[:2], OPTIONS))
        _entanglement(entanglement.analyse(runs[2:3], OPTIONS))
        _search(search.analyse(runs[:1], OPTIONS))


def _gradients(section: Section) -> None:
    figures = by_name(section)
    row = figures["gradients-by-table"].rows[0]  # type: ignore[union-attr]
    assert row[:2] == ("twin", "groups.shared")
    assert row[2:] == pytest.approx((0.2, 1.0, 5.0, -0.1, 0.75, 1.0))
    (line, other) = figures["gradients-norms"].charts[0].lines  # type: ignore[union-attr]
    assert line.y == pytest.approx((0.2, 0.2)) and line.low == pytest.approx((0.1, 0.1))
    assert other.x == (2.0, 4.0)
    assert any("5.0 times as hard" in finding.text for finding in section.findings)
    assert {"gradients-dominance", "gradients-conflict", "gradients-probe"} <= set(figures)
    matrix = np.array(figures["gradients-cosines"].charts[0].values)  # type: ignore[union-attr]
    np.testing.assert_allclose(matrix, matrix.T)
    assert (np.diag(matrix) == 1).all()


def _entanglement(section: Section) -> None:
    figures = by_name(section)
    bars = figures["entanglement-distances"].charts[0]  # type: ignore[union-attr]
    assert bars.groups[1:3] == ("click alone", "conversion alone")  # type: ignore[union-attr]
    assert {"attention", "representation / shared"} < set(bars.bars)  # type: ignore[union-attr]
    assert {"entanglement-gates", "entanglement-correlations"} < set(figures)
    assert any("are nearer than those of" in finding.text for finding in section.findings)


def _search(section: Section) -> None:
    figures = by_name(section)
    rows = {row[0]: row for row in figures["search-quality"].rows}  # type: ignore[union-attr]
    assert {"twin", "newest first", "random"} < set(rows)
    assert 0 < rows["twin"][3] < 1 and 0 < rows["twin"][-1] < 1
    assert {"search-by-category", "search-by-recency", "search-relevance", "search-discriminability"} < set(
        figures
    )
