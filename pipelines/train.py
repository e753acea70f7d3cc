"""`tandemrec train`: one rank, or any number under torchrun or TorchX; resumes its run folder by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from embeddings.agreement import from_every_rank, from_rank_0, unhurried
from embeddings.plan_file import to_tree
from embeddings.planning import Placement
from pipelines.console import quiet_third_parties
from pipelines.profile import StepProfile
from pipelines.train_report import next_commands, quality, unmeasured
from trainer import checkpoint
from trainer.assemble import build_sharded, feature_rows, resolve_groups
from trainer.config import Config, load_config
from trainer.data.reader import SequenceLogReader
from trainer.data.schema import LogManifest, read_manifest
from trainer.distributed import Ranks, process_group, sum_counts
from trainer.loop import Position, Trainer
from trainer.resume import check_resumable, log_fingerprint
from trainer.run import RunFolder, versions
from trainer.starts import ending_well, note_start
from trainer.warm_start import fill, opened


def train(config: Path, out: Path, overrides: Sequence[str] = (), profiled: bool = False) -> None:
    """Train as `config` says (with `section.key=value` overrides) and leave a run folder at `out`.

    `profiled`: also a trace of some steps and a table of where their time went, see `pipelines.profile`.
    """
    settings = load_config(config, overrides)
    # Kept in the run, which other commands may read from another folder.
    here = settings.data.model_copy(update={"log": settings.data.log.absolute()})
    file = settings.plan.file and str(Path(settings.plan.file).absolute())
    placed = settings.plan.model_copy(update={"file": file})
    settings = settings.model_copy(update={"data": here, "plan": placed})
    quiet_third_parties()
    with process_group(settings.train.timeout_s) as ranks:
        run(settings, out, ranks, profiled=profiled)


def check(config: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Find what is wrong with a configuration or its log before any rank starts."""
    settings = load_config(config, overrides)
    manifest = read_manifest(settings.data.log)
    resolve_groups(settings, manifest)
    print(
        "\n".join(
            [*unmeasured(manifest), f"{config} and {settings.data.log} fit together; {out} can be trained"]
        )
    )


def run(
    config: Config,
    out: Path,
    ranks: Ranks,
    after_step: Callable[[int], None] | None = None,
    profiled: bool = False,
) -> None:
    """The job on one rank, inside a process group; `after_step` is called with the number of steps done."""

    def say(line: str) -> None:
        if ranks.speaks:
            print(line, flush=True)

    manifest, folder = read_manifest(config.data.log), RunFolder(out)
    fingerprint = log_fingerprint(manifest)
    found = checkpoint.find(folder.checkpoints)
    for reason in found.refused:
        say(f"refused checkpoint: {reason}")
    if found.path is not None:
        check_resumable(found.state, config, fingerprint)
    note_start(folder, config, found.state.get("step", 0))
    from_rank_0(lambda: folder.write_config(config))
    sharded = build_sharded(config, manifest, ranks, training=True, resumed=found)
    if sharded.origin:
        say(sharded.origin)
    say("\n".join(plan_lines(sharded.placements, ranks.world_size)))
    rows = feature_rows(sharded.groups)
    reader = open_split(config, "train", rows, ranks, seed=config.train.seed)
    validation = open_split(config, "validation", rows, ranks) if manifest.holds("validation") else None
    for problem in [*reader.skipped, *(validation.skipped if validation else [])]:
        print(f"[rank {ranks.rank}] skipped: {problem}", flush=True)
    plan = to_tree(sharded.plan)
    for line in unmeasured(manifest):
        say(line)
    trainer = Trainer(config, sharded.model, reader, validation, ranks, folder, say, fingerprint, plan)
    if found.path is None and config.train.init_from:
        _start_from(trainer, config, manifest, out, say)
    trainer.after_step = after_step
    watching = StepProfile(sharded.model, out, ranks, say) if profiled else None
    if watching is not None:
        trainer.after_step = watching.after_step
    with (
        closing(watching) if watching is not None else nullcontext(),
        ending_well(folder, ranks.speaks),
        _locked(folder),
    ):
        end = trainer.run(found)
    _conclude(trainer, end, found, manifest, say)


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Rank 0 holds the folder's lock; collective, so that all hear where it cannot."""
    with ExitStack() as held:
        from_rank_0(lambda: held.enter_context(folder.lock()))
        yield


def _conclude(
    trainer: Trainer,
    end: Position,
    found: checkpoint.Found,
    manifest: LogManifest,
    say: Callable[[str], None],
) -> None:
    """Say how training ended, and sum it up where it reached its end; collective."""
    ranks, folder = trainer.ranks, trainer.folder
    if trainer.stopped:
        say(f"stopped after step {end.step:,} as asked, and saved; the same command continues it")
        return
    if found.path is not None and end.step == found.state["step"]:
        say(
            f"nothing left to train: {folder.path} has all its {end.step:,} steps "
            "(raise train.epochs or train.max_steps for more)"
        )
        return
    cpu_s = trainer.cpu_seconds()
    from_rank_0(lambda: _summarise(folder, end, cpu_s, ranks.world_size))
    say(
        f"trained {end.candidates:,} samples in {end.step:,} steps and {end.wall_s:.0f} s: "
        f"{end.candidates / max(end.wall_s, 1e-9):,.0f} samples/s on {ranks.world_size} rank(s); "
        f"see {folder.path}"
    )
    if not ranks.speaks:
        return
    if trainer.metrics_of_validation is not None and trainer.validation_reader is not None:
        entries, lines = quality(trainer.metrics_of_validation, trainer.validation_reader, manifest)
        folder.update_summary(entries)
        for line in lines:
            say(line)
    say("\n".join(next_commands(folder.path, manifest)))


def _start_from(
    trainer: Trainer, config: Config, manifest: LogManifest, out: Path, say: Callable[[str], None]
) -> None:
    """Give a new run the weights that `train.init_from` names."""
    path, carry = Path(config.train.init_from), config.train.init_optimizer == "carry"
    with opened(path, RunFolder(out).first_weights) as source:
        lines: list[str] = []

        def filled(tensors: dict[str, Any]) -> None:
            every = from_every_rank(
                lambda: fill(tensors, source, config.data.log, manifest, carry), slow=True
            )
            lines.extend(every[0])

        trainer.load(filled)
    say("\n".join([f"weights from {path}, step {source.manifest.step:,}", *lines]))


def _summarise(folder: RunFolder, end: Position, cpu_s: float, world_size: int) -> None:
    entries = {
        "samples": end.candidates,
        "steps": end.step,
        "wall_s": end.wall_s,
        "cpu_s": cpu_s,
        "world_size": world_size,
        "versions": versions(),
    }
    folder.update_summary(entries)


def open_split(
    config: Config, split: str, rows: dict[str, int], ranks: Ranks, seed: int | None = None
) -> SequenceLogReader:
    """This rank's reader of a split; shuffled where a seed is given. Collective."""
    return SequenceLogReader(
        config.data,
        split,
        rows,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=seed,
        share=sum_counts,
        together=unhurried,
    )


def plan_lines(placed: Sequence[Placement], world_size: int) -> list[str]:
    """The sharding plan as an aligned table, with the megabytes each rank holds."""
    head = f"{'table':<34} {'rows':>13} {'dim':>4} {'MB':>9}  {'sharding':<12} {'kernel':<8} ranks"
    lines = [f"sharding plan for {world_size} rank(s)", head]
    held = [0.0] * world_size
    for entry in placed:
        where = ",".join(map(str, entry.ranks))
        lines.append(
            f"{entry.table:<34} {entry.rows:>13,} {entry.dim:>4} {entry.megabytes:>9.2f}  "
            f"{entry.sharding:<12} {entry.kernel:<8} {where}"
        )
        for rank in entry.ranks:
            held[rank] += entry.megabytes / len(entry.ranks)
    lines.append(
        "weights per rank (MB): " + "  ".join(f"{rank}: {size:.2f}" for rank, size in enumerate(held))
    )
    return lines
