"""All steps, in the order of what their answers are worth: being right first, then speed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.gpu.check import Answer, Check

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Step:
    """One question to the machine.

    Attributes:
        where: `module.function` in this package.
        limit_s: the step is killed after so many seconds.
        part: `right` or `speed`.
        environment: set for this step alone; fresh: it needs an interpreter that has imported nothing yet.
        after: the steps whose files it reads.
    """

    where: str
    limit_s: float
    part: Literal["right", "speed"]
    environment: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    after: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return f"benchmarks.gpu.{self.where.split('.')[0]}"

    def load(self) -> Callable[[Check], Answer]:
        function: Callable[[Check], Answer] = getattr(
            importlib.import_module(self.module), self.where.split(".")[1]
        )
        return function

    def docs(self) -> tuple[str, str]:
        """The two parts of the step's docstring: what it answers, and what is expected."""
        question, _, expected = (inspect.getdoc(self.load()) or "").partition("Expected:")
        return " ".join(question.split()), " ".join(expected.split())


STEPS: Mapping[str, Step] = {
    "environment": Step("machine.environment", 60, "right"),
    "tbe": Step("machine.tbe", 60, "right"),
    "forms": Step("forms.forms", 60, "right"),
    "presets": Step("presets.presets", 90, "right"),
    "reference": Step("sharded.reference", 60, "right", NO_GPU),
    "sharded": Step("sharded.sharded", 120, "right", after=("reference",)),
    "midepoch": Step("sharded.midepoch", 60, "right"),
    "guard": Step("sharded.guard", 40, "right"),
    "saves": Step("saves.saves", 60, "right"),
    "synth": Step("jobs.synth", 60, "right", NO_GPU),
    "train": Step("jobs.train", 120, "right", after=("synth",)),
    "evaluate": Step("jobs.evaluate", 40, "right", after=("train",)),
    "export": Step("jobs.export", 40, "right", after=("train",)),
    "score": Step("jobs.score", 40, "right", NO_GPU, after=("evaluate", "export")),
    "resume": Step("saves.resume", 60, "right", after=("synth",)),
    "train_cpu": Step("jobs.train_cpu", 90, "right", NO_GPU, after=("train",)),
    "pytest": Step("jobs.pytest", 120, "right", fresh=True),
    "bags": Step("two_ranks.bags", 90, "right"),
    "step": Step("speed.step", 150, "speed"),
    "search": Step("search.search", 40, "speed"),
    "profile": Step("jobs.profile", 60, "speed", after=("synth",)),
    "prefetch": Step("ablations.prefetch", 90, "speed"),
    "precision": Step("ablations.precision", 60, "speed"),
    "segments": Step("segments.segments", 90, "speed"),
    "demo": Step("jobs.demo", 200, "speed"),
    # Last on purpose: it maps host memory, the one thing here that may trouble the machine.
    "caches": Step("caches.caches", 120, "speed"),
}
PARTS = ("right", "speed")


def choose(words: Sequence[str]) -> list[str]:
    """The steps that are meant: names, or `right` and `speed` for all of a part; nothing means all.

    Raises:
        ValueError: there is no such step.
    """
    found = []
    for word in words or PARTS:
        if word in PARTS:
            found += [name for name, step in STEPS.items() if step.part == word]
        elif word in STEPS:
            found.append(word)
        else:
            raise ValueError(f"no step {word!r}; there are {', '.join([*PARTS, *STEPS])}")
    return list(dict.fromkeys(found))
