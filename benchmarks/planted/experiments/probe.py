"""Trains a model on a planted log, and looks into it afterwards."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.planted.experiments.experiment import Floats, Measured, logloss_of
from pipelines.start import open_split
from pipelines.synth.synth import TRUTH
from pipelines.train import train
from trainer.checkpoint.restore import restore
from trainer.model.frame import TwoStageModel
from trainer.model.heads.expert_layer import ExpertLayer
from trainer.model.heads.grouped import GroupedLinear
from trainer.quality.evaluate import score_split
from trainer.quality.scored import Scored
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder

BASE = Path(__file__).parent.parent / "several.toml"
SPLIT = "test"


def trained(out: Path, overrides: list[str], tied: bool) -> Measured:
    """Train several.toml with overrides at `out`, and measure it on the test split.

    Args:
        tied: all experts use the weights of the first one.
    """
    said = io.StringIO()
    with one_interaction() if tied else nullcontext(), redirect_stdout(said), redirect_stderr(said):
        with gradients_of_negatives() as negatives:
            train(BASE, out, overrides)
        if "steps" not in RunFolder(out).read_summary():
            raise SystemExit("training was asked to stop; the same command makes this run again")
        with process_group() as ranks:
            restored = restore(RunFolder(out), ranks)
            reader = open_split(restored.config, SPLIT, restored.rows, ranks, finders=restored.finders)
            with experts_of_first_layer() as outputs:
                scored = score_split(restored.sharded.model, reader, ranks.device)
            seen = open_split(restored.config, "train", restored.rows, ranks, finders=restored.finders)
            on_train = score_split(restored.sharded.model, seen, ranks.device)
            learned = {task: logloss_of(on_train, task) for task in on_train.tasks}
            tables = representation(restored.sharded.model)
    truth = truth_of(scored, restored.config.data.log)
    return Measured(
        scored, truth, *relation(outputs), tables, negatives, shares=shares_of(out), learned=learned
    )


def shares_of(run: Path) -> list[dict[str, float]]:
    """What each merge of a run took of each of its branches."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["lambda"] for line in lines if line["split"] == "merge"]


def truth_of(scored: Scored, log: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The truth of the test split in the order of the scored candidates, that of their names."""
    table = pq.read_table(log / TRUTH, filters=[("split", "=", SPLIT)]).drop_columns(["split"])
    columns = {name: table[name].to_numpy() for name in table.column_names}
    order = np.lexsort((columns["candidate"], columns["request_id"], columns["user_id"]))
    columns = {name: values[order] for name, values in columns.items()}
    if not np.array_equal(columns["user_id"], scored.user_id):
        raise SystemExit("the scored candidates are not those of the log's truth")
    return columns


@contextmanager
def one_interaction() -> Iterator[None]:
    """All experts of a bank use the weights of the first: one interaction for all sets (a control of ME)."""
    own = GroupedLinear.forward

    def forward(self: GroupedLinear, x_ECW: Tensor) -> Tensor:
        return F.linear(x_ECW, self.weight[0], self.bias[0])

    GroupedLinear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        GroupedLinear.forward = own  # type: ignore[method-assign]


@contextmanager
def gradients_of_negatives() -> Iterator[list[float]]:
    """Of each step of a training, the norm of the gradient over the logits of candidates without a click."""
    norms: list[float] = []

    def note(module: nn.Module, given: tuple[Any, ...], prediction: Any) -> None:
        if isinstance(module, TwoStageModel) and module.training and prediction.logits.requires_grad:
            negative = given[0].labels[:, 0] == 0
            prediction.logits.register_hook(lambda slope: norms.append(float(slope[negative, 0].norm())))

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield norms
    finally:
        hook.remove()


@contextmanager
def experts_of_first_layer() -> Iterator[list[Tensor]]:
    """What the experts give for each batch that is scored, [C, E, d]."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        del given
        if isinstance(module, ExpertLayer):
            outputs.append(torch.stack(list(output[0]), dim=1))

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield outputs
    finally:
        hook.remove()


def relation(outputs: list[Tensor]) -> tuple[float, float]:
    """Mean |covariance| and mean |correlation| of an element of one expert and one of another.

    Experts that give less have less covariance, with the same correlation. Elements that never change have
    none. NaN with one expert.
    """
    rows_CED = torch.cat(outputs).double()
    centred = rows_CED - rows_CED.mean(0)
    deviation_ED = rows_CED.std(0)
    crossed, correlated = [], []
    for p, q in combinations(range(rows_CED.shape[1]), 2):
        both = centred[:, p].T @ centred[:, q] / (rows_CED.shape[0] - 1)
        scale = deviation_ED[p, :, None] * deviation_ED[q]
        crossed.append(float(both.abs().mean()))
        correlated.append(float((both[scale > 0] / scale[scale > 0]).abs().mean()))
    if not crossed:
        return float("nan"), float("nan")
    return float(np.mean(crossed)), float(np.mean(correlated))


def representation(model: nn.Module) -> dict[str, Floats]:
    """The tables of the representation, without the row of the unknown id."""
    tables = {}
    for name, value in model.state_dict().items():
        if ".representation." in name and name.endswith(".weight"):
            shards = value.local_shards() if hasattr(value, "local_shards") else None
            whole = shards[0].tensor if shards else value
            tables[name] = whole.detach().double().numpy()[1:]
    if not tables:
        raise SystemExit("the model has no table of the representation")
    return tables
