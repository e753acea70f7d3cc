"""Script: whole training runs on forked ranks, with what happens beside the steps; one JSON report.

python -m tests.programs.saving_runs FOLDER
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

import pipelines.train
from tests.helpers.forked import fork_ranks, one_thread
from tests.helpers.launching import SETTINGS, losses, overrides
from tests.helpers.logs import small_log
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint import writer as hashed_writer
from trainer.checkpoint.background import Saver
from trainer.loop.loop import Trainer
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config, load_config


class Runs:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = small_log(root / "log", seed=1, users=16)

    def config(self, **changes: Any) -> Config:
        words = {**SETTINGS, "data.log": str(self.log), "checkpoint.check_every": 3, "train.epochs": 2}
        words |= {"checkpoint.every_steps": 0, **{k.replace("__", "."): v for k, v in changes.items()}}
        return load_config(Path("configs/dare.toml"), overrides(words)[1::2])

    def train(
        self, name: str, ranks: int, before: Callable[[Ranks], None] = lambda ranks: None, **changes: Any
    ) -> dict[str, Any]:
        """Train in the run folder `name`, a new one or an old one; -> what can be seen from outside."""
        config, said = self.config(**changes), self.root / f"{name}.said"

        def work(ranks: Ranks) -> None:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            before(ranks)
            pipelines.train.run(config, self.root / name, ranks)

        codes = fork_ranks(ranks, work, changes.get("train__timeout_s", 30))
        folder = self.root / name / "checkpoints"
        return {
            "codes": codes,
            "losses": losses(self.root / name) if (self.root / name / "metrics.jsonl").exists() else [],
            "said": said.read_text(),
            "left": sorted(p.name for p in folder.glob("*")),
        }


def at_step(rank: int, step: int, action: Callable[[], None]) -> Callable[[Ranks], None]:
    """Have a rank do something within a step."""

    def before(ranks: Ranks) -> None:
        set_rates = Trainer._set_rates

        def acting(self: Trainer) -> None:
            if ranks.rank == rank and self.at.step == step:
                action()
            set_rates(self)

        Trainer._set_rates = acting  # type: ignore[method-assign]

    return before


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def break_saves(times: int) -> Callable[[Ranks], None]:
    """The first saves of rank 1 find the disk full."""

    def before(ranks: Ranks) -> None:
        write, left = hashed_writer._HashingStream.write, [times]

        def full(stream: Any, content: Any) -> int:
            if ranks.rank == 1 and left[0] and stream.size > 0:
                left[0] -= 1
                with stream._system.noting():
                    raise OSError(28, "No space left on device")
            return write(stream, content)

        hashed_writer._HashingStream.write = full  # type: ignore[method-assign]

    return before


def in_a_write(action: Callable[[], None]) -> Callable[[Ranks], None]:
    """Have rank 1 do something once, while it writes its first checkpoint."""

    def before(ranks: Ranks) -> None:
        write, left = hashed_writer._HashingStream.write, [action] * (ranks.rank == 1)

        def acting(stream: Any, content: Any) -> int:
            if left:
                left.pop()()
            return write(stream, content)

        hashed_writer._HashingStream.write = acting  # type: ignore[method-assign]

    return before


def freeze() -> None:
    """As a machine that is cut off: nothing of this process answers, until somebody ends it."""
    mine = os.getpid()
    if not os.fork():
        time.sleep(14)
        os.kill(mine, signal.SIGKILL)
        os._exit(0)
    os.kill(mine, signal.SIGSTOP)


def note_saves(said: Path) -> Callable[[Ranks], None]:
    """Keep the steps that rank 0 begins to save."""

    def before(ranks: Ranks) -> None:
        save = Saver.save

        def noting(self: Saver, step: int, *rest: Any, **named: Any) -> None:
            if ranks.rank == 0:
                said.open("a").write(f"{step}\n")
            save(self, step, *rest, **named)

        Saver.save = noting  # type: ignore[method-assign]

    return before


def dump_loaded(folder: Path) -> Callable[[Ranks], None]:
    """Keep every rank's shards as they are once a checkpoint is loaded, and the state of all generators."""

    def before(ranks: Ranks) -> None:
        resume = Trainer.resume

        def dumping(self: Trainer, start: Any) -> None:
            resume(self, start)
            if start.path is None:
                return
            parts: dict[str, Any] = {}

            def walk(prefix: str, tree: Any) -> None:
                if isinstance(tree, dict):
                    for key, value in tree.items():
                        walk(f"{prefix}.{key}" if prefix else str(key), value)
                elif isinstance(tree, ShardedTensor):
                    for shard in tree.local_shards():
                        place = ",".join(map(str, shard.metadata.shard_offsets))
                        parts[f"{prefix}@{place}"] = shard.tensor.numpy().copy()
                elif isinstance(tree, torch.Tensor):
                    parts[f"{prefix}@"] = tree.numpy().copy()

            walk("", self.course.tensors())
            np.savez(folder / f"loaded-{ranks.world_size}-{ranks.rank}.npz", **parts)

        Trainer.resume = dumping  # type: ignore[method-assign]

    return before


def generators() -> str:
    parts = (torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), str(random.getstate()))
    return str(hash(parts))


def watch_generators(said: Path) -> Callable[[Ranks], None]:
    def before(ranks: Ranks) -> None:
        run = Trainer.run

        def watching(self: Trainer, start: Any) -> Any:
            earlier = generators()
            end = run(self, start)
            said.write_text("same" if generators() == earlier else "consumed")
            return end

        Trainer.run = watching  # type: ignore[method-assign]

    return before


def digests(run: Path) -> dict[str, str]:
    path = checkpoint_files.checkpoints(run / "checkpoints")[0]
    return {n: e["sha256"] for n, e in checkpoint_files.read_manifest(path).items() if n.endswith("distcp")}


def main(root: Path) -> None:
    runs, report = Runs(root), {}
    report["whole"] = runs.train("whole", 2, watch_generators(root / "generators"))
    report["generators"] = (root / "generators").read_text()
    report["stopped"] = runs.train("stopped", 2, at_step(1, 6, terminate))
    report["continued"] = runs.train("stopped", 2)
    report["sync"] = runs.train("sync", 2, checkpoint__mode="sync", checkpoint__every_steps=4)
    report["same tensors"] = digests(root / "whole") == digests(root / "stopped") == digests(root / "sync")
    report["minutes"] = runs.train("minutes", 2, checkpoint__every_minutes=1e-6, checkpoint__keep=99)
    # The end of the epochs is at a step after which a save is due; the next start finds nothing to do.
    end = {"checkpoint__every_steps": len(report["whole"]["losses"])}
    report["once"] = runs.train("once", 2, note_saves(root / "saves"), **end)
    lines = (root / "once" / "metrics.jsonl").read_text()
    report["over"] = runs.train("once", 2, note_saves(root / "saves"), **end)
    report["lines again"] = (root / "once" / "metrics.jsonl").read_text() == lines
    report["saves"] = (root / "saves").read_text()
    often = {"checkpoint__every_steps": 4, "checkpoint__keep": 99}
    report["full, stop"] = runs.train("full", 2, break_saves(1), **often)
    report["full, continue"] = runs.train("on", 2, break_saves(1), **often, checkpoint__on_error="continue")
    last = {"checkpoint__on_error": "continue", "train__max_steps": 5}
    report["full at the end"] = runs.train("end", 2, break_saves(1), **last)
    report["full at the end, sync"] = runs.train("end2", 2, break_saves(1), **last, checkpoint__mode="sync")
    short = {"checkpoint__mode": "sync", "train__timeout_s": 3, "train__max_steps": 4}
    report["slow"] = runs.train("slow", 2, in_a_write(lambda: time.sleep(7)), **short)
    report["frozen"] = runs.train("frozen", 2, in_a_write(freeze), **short)
    four = {"train__max_steps": 8, "checkpoint__every_steps": 5, "checkpoint__keep": 99}
    report["on 4"] = runs.train("four", 4, **four)
    for ranks in (1, 2, 3, 4):
        shutil.copytree(root / "four", root / f"four-{ranks}")
        shutil.rmtree(root / f"four-{ranks}" / "checkpoints" / "step-00000008")
        report[f"4 to {ranks}"] = runs.train(f"four-{ranks}", ranks, dump_loaded(root), **four)
    report["same tensors on 4"] = digests(root / "four") == digests(root / "four-4")
    wide = {"groups__representation__dim": 256, "train__max_steps": 4, "checkpoint__every_steps": 3}
    runs.train("wide", 2, **wide)
    shutil.rmtree(root / "wide" / "checkpoints" / "step-00000004")
    report["to columns"] = runs.train("wide", 2, **wide, groups__representation__sharding=["column_wise"])
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]))
