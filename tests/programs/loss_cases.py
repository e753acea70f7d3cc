"""Run under torchrun: losses of a step whose candidates lie on several ranks, beside those of one rank.

torchrun --nproc-per-node N -m tests.programs.loss_cases LOG FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.console import quiet_third_parties
from tests.helpers.steps import DOMAINS, Drawn, drawn, tasks_of
from tests.programs.step_cases import job, local_tensors
from trainer.config.tasks import Task, resolve_tasks
from trainer.model.frame import Prediction
from trainer.model.heads.head import Head, HeadInput, HeadOutput, HeadSizes, MlpKeys
from trainer.model.heads.retrieval import Retrieved
from trainer.model.settings import HEADS
from trainer.objectives import ranked
from trainer.objectives.covariance import Covariance
from trainer.objectives.losses import rank_loss
from trainer.objectives.retrieval import RetrievalLoss
from trainer.objectives.step_loss import StepLoss
from trainer.ranks.process_group import Ranks, gather_rows, process_group, sum_over_ranks

COUNT = 30
RANKED: list[dict[str, Any]] = [
    {"rank": rank, "pairs": pairs, "mean": mean}
    for rank in ("pair", "list", "listce", "jrc")
    for pairs, mean in (("step", "step"), ("request", "step"), ("domain", "step"), ("domain", "domain"))
]
CASES: dict[str, tuple[Task, ...]] = {
    "plain": resolve_tasks({}, ["a", "b"]),
    "partial": tasks_of({}, {"weight": 0.3}, {"loss": "none"}, {"product": ("a", "c")}),
    "focal, domains": tasks_of({"loss": "focal", "mean": "domain"}, {"loss": "focal", "gamma": 1.5}, {}),
    **{", ".join(each.values()): tasks_of({}, each) for each in RANKED},
}
# How many requests the first rank has, of four: some, and none.
CUTS = (2, 0)


def of_step(
    of: StepLoss, given: Drawn, shares: tuple[int, ...], counted: bool, world_size: int
) -> tuple[Any, dict[str, Tensor]]:
    """Losses, and the gradients that they have once ranks are averaged."""
    losses = given.losses(of, given.step(COUNT, counted, shares))
    rank_loss(losses.total(), COUNT, world_size, counted).backward()
    parts = {name: getattr(given, name) for name in ("logits", "base", "auxiliary", "experts")}
    gradients = {name: (part * 0 if part.grad is None else part.grad) for name, part in parts.items()}
    return losses, {name: part / world_size for name, part in gradients.items()}


def case(
    tasks: tuple[Task, ...], cut: int, missing: float, unobserved: tuple[int, ...] = ()
) -> dict[str, Any]:
    """How far this step of several ranks is from that of one; `unobserved`: tasks without any label."""
    covariance = Covariance(0.1, "step")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = drawn(7, COUNT, len(tasks), missing)
    whole.labels[:, list(unobserved)] = torch.nan
    alone = StepLoss(tasks, "bce", DOMAINS, covariance)
    one, expected = of_step(alone, whole, (), True, 1)
    first = int((whole.request < cut).sum())
    shares = (first, COUNT - first)
    rows = slice(0, first) if rank == 0 else slice(first, COUNT)
    counted = shares[rank] > 0
    # A rank without candidates computes some of another.
    mine = whole.part(rows if counted else slice(0, 9))
    together = StepLoss(tasks, "bce", DOMAINS, covariance, world_size, rank)
    losses, found = of_step(together, mine, shares, counted, world_size)
    assert counted or all((part == 0).all() for part in found.values())
    far = 0.0
    for name, part in found.items():
        every = gather_rows((part if counted else part[:0]).contiguous())
        if rank == 0:
            far = max(far, float((every - expected[name]).abs().max() / (expected[name].abs().max() + 1e-9)))
    report = together.report(sum_over_ranks(losses.tally.values), sum_over_ranks(losses.tally.counts))
    return {
        "far": far,
        "report": report,
        "expected": alone.report(one.tally.values, one.tally.counts),
        "silent": [sorted(losses.silent), sorted(one.silent)],
    }


def retrieval_case(cut: int) -> dict[str, Any]:
    """The same of an auxiliary head's retrieval, by the gradients of both towers and the loss."""
    tasks, rank = tasks_of({}, {"weight": 0.5}), dist.get_rank()
    whole = drawn(7, COUNT, 2, 0.3)
    random = torch.Generator().manual_seed(1)
    towers = nn.functional.normalize(torch.randn(2, COUNT, 6, generator=random), dim=2)
    path = torch.randint(0, 6, (COUNT, 3), generator=random)
    of_task = RetrievalLoss(tasks[1], 1, 8.0, 0.3)

    def of_rows(rows: slice, shares: tuple[int, ...], counted: bool) -> tuple[Tensor, float]:
        ranks = max(1, len(shares))
        own, own_towers = whole.part(rows), towers[:, rows].clone().requires_grad_()
        of = StepLoss(tasks, "bce", DOMAINS, None, ranks, rank if shares else 0, retrieval=of_task)
        prediction = Prediction(own.logits, None, retrieved=Retrieved(*own_towers, path[rows]))
        losses = of.of(own.step(COUNT, counted, shares), prediction, 0.7)
        rank_loss(losses.total(), COUNT, ranks, counted).backward()
        assert own_towers.grad is not None
        sums = [losses.tally.values, losses.tally.counts]
        report = of.report(*([sum_over_ranks(each) for each in sums] if shares else sums))
        return own_towers.grad / ranks, report["retrieval"]

    first = int((whole.request < cut).sum())
    expected, alone = of_rows(slice(0, COUNT), (), True)
    shares = (first, COUNT - first)
    counted = shares[rank] > 0
    rows = slice(0, first) if rank == 0 else slice(first, COUNT)
    found, together = of_rows(rows if counted else slice(0, 9), shares, counted)
    every = gather_rows((found if counted else found[:, :0]).transpose(0, 1).contiguous())
    far = float((every.transpose(0, 1) - expected).abs().max()) if rank == 0 else 0.0
    return {"far": far, "largest": float(expected.abs().max()), "report": together, "expected": alone}


class Towers(Head):
    """A tower of its own for each task."""

    keys = MlpKeys

    @classmethod
    def build(cls, model: Any, sizes: HeadSizes) -> Towers:
        return cls(sizes)

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        towers = {task.name: nn.Linear(sizes.width, 1) for task in sizes.tasks}
        self.towers = nn.ModuleDict(towers)

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        return list(self.towers[task].parameters())

    def forward(self, given: HeadInput) -> HeadOutput:
        inputs = torch.cat(given.parts, dim=1)
        return HeadOutput(torch.cat([tower(inputs) for tower in self.towers.values()], dim=1))


TWO_TASKS = ["tasks.click.rank=pair", "tasks.buy.mask=click >= 0", "data.batch_candidates=24"]
STEM = [
    "model.head=experts", "model.experts.own=1", "model.experts.foreign=stopped",
    "model.mixer.kind=softmax", "groups.representation.sets=tasks", "model.auxiliary=retrieval",
    "model.retrieval.task=buy", 'model.retrieval.taxonomy=["band","category_id"]',
]  # fmt: skip


def unobserved_steps(log: Path, folder: Path, ranks: Ranks, *overrides: str) -> dict[str, Any]:
    """Weights and states that each of five steps changes: buy is observed on no rank in the last three.

    Beside them the losses of the steps, added up over ranks.
    """
    with mock.patch.dict(HEADS, mlp=Towers):
        made = job(ranks, log, folder, "none", *TWO_TASKS, *overrides)

    def state() -> dict[str, Tensor]:
        trees = [made.sharded.model.state_dict(), made.optimizer.state_dict()]
        return {name: tensor.detach().clone() for name, tensor in local_tensors(trees)}

    steps = list(made.reader.steps())[:5]
    for step in steps[2:]:
        step.batch.labels[:, 1] = torch.nan
        step.batch.sizes = None
    changed, losses, before = [], [], state()
    for _, loss in made.train(iter(steps)):
        losses.append(loss)
        after = state()
        mine = [name for name in after if not torch.equal(before[name], after[name])]
        every: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(every, mine)
        changed.append(sorted({name for names in every for name in names}))
        before = after
    return {"changed": changed, "losses": losses}


def main(log: Path, folder: Path) -> None:
    quiet_third_parties()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with process_group(60) as ranks:
        steps = {
            "towers": unobserved_steps(log, folder, ranks),
            "sets": unobserved_steps(log, folder, ranks, *STEM),
        }
        if ranks.world_size == 1:
            (folder / "report.json").write_text(json.dumps({"steps": steps}))
            return
        for name, tasks in CASES.items():
            for cut in CUTS:
                missing = 0.0 if name == "plain" else 0.3
                found[f"{name}, {cut}"] = case(tasks, cut, missing)
                if "pair" in name:
                    # As on a device that the host must not ask how many positives there are.
                    with mock.patch.object(ranked, "_may_look", lambda _: False):
                        found[f"{name}, {cut}, by counts"] = case(tasks, cut, missing)
        found_of_retrieval = [retrieval_case(cut) for cut in CUTS]
        never = tasks_of({"rank": "pair"}, {"loss": "focal"})
        found["never observed"] = case(never, 2, 0.3, [0])
        # What no other rank need be asked for is not.
        silence = mock.Mock(side_effect=AssertionError("a collective"))
        with mock.patch.object(dist, "all_reduce", silence), mock.patch.object(dist, "all_gather", silence):
            part = drawn(7, COUNT, 2, 0.0)
            of = StepLoss(CASES["plain"], "bce", 0, Covariance(0.1), ranks.world_size, ranks.rank)
            part.losses(of, part.step(2 * COUNT, True, (COUNT, COUNT))).total().backward()
        if ranks.rank == 0:
            (folder / "report.json").write_text(
                json.dumps({"cases": found, "steps": steps, "retrieval": found_of_retrieval})
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
