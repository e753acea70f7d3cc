"""Stage two (ESU), from kept behaviors and weights to a head's input: what all sequence models share."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.config.model import BranchKeys
from trainer.model.retrieve.search import Retrieval
from trainer.model.sizes import BranchSizes


@dataclass(frozen=True)
class Behaviors(Retrieval):
    """What stage one keeps of a batch, with its representation.

    Attributes:
        target_CD: of the candidates; value_SD: of the looked-up behaviors, S at least 1. The vectors of
            several sets lie side by side.
        place: int64, the row of `value_SD` of each behavior of `index`.
    """

    target_CD: Tensor
    value_SD: Tensor
    place: Tensor

    @property
    def place_CK(self) -> Tensor:
        """`place` of what each candidate keeps, with `whole` too."""
        return self.place[self.windows.of_candidate] if self.whole else self.place

    def with_whole_windows(self) -> Behaviors:
        """As if every candidate kept its whole window; all of the batch's behaviors must be looked up."""
        return replace(self, selection=self.windows.of_candidates(), whole=True, place=self.windows.index)

    def by_set(self, widths: Sequence[int]) -> list[Behaviors]:
        """The same with the vectors of one set each; `widths`: D of each set."""
        if len(widths) == 1:
            return [self]
        parts = (part.split(list(widths), dim=1) for part in (self.target_CD, self.value_SD))
        return [
            replace(self, target_CD=target_CD, value_SD=value_SD)
            for target_CD, value_SD in zip(*parts, strict=True)
        ]


class SequenceModel(nn.Module):
    """Maps behaviors and weights to the parts of the head's input, and says what must be known of it.

    `settings` are those of a branch, with the keys that this sequence model adds.

    Attributes:
        keys: the settings class of a branch, or a subclass of it with the keys that this model adds.
        uses: keys shared with other kinds that it looks at.
        on_windows: it reads whole windows and no attention weights; there is no stage one then.
        needs_vectors: it cannot work where no feature is attended to.
        scores_values: it scores vectors of the representation, too.
        takes_columns: it reads encodings that stand beside the vectors (`time = "concat"`).
        takes_cross: it reads cross features as a part of values.
        needs_content: it compares pre-trained vectors, which the attention roles must serve.
        needs_stretch: it takes a window for a stretch of the history, the same for all candidates.
        needs_seconds: it is given `Windows.seconds`, of such windows.
        scales_by_longest: it divides by the longest window that there may be.
        two_towers: its parts are a user's vector, which may know no candidate, and the candidate's.
    """

    keys: ClassVar[type[BranchKeys]] = BranchKeys
    uses: ClassVar[Set[str]] = frozenset()
    on_windows: ClassVar[bool] = False
    needs_vectors: ClassVar[bool] = False
    scores_values: ClassVar[bool] = False
    takes_columns: ClassVar[bool] = False
    takes_cross: ClassVar[bool] = False
    needs_content: ClassVar[bool] = False
    needs_stretch: ClassVar[bool] = False
    needs_seconds: ClassVar[bool] = False
    scales_by_longest: ClassVar[bool] = False
    two_towers: ClassVar[bool] = False

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> SequenceModel:
        """The sequence model of a branch; `sizes` knows widths, time encodings and the seed."""
        raise NotImplementedError

    @classmethod
    def problem(cls, settings: Any) -> str:
        """What is wrong with a branch that has this; empty if nothing is."""
        return ""

    @classmethod
    def width_problem(cls, settings: Any, width: int) -> str:
        """What is wrong with settings for a representation of this width; empty if nothing is."""
        return ""

    @classmethod
    def memory_problem(cls, settings: Any, section: str, window: int, requests: int, memory: int) -> str:
        """Why a step of so many requests does not fit a rank; empty if it does, as far as anyone knows.

        Args:
            section: where the branch is configured; window: behaviors of the longest window.
            memory: bytes that a rank has.
        """
        return ""

    @property
    def output_width(self) -> int:
        """Of all parts together."""
        raise NotImplementedError

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        """What it makes of attention vectors of behaviors whatever the candidates, as a search does."""
        return {}

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        """-> parts, each [C, *]."""
        raise NotImplementedError

    @classmethod
    def read_sets(
        cls, models: Sequence[Any], widths: Sequence[int], behaviors: Behaviors, weight_CHK: Tensor | None
    ) -> list[list[Tensor]]:
        """The parts of several sets, each read by a model of its own. All models are built alike.

        This is the plain form, one set after the other. A kind that pools by the same weights whatever it
        pools may read the vectors of all sets at once, to the same numbers up to rounding.

        Args:
            widths: D of each set, whose vectors lie side by side in `behaviors`.
        """
        return [model(own, weight_CHK) for model, own in zip(models, behaviors.by_set(widths), strict=True)]


class TargetPooling(SequenceModel):
    """What models that pool behaviors into one vector h have in common: the head's [v_t ; h ; v_t * h].

    Args:
        width: D of the representation; target_aware: without it the head is given [v_t ; h].
    """

    def __init__(self, width: int, target_aware: bool) -> None:
        super().__init__()
        self.width, self.target_aware = width, target_aware

    @property
    def output_width(self) -> int:
        return self.width * (3 if self.target_aware else 2)

    def parts(self, target_CD: Tensor, pooled_CD: Tensor) -> list[Tensor]:
        parts = [target_CD, pooled_CD]
        return [*parts, target_CD * pooled_CD] if self.target_aware else parts


def split_parts(parts: Sequence[Tensor], widths: Sequence[int]) -> list[list[Tensor]]:
    """Parts [C, sum of widths] of all sets -> those of each set."""
    if len(widths) == 1:
        return [list(parts)]
    return [list(each) for each in zip(*(part.split(list(widths), dim=1) for part in parts), strict=True)]
