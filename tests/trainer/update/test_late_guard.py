"""A guard whose answer the host reads a step late, as on CUDA: the same contract as one that waits.

One launch for each number of ranks does all cases (`tests.programs.late_cases`); tests look at what it found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pipelines.train
import trainer.loop.loop
from embeddings.errors import DataError
from tests.helpers.launching import SETTINGS, launched, overrides
from tests.helpers.logs import Shape, enrich, random_rows, small_log, write_log
from tests.helpers.stand_in import _line
from tests.programs.late_cases import BAD
from tests.programs.step_cases import nan_weight
from tests.trainer.update.test_step import Fake
from trainer.config.sections import TrainConfig
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader, Step
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import load_config
from trainer.update.guard import Gradients, Guard
from trainer.update.step import make_optimizer, run_optimizer

Found = dict[str, Any]


def rich_log(path: Path) -> Path:
    rows = enrich(random_rows(8, Shape(users=20)), seed=1)
    return write_log(path, {"train": rows, "validation": rows[:2]}, rich=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    folder = tmp_path_factory.mktemp("late")
    log, results = rich_log(folder / "log"), {}
    for ranks in (1, 2):
        out = folder / str(ranks) / "found.json"
        out.parent.mkdir()
        done = launched("tests.programs.late_cases", str(log), str(out), ranks=ranks, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        results[ranks] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_a_good_run_gives_the_same_bits_late_or_not(found: dict[int, Found], ranks: int) -> None:
    """With running statistics, clipping and half precision, in both pipelines: weights, states, scores."""
    waited, *others = found[ranks]["good"].values()
    assert len(waited["losses"]) > 6 and len(set(waited["losses"])) == len(waited["losses"])
    assert others == [waited] * 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_batch_waits_while_a_model_is_measured(found: dict[int, Found], ranks: int) -> None:
    for way in found[ranks]["good"].values():
        assert len(way["ahead"]) >= 3 and set(way["ahead"]) == {0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_in_a_pipeline_gives_the_same_scores(found: dict[int, Found], ranks: int) -> None:
    for way in found[ranks]["good"].values():
        assert way["scores"][::2] == way["scores"][1::2]
        assert way["scores"][0] and way["scores"][0] != way["scores"][2]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_step_changes_nothing_and_is_named(found: dict[int, Found], ranks: int, name: str) -> None:
    waited, plain, ahead = (
        found[ranks]["bad"][f"{name} {way}"] for way in ("False none", "True none", "True sparse_dist")
    )
    kind, at, _ = BAD[name]
    assert [waited["done"], plain["done"], ahead["done"]] == [at - 1, at, at]
    guilty = range(ranks) if kind == "dense" else [ranks - 1]
    kept = [f"nonfinite-step-{at}-rank-{rank}.safetensors" for rank in guilty]
    for each in (waited, plain, ahead):
        assert each["before"] == each["after"] and len(set(each["after"])) == ranks
        assert each["messages"] == waited["messages"] == [waited["messages"][0]] * ranks
        assert each["messages"][0].startswith(f"step {at} is not finite on ")
        assert list(each["kept"]) == (kept if ranks > 1 else [f"nonfinite-step-{at}.safetensors"])
        # Rank 0 has its own weights only; the last rank's last one was spoiled.
        if ranks == 1:
            weights = each["weights"]
            assert list(each["kept"].values()) == [
                weights if kind in ("vectors", "dense") else [*weights[:-1], -1.0]
            ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_late_check_asks_no_tensor_for_a_number(found: dict[int, Found], ranks: int) -> None:
    """Neither the check nor clipping, the scale of half precision or the update of any weight."""
    assert found[ranks]["asked"]["true"] == [0, 0, 0]
    assert min(found[ranks]["asked"]["false"]) > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_device_leaves_a_bad_step_out_by_itself(found: dict[int, Found], ranks: int) -> None:
    """Where nobody reads the answer, steps after a bad one are to the bit what they were without it."""
    bad, never = found[ranks]["left out"]
    assert bad == never and bad["losses"][0] != bad["losses"][1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD)
def test_a_bad_step_changes_nothing_on_a_gpu(bad_on_gpu: Found, name: str) -> None:
    _, at, _ = BAD[name]
    for way in ("True none", "True sparse_dist"):
        each = bad_on_gpu["bad"][f"{name} {way}"]
        assert each["done"] == at and each["before"] == each["after"], way
        assert each["messages"][0].startswith(f"step {at} is not finite on rank 0: ")


@pytest.fixture(scope="module")
def bad_on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("gpu")
    log = rich_log(folder / "log")
    done = launched("tests.programs.late_cases", str(log), str(folder / "found.json"), "bad", timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result: Found = json.loads((folder / "found.json").read_text())
    return result


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "a report": ({"train.log_every": 1}, 2),
    "a validation": ({"train.validate_every": 2}, 2),
    "a save": ({"checkpoint.every_steps": 2}, 2),
    "the next step": ({}, 2),
    "the end of an epoch": ({}, 3),
    "the last step": ({"train.max_steps": 2}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_made_of_a_bad_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_log: Path
) -> None:
    """Neither a line of metrics nor a checkpoint, whatever comes after the bad step."""
    changes, at = CASES[case]
    settings = {**SETTINGS, "data.log": str(quick_log), "train.log_every": 1000, "train.epochs": 2, **changes}
    config = load_config(Path("configs/dare.toml"), overrides(settings)[1::2])
    read = SequenceLogReader._steps

    def bad(reader: SequenceLogReader, cursor: Cursor) -> Iterator[Step]:
        for number, step in enumerate(read(reader, cursor), 1):
            assert reader.split != "train" or step.last == (number == 3)
            yield nan_weight(step) if reader.split == "train" and number == at else step

    monkeypatch.setattr(SequenceLogReader, "_steps", bad)
    monkeypatch.setattr(trainer.loop.loop, "Guard", partial(Guard, late=True))
    monkeypatch.setattr(trainer.loop.loop, "run_optimizer", partial(run_optimizer, fused=True))
    run = tmp_path / "run"
    with process_group() as ranks, pytest.raises(DataError, match=f"^step {at} is not finite"):
        pipelines.train.run(config, run, ranks)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ([1] if case == "a report" else [])
    assert not list((run / "checkpoints").glob("step-*"))


class Asked(TorchDispatchMode):
    """Notes the line of our code that asks a tensor for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_local_scalar_dense":
            self.lines.append(_line())
        return func(*args, **(kwargs or {}))


def test_the_loop_asks_for_no_number_between_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_log: Path
) -> None:
    """What the stand-in does not see: what is done around a step. Kernels of a CPU may ask."""
    settings = {**SETTINGS, "data.log": str(quick_log), "train.log_every": 1000, "model.lookup": "full"}
    config = load_config(Path("configs/dare.toml"), overrides(settings)[1::2])
    monkeypatch.setattr(trainer.loop.loop, "Guard", partial(Guard, late=True))
    monkeypatch.setattr(trainer.loop.loop, "run_optimizer", partial(run_optimizer, fused=True))
    until: dict[int, list[str]] = {}
    with process_group() as ranks, Asked() as asked:

        def note(step: int) -> None:
            until[step] = list(asked.lines)

        pipelines.train.run(config, tmp_path / "run", ranks, note)
    of_step_2 = until[2][len(until[1]) :]
    around = ("trainer/loop/loop.py", "trainer/update/", "trainer/checkpoint/background.py")
    assert not [line for line in of_step_2 if line.startswith(around)]
    assert any(line.startswith(around) for line in asked.lines)


@pytest.fixture(scope="module")
def quick_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("quick") / "log", seed=1, users=8)


def test_a_guard_is_late_on_cuda_and_needs_the_optimizer_that_can_skip(
    found: dict[int, Found], tmp_path: Path
) -> None:
    cpu, cuda = (Guard(Ranks(0, 1, 1, torch.device(kind)), tmp_path) for kind in ("cpu", "cuda"))
    assert [cpu.reads_late, cuda.reads_late] == [False, True]
    assert "fused=True" in found[1]["unfused"]


def test_a_rank_without_rows_is_finite(tmp_path: Path) -> None:
    guard = Guard(Ranks(0, 1, 1, torch.device("cpu")), tmp_path)
    none = {"a": torch.zeros(0, 4)}
    step = Step(None, True, Cursor())  # type: ignore[arg-type] # not looked at
    checked = guard.check(1, step, Gradients(torch.ones(()), none, {}, none), largest=True)
    guard.judge(checked)
    assert checked.largest is not None and float(checked.largest) == float(checked.alarm) == 0.0


def trained(fused: bool, optimizer: str, steps: int, state: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A small model after steps of seeded gradients, from a state where one is given; -> it and its state."""
    model = Fake()
    settings = {"optimizer": optimizer, "weight_decay": 0.1 if optimizer == "adamw" else 0.0}
    made = make_optimizer(model, TrainConfig(learning_rate=0.01, **settings), fused)
    if state is not None:
        nn.Module.load_state_dict(model, state["model"])
        made.load_state_dict(state["optim"])
    rng = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for parameter in (model.matrix, model.bias):
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        made.step()
    return model, {"model": dict(model.state_dict()), "optim": made.state_dict()}


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_either_adam_fits_the_other(optimizer: str, fused: bool) -> None:
    """As one of a GPU does a CPU; the optimizers differ in rounding only."""
    _, saved = trained(fused, optimizer, 3)
    _, of_other = trained(not fused, optimizer, 3)
    flat = {
        name: [(key, value.dtype, value.shape) for key, value in state.items()]
        for name, state in saved["optim"]["state"].items()
    }
    assert flat == {
        name: [(key, value.dtype, value.shape) for key, value in state.items()]
        for name, state in of_other["optim"]["state"].items()
    }
    same, _ = trained(fused, optimizer, 2, saved)
    other, state = trained(not fused, optimizer, 2, saved)
    for a, b in zip(same.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert {float(part["step"]) for part in state["optim"]["state"].values()} == {5.0}


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD]
)
def test_rows_stay_under_gradients_of_zero(
    optimizer: EmbOptimType, precision: SparseType, device: str
) -> None:
    """Weights and accumulators, to the bit: with zeros of both signs among them, and rounding by chance."""
    place = ComputeDevice.CUDA if device == "cuda" else ComputeDevice.CPU
    where = EmbeddingLocation.DEVICE if device == "cuda" else EmbeddingLocation.HOST
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(50, 8, where, place)],
        optimizer=optimizer,
        weights_precision=precision,
        learning_rate=0.1,
        eps=1e-8,
        stochastic_rounding=precision == SparseType.FP16 and device == "cuda",
    )
    weight = tables.split_embedding_weights()[0]
    weight.copy_(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    weight[:2] = torch.tensor([0.0, -0.0])[:, None]
    ids, offsets = torch.tensor([0, 1, 2, 2, 7], device=device), torch.tensor([0, 2, 5], device=device)
    # The accumulators of row 7 are first 0, those of the others are not.
    tables(ids[:4], offsets.clamp(max=4)).square().sum().backward()

    def state() -> list[torch.Tensor]:
        kept = [
            tables.split_embedding_weights()[0],
            *(x for of in tables.split_optimizer_states() for x in of),
        ]
        return [tensor.detach().cpu().clone() for tensor in kept]

    before = state()
    out = tables(ids, offsets)
    out.backward(torch.where(torch.tensor(True, device=device), 0.0, torch.full_like(out, torch.nan)))
    for a, b in zip(before, state(), strict=True):
        bits = torch.int32 if a.dtype == torch.float32 else torch.int16
        assert torch.equal(a.view(bits), b.view(bits))
