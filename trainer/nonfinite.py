"""No weight changes where a loss or a gradient is not finite: all ranks stop together and say why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from embeddings.agreement import from_every_rank
from embeddings.comms import HALF_MAX
from embeddings.errors import DataError
from trainer.data.files import RowGroup
from trainer.data.reader import Step
from trainer.distributed import Ranks, sum_over_ranks
from trainer.durable import replacing
from trainer.recorded import pack

# Names in a message; the batch that is kept says more.
_SHOWN = 3


@dataclass(frozen=True)
class Gradients:
    """What one rank has computed of a step, before any weight changes.

    Attributes:
        loss: of this rank, scalar; vectors: group -> gradient of the vectors that this rank looked up;
            dense: dense weight -> gradient, already averaged over ranks.
        halves: group -> vectors that travelled in fp16, where too large ones are clipped.
    """

    loss: Tensor
    vectors: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    halves: Mapping[str, Tensor] = field(default_factory=dict)

    def local_problems(self) -> list[str]:
        """What is not finite and comes from this rank's batch alone."""
        found = [] if _finite(self.loss) else [f"the loss ({float(self.loss)})"]
        bad = [group for group, gradient in self.vectors.items() if not _finite(gradient)]
        found += [f"the gradient of group {group}" for group in bad]
        clipped = [group for group, vectors in self.halves.items() if _reaches(vectors, HALF_MAX)]
        return [
            *found,
            *(
                f'the vectors of group {group}, which comms.forward = "fp16" clips at {HALF_MAX:,.0f},'
                for group in clipped
            ),
        ]

    def shared_problems(self) -> list[str]:
        """What is not finite in the average over ranks."""
        bad = [_plain(name) for name, gradient in self.dense.items() if not _finite(gradient)]
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        return [f"the gradient of {', '.join(bad[:_SHOWN])}{more}"] if bad else []


@dataclass(frozen=True)
class Guard:
    """Checks steps.

    Attributes:
        ranks: this rank's place; folder: where the batch of a bad step is kept.
    """

    ranks: Ranks
    folder: Path

    def norm(self, number: int, step: Step, found: Gradients) -> Tensor:
        """The global norm of the dense gradients; collective.

        Args:
            number, step: which step this is, for the message.

        Raises:
            DataError: something is not finite on some rank. All ranks raise it; it names the ranks, what is
                not finite there, and the files of their batches, which are kept in the folder.
        """
        dense = list(found.dense.values())
        norm = get_total_norm(dense) if dense else torch.zeros_like(found.loss)
        vectors = list(found.vectors.values())
        sizes = torch.stack([found.loss, norm, get_total_norm(vectors) if vectors else norm])
        clipped = [
            torch.where(part.abs().amax() < HALF_MAX, 0.0, torch.inf)
            for part in found.halves.values()
            if part.numel()
        ]
        sizes = torch.cat([sizes, torch.stack(clipped)]) if clipped else sizes
        # What is not finite in a tensor shows in its norm.
        alarm = (~torch.isfinite(sizes).all()).to(torch.int64)
        if int(sum_over_ranks(alarm) if self.ranks.world_size > 1 else alarm):
            self._stop(number, step, found)
            # Only the squares were too large.
            norm = get_total_norm([gradient.double() for gradient in dense]) if dense else norm
        return norm

    def largest(self, parts: Sequence[Tensor]) -> float:
        """The largest number of some tensors on any rank, by size; collective."""
        sizes = [part.abs().amax() for part in parts if part.numel()]
        largest = torch.stack(sizes).amax() if sizes else torch.zeros((), device=self.ranks.device)
        if self.ranks.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def _stop(self, number: int, step: Step, found: Gradients) -> None:
        """Raise on all ranks, or on none where the alarm was false; collective."""
        bad = torch.zeros(self.ranks.world_size, dtype=torch.int64, device=found.loss.device)
        problems = found.local_problems()
        bad[self.ranks.rank] = len(problems)
        if not int(sum_over_ranks(bad).sum()):
            # It shows in the average only, so that any rank's batch may be the cause.
            problems = found.shared_problems()

        def told() -> str:
            if not problems:
                return ""
            kept = self._keep(number, step, problems)
            place = f"its batch {kept} and came from {_listed(step.sources)}"
            return f"rank {self.ranks.rank}: {', '.join(problems)} ({place})"

        answers = from_every_rank(told) if self.ranks.world_size > 1 else [told()]
        lines = [line for line in answers if line]
        if lines:
            more = f"; and {len(lines) - _SHOWN} more ranks" if len(lines) > _SHOWN else ""
            raise DataError(
                f"step {number} is not finite on {'; '.join(lines[:_SHOWN])}{more}. No weight was "
                "changed and nothing saved; look at labels, weights and numbers of the batch, or lower the "
                "learning rates"
            )

    def _keep(self, number: int, step: Step, problems: Sequence[str]) -> str:
        """Keep the batch as a safetensors file; returns where it is."""
        rank = f"-rank-{self.ranks.rank}" if self.ranks.world_size > 1 else ""
        path = self.folder / f"nonfinite-step-{number}{rank}.safetensors"
        batch = step.batch.to(torch.device("cpu"))
        facts = {
            "step": number,
            "rank": self.ranks.rank,
            "problems": list(problems),
            "counted": step.counted,
            "step_candidates": batch.step_candidates,
            "features": batch.features.keys(),
            "context": batch.context.keys() if batch.context is not None else [],
            "sources": [[str(place.file), place.row_group] for place in step.sources],
        }
        try:
            with replacing(path) as part:
                save_file(pack(batch), part, {name: json.dumps(value) for name, value in facts.items()})
        except (OSError, SafetensorError) as error:
            # safetensors has an error of its own for a full disk.
            return f"could not be kept ({path}: {getattr(error, 'strerror', None) or error})"
        return f"is kept in {path}"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _reaches(tensor: Tensor, limit: float) -> bool:
    return bool((tensor.abs() >= limit).any())


def _plain(name: str) -> str:
    """A parameter's name in the model, without the wrappers around it."""
    return name.removeprefix("_dmp_wrapped_module.").removeprefix("module.")


def _listed(places: Iterable[RowGroup]) -> str:
    """`a.parquet row groups 1, 4; b.parquet row group 0`."""
    parts = []
    ordered = sorted(places, key=lambda place: (place.file, place.row_group))
    for file, those in groupby(ordered, key=lambda place: place.file):
        numbers = [str(place.row_group) for place in those]
        parts.append(f"{file} row group{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}")
    return "; ".join(parts)
