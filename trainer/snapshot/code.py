"""The dense part of a model as machine code for servers in C++: the only code in a snapshot, on request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from embeddings.errors import SnapshotError
from embeddings.private import compile_package
from trainer.model.branch import Branch
from trainer.model.frame import TwoStageModel
from trainer.model.heads.head import HeadInput, HeadOutput
from trainer.model.heads.products import Products
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.score import AttentionVectors
from trainer.model.time import Marks
from trainer.model.windows import Selection, Windows
from trainer.sealed_folder import entry_of
from trainer.snapshot.loading import Snapshot
from trainer.snapshot.manifest import CodeFile

_MOST_CANDIDATES = 1 << 20
_ALLOWED_DIFFERENCE = 1e-6


class _Probabilities(nn.Module):
    def __init__(self, model: TwoStageModel) -> None:
        super().__init__()
        self.head, self.products = model.head, Products(model.tasks)

    def forward(self, parts_CW: Tensor) -> Tensor:
        output: HeadOutput = self.head(HeadInput({"": [parts_CW]}, []))
        all_tasks: HeadOutput = self.products(output)
        return all_tasks.logits.sigmoid()


class _Ranking(nn.Module):
    """Stage two of a model with one branch, as a function of tensors: what its search kept -> probabilities.

    Shapes: A width of the attention vectors, D of the representation, K kept behaviors.
    """

    def __init__(self, model: TwoStageModel) -> None:
        super().__init__()
        branch = model.branches["main"]
        assert isinstance(branch, Branch)
        self.branch, self.head, self.products = branch, model.head, Products(model.tasks)

    def forward(
        self,
        query_CA: Tensor,
        key_CKA: Tensor,
        target_CD: Tensor,
        value_CKD: Tensor,
        position_CK: Tensor,
        age_CK: Tensor,
        mask_CK: Tensor,
    ) -> Tensor:
        branch, (count, k) = self.branch, mask_CK.shape
        assert branch.scorer is not None
        place_CK = torch.arange(count * k, device=mask_CK.device).view(count, k)
        of_none_C = torch.zeros(count, dtype=torch.int64, device=mask_CK.device)
        marks = Marks(position_CK, age_CK, torch.zeros_like(age_CK))
        raw = AttentionVectors(query_CA, key_CKA.flatten(0, 1), of_none_C)
        windows = Windows(place_CK, mask_CK, marks, None, of_none_C)
        selection = Selection(place_CK, mask_CK, marks)
        encoded, value_SD = branch.scorer.encode(raw), value_CKD.flatten(0, 1)
        behaviors = Behaviors(windows, raw, encoded, selection, False, target_CD, value_SD, place_CK)
        sets = branch.read(behaviors, branch.weigh(behaviors))
        output: HeadOutput = self.head(HeadInput(sets, []))
        all_tasks: HeadOutput = self.products(output)
        return all_tasks.logits.sigmoid()


def check_code(root: Path, model: TwoStageModel) -> None:
    """Raises SnapshotError where there is no C++ compiler, or nothing of the model to compile.

    Args:
        root: the folder of snapshots; model: on any device, also the meta device.
    """
    if shutil.which("g++") is None:
        raise SnapshotError(root, "--aoti compiles C++ and finds no g++; install it or export without --aoti")
    if obstacle := dense_obstacle(model):
        raise SnapshotError(
            root,
            f'--aoti compiles head = "mlp" of such a model, and {obstacle}; export without --aoti '
            "(docs/snapshots.md says which models it compiles whole)",
        )


@torch.no_grad()
def write_code(folder: Path, snapshot: Snapshot) -> CodeFile:
    """Compile all that follows look-ups and search, or where that is no function of tensors, the head alone.

    AOTInductor compiles. Any number of candidates; all other sizes are fixed.

    Args:
        snapshot: of a model that `check_code` lets pass.

    Raises:
        SnapshotError: the compiled one computes something else.
    """
    part = dense_part(snapshot)
    path = f"code/{part.name}.pt2"
    file = folder / path
    file.parent.mkdir()
    compiled = compile_package(part.traced(), str(file))
    given = part.inputs.values()
    worst = max(
        float((compiled(*(each[:count] for each in given)) - part.expected[:count]).abs().max())
        for count in (1, len(part.expected))
    )
    if not worst <= _ALLOWED_DIFFERENCE:
        raise SnapshotError(file, f"the compiled model differs by {worst:.3g}")
    return CodeFile(path=path, **entry_of(file), describes=part.describes)


class DensePart(NamedTuple):
    """A part of a model as a function of tensors, any number of candidates in the first dimension.

    Attributes:
        name: `ranking` or `head`; module: the function.
        inputs: examples by name, in the order of the arguments; expected: what it gives for them.
        describes: arguments and result, for people.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    expected: Tensor
    describes: str

    @torch.no_grad()
    def traced(self) -> torch.export.ExportedProgram:
        """Its operators, for any number of candidates; all other sizes are fixed."""
        candidates = torch.export.Dim("candidates", min=1, max=_MOST_CANDIDATES)
        given = tuple(self.inputs.values())
        shapes = tuple({0: candidates} for _ in given)
        return torch.export.export(self.module, given, dynamic_shapes=shapes)


@torch.no_grad()
def dense_part(snapshot: Snapshot) -> DensePart:
    """All that follows look-ups and search, or where that is no function of tensors, the head alone.

    Args:
        snapshot: of a model without a `dense_obstacle`.
    """
    model = snapshot.model
    if _is_one_branch(model):
        named, expected = _ranked(snapshot)
        sizes = ", ".join(f"{name} {_shape(part)}" for name, part in named.items())
        describes = f"stage two and head: {sizes} -> probabilities [candidates, tasks]"
        return DensePart("ranking", cast("nn.Module", _Ranking(model).eval()), named, expected, describes)
    width = next(layer for layer in model.head.modules() if isinstance(layer, nn.Linear)).in_features
    module = _Probabilities(model).eval()
    parts = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    describes = f"head and sigmoid: parts {_shape(parts)} -> probabilities [candidates, tasks]"
    return DensePart("head", module, {"parts": parts}, module(parts), describes)


def dense_obstacle(model: TwoStageModel) -> str:
    """Why nothing of a model is such a function; empty if some part is."""
    obstacle = model.head.compile_obstacle
    return f'head = "{model.config.head}" {obstacle}' if obstacle and not _is_one_branch(model) else ""


def _shape(part: Tensor) -> str:
    sizes = ", ".join(map(str, ("candidates", *part.shape[1:])))
    return f"{str(part.dtype).removeprefix('torch.')} [{sizes}]"


def _is_one_branch(model: TwoStageModel) -> bool:
    """Whether scores follow from the vectors, positions and ages of what one search kept."""
    config, branch = model.config, model.branches["main"]
    assert isinstance(branch, Branch)
    if branch.search is None or branch.search.keeps_all:
        return False
    roles = config.roles
    others = config.branches or roles.cross or model.numbers or model.of_requests or roles.prior
    of_domains = any(owner.startswith("domain:") for owner in branch.owners.values())
    if of_domains or config.head_kind.reads_domain(config):
        return False
    return not (others or config.clusters or config.level or config.time_group)


def _ranked(snapshot: Snapshot) -> tuple[dict[str, Tensor], Tensor]:
    """What `_Ranking` is given for the recorded requests, twice over, and the snapshot's own scores of it.

    The names are those of the description, in the order of the arguments.
    """
    model, batch = snapshot.model, snapshot.with_rows(snapshot.recorded.batch)
    retrieval, roles = model.retrieve(batch)["main"], model.config.roles
    groups = (roles.representation_target, roles.representation_behavior)
    rows = model.lookups({name: model.collections[name](batch.features) for name in groups})
    kept, n = retrieval.selection, batch.behaviors
    given = {
        "attention of candidates": retrieval.raw.query_CD,
        "attention of kept behaviors": retrieval.raw.key_ND[kept.index],
        "representation of candidates": rows[groups[0]][n:],
        "representation of kept behaviors": rows[groups[1]][kept.index],
        "position": kept.marks.index("position"),
        "age": kept.marks.index("age"),
        "mask": kept.mask,
    }
    # A single candidate would be taken for a fixed size.
    twice = {name: torch.cat([part, part]) for name, part in given.items()}
    return twice, snapshot.recorded.own.repeat(2, 1)
