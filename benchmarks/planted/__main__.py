"""Presets on a planted log beside its oracle, and how much of the planted signal the search keeps

    tandemrec bench planted --kind relevance --config configs/dare.toml --config configs/twin.toml \
        --seeds 1,2,3 --set model.k=20 --out runs/planted --jobs 2 --title "DARE and TWIN"

The log is written to OUT/<kind>-<log seed> unless it is there. Runs are made and resumed as
`tandemrec bench models` does it. The section of this title in benchmarks/planted/README.md is replaced.

    tandemrec bench planted --experiment agree --seeds 1,2,3,4,5 --out runs/planted

Experiments with several tasks, sets or domains, see benchmarks/planted/experiments.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.harness.options import Options, own_command
from benchmarks.harness.report import Report, markdown
from benchmarks.models import Record, add_options, by_preset, environment_line, mean, run_all, run_one
from benchmarks.planted.recall import planted_recall
from pipelines.start import open_split
from pipelines.synth.kinds import KINDS
from pipelines.synth.synth import synth
from trainer.checkpoint.restore import restore
from trainer.config.sections import SearchConfig
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import is_sequence_log, read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder

README = Path(__file__).with_name("README.md")
INTRODUCTION = """# Planted logs

Models on logs whose labels were drawn from known probabilities (`tandemrec synth`; the equations are in
`pipelines/synth/`). *Signal kept*: the share of the planted weight that lies in the behaviors which the
search keeps, over candidates with at least three relevant behaviors. *Recall*: the relevant behaviors kept,
of at most K. Both on the test split, ± is the standard deviation over seeds.
"""
KEPT = "kept.json"


def measure_kept(run: Path, facts: dict[str, Any]) -> None:
    """Leave the recall of a trained run's search on the test split in `kept.json`."""
    with process_group() as ranks:
        restored = restore(RunFolder(run), ranks)
        config = restored.config
        reader = open_split(config, "test", restored.rows, ranks, finders=restored.finders)
        data = config.data.model_copy(update={"search": SearchConfig()})
        whole = SequenceLogReader(data, "test", None)
        kind = KINDS[facts["kind"]]
        recall = planted_recall(restored.sharded.model, reader, whole, kind, facts["seed"])
    (run / KEPT).write_text(json.dumps(asdict(recall)), encoding="utf-8")


def planted_log(out: Path, kind: str, seed: int, users: int) -> Path:
    """The log of these arguments, written if it is not there."""
    name = f"{kind}-{seed}" + (f"-{users}" if users else "")
    log = (out / name).absolute()
    if not is_sequence_log(log):
        synth(log, kind, seed, users)
    return log


def section(title: str, kind: str, records: Sequence[Record], oracle: dict[str, Any]) -> list[str]:
    """The table of one comparison, oracle and reference searches included."""
    head = [
        "model",
        "tables",
        "seeds",
        "validation AUC",
        "test AUC",
        "GAUC",
        "logloss",
        "signal kept",
        "recall",
    ]
    rows = [["oracle", "", "", f"{oracle['validation']['auc']:.4f}"]]
    rows[0] += [f"{oracle['test'][name]:.4f}" for name in ("auc", "gauc", "logloss")] + ["", ""]
    for preset, same in by_preset(records):
        values = [[r["validation"]["auc"] for r in same]]
        values += [[r["test"][name] for r in same] for name in ("auc", "gauc", "logloss")]
        values += [[r["extra"][name] for r in same] for name in ("share", "recall")]
        rows.append([preset, same[0]["tables"], str(len(same)), *map(mean, values)])
    first = records[0]["extra"]
    references = (
        f"Of {first['rows']:,} candidates with at least 3 relevant behaviors; the newest {first['k']} hold "
        f"{first['share_newest']:.4f} of their signal, {first['k']} at random {first['share_random']:.4f}."
    )
    samples, wall = records[0]["samples"], fmean(r["wall_s"] for r in records)
    lines = [
        f"## {title}",
        "",
        f"Kind `{kind}`, {samples:,} samples, {wall:.0f} s of training on average.",
        "",
    ]
    return [*lines, *markdown(head, rows), "", references]


def put_section(path: Path, title: str, lines: Sequence[str]) -> None:
    """Replace the section of this title, or add it at the end."""
    text = path.read_text(encoding="utf-8") if path.exists() else INTRODUCTION
    head, *sections = text.split("\n## ")
    kept = {each.split("\n", 1)[0]: each.rstrip() for each in sections}
    kept[title] = "\n".join(lines).removeprefix("## ").rstrip()
    path.write_text("\n## ".join([head.rstrip() + "\n", *(each + "\n" for each in kept.values())]), "utf-8")


def shown_words(words: Sequence[str]) -> list[str]:
    """A command's words without the place of the table, which is the reader's own."""
    place = words.index("--readme") if "--readme" in words else len(words)
    return [*words[:place], *words[place + 2 :]]


def main(words: Sequence[str]) -> None:
    if "--experiment" in words:
        from benchmarks.planted.experiments.run import main as experiments

        experiments(words)
        return
    options = Options("planted", __doc__)
    add_options(options)
    options.add_argument("--kind", default="relevance")
    options.add_argument("--log-seed", type=int, default=7)
    options.add_argument("--users", type=int, default=0)
    options.add_argument("--title", default="")
    options.add_argument("--readme", type=Path, default=README, help="where the table goes")
    given = options.read(words)
    if given.one:
        run_one(given)
        log = RunFolder(given.out).read_config().data.log
        measure_kept(given.out, read_manifest(log).ingest["synth"])
        return
    log = planted_log(given.out, given.kind, given.log_seed, given.users)
    manifest = read_manifest(log)
    overrides = [f"data.history_length={manifest.ingest['synth']['history_length']}", *given.overrides]
    title = given.title or given.kind
    report = Report(given, title, seed=given.log_seed, n=len(given.seeds.split(",")))
    report.rows = run_all(log, overrides, given, own_command("planted"), extra=KEPT)
    lines = section(title, given.kind, report.rows, manifest.report["oracle"])
    shown = f"    tandemrec bench planted {shlex.join(shown_words(words))}"
    lines += [environment_line(report.rows, given.jobs), "", shown]
    report.lines(lines)
    put_section(given.readme, title, lines)
    report.close()
