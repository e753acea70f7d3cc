"""Attempts to train: a run that fails, is restarted and fails again at the same step comes to an end.

Supervisors (torchrun, Slurm's requeue, a Kubernetes job) restart whatever failed, some of them for ever. Each
attempt leaves a line in `starts.jsonl` of the run folder. An attempt that ends well removes the file. An
attempt that would be one too many from the same step is refused.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from embeddings.agreement import from_rank_0
from embeddings.errors import ConfigError
from trainer.run_config import Config
from trainer.run_folder import RunFolder
from trainer.sealed_folder import naming

_NAME = "starts.jsonl"


class NoProgress(ConfigError):
    """So many starts of a run have failed at the same step that one more would be in vain."""


def note_start(folder: RunFolder, config: Config, step: int, *, checking: bool = False) -> None:
    """Write down that a run starts from `step`; collective.

    Args:
        checking: only check, and write nothing.

    Raises:
        NoProgress: the last `train.max_starts_without_progress` starts began there, too, with this config.
    """
    from_rank_0(lambda: _note(folder.path / _NAME, config, step, checking))


@contextmanager
def ending_well(folder: RunFolder, speaks: bool) -> Iterator[None]:
    """Forget the starts when the training returns, or is interrupted: a person or a signal is no failure.

    Collective where the training returns; ranks may be interrupted at different places.
    """
    file = folder.path / _NAME
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if speaks:
            file.unlink(missing_ok=True)
        raise
    from_rank_0(lambda: file.unlink(missing_ok=True))


def _note(file: Path, config: Config, step: int, checking: bool) -> None:
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    attempts = len(list(takewhile(lambda line: _step_and_config(line) == (step, digest), reversed(lines))))
    limit = config.train.max_starts_without_progress
    if limit and attempts >= limit:
        raise NoProgress(
            f"{file}: the last {attempts} starts began at step {step:,} and failed before a newer "
            "checkpoint; look at the first error of each and mend its cause (or save more often, see "
            "checkpoint.*), then delete this file to go on; a start with a changed "
            "configuration goes on by itself"
        )
    if checking:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file), file.open("a", encoding="utf-8") as starts:
        starts.write(json.dumps({"step": step, "config": digest, "time": now}) + "\n")


def _step_and_config(line: str) -> tuple[int, str] | None:
    """-> (step, config) of a line; None for one that a crash cut short."""
    try:
        entry = json.loads(line)
        return int(entry["step"]), str(entry["config"])
    except (ValueError, KeyError, TypeError):
        return None
