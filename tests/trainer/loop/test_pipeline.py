"""Train pipelines, the check before any weight changes, clipping and precision: all on one rank and on two.

One launch for each number of ranks does all cases (`tests.programs.step_cases`); tests look at what it found.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines.train
from embeddings.errors import ConfigError
from tests.helpers.launching import SETTINGS, launched, losses, overrides, train
from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.programs.step_cases import MODELS, WAYS
from tests.trainer.test_ranks import parameters
from trainer.loop.pipeline import Pipeline, kind_for
from trainer.loop.validation import Validation
from trainer.quality.domains import SplitMetrics
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config

Found = dict[str, Any]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = enrich(random_rows(8, Shape(users=12)), seed=1)
    return write_log(
        tmp_path_factory.mktemp("log") / "log", {"train": rows, "validation": rows[:2]}, rich=True
    )


@pytest.fixture(scope="module")
def found(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    results = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("cases") / "found.json"
        done = launched("tests.programs.step_cases", str(log), str(out), ranks=ranks, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        results[ranks] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_way_to_train_gives_the_same_bits(found: dict[int, Found], ranks: int, model: str) -> None:
    """A bare backward pass, one that is cut at the tables and checked, and a pipeline that reads ahead.

    An epoch and the beginning of another, with an evaluation inside each; weights, optimizer states and
    buffers of every rank.
    """
    bare, *others = (found[ranks]["ways"][model][way] for way in WAYS)
    assert len(bare["losses"]) >= 10 and len(set(bare["losses"])) == len(bare["losses"])
    assert len(set(bare["digests"])) == ranks
    for other in others:
        for what in ("losses", "scores", "digests"):
            assert other[what] == bare[what], what


def test_steps_without_a_block_for_a_rank_are_among_them(found: dict[int, Found]) -> None:
    assert found[1]["ways"]["selected"]["none"]["uncounted"] == 0
    assert found[2]["ways"]["selected"]["none"]["uncounted"] > 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_lookups_before_the_search_are_pipelined_and_no_others(found: dict[int, Found], ranks: int) -> None:
    expected = {
        "selected": ["attention"],
        "full": ["attention", "representation"],
        "context, few features": ["attention", "user"],
        "sets, attention of one task, product": ["attention", "representation"],
        "sets of tasks, prior": ["attention", "user"],
        "auxiliary, batch norm": ["attention", "representation"],
    }
    for model, names in expected.items():
        modules = found[ranks]["ways"][model]["sparse_dist"]["modules"]
        assert modules == [f"collections.{name}" for name in names], model


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_read_ahead_is_not_lost_by_stopping(found: dict[int, Found], ranks: int) -> None:
    whole = found[ranks]["ways"]["selected"]["none"]["losses"]
    for way, stopped in found[ranks]["stopped"].items():
        assert stopped["losses"] == whole[: len(stopped["losses"])], way
        assert len(stopped["losses"]) == len(whole) - 5
    assert found[ranks]["stopped"]["none"]["digests"] == found[ranks]["stopped"]["sparse_dist"]["digests"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["none", "sparse_dist"])
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("loss", "the loss (nan), the gradient of group attention, the gradient of group representation"),
        ("vectors", "the gradient of group representation"),
        ("dense", "the gradient of branches.main.sequence.time.tables.position"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    found: dict[int, Found], ranks: int, way: str, kind: str, problem: str
) -> None:
    """One rank's NaN stops all; with batch normalisation (kind `loss`) its statistics stay too."""
    bad = found[ranks]["bad"][f"{kind} {way}"]
    assert bad["done"] == 3
    assert bad["before"] == bad["after"] and len(bad["before"]) == ranks
    guilty = range(ranks) if kind == "dense" else [ranks - 1]
    message = bad["messages"][0]
    assert bad["messages"] == [message] * ranks
    assert message.startswith("step 4 is not finite on ") and "\n" not in message
    suffix = (lambda rank: f"-rank-{rank}") if ranks > 1 else (lambda rank: "")
    assert sorted(bad["kept"]) == [f"nonfinite-step-4{suffix(rank)}.safetensors" for rank in guilty]
    for rank in range(ranks):
        assert (f"rank {rank}: {problem} (its batch is kept in " in message) == (rank in guilty)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_batch_is_kept_for_replay_and_its_files_are_named(found: dict[int, Found], ranks: int) -> None:
    bad = found[ranks]["bad"]["dense none"]
    kept = bad["kept"][
        "nonfinite-step-4.safetensors" if ranks == 1 else "nonfinite-step-4-rank-0.safetensors"
    ]
    assert kept["same"] and kept["step"] == 4 and kept["counted"]
    assert kept["sources"] == bad["sources"] and bad["sources"]
    for file, row_group in bad["sources"]:
        assert file in bad["messages"][0] and str(row_group) in bad["messages"][0]


def norm(gradients: dict[str, list[float]]) -> float:
    return math.sqrt(sum(x * x for gradient in gradients.values() for x in gradient))


@pytest.mark.parametrize("ranks", [1, 2])
def test_dense_gradients_are_clipped_by_their_global_norm(found: dict[int, Found], ranks: int) -> None:
    free, clipped, large = (found[ranks]["clip"][name] for name in ("free", "clipped", "large"))
    whole = norm(free["gradients"])
    assert whole > 0.1
    for name, gradient in free["gradients"].items():
        assert np.allclose(np.array(gradient) * 0.01 / whole, clipped["gradients"][name], atol=1e-7), name
    assert free["tables"] == clipped["tables"]
    # Squares of these overflow: the norm is found all the same.
    assert norm(large["gradients"]) == pytest.approx(0.01, rel=1e-3)


def test_clipping_on_two_ranks_is_that_on_one(found: dict[int, Found]) -> None:
    one, two = (found[ranks]["clip"]["clipped"]["gradients"] for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert np.allclose(gradient, two[name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_trains_near_fp32_with_weights_and_lookups_in_fp32(found: dict[int, Found], ranks: int) -> None:
    fp32, bf16 = (found[ranks]["precision"][kind] for kind in ("fp32", "bf16"))
    assert bf16["lookups"] == bf16["gradients"] == ["torch.float32"]
    assert bf16["losses"] != fp32["losses"]
    assert np.allclose(bf16["losses"], fp32["losses"], rtol=0.05)


def test_prefetching_needs_cuda() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ConfigError, match=r'train.pipeline = "prefetch".*use "none" or "sparse_dist"'):
        kind_for("prefetch", cpu)
    assert [kind_for("auto", device) for device in (cpu, cuda)] == ["none", "sparse_dist"]
    assert kind_for("prefetch", cuda) == "prefetch"


def test_a_run_measures_with_no_batch_under_way(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline ends before a validation: rows in a cache would be taken for those of the validation."""
    ahead, measure = [], Validation.measure

    def noted(self: Validation, pipeline: Pipeline) -> SplitMetrics:
        ahead.append(pipeline.ahead)
        return measure(self, pipeline)

    monkeypatch.setattr(Validation, "measure", noted)
    settings = {
        **SETTINGS, "data.log": str(log), "data.batch_candidates": 6, "train.pipeline": "sparse_dist",
        "train.validate_every": 3, "train.max_steps": 7,
    }  # fmt: skip
    config = load_config(Path("configs/dare.toml"), overrides(settings)[1::2])
    with process_group() as ranks:
        pipelines.train.run(config, tmp_path / "run", ranks)
    assert ahead == [0, 0, 0]


def test_a_run_resumed_inside_an_epoch_and_a_schedule_equals_the_uninterrupted_one(
    log: Path, tmp_path: Path
) -> None:
    """The pipeline has read beyond the checkpoint, whose cursor must be that of the trained step."""
    settings = {
        "train__epochs": 1, "checkpoint__every_steps": 3, "train__decay": "cosine",
        "train__optimizer": "adamw", "train__weight_decay": 0.1,
        "train__tables__warmup_steps": 5, "train__tables__decay": "none",
        "train__max_gradient_norm": 0.5, "train__pipeline": "sparse_dist", "data__batch_candidates": 12,
    }  # fmt: skip
    whole = train(log, tmp_path / "whole", **{**settings, "train__pipeline": "none"})
    run = tmp_path / "run"
    assert train(log, run, **settings) == whole and len(whole) > 5
    for path in max((run / "checkpoints").glob("step-????????")).rglob("*"):
        if path.is_file():
            path.unlink()
    assert train(log, run, **settings) == losses(tmp_path / "whole")
    reference = parameters(tmp_path / "whole")
    for name, tensor in parameters(run).items():
        assert torch.equal(tensor, reference[name]), name
