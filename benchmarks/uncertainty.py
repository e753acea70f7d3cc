"""How often intervals of `export --uncertainty` hold the true logit, and what exploring by them is worth

Models learn planted logs of known noise (`tandemrec synth --kind uncertain`), and the snapshot says mean and
deviation of the logit of every test candidate. Coverage is the share of candidates whose true logit lies
within mean ± 1.645 deviations: 90 % where deviations are right. `last map` learns nothing but the last map,
so that all else is known, as the posterior assumes; `all of it` learns tables and layers, too, as models do.
Then a simulated bandit ranks by the same posterior: greedily, by upper bounds, and by draws (Thompson).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread
from benchmarks.inputs.bandit import OFFERS, RULES, regrets
from benchmarks.models import mean
from pipelines.export import export
from pipelines.export_uncertainty import UncertaintyOptions
from pipelines.score import score
from pipelines.synth.synth import TRUTH, synth
from pipelines.synth.uncertain import BEHAVIORS, OF_ITEMS, PLAIN
from pipelines.train import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "dare.toml"
COMMON = (
    f"data.history_length={BEHAVIORS}",
    "data.batch_candidates=512",
    "model.k=4",
    "groups.attention.dim=4",
    "train.warmup=0.05",
)
MODELS: dict[str, tuple[str, ...]] = {
    "last map": (
        "model.hidden=[]",
        "model.norm=batch",
        "groups.representation.dim=4",
        'phases=[{passes=20, train=["head.layers.1"], learning_rate=0.02}]',
    ),
    "all of it": ("groups.representation.dim=16", "train.epochs=2", "train.learning_rate=0.003"),
}
# Of a normal distribution, 90 % lie within so many deviations.
WITHIN = 1.6449
# Training candidates of an item: from, up to before.
SEEN = ((0, 1), (1, 10), (10, 100), (100, 1 << 40))


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("uncertainty", __doc__).measuring(repeats=3)
    options.add_argument("--users", type=int, default=3_000, help="to train on; 0: no models")
    options.add_argument("--rounds", type=int, default=6_000, help="of the bandit; 0: none")
    options.overriding()
    given = options.read(words)
    report = Report(given, "Uncertainty", seed=1)
    for seed in range(1, given.repeats + 1) if given.users else ():
        for name, settings in MODELS.items():
            with tempfile.TemporaryDirectory() as folder:
                overrides = [*COMMON, *settings, *given.overrides]
                report.rows += measured(Path(folder), name, seed, given.users, overrides)
    if report.rows:
        show(report)
    if given.rounds:
        show_bandit(report, given.rounds, given.repeats)
    report.show_ratios(2)
    report.close()


def measured(folder: Path, name: str, seed: int, users: int, overrides: Sequence[str]) -> list[Row]:
    """Rows of a model on the log of a seed."""
    log, run, said = folder / "log", folder / "run", io.StringIO()
    with redirect_stdout(said):
        synth(log, "uncertain", seed, users)
        train(CONFIG, run, [*overrides, f"data.log={log}", f"train.seed={seed}"])
        version = export(run, folder / "snap", parity_requests=0, uncertainty=UncertaintyOptions(0))
        score(version, log, "test", 0, folder / "scores.parquet", uncertainty=True)
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("uncertainty:")]
    print(f"seed {seed}, {name}: {line}", flush=True)
    table, of = joined(folder / "scores.parquet", log), {"model": name, "seed": seed}
    rows = []
    for task in (*PLAIN, OF_ITEMS):
        kind = "numbers" if task in PLAIN else "numbers and items"
        rows.append({**of, "task": kind, "items": "all", **coverage(table, task, slice(None))})
    seen = counts(log)[table["item_id"].to_numpy()]
    for low, high in SEEN:
        chosen = (seen >= low) & (seen < high)
        items = f"seen {low}-{high - 1} times" if low else "never seen"
        items = f"seen {low} or more times" if high > 1 << 30 else items
        rows.append({**of, "task": "numbers and items", "items": items, **coverage(table, OF_ITEMS, chosen)})
    return rows


def joined(scores: Path, log: Path) -> pa.Table:
    """The scores with the true probabilities, `true_<task>`."""
    keys = ["user_id", "request_id", "candidate"]
    truth = pq.read_table(log / TRUTH, filters=[("split", "==", "test")]).drop_columns(["split"])
    named = [name.replace("probability_", "true_") for name in truth.column_names]
    return pq.read_table(scores).join(truth.rename_columns(named).drop_columns(["probability"]), keys)


def counts(log: Path) -> npt.NDArray[np.int64]:
    """[items + 1], how many training candidates each item is."""
    files = [pq.read_table(path, columns=["candidate_item_id"]) for path in sorted((log / "train").iterdir())]
    lists = pa.concat_tables(files)["candidate_item_id"]
    found = pa.compute.list_flatten(lists, recursive=True).to_numpy()
    return np.bincount(found, minlength=1 << 12)


def coverage(table: pa.Table, task: str, chosen: npt.NDArray[np.bool_] | slice) -> Row:
    """How often the interval holds the true logit, and how its width compares with the error."""
    true = np.asarray(table[f"true_{task}"])[chosen]
    off = np.asarray(table[f"mean_{task}"])[chosen] - (np.log(true) - np.log1p(-true))
    deviation = np.asarray(table[f"deviation_{task}"])[chosen]
    held = float((np.abs(off) <= WITHIN * deviation).mean()) if off.size else np.nan
    errors = {"error": float(np.sqrt(np.square(off).mean())), "deviation": float(deviation.mean())}
    return {"held": held, **errors, "n": off.size}


def show(report: Report) -> None:
    """Means over seeds, and over the tasks of a kind."""
    head = ["model", "logit of", "items", "coverage", "error of the logit", "deviation", "candidates"]
    keys = dict.fromkeys((row["model"], row["task"], row["items"]) for row in report.rows)
    cells = []
    for key in keys:
        own = [row for row in report.rows if (row["model"], row["task"], row["items"]) == key]
        numbers = [mean([row[name] for row in own], 3) for name in ("held", "error", "deviation")]
        cells.append([*key, *numbers, f"{fmean(row['n'] for row in own):,.0f}"])
    report.cells(head, cells)
    for name in MODELS:
        held = [row["held"] for row in report.rows if (row["model"], row["task"]) == (name, "numbers")]
        report.ratios[f"coverage, {name}"] = fmean(held)


def show_bandit(report: Report, rounds: int, seeds: int) -> None:
    """Regret of each rule: what was lost to the best item of every round."""
    head = ["offered", "rule", f"regret of {rounds:,} rounds", "of a round, in the last quarter"]
    cells = []
    for name, offers in OFFERS.items():
        greedy: list[float] = []
        for rule in RULES:
            lost = [regrets(rule, seed, rounds, offers) for seed in range(1, seeds + 1)]
            total = [float(each.sum()) for each in lost]
            late = [float(each[-rounds // 4 :].mean()) for each in lost]
            cells.append([name, rule, mean(total, 0), mean(late)])
            greedy = greedy or total
            if rule != "greedy":
                report.ratios[f"regret, {name}: {rule} to greedy"] = sum(total) / sum(greedy)
    report.cells(head, cells)
