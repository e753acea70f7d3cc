"""What is analysed, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.ranks.device import DeviceName

# Candidates that a section looks at, where nobody says how many.
SAMPLE = 20_000


@dataclass(frozen=True)
class AnalyzeOptions:
    """How runs are analysed.

    Attributes:
        what: names of sections, see `pipelines.analyze.sections`; empty = all.
        split: whose requests are looked at.
        which: checkpoint, see `trainer.checkpoint.save_load.find_to_use`.
        sample: about so many candidates are looked at, those of whole users; 0 = all.
        seed: of every random draw; None = `train.seed` of each run.
        device: where to compute; None = as the run trained.
    """

    what: tuple[str, ...] = ()
    split: str = "test"
    which: str = ""
    sample: int = SAMPLE
    seed: int | None = None
    device: DeviceName | None = None
