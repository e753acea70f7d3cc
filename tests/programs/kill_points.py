"""Script: die before every single file operation of a save, and say each time what is left to resume from.

    python -m tests.programs.kill_points FOLDER RANKS VICTIM STRIDE [deltas]

Saves steps 1 and 2, then step 3, which retires step 1, so that all stages of a save occur. Before the n-th
file operation of rank VICTIM below the folder the process gets SIGKILL. Prints one JSON object per n.
With `deltas` step 1 is full and so is step 2, on which step 3 builds with the rows that were touched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.checkpoints import newest
from tests.helpers.forked import fork_ranks
from tests.helpers.touched_tables import WEIGHT, TouchedTable
from trainer.checkpoint import delta, files
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint import writer as hashed_writer
from trainer.checkpoint.background import Saver
from trainer.config.sections import CheckpointConfig
from trainer.ranks.process_group import Ranks

AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def tensors(step: int) -> dict[str, Any]:
    return {"a": torch.full((70_000, 4), float(step)), "b": torch.arange(10.0) + step}


def save(folder: Path, *steps: int) -> None:
    config = CheckpointConfig(keep=2, mode="async")
    with Saver(folder, config, lambda line: None) as saver:
        for step in steps:
            saver.save(step, tensors(step), {"step": step})
        saver.settle(last=True)


class Deltas:
    """Checkpoints of a table whose row 7 holds the number of the step in its first column."""

    def __init__(self) -> None:
        self.table = TouchedTable(3_000, 4, 2_000, 4, torch.float32)

    def save(self, folder: Path, *steps: int) -> None:
        config = CheckpointConfig(keep=2, full_every=2, mode="sync")
        with Saver(folder, config, lambda line: None, touched=self.table) as saver:  # type: ignore[arg-type]
            if steps[0] == 3:
                saver.follow(folder / files.final_name(2))
            for step in steps:
                self.table.touch(torch.arange(0, 1_500, 7), changes=False)
                self._weight()[7, 0] = step
                if step == 2:
                    saver.follow(None)
                saver.save(step, self.table.tensors(), {"step": step})
            saver.settle(last=True)

    def value(self, path: Path) -> float:
        self.table.zero()
        checkpoint.load_tensors(path, self.table.tensors(), distributed=False)
        return float(self._weight()[7, 0])

    def _weight(self) -> torch.Tensor:
        part: torch.Tensor = self.table.tensors()["model"][WEIGHT].local_shards()[0].tensor
        return part


class Killer:
    """Counts what this process does to files of a folder, and kills it before number `at`."""

    def __init__(self, folder: Path, at: int, note: Callable[[str], None]) -> None:
        self.folder, self.at, self.note = str(folder), at, note
        self.count = self.writes = 0
        sys.addaudithook(self.audit)
        fsync, write = os.fsync, hashed_writer._HashingStream.write
        append = delta.TensorStream.append

        def killing_fsync(descriptor: int) -> None:
            self.step("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def killing_write(stream: Any, content: Any) -> int:
            # Most of the many writes are a few bytes long and alike.
            self.writes += 1
            if self.writes % 12 == 0:
                self.step("write")
            return write(stream, content)

        def killing_append(stream: Any, name: str, rows: Any) -> None:
            self.step("append")
            append(stream, name, rows)

        delta.TensorStream.append = killing_append  # type: ignore[method-assign]
        os.fsync = killing_fsync
        hashed_writer._HashingStream.write = killing_write

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        # A tree is deleted file by file, each named relative to its open directory.
        if event == "os.remove" or (event in AUDITED and str(arguments[0]).startswith(self.folder)):
            self.step(f"{event} {os.path.basename(str(arguments[0]))}")

    def step(self, what: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.note(what)
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(
    template: Path, folder: Path, at: int, world_size: int, victim: int, deltas: bool
) -> dict[str, Any]:
    shutil.copytree(template, folder)
    told = folder.parent / "told"
    told.write_text("")

    def work(ranks: Ranks) -> None:
        if ranks.rank == victim:
            Killer(folder, at, lambda what: print(what, file=told.open("w"), flush=True))
        (Deltas().save if deltas else save)(folder, 3)

    codes = fork_ranks(world_size, work)
    path, refused = newest(folder)
    value = 0.0
    if path is not None:
        value = _loaded(path, deltas)
    return {
        "before": told.read_text().strip(),
        "codes": codes,
        "newest": path.name if path else None,
        "value": value,
        "refused": refused,
        "left": sorted(p.name for p in folder.iterdir()),
    }


def _loaded(path: Path, deltas: bool) -> float:
    """The step that a checkpoint's tensors are of."""
    if deltas:
        # Sharded tensors need a process group, and this process is to fork more.
        told = path.parent.parent / "value"
        fork_ranks(1, lambda ranks: print(Deltas().value(path), file=told.open("w"), flush=True))
        return float(told.read_text())
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    checkpoint.load_tensors(path, loaded, distributed=False)
    return float(loaded["a"].mean())


def main(root: Path, world_size: int, victim: int, stride: int, deltas: bool) -> None:
    template, folder = root / "template", root / "checkpoints"
    template.mkdir()
    fork_ranks(1, lambda ranks: (Deltas().save if deltas else save)(template, 1, 2))
    at = 1
    while True:
        result = attempt(template, folder, at, world_size, victim, deltas)
        print(json.dumps(result), flush=True)
        if not result["before"]:
            break
        if at % 20 == 1:
            # The next save must clear up whatever the killed one left.
            fork_ranks(1, lambda ranks: (Deltas().save if deltas else save)(folder, 4))
            print(json.dumps({"after": sorted(p.name for p in folder.iterdir())}), flush=True)
        shutil.rmtree(folder)
        at += stride


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:5]), deltas=sys.argv[5:] == ["deltas"])
