"""The command line: one verb per file of `pipelines/`, and nothing but argument parsing here.

Exit codes: 0 success; 2 an error the user can mend (one line on stderr); 1 anything else, a lost rank too.
Pipelines are imported when their verb runs: `tandemrec --help` must not wait for torch. An option is called
as its parameter is; switches are named, so that they get no `--no-` form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from launch.analysis_verbs import analyze
from launch.options import (
    At,
    Checkpoint,
    ConfigFile,
    Device,
    HistoryLength,
    MoreOverrides,
    Overrides,
    Overwrite,
    RunFolder,
    Split,
    Version,
    Weights,
    refuse_secrets_in,
)
from launch.quick_imports import quick_imports
from launch.reporting import OTHER_ERROR, USER_ERROR, report, reporting_thread_errors
from launch.serving_verbs import ServeCommand, serve
from launch.snapshot_verbs import export, portable, score, vectors
from launch.stream_verbs import online, windows
from launch.tuning_verb import tune

app = typer.Typer(
    name="tandemrec",
    help="Train, evaluate and serve long-sequence recommendation models on TorchRec.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _global_options(
    version: Version = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # `main` reads --debug itself, so that it may stand before or after the verb; here it is for --help.
    del version, debug


@app.command()
def doctor() -> None:
    """Check this environment."""
    from pipelines.doctor import doctor as run

    raise typer.Exit(run())


@app.command()
def fetch(
    out: Annotated[Path, At("--out", metavar="DIR", help="Where to put the data.")],
    what: Annotated[
        Literal["demo", "multi-task"], Option(help="Only events, or also candidates with several labels.")
    ] = "demo",
) -> None:
    """Download the Complete Journey data as raw tables."""
    from pipelines.fetch.fetch import fetch as run

    for table in run(out, what=what):
        typer.echo(f"{table.stem}: {table}")


@app.command()
def synth(
    out: Annotated[Path, At(metavar="LOG", help="The sequence log to write.")],
    kind: Annotated[
        str,
        Option(
            help="relevance, xor, profiles, interference, decoupled, far, pair or opposite; of several tasks "
            "or domains agree, domains, signs, funnel and helper; sparse_25, sparse_5, sparse_1 or collapse; "
            "digits, digits_number, similar and uncertain, of encoders; flip, whose best item changes."
        ),
    ] = "relevance",
    seed: Annotated[int, Option(min=0, help="Of every random draw.")] = 7,
    users: Annotated[int, Option(min=0, help="To train on; 0: the kind's own number.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a log with a planted signal and a known oracle."""
    from pipelines.synth.synth import synth as run

    run(out, kind, seed, users, overwrite)


@app.command()
def ingest(
    config: ConfigFile,
    out: Annotated[Path | None, At(metavar="LOG", help="The sequence log to write.")] = None,
    events: Annotated[
        list[Path] | None,
        At(metavar="FILE", help="Raw events: a file, folder or quoted pattern; repeatable."),
    ] = None,
    impressions: Annotated[
        list[Path] | None, At(metavar="FILE", help="Shown candidates with labels; repeatable.")
    ] = None,
    vocabulary: Annotated[
        Path | None, At(metavar="LOG", help="Keep the ids of this older log; new values are unknown.")
    ] = None,
    extend: Annotated[
        bool, Option("--extend-vocabulary", help="New values get new ids after the older log's.")
    ] = False,
    overrides: Overrides = None,
    engine: Annotated[str | None, Option(help="duckdb (the default) or spark.")] = None,
    overwrite: Overwrite = False,
    preview: Annotated[
        bool, Option("--preview", help="Only show how each column is read; writes nothing.")
    ] = False,
) -> None:
    """Turn raw events into a sequence log."""
    from pipelines.ingest.ingest import ingest as run
    from pipelines.ingest.ingest import load_ingest_config, report_lines

    files = events[0] if events and len(events) == 1 else events
    # What is not given stays with the pipeline's own default.
    given = {"impressions": impressions, "engine": engine}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    chosen = list(overrides or [])
    chosen += [f"vocabulary.log={json.dumps(str(vocabulary), ensure_ascii=False)}"] if vocabulary else []
    chosen += ["vocabulary.extend=true"] if extend else []
    settings = load_ingest_config(config, chosen)
    if preview:
        from pipelines.ingest.ingest import preview as show

        show(files, settings, typer.echo, **options)
        return
    if out is None:
        raise typer.BadParameter("name the log to write with --out, or ask for --preview")
    manifest = run(files, out, settings, overwrite=overwrite, **options)
    for line in report_lines(manifest):
        typer.echo(line)


@app.command()
def plan(
    config: ConfigFile,
    world_size: Annotated[int, Option(min=1, help="Number of ranks.")],
    local_world_size: Annotated[int, Option(min=0, help="Ranks of a node; 0: all, at most 8.")] = 0,
    device: Annotated[str, Option(help="cpu or cuda; cuda with --hbm.")] = "",
    hbm: Annotated[str, Option(metavar="SIZE", help="Device memory per rank, such as 141GB.")] = "",
    ddr: Annotated[str, Option(metavar="SIZE", help="Host memory of a node, shared by its ranks.")] = "",
    behaviors: Annotated[
        int, Option("--behaviors-per-step", min=0, help="Of all ranks; 0: estimate from the log.")
    ] = 0,
    out: Annotated[Path | None, At("--json", metavar="FILE", help="Keep the plan here.")] = None,
    run_folder: Annotated[
        Path | None, At("--out", metavar="RUN", help="The run's folder: is its disk large enough?")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print the sharding plan, what a run needs of memory and disk, and step bytes."""
    with quick_imports():
        from pipelines.plan.plan import PlanOptions
        from pipelines.plan.plan import plan as run

    options = PlanOptions(world_size, local_world_size, device, hbm, ddr, behaviors, out, run_folder)
    run(config, overrides or [], options)


@app.command()
def train(
    config: ConfigFile,
    out: Annotated[Path, At(metavar="RUN", help="The run folder; resumed if it exists.")],
    plan_file: Annotated[
        Path | None, At("--plan", metavar="FILE", help="Place the tables as `plan --json` did.")
    ] = None,
    overrides: Overrides = None,
    init_from: Annotated[
        Path | None, At(metavar="DIR|RUN", help="Start a new run with the weights of another one.")
    ] = None,
    more: MoreOverrides = None,
    check: Annotated[bool, Option("--check", help="Only check the configuration and the log.")] = False,
    profile: Annotated[
        bool, Option("--profile", help="Trace 20 steps and print where their time went.")
    ] = False,
) -> None:
    """Train a model; torchx or torchrun start several ranks."""
    chosen = [*(overrides or []), *(more or [])]
    chosen += [f"plan.file={json.dumps(str(plan_file))}"] if plan_file else []
    chosen += [f"train.init_from={json.dumps(str(init_from.absolute()))}"] if init_from else []
    if check:
        with quick_imports():
            from pipelines.train import check as check_only

        check_only(config, out, chosen)
        return
    with quick_imports():
        from pipelines.train import train as run

    run(config, out, chosen, profile)


app.command()(tune)


@app.command()
def evaluate(
    run_folder: RunFolder,
    split: Split = "test",
    checkpoint: Checkpoint = "",
    device: Device = None,
    sample: Annotated[
        int, Option(min=0, help="About so many candidates at most, those of some users; 0: all.")
    ] = 0,
    weights: Weights = "raw",
    history_length: HistoryLength = 0,
) -> None:
    """Measure a trained run: AUC, log loss, calibration."""
    with quick_imports():
        from pipelines.evaluate import evaluate as run

    run(run_folder, split, checkpoint, device, sample, weights, history_length)


app.command()(analyze)


app.command()(export)
app.command()(portable)


@app.command()
def unshard(
    run_folder: RunFolder, out: Annotated[Path, At("--out", metavar="DIR", help="The folder to write.")]
) -> None:
    """Write a run's newest checkpoint as plain tables."""
    with quick_imports():
        from pipelines.unshard import unshard as run

    run(run_folder, out)


@app.command()
def cluster(
    log: Annotated[Path, At(metavar="LOG", help="A sequence log.")],
    snapshot: Annotated[Path, At(metavar="SNAP", help="Whose attention vectors are clustered.")],
    out: Annotated[Path, At(metavar="LOG", help="The log to write, with clusters.")],
    chunk: Annotated[int, Option(min=1, help="Behaviors clustered together.")] = 500,
    cap: Annotated[int, Option(min=1, help="Most behaviors of a cluster.")] = 20,
    group_by: Annotated[
        str,
        Option(metavar="FEATURE", help="No cluster mixes values of it. coarsest: fewest values; or none."),
    ] = "coarsest",
    seed: Annotated[int, Option(min=0, help="Of k-means.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Add clusters of histories to a log (TWIN-V2)."""
    with quick_imports():
        from pipelines.cluster import cluster as run
    from trainer.log.clusters import ClusterInfo

    run(log, snapshot, out, ClusterInfo(chunk=chunk, cap=cap, group_by=group_by, seed=seed), overwrite)


app.command()(windows)
app.command()(online)
app.command()(score)
app.command()(vectors)
app.command(cls=ServeCommand)(serve)


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def bench(words: Annotated[list[str] | None, typer.Argument(metavar="[NAME] [OPTIONS]")] = None) -> None:
    """Run a benchmark; needs a clone of the repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        from embeddings.errors import ConfigError

        raise ConfigError(
            "benchmarks are no part of the package: clone the repository, run `make bench` there"
        )
    sys.path.insert(0, str(root))
    from benchmarks.__main__ import main as run

    raise typer.Exit(run(words or []))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; `arguments` defaults to the process's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        refuse_secrets_in(words)
        # The command itself: called as an app, Typer puts an exception hook of its own in place of ours.
        command = typer.main.get_command(app)
        with reporting_thread_errors(debug="--debug" in words):
            result = command([word for word in words if word != "--debug"], standalone_mode=False)
    except typer.Abort:
        return OTHER_ERROR
    except Exception as error:
        return report(error, debug="--debug" in words)
    # A verb that ends early hands its exit code back here; an interrupt comes as 130.
    if not isinstance(result, int) or result == 0:
        return 0
    return USER_ERROR if result == USER_ERROR else OTHER_ERROR


if __name__ == "__main__":
    sys.exit(main())
