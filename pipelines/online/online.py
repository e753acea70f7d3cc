"""`tandemrec online`: for each window of a stream: measure it, train it once, save, publish.

The loop itself is `trainer.loop.online`. Here is what it needs: the stream's windows, a model, and a process
that publishes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from embeddings.agreement import from_rank_0
from embeddings.errors import ConfigError, DataError
from pipelines.console import quiet_third_parties
from pipelines.online.publisher import Places, VersionPublisher
from pipelines.start import Start, open_split, open_start
from pipelines.train import trainer_of
from trainer.assemble import id_bounds
from trainer.data.reader import SequenceLogReader
from trainer.data.stream.folder import WindowFolder
from trainer.data.stream.intake import Intake
from trainer.data.stream.ledger import Ledger
from trainer.data.stream.source import SPLIT, Window
from trainer.log.schema import LogManifest, read_manifest
from trainer.loop.attempts import ending_well
from trainer.loop.online import Stream, WindowTrainer
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config, of_files

Say = Callable[[str], None]


@dataclass(frozen=True)
class OnlineJob:
    """What to do with a stream.

    Attributes:
        out: the run's folder; snapshots: where versions are published, None = nowhere.
        windows: to train in this start, 0 = all; follow: wait for more.
    """

    stream: Path
    out: Path
    snapshots: Path | None = None
    windows: int = 0
    follow: bool = False


def online(config: Path, job: OnlineJob, overrides: Sequence[str] = ()) -> None:
    """Train a stream as `config` says, on one rank or many; goes on where the run in `job.out` stands.

    Raises:
        TandemError: what training and publishing raise; a config that a stream cannot follow.
    """
    given = load_config(config, overrides)
    quiet_third_parties()
    with process_group(given.train.timeout_s, given.train.device) as ranks, of_files(config, overrides):

        def say(line: str) -> None:
            if ranks.speaks:
                print(line, flush=True)

        settings, lines = for_stream(given, job.stream)
        for line in lines:
            say(line)
        run(settings, job, ranks, say)


def for_stream(config: Config, stream: Path) -> tuple[Config, list[str]]:
    """The same config for a stream, which has no end; -> lines that say what of it is left aside.

    Raises:
        ConfigError: it asks for what only a log has.
    """
    if config.phases:
        more = "leave them out, and start from a trained run with train.init_from"
        raise ConfigError(f"phases: a stream is one phase; {more}")
    if config.train.early_stopping.on:
        raise ConfigError("train.early_stopping: a stream has no end to bring forward; set its patience to 0")
    train, tables = config.train, config.train.tables
    constant = {"warmup_steps": None, "warmup": 0.0, "decay": "none"}
    left = [f"train.{key}" for key, value in constant.items() if getattr(train, key) != value]
    of_tables = {"warmup_steps": None, "warmup": None, "decay": None}
    left += [f"train.tables.{key}" for key, value in of_tables.items() if getattr(tables, key) != value]
    lines = [f"learning rates of a stream are constant: {', '.join(left)} left aside"] if left else []
    update = {**constant, "epochs": 1, "tables": tables.model_copy(update=of_tables)}
    data = config.data.model_copy(update={"log": stream}).absolute()
    return config.model_copy(update={"train": train.model_copy(update=update), "data": data}), lines


def run(
    config: Config, job: OnlineJob, ranks: Ranks, say: Say, kind: type[WindowTrainer] = WindowTrainer
) -> Ledger:
    """The job on one rank, inside a process group; -> what was taken. `kind` trains it."""
    stream = config.data.log
    manifest, source = read_manifest(stream), WindowFolder(stream)
    start = _start(config, job, ranks, say, manifest, source)
    trainer = trainer_of(start, say, kind)
    with ExitStack() as opened:
        opened.enter_context(ending_well(start.folder, ranks.speaks))
        # Rank 0 holds the folder's lock, and has the process that publishes; all hear where it cannot.
        from_rank_0(lambda: opened.enter_context(start.folder.lock()))
        intake, publisher = None, None
        if ranks.rank == 0:
            skip, order = config.data.on_bad == "skip", job.out / "windows.json"
            intake = Intake(source, stream, order, skip, config.online.retry_s)
            if job.snapshots is not None:
                places = Places(job.out, job.snapshots, stream)
                publisher = opened.enter_context(VersionPublisher(places, config.online))
        reading = partial(_open, start, manifest)
        skip = config.data.on_bad == "skip"
        trainer.stream = Stream(intake, publisher, reading, job.windows, job.follow, skip)
        trainer.run(start.resume)
        from_rank_0(lambda: None if publisher is None else publisher.finish(), slow=True)
        _conclude(trainer, say)
    return trainer.ledger


def _start(
    config: Config, job: OnlineJob, ranks: Ranks, say: Say, manifest: LogManifest, source: WindowFolder
) -> Start:
    """A run that knows its input from the first window that can be read. Collective."""
    bad: dict[str, str] = {}
    while True:
        first = _first_window(source, job, config, say, bad)
        try:
            return open_start(config, job.out, ranks, say, manifest=first.manifest(manifest))
        except DataError as error:
            # What becomes of it is said where it is taken.
            if config.data.on_bad != "skip":
                raise
            bad[first.name] = str(error)


def _open(start: Start, manifest: LogManifest, window: Window) -> SequenceLogReader:
    """A reader of one window, for this rank; collective."""
    config = start.config
    rows = id_bounds(start.groups, config)
    of_window = window.manifest(manifest)
    return open_split(config, SPLIT, rows, start.ranks, seed=config.train.seed, manifest=of_window)


def _first_window(
    source: WindowFolder, job: OnlineJob, config: Config, say: Say, bad: Mapping[str, str]
) -> Window:
    """Any window with requests: what a model needs to know of its input; waits for one. Collective.

    Which of those that cannot be read end the run is said by whoever takes them one by one.

    Args:
        bad: windows that no reader could be opened of, and why.

    Raises:
        ConfigError: there is none, and nobody wants to wait. DataError: none can be read.
    """

    def look() -> Window | None:
        problems = [f"window {name}: {problem}" for name, problem in bad.items()]
        for name, stamp in source.listed().items():
            if name in bad:
                continue
            try:
                window = source.open(name, stamp)
            except (DataError, OSError) as error:
                problems.append(f"window {name}: {error}")
                continue
            if not window.empty:
                return window
        if problems and not (job.follow and config.data.on_bad == "skip"):
            raise DataError(f"no window with requests can be read; {problems[0]}", file=source.folder)
        return None

    said = False
    while (window := from_rank_0(look, slow=True)) is None:
        if not job.follow:
            raise ConfigError(f"{source.folder}: no window with requests is there yet; wait with --follow")
        if not said:
            say(f"waiting for a first window in {source.folder}")
        said = True
        from_rank_0(lambda: time.sleep(config.online.poll_s))
    return window


def _conclude(trainer: WindowTrainer, say: Say) -> None:
    """Sum the run up; collective."""
    at, ledger, folder = trainer.at, trainer.ledger, trainer.folder
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in ledger.counts.items()) or "none"
    entries = {"windows": dict(ledger.counts), "steps": at.step, "samples": at.candidates}
    from_rank_0(lambda: folder.update_summary(entries))
    stopped = " stopped as asked;" if trainer.stopped else ""
    say(
        f"{folder.path}:{stopped} windows so far: {counts}; {at.candidates:,} samples in {at.step:,} steps; "
        "the same command goes on"
    )
