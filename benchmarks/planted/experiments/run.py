"""What papers on several tasks, sets and domains expect, put to the test on planted logs

    tandemrec bench planted --experiment agree --experiment domains --seeds 1,2,3,4,5 --out runs/planted

Each seed has a log of its own, and models that start from it. A finished run is one line of
OUT/<experiment>/results.jsonl, and is not made again. The experiment's section in
benchmarks/planted/README.md is replaced; --image draws the gradients of negatives of the runs that are there.

    tandemrec bench planted --experiment collapse --users 40000 --set train.epochs=4 --out runs/planted

To seek causes: --set and --users change all models of an experiment, --model chooses some of them. What they
give is printed, with the logloss on what was learned from, and no section is replaced.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, markdown
from benchmarks.models import RESULTS, Record, environment_line, keep, mean, records_of, seeds_of
from benchmarks.planted.experiments.experiment import ByModel, Experiment
from benchmarks.planted.experiments.probe import SPLIT, trained
from benchmarks.planted.experiments.table import EXPERIMENTS
from embeddings.errors import ConfigError, hint_of
from pipelines.synth.synth import synth
from trainer.log.schema import is_sequence_log, read_manifest
from trainer.run_folder import versions


@dataclass(frozen=True)
class Change:
    """What is other than an experiment says.

    Attributes:
        settings: overrides of all models; users: to train on, 0 = the experiment's own.
        models: those that are trained, empty = all.
    """

    settings: tuple[str, ...] = ()
    users: int = 0
    models: tuple[str, ...] = ()

    def same_as(self, record: Record) -> bool:
        """Whether a finished run had these settings and users."""
        return [*self.settings] == record.get("settings", []) and self.users == record.get("users", 0)


NONE = Change()


def log_of(experiment: Experiment, seed: int, out: Path, users: int = 0) -> Path:
    """The log of an experiment and a seed, written if it is not there."""
    log = (out / (f"{experiment.kind}-{seed}" + (f"-{users}" if users else ""))).absolute()
    if not is_sequence_log(log):
        with redirect_stdout(StringIO()):
            synth(log, experiment.kind, seed, users or experiment.users)
    return log


def run_one(
    experiment: Experiment, model: str, seed: int, log: Path, out: Path, change: Change = NONE
) -> Record:
    """Train and measure one model; its run folder does not stay."""
    overrides = [*experiment.overrides, *experiment.models[model], *change.settings]
    overrides += [f"data.log={log}", f"train.seed={seed}"]
    folder, started = out / "run", (time.perf_counter(), time.process_time())
    shutil.rmtree(folder, ignore_errors=True)
    of = trained(folder, overrides, tied=model in experiment.tied)
    shutil.rmtree(folder)
    return {
        "model": model,
        "seed": seed,
        "settings": list(change.settings),
        "users": change.users,
        "values": dict(experiment.measure(of)),
        "learned": dict(of.learned),
        "negatives": list(of.negatives),
        "wall_s": time.perf_counter() - started[0],
        "cpu_s": time.process_time() - started[1],
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def run_all(name: str, seeds: Sequence[int], out: Path, change: Change = NONE) -> list[Record]:
    """Make the runs of an experiment that are not there yet; returns those of the seeds."""
    experiment, folder = EXPERIMENTS[name], out / name
    models = [model for model in experiment.models if not change.models or model in change.models]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    done = {(record["model"], record["seed"]) for record in records_of(path) if change.same_as(record)}
    for seed in seeds:
        for model in models:
            if (model, seed) in done:
                continue
            log = log_of(experiment, seed, out, change.users)
            record = run_one(experiment, model, seed, log, folder, change)
            keep(folder, record)
            learned = {f"{task} on train": value for task, value in record["learned"].items()}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in {**record["values"], **learned}.items())
            print(f"{name}, seed {seed}, {model}: {shown} ({record['cpu_s']:.0f} s)", flush=True)
    return [
        each
        for each in records_of(path)
        if each["seed"] in seeds and each["model"] in models and change.same_as(each)
    ]


def by_seed(records: Sequence[Record]) -> Iterator[ByModel]:
    """Values of every model, for each seed."""
    for seed in sorted({record["seed"] for record in records}):
        yield {record["model"]: record["values"] for record in records if record["seed"] == seed}


def section(name: str, records: Sequence[Record], out: Path) -> list[str]:
    """The table of an experiment and what becomes of each claim."""
    experiment = EXPERIMENTS[name]
    columns = list(dict.fromkeys(key for record in records for key in record["values"]))
    rows = []
    for model in experiment.models:
        of = [record for record in records if record["model"] == model]
        values = [[record["values"].get(key, math.nan) for record in of] for key in columns]
        rows.append([model, *map(mean, values)])
    seeds = sorted({record["seed"] for record in records})
    oracles = [read_manifest(log_of(experiment, seed, out)).report for seed in seeds]
    by_task = [
        report["oracles"][SPLIT] if "oracles" in report else {"click": report["oracle"][SPLIT]}
        for report in oracles
    ]
    losses = {task: mean([each[task]["logloss"] for each in by_task]) for task in by_task[0]}
    told = ", ".join(f"{loss} on {task}" for task, loss in losses.items())
    lines = [f"## {experiment.paper} on {name}", "", *markdown(["model", *columns], rows), ""]
    lines += [f"Logloss of the oracle: {told}. Columns without a name of a metric are logloss too.", ""]
    held = {
        claim: [holds(values) for values in by_seed(records)] for claim, holds in experiment.claims.items()
    }
    lines += [f"* {claim}: {sum(each)} of {len(each)} seeds" for claim, each in held.items()]
    return [*lines, ""]


def draw(out: Path, image: Path) -> None:
    """Norms of the gradients of negatives by step, a panel a rate. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for panel, rate in zip(panels, ("25", "5", "1"), strict=True):
        finished = records_of(out / f"sparse_{rate}" / RESULTS)
        records = [record for record in finished if NONE.same_as(record)]
        for model in EXPERIMENTS[f"sparse_{rate}"].models:
            each = [record["negatives"] for record in records if record["model"] == model]
            if not each:
                continue
            steps = torch.tensor([norms[: min(map(len, each))] for norms in each])
            panel.plot(steps.mean(0), label=model, linewidth=1)
            panel.fill_between(range(steps.shape[1]), steps.amin(0), steps.amax(0), alpha=0.25)
        panel.set(title=f"{rate} % of candidates clicked", xlabel="step", yscale="log")
    panels[0].set_ylabel("norm of the gradient\nover logits of negatives")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(image, dpi=110)


def main(words: Sequence[str]) -> None:
    from benchmarks.planted.__main__ import README, put_section, shown_words

    options = Options("planted", __doc__)
    options.add_argument("--experiment", action="append", required=True, choices=list(EXPERIMENTS))
    options.add_argument("--seeds", default="1,2,3,4,5", help="comma-separated")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all models")
    options.add_argument("--users", type=int, default=0, help="to train on, 0 = the experiment's own")
    options.add_argument("--model", action="append", default=[], help="train this model only; repeatable")
    options.add_argument("--image", type=Path, metavar="FILE.png", help="draw the gradients of negatives")
    options.add_argument("--readme", type=Path, default=README, help="where the tables go")
    given = options.read(words)
    torch.set_num_threads(1)
    seeds = seeds_of(given)
    change = Change(tuple(given.set), given.users, tuple(given.model))
    known = [model for name in given.experiment for model in EXPERIMENTS[name].models]
    for model in change.models:
        if model not in known:
            raise ConfigError(f"--model {model}: {hint_of(model, known, 'there are ' + '; '.join(known))}")
    report = Report(given, "Planted experiments", n=len(seeds))
    for name in given.experiment:
        records = run_all(name, seeds, given.out, change)
        if change != NONE:
            report.rows += records
            continue
        lines = section(name, records, given.out)
        lines += [
            environment_line(records, 1),
            "",
            f"    tandemrec bench planted {shlex.join(shown_words(words))}",
        ]
        report.rows += records
        report.lines(lines)
        put_section(given.readme, lines[0].removeprefix("## "), lines)
    if given.image is not None:
        draw(given.out, given.image)
    report.close()
