"""What every step is told, and what it may answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer.ranks.device import observe, obstacle

ROOT = Path(__file__).resolve().parents[2]
# JSON of a step: `rows` (a table), `different` (names of what is wrong), `facts`, or `skipped` with a reason.
Answer = dict[str, Any]
Row = dict[str, Any]
Way = TypeVar("Way")


@dataclass(frozen=True)
class Check:
    """One run of the check.

    Attributes:
        dry: sizes are tiny, and a CPU will do: it shows that the code runs, and measures nothing.
        out: what comes back: results, logs, traces; work: logs, runs and snapshots that steps share.
        log: a sequence log that was brought along, for the step `demo`.
        step: whose turn it is.
    """

    dry: bool
    out: Path
    work: Path
    log: Path | None = None
    step: str = ""

    @property
    def device(self) -> torch.device:
        """The GPU; a CPU in a dry run, and in steps that the catalogue runs without a GPU."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def answer_file(self) -> Path:
        """Where a step's answer waits for the parent."""
        return self.out / f".{self.step}.json"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry else full

    def keep(self, found: Answer) -> None:
        """Have an answer, or what there is of it, survive whatever ends this process."""
        part = self.answer_file.with_suffix(".part")
        part.write_text(json.dumps(found, default=str), encoding="utf-8")
        part.replace(self.answer_file)


def each_way(
    ways: Mapping[str, Way],
    measure: Callable[[Way], Row],
    keep: Callable[[list[Row]], object] = lambda rows: None,
    key: str = "way",
) -> list[Row]:
    """A row for each way. A way that fails has its error in its row and costs no other way anything.

    `keep` gets the rows after each way, so that they survive if a later one ends the process.
    """
    rows: list[Row] = []
    for name, way in ways.items():
        try:
            rows.append({key: name, **measure(way)})
        except Exception as error:
            rows.append({key: name, "error": reason_of(error)})
        keep(rows)
    return rows


def no_gpu() -> str:
    """Why there is no GPU to check, and what to do about it; empty where torch sees one.

    Where there is one this starts no driver, which no fork of this process could use any more.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        return ""
    return "; ".join(obstacle(observe()) or ("CUDA sees no GPU", "look at `nvidia-smi`"))


def answer(rows: Sequence[Row] = (), different: Sequence[str] = (), **facts: Any) -> Answer:
    """A step's answer: a table, what of it is wrong, and single facts."""
    return {"different": list(different), "rows": list(rows), "facts": facts}


def skipped(reason: str) -> Answer:
    return {"skipped": reason}


def reason_of(error: BaseException) -> str:
    """An error in one line, for a table's cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
