"""AUC, GAUC, NE and PCOC are those of all candidates, on however many ranks they were scored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.quality.evaluate as evaluate_module
from embeddings.agreement import from_rank_0
from embeddings.errors import TandemError
from pipelines.evaluate import evaluate
from pipelines.train import train
from tests.helpers.launching import ROOT, SETTINGS, losses
from tests.helpers.logs import Shape, random_rows, small_log, write_log
from tests.trainer.data.test_reader_kill import LIMIT_S, free_port, running
from trainer.config.sections import DataConfig
from trainer.quality import baseline_files, runs, score_files, streamed
from trainer.quality.evaluate import shared_metrics
from trainer.quality.scored import Scored
from trainer.ranks.process_group import gather_rows, process_group

WORLDS = (1, 2, 4)


def _rank(rank: int, world_size: int, port: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One rank as a launcher starts it; what the job returns goes to `<last argument>.<rank>`."""
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in launcher.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    Path(f"{arguments[-1]}.{rank}").write_text(json.dumps(job(*arguments)), encoding="utf-8")


def on_ranks(world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `job` returns on each of several ranks; its last argument is a path nobody else uses."""
    port = free_port()
    with running(
        _rank, [(rank, world_size, port, job, arguments) for rank in range(world_size)]
    ) as processes:
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [0] * world_size
    return [json.loads(Path(f"{arguments[-1]}.{rank}").read_text()) for rank in range(world_size)]


def _evaluate(run: Path, _: Path) -> Any:
    entry = evaluate(run, "test")
    of_domains = {
        f"{d}/{n}": v for d, own in entry["by_domain"].items() for n, v in own["tasks"]["click"].items()
    }
    return {**entry["tasks"]["click"], **of_domains, "mean": entry["over_domains"]["mean_auc"]}


def _evaluate_from_files(run: Path, _: Path) -> Any:
    """As if memory held hardly anything."""
    for module in (evaluate_module, score_files, baseline_files):
        module.IN_MEMORY = 50  # type: ignore[attr-defined]
    # Several runs a rank, several pieces and buckets.
    streamed._BUCKET, runs._GROUP, runs._PIECE, runs._RUN = 64, 16, 40, 90
    return evaluate(run, "test")


def _train(log: Path, run: Path, sharding: str, _: Path) -> None:
    settings = {**SETTINGS, "data.log": str(log), "data.sharding": sharding, "train.epochs": 2}
    settings |= {"data.domain": "category_id", "groups.attention.init": "uniform"}
    train(ROOT / "configs/dare.toml", run, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def _measure(log: Path, _: Path) -> Any:
    """Metrics of 997 synthetic candidates of which every rank holds some, the last rank none."""
    rng = np.random.default_rng(5)
    score = rng.uniform(size=(997, 1)).astype(np.float32).round(3)
    label = (rng.uniform(size=(997, 1)) < score).astype(np.float32)
    user, request = rng.integers(0, 40, 997), rng.integers(0, 3, 997)
    with process_group(60) as ranks:
        holders = max(1, ranks.world_size - 1)
        mine = np.arange(997) % holders == ranks.rank
        floats = gather_rows(torch.from_numpy(np.concatenate([score, label], axis=1)[mine])).numpy()
        names = np.stack([user, request, np.arange(997), user, user, user % 3], axis=1)
        keys = gather_rows(torch.from_numpy(names[mine])).numpy()
        assert len(floats) == len(keys) == (997 if ranks.speaks else 0 if ranks.world_size > 1 else 997)
        *keys, domain = keys.T
        scored = Scored(floats[:, :1], floats[:, 1:], *keys, ("click",), domain).in_order()
        reader = SimpleNamespace(config=DataConfig(log=log, domain="nowhere"), sample=None)
        measured = shared_metrics(scored, reader)  # type: ignore[arg-type]
        return {**measured.tasks["click"].as_dict(), **measured.entry()["by_domain"]}


def _refuse(_: Path) -> Any:
    def refuse() -> None:
        raise TandemError("no")

    with process_group(60):
        try:
            from_rank_0(refuse)
        except TandemError as error:
            return str(error)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    # Domains of the test split are large enough to be compared.
    splits = {
        "train": random_rows(1, Shape(users=40)),
        "test": random_rows(2, Shape(users=20, candidates=20)),
    }
    log = write_log(folder / "log", {**splits, "validation": splits["train"][:20]})
    on_ranks(1, _train, log, folder / "run", "steps", folder / "trained")
    return folder / "run"


def test_evaluate_finds_the_same_on_1_2_and_4_ranks(run: Path, tmp_path: Path) -> None:
    found = {world: on_ranks(world, _evaluate, run, tmp_path / f"e{world}") for world in WORLDS}
    one = found[1][0]
    assert one["samples"] > 100 and 0 < one["positives"] < one["samples"] and one["groups"] > 10
    assert sum(one[f"{domain}/samples"] for domain in range(9)) == one["samples"] and 0 < one["mean"] < 1
    for world in WORLDS:
        for metrics in found[world]:
            assert metrics == found[world][0], "ranks disagree"
            for name, value in metrics.items():
                # The scores themselves may differ in their last bit, since batches are cut otherwise.
                assert value == pytest.approx(one[name], abs=1e-6, nan_ok=True), (world, name)
    print({world: [metrics[0][name] - one[name] for name in one] for world, metrics in found.items()})


@pytest.mark.parametrize("world", [1, 2])
def test_a_split_that_no_memory_holds_is_evaluated_alike(run: Path, tmp_path: Path, world: int) -> None:
    def kept() -> dict[str, Any]:
        return {
            key: value
            for key, value in json.loads((run / "summary.json").read_text()).items()
            if "test" in key
        }

    on_ranks(world, _evaluate, run, tmp_path / "memory")
    in_memory, scores = kept(), pq.read_table(run / "scores-test.parquet")
    (run / "scores-test.parquet").unlink()
    (run / "summary.json").unlink()
    on_ranks(world, _evaluate_from_files, run, tmp_path / "files")
    assert pq.read_table(run / "scores-test.parquet").equals(scores)
    assert differing(kept(), in_memory) == []
    assert [path.name for path in run.iterdir() if "tmp" in path.name] == []


def differing(found: Any, expected: Any, name: str = "") -> list[str]:
    """The names of values that lie further apart than adding up in another order explains."""
    if isinstance(expected, dict):
        if list(found) != list(expected):
            return [f"{name}: {list(found)}"]
        return [
            far for key, value in expected.items() for far in differing(found[key], value, f"{name}/{key}")
        ]
    return [] if found == expected or found == pytest.approx(expected, rel=1e-10, abs=1e-12) else [name]


def test_metrics_of_given_scores_are_bit_equal_on_1_2_and_4_ranks(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    found = [
        metrics for world in WORLDS for metrics in on_ranks(world, _measure, log, tmp_path / f"m{world}")
    ]
    assert found == [found[0]] * sum(WORLDS)
    assert found[0]["samples"] == 997 and 0.7 < found[0]["auc"] < 0.95
    assert sum(found[0][domain]["samples"] for domain in "012") == 997


def test_an_error_of_rank_0_is_one_on_every_rank(tmp_path: Path) -> None:
    assert on_ranks(2, _refuse, tmp_path / "r") == ["no", "no"]


@pytest.mark.parametrize("sharding", ["steps", "row_groups"])
def test_training_ends_where_ranks_have_nothing_to_do(tmp_path: Path, sharding: str) -> None:
    """Two users in one row group, fewer than the ranks: most ranks have no block in any step."""
    rows = random_rows(2, Shape(users=2))
    log = write_log(tmp_path / "log", {"train": rows, "validation": rows[:1]})
    whole = tmp_path / "one"
    on_ranks(1, _train, log, whole, sharding, tmp_path / "a")
    on_ranks(4, _train, log, tmp_path / "four", sharding, tmp_path / "b")
    one, four = losses(whole), losses(tmp_path / "four")
    assert len(one) == len(four) > 1
    assert max(abs(a - b) for a, b in zip(one, four, strict=True)) < 1e-5
