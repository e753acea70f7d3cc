"""A sharded model on a GPU: where it lies, pipelines against each other, saves, evaluation, waits."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.caches import Place, place_tables
from benchmarks.gpu.check import Check
from benchmarks.gpu.logs import small_log
from benchmarks.gpu.measure import host_waits
from benchmarks.gpu.sharded import CACHED
from benchmarks.gpu.training import small_job
from embeddings.errors import ConfigError
from tests.helpers.launching import launched
from trainer.loop.pipeline import kind_for
from trainer.ranks.process_group import process_group

pytestmark = pytest.mark.gpu
STEPS, SEED = 10, 3


@pytest.fixture
def check(tmp_path: Path) -> Check:
    tmp_path.joinpath("work").mkdir()
    return Check(False, tmp_path / "out", tmp_path / "work")


def test_one_rank_takes_the_first_gpu_and_everything_lies_there(check: Check, tmp_path: Path) -> None:
    with process_group(60) as ranks:
        assert ranks.device == torch.device("cuda", 0)
        made = small_job(check, ranks, tmp_path)
        assert {weight.device for weight in made.sharded.model.parameters()} == {ranks.device}
        assert {buffer.device for buffer in made.sharded.model.buffers()} <= {ranks.device}
        assert kind_for("auto", ranks.device) == "sparse_dist"


@pytest.mark.gpu2
def test_two_ranks_train_on_a_gpu_each_as_one_does(check: Check, tmp_path: Path) -> None:
    log = small_log(check)
    files = [tmp_path / f"{ranks}.json" for ranks in (1, 2)]
    for ranks, out in enumerate(files, 1):
        done = launched("tests.programs.preset_steps", str(out), f"dare@{log}", ranks=ranks, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (json_losses(out) for out in files)
    assert one == pytest.approx(two, rel=1e-3)


def json_losses(path: Path) -> list[float]:
    losses: list[float] = json.loads(path.read_text())["dare"]["losses"]
    return losses


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sparse_dist", []),
        ("sparse_dist", CACHED),
        ("prefetch", [*CACHED, 'train.pipeline="prefetch"']),
    ],
    ids=["sparse_dist", "cached tables", "cached tables, prefetch"],
)
def test_pipelines_and_caches_train_as_the_plain_loop_does(
    kind: str, settings: list[str], check: Check, tmp_path: Path
) -> None:
    """With an evaluation in the midst, and a second epoch after it."""
    found = []
    for way, more in (("none", []), (kind, settings)):
        with place_tables(Place("fused")), process_group(60) as ranks:
            made = small_job(check, ranks, tmp_path, way, more)
            losses = made.train_and_pause(islice(made.reader("train", SEED).steps(), STEPS), after=4)
            scores = made.scores()
            losses += made.train(islice(made.reader("train", SEED).steps(), STEPS))
            found.append((losses, scores))
    (plain, plain_scores), (losses, scores) = found
    assert losses == pytest.approx(plain, rel=1e-3)
    assert scores == pytest.approx(plain_scores, abs=1e-3)


def test_prefetching_without_cached_tables_is_refused_or_harmless(check: Check, tmp_path: Path) -> None:
    found = []
    for kind in ("none", "prefetch"):
        with process_group(60) as ranks:
            try:
                made = small_job(check, ranks, tmp_path, kind)
                found.append(made.train(islice(made.reader("train", SEED).steps(), STEPS)))
            except ConfigError as problem:
                assert "prefetch" in str(problem)
                found.append(found[0])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_no_step_waits_for_the_device_outside_of_the_guard(check: Check, tmp_path: Path) -> None:
    with process_group(60) as ranks:
        made = small_job(check, ranks, tmp_path, "sparse_dist")
        steps = list(islice(made.reader("train", SEED).steps(), STEPS))
        train = made.pipeline.train(iter(steps))
        for _ in range(STEPS // 2):
            next(train)
        with host_waits() as waited:
            for _ in range(3):
                next(train)
        train.close()
    assert not {
        line: times for line, times in waited.items() if line.startswith(("trainer/model", "embeddings"))
    }
