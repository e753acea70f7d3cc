"""Weights of repeated exposures, beside none, on impressions of users who tire of what they see again

The raw tables of benchmarks/inputs/fatigue.py are ingested once a rule, and the preset learns each log. What
is measured is what a server wants to know of an item that it shows for the first time: AUC, logloss and PCOC
over the first exposures of the test split, beside the true probabilities. Every repeat has tables of its own
and a run of each rule that starts from its seed. A ratio compares loglosses with those without weights.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread
from benchmarks.inputs.fatigue import ITEMS, TEST, VALIDATION, Fatigue, fatigue
from benchmarks.models import mean
from pipelines.evaluate import evaluate
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.ingest import ingest
from pipelines.train import train
from trainer.quality.metrics import Metrics, measure
from trainer.quality.scored import read_scores

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "dare.toml"
RULES: dict[str, dict[str, object] | None] = {
    "no weights": None,
    "1 / (1 + n)": {"rate": 1.0},
    "1 / (1 + 4 n)": {"rate": 4.0},
    "first exposures alone": {"rule": "table", "weights": [1.0, 0.0]},
}
TRAINING = (
    "data.history_length=12",
    "data.batch_candidates=1024",
    "data.requests_per_block=15",
    "model.k=6",
    "train.epochs=3",
    "train.learning_rate=0.003",
)
COLUMNS = ("AUC", "logloss", "PCOC", "weighted PCOC", "all: AUC", "all: logloss")


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("exposure", __doc__).measuring(repeats=3)
    options.add_argument("--users", type=int, default=3_000, help="in the raw tables")
    options.overriding()
    given = options.read(words)
    report = Report(given, "Repeated exposures", seed=1)
    for seed in range(1, given.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            report.rows += measured(Path(folder), seed, given.users, given.overrides)
    report.facts = {"users": given.users, "rules": RULES}
    names = [*RULES, "the truth"]
    cells = []
    for name in names:
        own = [row for row in report.rows if row["name"] == name]
        cells.append([name, *(mean([row[column] for row in own if column in row]) if column in own[0] else ""
                              for column in COLUMNS)])  # fmt: skip
    report.cells(["first exposures of test", *COLUMNS], cells)
    plain = [row["logloss"] for row in report.rows if row["name"] == "no weights"]
    for name in list(RULES)[1:]:
        losses = [row["logloss"] for row in report.rows if row["name"] == name]
        report.ratio(f"logloss, {name} to none", losses, plain, digits=3)
    report.line(f"first exposures: {fmean(row['samples'] for row in report.rows):,.0f} candidates a repeat")
    report.close()


def measured(folder: Path, seed: int, users: int, overrides: Sequence[str]) -> list[Row]:
    """One row a rule, and one of the truth."""
    raw, rows = fatigue(folder, seed, users), []
    for number, (name, exposure) in enumerate(RULES.items()):
        log, run = folder / f"log-{number}", folder / f"run-{number}"
        ingest(raw.events, log, config_of(exposure), impressions=raw.impressions)
        said = io.StringIO()
        with redirect_stdout(said):
            train(CONFIG, run, [*TRAINING, *overrides, f"data.log={log}", f"train.seed={seed}"])
            summary = evaluate(run, "test")
        own, truth = of_first(run, log, raw)
        weighted = {"weighted PCOC": summary["pcoc_weighted"]} if "pcoc_weighted" in summary else {}
        everywhere = {"all: AUC": summary["auc"], "all: logloss": summary["logloss"]}
        rows.append({**row_of(name, seed, own), **weighted, **everywhere})
        print(f"seed {seed}, {name}: AUC {own.auc:.4f}, logloss {own.logloss:.4f}", flush=True)
    return [*rows, row_of("the truth", seed, truth)]


def config_of(exposure: dict[str, object] | None) -> IngestConfig:
    """How the raw tables are read, with a rule."""
    impressions = {"request": "request", **({} if exposure is None else {"exposure": exposure})}
    return IngestConfig.model_validate(
        {
            "protocol": "impressions",
            "events": {"taxonomy": ["category"]},
            "impressions": impressions,
            "requests": {"min_history": 0},
            "split": {"validation": VALIDATION, "test": TEST},
            "files": {"rows_per_group": 128},
        }
    )


def of_first(run: Path, log: Path, raw: Fatigue) -> tuple[Metrics, Metrics]:
    """Metrics of the run, and of the true probabilities, over first exposures of the test split."""
    scored = read_scores(run / "scores-test.parquet")
    words = pq.read_table(log / "vocab" / "item_id.parquet")
    ids = np.zeros(ITEMS, dtype=np.int64)
    ids[words["value"].to_numpy()] = words["id"].to_numpy()
    known = dict(
        zip(
            zip(raw.user.tolist(), raw.request.tolist(), ids[raw.item].tolist(), strict=True),
            zip(raw.exposures.tolist(), raw.probability.tolist(), strict=True),
            strict=True,
        )
    )
    keys = zip(scored.user_id.tolist(), scored.request_id.tolist(), scored.item_id.tolist(), strict=True)
    exposures, chance = np.array([known[key] for key in keys]).T
    first = exposures == 0
    part = scored.part(first)
    groups = part.user_id * 1_000 + part.request_id
    return part.measured(0), measure(chance[first], part.label[:, 0], groups, part.user_id)


def row_of(name: str, seed: int, own: Metrics) -> Row:
    """A row of the report."""
    values = {"AUC": own.auc, "logloss": own.logloss, "PCOC": own.pcoc, "samples": own.samples}
    return {"name": name, "seed": seed, **values}
