"""Several ranks do what one rank does, and a resumed run does what an uninterrupted one does."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.helpers.launching import SETTINGS, losses, overrides, tandemrec, train
from tests.helpers.logs import Shape, enrich, random_rows, small_log, write_log
from trainer.checkpoint.files import read_state

pytestmark = pytest.mark.slow


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, in one piece."""
    return parameters_of(max((run / "checkpoints").glob("step-????????")))


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("ranks") / "log", seed=1, users=40)


@pytest.fixture(scope="module")
def one_rank(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    train(log, run, train__epochs=2)
    return run


def test_two_ranks_equal_one(log: Path, one_rank: Path, tmp_path: Path) -> None:
    two = train(log, tmp_path / "run", ranks=2, train__epochs=2)
    one = losses(one_rank)
    assert len(one) == len(two) > 10
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    mine, theirs = parameters(one_rank), parameters(tmp_path / "run")
    assert mine.keys() == theirs.keys()
    assert sum("embedding_bags" in name and name.endswith("weight") for name in mine) == 4
    for name, tensor in mine.items():
        # The ranks add gradients up in another order; Adagrad magnifies that where they are small.
        assert torch.allclose(tensor.double(), theirs[name].double(), atol=2e-4), name
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["samples"] > 0
    first = json.loads((one_rank / "summary.json").read_text())["validation"]
    assert summary["validation"]["auc"] == pytest.approx(first["auc"], abs=1e-3)


def test_tables_of_one_group_on_two_ranks_keep_their_order(tmp_path: Path) -> None:
    """TWIN's one group lies on both ranks; the vectors it gives must be those of one rank all the same."""
    rows = enrich(random_rows(8, Shape(users=30)), seed=1)
    log = write_log(tmp_path / "log", {"train": rows, "validation": rows}, rich=True)
    run = tmp_path / "two"
    settings = {"train__max_steps": 8, "groups__shared__dim": 4, "groups__shared__init_scale": 1.0}
    two = train(log, run, ranks=2, preset="twin_paper_dare", **settings)
    one = train(log, tmp_path / "one", preset="twin_paper_dare", **settings)
    assert len(one) == 8 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    tables = [n for n in parameters(run) if "embedding_bags" in n and n.startswith("model.")]
    assert tables and all("shared" in name for name in tables)
    trained = json.loads((run / "summary.json").read_text())["validation"]
    done = tandemrec("evaluate", "--run", str(run), "--split", "validation")
    assert done.returncode == 0, done.stderr
    restored = json.loads((run / "summary.json").read_text())["validation"]
    for name in ("auc", "gauc", "logloss", "pcoc"):
        assert restored[name] == pytest.approx(trained[name], abs=1e-6), name


def test_same_seed_same_bits_on_two_ranks(log: Path, tmp_path: Path) -> None:
    """The second run is profiled, which changes nothing and leaves a table and a trace of every rank."""
    a = train(log, tmp_path / "a", ranks=2, train__max_steps=14, train__epochs=2)
    settings = {"data.log": str(log), **SETTINGS, "train.max_steps": 14, "train.epochs": 2}
    words = ["train", "--config", "configs/dare.toml", "--out", str(tmp_path / "b"), "--profile"]
    done = tandemrec(*words, *overrides(settings), ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(a) == 14 and a == losses(tmp_path / "b")
    assert "where 4 steps went" in done.stdout
    for rank in range(2):
        table = (tmp_path / "b" / "profile" / f"rank-{rank}.txt").read_text()
        phases = {line[:31].rstrip() for line in table.splitlines()}
        expected = {
            "read",
            "exchange",
            "lookup attention",
            "search",
            "lookup representation",
            "sequence model",
        }
        assert expected <= phases, table
        trace = gzip.decompress((tmp_path / "b" / "profile" / f"rank-{rank}.json.gz").read_bytes())
        assert json.loads(trace)["traceEvents"]


def test_a_resumed_run_repeats_nothing_and_equals_the_uninterrupted_one(
    log: Path, one_rank: Path, tmp_path: Path
) -> None:
    """Stopped in the second epoch, then continued: same losses bit for bit, same tensors."""
    run, whole = tmp_path / "run", losses(one_rank)
    stop = len(whole) // 2 + 2
    # The schedule looks at epochs only, so that stopping early does not change the rates before.
    settings = {"train__epochs": 2, "checkpoint__every_steps": stop}
    train(log, run, **settings)
    newest = max((run / "checkpoints").glob("step-????????"))
    for path in newest.rglob("*"):
        if path.is_file():
            path.unlink()
    assert losses(run) == whole
    assert train(log, run, **settings) == whole
    reference = parameters(one_rank)
    for name, tensor in parameters(run).items():
        assert torch.equal(tensor, reference[name]), name


def test_a_run_that_is_over_trains_no_more(log: Path, one_rank: Path) -> None:
    before = {name: (one_rank / name).read_text() for name in ("metrics.jsonl", "summary.json")}
    words = ["train", "--config", str(one_rank / "config.toml"), "--out", str(one_rank)]
    done = tandemrec(*words, ranks=2)
    assert done.returncode == 0 and "nothing left to train" in done.stdout
    assert before == {name: (one_rank / name).read_text() for name in before}


def test_a_diverged_run_stops_and_saves_nothing_more(log: Path, tmp_path: Path) -> None:
    settings = {
        "data.log": str(log),
        "train.learning_rate": 1e30,
        "checkpoint.every_steps": 3,
        "train.log_every": 50,
    }
    words = ["train", "--config", "configs/dare.toml", "--out", str(tmp_path / "run"), *overrides(settings)]
    done = tandemrec(*words, *overrides({"data.batch_candidates": 24}), ranks=2)
    assert done.returncode != 0
    assert re.search(r"tandemrec.*: error: step \d+ is not finite on rank", done.stderr)
    assert "No weight was changed and nothing saved" in done.stderr
    assert list((tmp_path / "run").glob("nonfinite-step-*.safetensors"))
    for path in (tmp_path / "run" / "checkpoints").glob("step-????????"):
        assert all(torch.isfinite(tensor).all() for tensor in parameters_of(path).values())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resuming_on_another_number_of_ranks_ends_alike(
    log: Path, one_rank: Path, tmp_path: Path, before: int, after: int
) -> None:
    run, whole = tmp_path / "run", losses(one_rank)
    stop = len(whole) // 2 + 2
    settings = {"train__epochs": 2, "checkpoint__every_steps": stop}
    train(log, run, ranks=before, **settings)
    shutil.rmtree(max((run / "checkpoints").glob("step-????????")))
    resumed = train(log, run, ranks=after, **settings)
    assert len(resumed) == len(whole)
    assert read_state(max((run / "checkpoints").glob("step-????????")))["plan"]["world_size"] == after
    assert max(abs(a - b) for a, b in zip(resumed, whole, strict=True)) < 1e-5


def test_a_config_error_is_one_line_and_exit_code_2(log: Path, tmp_path: Path) -> None:
    done = tandemrec(
        "train", "--config", "configs/dare.toml", "--out", str(tmp_path / "run"),
        *overrides({"data.log": str(log), "model.kk": 3}),
    )  # fmt: skip
    assert done.returncode == 2
    assert "unknown key 'model.kk'; did you mean 'model.k'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_id_stops_training_with_its_place(tmp_path: Path) -> None:
    rows = random_rows(3)
    rows[4]["history_item_id"] = [61] * rows[4]["num_behaviors"]
    bad = write_log(tmp_path / "log", {"train": rows})
    words = ["train", "--config", "configs/dare.toml", "--out", str(tmp_path / "run")]
    done = tandemrec(*words, *overrides({"data.log": str(bad)}), ranks=2)
    assert done.returncode != 0
    assert (
        "row group 1, column history_item_id, row 1: id 61 lies outside the table of 60 rows" in done.stderr
    )


def test_a_log_in_another_order_is_refused_inside_an_epoch(tmp_path: Path) -> None:
    """The same rows in other row groups: a position would mean other blocks."""
    rows, log = random_rows(1, Shape(users=40)), tmp_path / "log"
    write_log(log, {"train": rows, "validation": rows[:5]})
    settings = {"checkpoint__every_steps": 3, "train__max_steps": 3}
    train(log, tmp_path / "run", **settings)
    shutil.rmtree(log)
    write_log(log, {"train": rows, "validation": rows[:5]}, layout=(8, 16))
    changed = {"data.log": str(log), **SETTINGS, "train.max_steps": 6}
    words = ["train", "--config", "configs/dare.toml", "--out", str(tmp_path / "run"), *overrides(changed)]
    done = tandemrec(*words)
    assert done.returncode == 2 and "some would be read twice" in done.stderr
