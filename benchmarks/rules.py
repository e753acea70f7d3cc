"""What update rules and averages cost: processor seconds of a step and memory, beside the plain step

    tandemrec bench rules --config configs/mmoe.toml --set data.log=LOG [--steps 40] [--rule per_task ...] \\
        [--page FILE.md]

Every run is a process of its own with one thread, which trains so many steps from nothing; rules take turns,
so that a change of the machine's load meets each of them. A step's time is the mean over the steps of a run,
reading included. "Beside steps" is what else the process takes: imports, start, validations, merges, saving.
--repeats is the number of seeds.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.harness.options import Options, own_command
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread, time_process
from benchmarks.models import mean

_SEED = 17
_BRANCHES = ({"name": "target"}, {"name": "other"})


class Rule(NamedTuple):
    """Settings of one rule.

    Attributes:
        phase: of its single phase, but for the length; given: overrides beside it.
        told: what it is, for the table. branches: that train each step of the phase.
    """

    told: str
    phase: Mapping[str, Any] = {}
    given: tuple[str, ...] = ()
    branches: int = 1


RULES = {
    "summed": Rule("plain: losses are added up"),
    "per_task": Rule("AdaTask: `per_task`", {"update": "per_task"}),
    "fork": Rule("ForkMerge: two branches, a merge every 10 steps", {"fork": {}}, branches=2),
    "fork_dense": Rule('the same, `scope = "dense"`', {"fork": {"scope": "dense"}}, branches=2),
    "beta": Rule("average, `beta`", {"average": {"kind": "beta"}}),
    "ema": Rule("average, `ema`", {"average": {"kind": "ema"}}),
    "domains": Rule("a tower for each domain", given=('model.towers.per="domain"',)),
    "tied": Rule("D-Train, first phase: these, tied", {"heads": "tied"}, ('model.towers.per="domain"',)),
    "towers": Rule(
        "D-Train, last phase: towers alone", {"train": ["head.towers"]}, ('model.towers.per="domain"',)
    ),
    "frozen": Rule("all tables frozen", {"freeze": ["tables"]}),
}


def phase_of(rule: Rule, steps: int) -> dict[str, Any]:
    """The phase in which a run trains so many steps, those of branches included."""
    phase = {"steps": steps // rule.branches, **rule.phase}
    if "fork" in phase:
        phase["fork"] = {"branches": list(_BRANCHES), "every": 10, **phase["fork"]}
    return phase


def toml_of(value: Any) -> str:
    """A value as TOML has it in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_of(each)}" for key, each in value.items()) + "}"
    return "[" + ", ".join(map(toml_of, value)) + "]" if isinstance(value, list) else json.dumps(value)


@one_thread()
def part(given: Any) -> None:
    """Train with one rule in this process, and leave its figures in `given.out`."""
    from pipelines.train import train

    rule = RULES[given.part]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        config, run = Path(folder, "rule.toml"), Path(folder, "run")
        phase = toml_of(phase_of(rule, given.steps))
        config.write_text(f"extends = {json.dumps(str(given.config.absolute()))}\nphases = [{phase}]\n")
        train(config, run, ["train.validate_candidates=20000", *rule.given, *given.overrides])
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        saved = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    given.out.write_text(json.dumps({**summary, "saved": saved}), encoding="utf-8")


def measured(name: str, seed: int, given: Any) -> Row:
    """One run of a rule, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        words = [
            "--config",
            str(given.config),
            "--steps",
            str(given.steps),
            "--part",
            name,
            "--out",
            str(out),
        ]
        for override in (*given.overrides, f"train.seed={seed}"):
            words += ["--set", override]
        seconds, peak = time_process([*own_command("rules"), *words])
        figures = json.loads(out.read_text(encoding="utf-8"))
    return {
        "rule": name,
        "seed": seed,
        "steps": figures["steps"],
        "step_ms": 1e3 * figures["cpu_s"] / figures["steps"],
        "beside_s": seconds.cpu - figures["cpu_s"],
        "peak_mb": peak / 1e6,
        "saved_mb": figures["saved"] / 1e6,
    }


def cells_of(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each rule; ratios are means over seeds of those to the plain rule with the same seed."""
    plain = {row["seed"]: row for row in rows if row["rule"] == "summed"}
    lines = []
    for name in dict.fromkeys(row["rule"] for row in rows):
        same = [row for row in rows if row["rule"] == name]
        ratio = [row["step_ms"] / plain[row["seed"]]["step_ms"] for row in same]
        more = fmean(row["peak_mb"] - plain[row["seed"]]["peak_mb"] for row in same)
        cells = [mean([row["step_ms"] for row in same], 1), mean(ratio, 2)]
        cells += [mean([row["beside_s"] for row in same], 1), f"{fmean(row['peak_mb'] for row in same):,.0f}"]
        lines.append(
            [RULES[name].told, *cells, f"{more:+,.0f}", f"{fmean(r['saved_mb'] for r in same):,.1f}"]
        )
    return lines


def main(words: Sequence[str]) -> None:
    options = Options("rules", __doc__).measuring(config=True)
    options.add_argument("--steps", type=int, default=40, help="of each run, those of all branches")
    options.add_argument(
        "--rule", action="append", choices=RULES, help="repeatable; the plain one is always there"
    )
    options.add_argument("--part", choices=RULES, help="for the process of one run")
    options.add_argument("--out", type=Path, help="for the process of one run: its figures")
    given = options.read(words)
    if given.part:
        part(given)
        return
    report = Report(given, "Rules", seed=_SEED)
    names = ["summed", *(name for name in given.rule or RULES if name != "summed")]
    for seed in range(_SEED, _SEED + given.repeats):
        for name in names:
            report.rows.append(measured(name, seed, given))
            print(
                f"{name}, seed {seed}: {report.rows[-1]['step_ms']:.0f} ms a step",
                file=sys.stderr,
                flush=True,
            )
    order = {name: place for place, name in enumerate(names)}
    report.rows.sort(key=lambda row: order[row["rule"]])
    head = ["rule", "ms a step", "over plain", "beside steps, s", "peak MB", "above plain", "saved MB"]
    report.cells(head, cells_of(report.rows))
    report.close()
