"""`tandemrec train`: one rank, or any number under torchrun or TorchX; resumes its run folder by itself."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

from embeddings.agreement import from_rank_0
from embeddings.errors import TandemError
from embeddings.plan.planner import Placement
from pipelines.console import quiet_third_parties, table_lines
from pipelines.profile import StepProfile
from pipelines.quality_report import baselines_key, remarks, without
from pipelines.start import Kind, Start, open_start, try_out
from trainer.assemble import build_sharded
from trainer.checkpoint import save_load as checkpoint
from trainer.config.places import place_of
from trainer.log.schema import LogManifest
from trainer.loop.attempts import ending_well
from trainer.loop.loop import Trainer
from trainer.loop.phases import phases_of
from trainer.loop.position import Position
from trainer.quality.baseline_files import baselines_of
from trainer.quality.baselines import by_baseline, counted_feature
from trainer.quality.domains import SplitMetrics
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config, of_files
from trainer.run_folder import versions

# Candidates of a training split that is read once more when training ends, for baselines: some minutes.
_RATES_OF = 100_000_000
End = Literal["complete", "stopped", "pruned"]


def train(config: Path, out: Path, overrides: Sequence[str] = (), profiled: bool = False) -> None:
    """Train as `config` says (with `section.key=value` overrides) and leave a run folder at `out`.

    `profiled`: also a trace of some steps and a table of where their time went, see `pipelines.profile`.
    """
    settings = settings_of(config, overrides)
    with process_group(settings.train.timeout_s, settings.train.device) as ranks, of_files(config, overrides):
        run(settings, out, ranks, profiled=profiled)


def check(config: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Find whatever would stop a training before its first step; nothing is left behind.

    Raises:
        TandemError: what training would raise.
    """
    settings = settings_of(config, overrides)
    with process_group(settings.train.timeout_s, settings.train.device) as ranks, of_files(config, overrides):
        say = _say(ranks)
        start = open_start(settings, out, ranks, say, checking=True)
        phases = phases_of(settings, start.domains)
        for phase in phases if settings.phases else ():
            say(phase.line(len(phases)))
        try_out(start, say)
        say(f"{config} and {settings.data.log} fit together; {out} can be trained on {ranks.device}")


def settings_of(config: Path, overrides: Sequence[str]) -> Config:
    """The settings of a run, with places that do not depend on the folder that a command is called in."""
    quiet_third_parties()
    # Kept in the run, which other commands may read from another folder.
    return placed(load_config(config, overrides))


def placed(settings: Config) -> Config:
    """The same settings, with all local places as absolute paths.

    Raises:
        ConfigError: an address needs a package that is missing.
    """

    def absolute(setting: str, text: str) -> str:
        return text and str(place_of(setting, text).absolute())

    train, plan = settings.train, settings.plan
    changes = {
        "data": settings.data.absolute(),
        "train": train.model_copy(update={"init_from": absolute("train.init_from", train.init_from)}),
        "plan": plan.model_copy(
            update={
                "file": absolute("plan.file", plan.file),
                "mapped_folder": plan.mapped_folder and str(Path(plan.mapped_folder).absolute()),
            }
        ),
    }
    return settings.model_copy(update=changes)


def _say(ranks: Ranks) -> Callable[[str], None]:
    def say(line: str) -> None:
        if ranks.speaks:
            print(line, flush=True)

    return say


def run(
    config: Config,
    out: Path,
    ranks: Ranks,
    after_step: Callable[[int], None] | None = None,
    profiled: bool = False,
    after_validation: Callable[[int, SplitMetrics, bool], bool] | None = None,
    baselines: bool = True,
) -> End:
    """The job on one rank, inside a process group -> how it ended.

    Args:
        after_step: called with the number of steps done; after_validation: see `Trainer`.
        baselines: measure simple rules beside the last validation, for which data are read once more.
    """
    say = _say(ranks)
    start = open_start(config, out, ranks, say)
    folder, resume = start.folder, start.resume
    trainer = trainer_of(start, say, Trainer)
    trainer.after_step, trainer.after_validation = after_step, after_validation
    with ExitStack() as opened:
        if profiled:
            profile = opened.enter_context(closing(StepProfile(trainer.model, out, ranks, say)))
            trainer.after_step = profile.after_step
        opened.enter_context(ending_well(folder, ranks.speaks))
        # Rank 0 holds the folder's lock; all hear where it cannot.
        from_rank_0(lambda: opened.enter_context(folder.lock()))
        end = trainer.run(resume)
    if start.train.vectors:
        found = {name: each.counts.entry() for name, each in start.train.vectors.items()}
        from_rank_0(lambda: folder.update_summary({"vectors": found}))
    _conclude(trainer, end, resume, start.manifest, say, baselines)
    if trainer.stopped:
        return "stopped"
    return "pruned" if trainer.pruned else "complete"


def trainer_of(start: Start, say: Callable[[str], None], kind: type[Kind]) -> Kind:
    """Place the tables of a run, build its model and what trains it; collective."""
    config, ranks, resume = start.config, start.ranks, start.resume
    sharded = build_sharded(
        config,
        start.manifest,
        ranks,
        training=True,
        former=resume.former_plan,
        first_rows=resume.path is None,
        disk_lines=start.disk_lines,
    )
    if sharded.origin:
        say(sharded.origin)
    say("\n".join(plan_lines(sharded.placements, ranks.world_size)))
    if (mapped := config.plan.mapped_folder) and ranks.device.type == "cpu":
        say(f"tables and their optimizer's state lie in mapped files of {mapped}, which show no name there")
    trainer = start.trainer(sharded, say, kind)
    start.fill(trainer, start.folder.first_weights, say)
    return trainer


def _conclude(
    trainer: Trainer,
    end: Position,
    resume: checkpoint.ResumePoint,
    manifest: LogManifest,
    say: Callable[[str], None],
    baselines: bool,
) -> None:
    """Say how training ended, and sum it up where it reached its end; collective."""
    ranks, folder = trainer.ranks, trainer.folder
    if trainer.pruned:
        say(f"pruned after step {end.step:,}: nothing more is saved")
        return
    if trainer.stopped:
        say(f"stopped after step {end.step:,} as asked, and saved; the same command continues it")
        return
    short = trainer.course.cut_short(end)
    if short:
        say(short)
    # An earlier start may have been killed between its last save and its summary.
    summed_up = from_rank_0(lambda: folder.read_summary().get("steps") == end.step)
    if resume.path is not None and end.step == resume.state["step"] and summed_up:
        raised = "train.early_stopping.patience" if trainer.ended_early else "train.epochs or train.max_steps"
        if trainer.config.phases:
            raised = "train.max_steps" if short else "passes or steps of the last of phases, or add one"
        say(f"nothing left to train: {folder.path} has all its {end.step:,} steps (raise {raised} for more)")
        return
    cpu_s, (metrics, step) = trainer.cpu_seconds(), trainer.kept_validation()
    say(
        f"trained {end.candidates:,} samples in {end.step:,} steps and {end.wall_s:.0f} s: "
        f"{end.candidates / max(end.wall_s, 1e-9):,.0f} samples/s on {ranks.world_size} rank(s); "
        f"see {folder.path}"
    )

    def summarise() -> list[str]:
        entries: dict[str, Any] = {
            "samples": end.candidates,
            "steps": end.step,
            "wall_s": end.wall_s,
            "cpu_s": cpu_s,
            "world_size": ranks.world_size,
            "versions": versions(),
        }
        lines: list[str] = []
        if metrics is not None and trainer.validation.reader is not None:
            entries |= {"validation": metrics.entry(), "validation_step": step}
        if baselines and metrics is not None and trainer.validation.reader is not None:
            try:
                with baselines_of(trainer.validation.reader, folder.path, _RATES_OF) as beside:
                    table, missing = beside.metrics(), beside.missing
            except (TandemError, OSError, MemoryError) as error:
                # Training is over and saved by now: this is said, and is no failure.
                lines = [f"no baselines beside the validation: {error}"]
            else:
                feature = counted_feature(manifest)
                entries[baselines_key("validation")] = by_baseline(table)
                lines = [*without(missing), *remarks("validation", metrics, table, feature)]
        folder.update_summary(entries)
        return lines

    if step != end.step:
        say(f"evaluate and export take the best checkpoint, after step {step:,}; what follows is about it")
    # Rank 0 may count for long, and what it cannot write is every rank's failure.
    for line in from_rank_0(summarise, slow=True):
        say(line)
    _say_what_is_there(trainer, end, manifest, say)


def _say_what_is_there(
    trainer: Trainer, end: Position, manifest: LogManifest, say: Callable[[str], None]
) -> None:
    """Name what the run folder has to look at, and the verb that comes next; collective."""
    folder = trainer.folder
    quoted = shlex.quote(str(folder.path))
    split = next(filter(manifest.holds, ("test", "validation")), "train")
    other = "" if split == "test" else f" --split {split}"
    if trainer.course.averaging.average is not None:
        say("the last phase has averaged weights, too: --weights averaged takes them")
    if trainer.course.fork is not None and trainer.course.fork.inside(end):
        branch = trainer.course.fork.of_branch()["branch"]
        say(f"this is inside the branch {branch}, which is not merged yet: the weights are its own")
    if from_rank_0(folder.shares.exists):
        say(f"shares of branches: {shlex.quote(str(folder.shares))}")
    say(f"curves: tensorboard --logdir {quoted}\nnext:   tandemrec evaluate --run {quoted}{other}")


def plan_lines(placed: Sequence[Placement], world_size: int) -> list[str]:
    """The sharding plan as an aligned table, with the megabytes each rank holds."""
    head, rows = ("table", "rows", "dim", "MB", "sharding", "kernel", "ranks"), []
    held = [0.0] * world_size
    for entry in placed:
        numbers = f"{entry.rows:,}", str(entry.dim), f"{entry.megabytes:.2f}"
        rows.append((entry.table, *numbers, entry.sharding, entry.kernel, ",".join(map(str, entry.ranks))))
        for rank in entry.ranks:
            held[rank] += entry.megabytes / len(entry.ranks)
    lines = [f"sharding plan for {world_size} rank(s)", *table_lines(head, rows)]
    lines.append(
        "weights per rank (MB): " + "  ".join(f"{rank}: {size:.2f}" for rank, size in enumerate(held))
    )
    return lines
