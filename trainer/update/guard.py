"""No weight changes where a loss or a gradient is not finite: all ranks stop together and say why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils import get_total_norm

from embeddings.agreement import from_every_rank
from embeddings.errors import DataError
from embeddings.lookup.rounding import HALF_MAX
from embeddings.private import foreach_norm
from trainer.data.batch_file import pack
from trainer.data.files import RowGroup
from trainer.data.reader import Step
from trainer.ranks.host_copy import HostCopy
from trainer.ranks.process_group import Ranks
from trainer.sealed_folder import replacing

Answer = TypeVar("Answer")
# Names in a message; the batch that is kept says more.
_SHOWN = 3


class NotFinite(DataError):
    """A loss or a gradient is not finite; the step has changed no weight."""


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

    def parts(self) -> list[tuple[str, str, Tensor]]:
        """(attribute, name, tensor) of everything but the loss, in the order of `sizes`."""
        kinds = {"vectors": self.vectors, "halves": self.halves, "dense": self.dense}
        return [(kind, name, part) for kind, named in kinds.items() for name, part in named.items()]

    @torch.no_grad()
    def sizes(self) -> Tensor:
        """The loss, then the largest number of each part, without its sign: float32 [1 + parts].

        What is not finite in a part shows in its size. A part without numbers has size 0. Nothing waits for
        the device.
        """
        parts = [part for _, _, part in self.parts()]
        full = [part for part in parts if part.numel()]
        # As torch's own clipping of gradients does it: a few kernels for all parts together.
        sizes = iter(foreach_norm(full, math.inf) if full else ())
        zero = torch.zeros_like(self.loss)
        return torch.stack([self.loss, *(next(sizes) if part.numel() else zero for part in parts)])


@dataclass(frozen=True)
class Check:
    """A step after its check, whose answer may not have reached the host yet.

    Attributes:
        number, step: which step it is, for the message.
        parts: (attribute of `Gradients`, name) of the parts whose sizes were taken.
        alarm: float32 scalar on the device, the same on all ranks: 1 where something is not finite, else 0.
        largest: scalar on the device, the same on all ranks: the largest gradient of a looked-up vector, by
            size, 0 where that is not finite; None where nobody asked for it.
        copy: this rank's alarm, then `Gradients.sizes`.
    """

    number: int
    step: Step
    parts: tuple[tuple[str, str], ...]
    alarm: Tensor
    largest: Tensor | None
    copy: HostCopy

    def local_problems(self, sizes: Sequence[float]) -> list[str]:
        """What is not finite and comes from this rank's batch alone; `sizes`: of `Gradients.sizes`."""
        loss, *of_parts = sizes
        problems = [] if math.isfinite(loss) else [f"the loss ({loss})"]
        for (kind, name), size in zip(self.parts, of_parts, strict=True):
            if kind == "vectors" and not math.isfinite(size):
                problems.append(f"the gradient of group {name}")
            if kind == "halves" and size >= HALF_MAX:
                problems.append(
                    f'the vectors of group {name}, which comms.forward = "fp16" clips at {HALF_MAX:,.0f},'
                )
        return problems

    def shared_problems(self, sizes: Sequence[float]) -> list[str]:
        """What is not finite in the average over ranks."""
        of_dense = [
            (name, size) for (kind, name), size in zip(self.parts, sizes[1:], strict=True) if kind == "dense"
        ]
        # Without the wrappers around the model.
        bad = [
            name.removeprefix("_dmp_wrapped_module.").removeprefix("module.")
            for name, size in of_dense
            if not math.isfinite(size)
        ]
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        return [f"the gradient of {', '.join(bad[:_SHOWN])}{more}"] if bad else []


@dataclass(frozen=True)
class Guard:
    """Checks steps.

    Attributes:
        ranks: this rank's place; folder: where the batch of a bad step is kept.
        late: the host reads the answer to a check one step later, and the device itself leaves everything as
            it was where the answer is bad; None: on CUDA, where the host would wait for the device.
    """

    ranks: Ranks
    folder: Path
    late: bool | None = None

    @property
    def reads_late(self) -> bool:
        return self.ranks.device.type == "cuda" if self.late is None else self.late

    @torch.no_grad()
    def check(self, number: int, step: Step, gradients: Gradients, largest: bool = False) -> Check:
        """Look whether a step is finite, without waiting for the device; collective.

        Args:
            number, step: which step this is, for the message.
            largest: find the largest gradient of a looked-up vector, too.
        """
        sizes, groups, halves = gradients.sizes(), len(gradients.vectors), len(gradients.halves)
        # Of a NaN this is false, too.
        bad = ~(sizes.abs() < math.inf).all()
        if halves:
            bad = bad | (sizes[1 + groups : 1 + groups + halves] >= HALF_MAX).any()
        shared = bad.to(sizes.dtype)[None]
        if largest:
            # What is not finite is left out: NCCL does not say what becomes of a NaN in a maximum.
            of_groups = torch.where(sizes[1 : 1 + groups] < math.inf, sizes[1 : 1 + groups], 0.0)
            most = of_groups.amax(0, keepdim=True) if groups else torch.zeros_like(shared)
            shared = torch.cat([shared, most])
        if self.ranks.world_size > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        parts = tuple((kind, name) for kind, name, _ in gradients.parts())
        copy = HostCopy(torch.cat([shared[:1], sizes]))
        return Check(number, step, parts, shared[0], shared[1] if largest else None, copy)

    def judge(self, check: Check) -> None:
        """Stop where a checked step is not finite; waits for the answer, collective where it is bad.

        Raises:
            NotFinite: something is not finite on some rank. All ranks raise it; it names the ranks, what is
                not finite there, and the files of their batches, which are kept in the folder.
        """
        alarm, *sizes = check.copy.wait().tolist()
        if not alarm:
            return
        problems = check.local_problems(sizes)
        if not any(self._everyone(lambda: bool(problems))):
            # It shows in the average only, so that any rank's batch may be the cause.
            problems = check.shared_problems(sizes)

        def line() -> str:
            if not problems:
                return ""
            kept = self._keep(check.number, check.step, problems)
            place = f"its batch {kept} and came from {_listed(check.step.sources)}"
            return f"rank {self.ranks.rank}: {', '.join(problems)} ({place})"

        lines = [line for line in self._everyone(line) if line]
        more = f"; and {len(lines) - _SHOWN} more ranks" if len(lines) > _SHOWN else ""
        raise NotFinite(
            f"step {check.number} is not finite on {'; '.join(lines[:_SHOWN])}{more}. No weight was "
            "changed and nothing saved; look at labels, weights and numbers of the batch, or lower the "
            "learning rates"
        )

    def _everyone(self, compute: Callable[[], Answer]) -> list[Answer]:
        """What each rank computes, on every rank; collective."""
        return from_every_rank(compute) if self.ranks.world_size > 1 else [compute()]

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
                part.write_bytes(
                    save(pack(batch), {name: json.dumps(value) for name, value in facts.items()})
                )
        except OSError as error:
            return f"could not be kept ({path}: {error.strerror or error})"
        return f"is kept in {path}"


def dense_norm(gradients: list[Tensor], wait: bool) -> Tensor:
    """L2 norm of all gradients together, also where their squares overflow.

    Args:
        wait: the host may wait for the device, and so find the exact norm only where it is needed.
    """
    norm = get_total_norm(gradients)
    if wait and bool(torch.isfinite(norm)):
        return norm
    # Only the squares were too large.
    exact = torch.linalg.vector_norm(torch.stack(foreach_norm(gradients, 2, dtype=torch.float64)))
    return exact if wait else torch.where(torch.isfinite(norm), norm, exact.to(norm.dtype))


def _listed(places: Iterable[RowGroup]) -> str:
    """`a.parquet row groups 1, 4; b.parquet row group 0`."""
    parts = []
    ordered = sorted(places, key=lambda place: (place.file, place.row_group))
    for file, those in groupby(ordered, key=lambda place: place.file):
        numbers = [str(place.row_group) for place in those]
        parts.append(f"{file} row group{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}")
    return "; ".join(parts)
