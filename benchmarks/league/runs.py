"""One run of the league: a preset that is trained, validated and tested once, or a line to beat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.league.declared import Entry, Tree
from benchmarks.league.draws import DRAWS, drawn_of, write_drawn
from benchmarks.league.lines import LINES, OPENED, LineSettings, open_test
from benchmarks.models import SPLITS, Job, make_job
from trainer.model.branch import Branch
from trainer.quality.scored import Scored, read_scores, write_scores
from trainer.run_folder import RunFolder
from trainer.sealed_folder import write_text

FACTS = "league.json"


@dataclass(frozen=True)
class LineJob(Job):
    """A run of a line to beat: `preset` is its name, and its settings are the overrides."""

    def words(self, out: Path, threads: int) -> list[str]:
        _, *words = super().words(out, threads)
        return ["--line", *words]


def jobs_of(entries: Sequence[Entry], log: Path, overrides: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """A job for each preset and seed, seed by seed, so that a part of them says something about all."""
    return [
        make_job(entry.config, log, [*overrides, *entry.overrides], seed)
        for seed in seeds
        for entry in entries
    ]


def line_jobs(log: Path, settings: Tree) -> list[Job]:
    """A job for each line to beat."""
    from trainer.checkpoint.compatible import log_fingerprint
    from trainer.log.schema import read_manifest

    of_log = log_fingerprint(read_manifest(log))
    found: list[Job] = []
    for name in LINES:
        own = [f"trials={settings.trials}", f"iterations={settings.iterations}"] if name == "tree" else []
        digest = hashlib.sha256(json.dumps([of_log, own]).encode()).hexdigest()
        found.append(LineJob(Path(name), (f"log={log}", *own), 0, f"{name}-{digest[:10]}", ""))
    return found


def run_one(given: Any) -> None:
    """Make the run that `given.one` or `given.line` names, in this process.

    A run that is complete is left as it is; one that was interrupted goes on.
    """
    run: Path = given.out
    if (run / FACTS).exists():
        return
    if given.line:
        from trainer.config.toml import load_settings

        scored, probable = LINES[given.line](load_settings(LineSettings, None, given.overrides), run)
        write_scores(scored, RunFolder(run).scores("test"))
        _conclude(run, scored, {"search": "", "dense": 0, "rows": 0}, probable)
        return
    import torch

    from pipelines.train import train

    torch.set_num_threads(given.threads)
    train(given.one, run, given.overrides)
    evaluate_once(run)
    _conclude(run, read_scores(RunFolder(run).scores("test")), sizes_of(run))


def evaluate_once(run: Path) -> None:
    """Validate a trained run, and test it unless that was done: how often is counted in a file."""
    from pipelines.evaluate import evaluate

    folder = RunFolder(run)
    for split in SPLITS:
        if f"{split}_by_history" in folder.read_summary() and folder.scores(split).exists():
            continue
        if split == "test":
            open_test(run)
        evaluate(run, split)


def _conclude(run: Path, scored: Scored, sizes: dict[str, Any], probable: bool = True) -> None:
    """Keep what comparisons need: values for each draw of users, and sizes; the facts come last."""
    if not (run / DRAWS).exists():
        write_drawn(drawn_of(scored, probable), run)
    opened = len((run / OPENED).read_text(encoding="utf-8").splitlines())
    write_text(run / FACTS, json.dumps({**sizes, "opened": opened}))


def sizes_of(run: Path) -> dict[str, Any]:
    """Of a run's model: `dense` weights, weights of tables (`rows`), and what its `search` compares."""
    import torch

    from trainer.assemble import build_trainable
    from trainer.log.schema import read_manifest

    config = RunFolder(run).read_config()
    model, groups = build_trainable(config, read_manifest(config.data.log), torch.device("meta"))
    dense = sum(tensor.numel() for tensor in dict(model.named_parameters()).values())
    tables = sum(table.rows * table.dim for group in groups.values() for table in group.tables)
    of_tables = sum(
        tensor.numel() for name, tensor in model.named_parameters() if name.startswith("collections.")
    )
    searches = [search_of(branch) for branch in model.branches.named().values()]
    if config.data.search.levels:
        searches[0] = f"hard {config.data.search.budget}, then {searches[0]}"
    return {"search": "; ".join(searches), "dense": dense - of_tables, "rows": tables}


def search_of(branch: Branch) -> str:
    """The width of the vectors that a branch searches by, and K; in words where there are none."""
    settings = branch.settings
    kind = settings.search_kind
    if not settings.searches:
        return f"newest {settings.newest}" if settings.newest else "none"
    if kind.keeps_all:
        return f"newest {settings.newest}" if settings.newest else "all"
    if not kind.by_score:
        return f"ids, K {settings.k}"
    if kind.own_scorer:
        width = str(settings.head_dim)
    elif "hash_bits" in kind.uses:
        width = f"{settings.hash_bits} bits"
    elif settings.projection == "heads":
        width = f"{settings.heads} x {settings.head_dim}"
    else:
        width = str(branch.attention_width)
    return f"{width}, K {settings.k}"
