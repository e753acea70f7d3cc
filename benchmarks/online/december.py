"""A model trained once, one that learns every day, and one that learns all the time: AUC of each day

    tandemrec bench online december --log LOG --config configs/dare.toml --out OUT \
        [--every 1d --every 3h] [--first 2017-12-01] [--set KEY=VALUE ...] [--online-set KEY=VALUE ...] \
        [--page FILE.md] [--image FILE.svg]

The splits `validation` and `test` of the log are the days that are measured; `train` is what lies before. All
models begin as one that was trained on `train`. `once` stays as it is. The others go through windows of the
length that --every names: a window is scored before the model learns it. Every model scores the same
candidates, so that the days compare. An item is new if nothing in `train` has it.

Of a log whose negatives are drawn from earlier events, leave out positives that nobody had before
(`requests.new_items = "drop"` of its ingest): a model that sees that an item is new would know its label.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.harness.timing import one_thread
from benchmarks.online.keeping import learn_windows
from benchmarks.online.plot import line_plot
from pipelines.windows import WindowOptions, second_of, seconds_of, windows
from trainer.log.schema import LogManifest, read_manifest
from trainer.quality.metrics import logloss
from trainer.quality.ranking import auc
from trainer.run_config import load_config

_DAY = 86_400
_KEYS = ["user_id", "request_id", "candidate"]
_SPLITS = ("validation", "test")
Flags = npt.NDArray[np.bool_]


def candidates_of(log: Path, manifest: LogManifest, splits: Sequence[str]) -> pa.Table:
    """user_id, request_id, candidate, item_id, time and label: a row a candidate."""
    names = ["user_id", "request_id", "request_timestamp", "candidate_item_id", f"label_{manifest.tasks[0]}"]
    found = []
    for split in splits:
        for file in manifest.splits[split].files:
            table = pq.read_table(log / file.path, columns=names).combine_chunks()
            requests = table["request_id"].combine_chunks()
            user = table["user_id"].combine_chunks().take(pc.list_parent_indices(requests))
            items = table["candidate_item_id"].combine_chunks().flatten()
            request = pc.list_parent_indices(items)
            first = items.offsets.to_numpy()[:-1][request.to_numpy()] - items.offsets[0].as_py()
            found.append(
                pa.table(
                    {
                        "user_id": user.take(request),
                        "request_id": requests.flatten().take(request),
                        "candidate": np.arange(len(request)) - first,
                        "item_id": items.flatten(),
                        "time": table["request_timestamp"].combine_chunks().flatten().take(request),
                        "label": table[names[-1]].combine_chunks().flatten().flatten(),
                    }
                )
            )
    return pa.concat_tables(found)


def known_items(log: Path, manifest: LogManifest) -> pa.Array:
    """The items that the split `train` has, as behaviors or as candidates."""
    parts = []
    for file in manifest.splits["train"].files:
        table = pq.read_table(log / file.path, columns=["history_item_id", "candidate_item_id"])
        parts += [pc.list_flatten(table[name], recursive=True).unique() for name in table.column_names]
    return pa.chunked_array(parts).unique()


def learn(every: str, given: Any) -> pa.Table:
    """Scores of a model that learns windows of this length, each scored before."""
    folder = given.out / f"run-{every}"
    if not (folder / "scores.parquet").exists():
        shutil.rmtree(folder, ignore_errors=True)
        stream = given.out / f"stream-{every}"
        read = load_config(given.config, given.overrides).data.history_length
        begin = second_of(given.first, "--first")
        options = WindowOptions(seconds_of(every, "--every"), begin, _SPLITS, max_history=read)
        with redirect_stdout(io.StringIO()):
            windows(given.log, stream, options, overwrite=True)
            overrides = [
                *given.overrides,
                *given.online_overrides,
                f"train.init_from={json.dumps(str((given.out / 'once').absolute()))}",
            ]
            learn_windows(given.config, stream, folder, overrides)
    return pq.read_table(folder / "scores.parquet")


def once(given: Any) -> pa.Table:
    """Scores of the model that was trained on `train` alone; the others begin as it ends."""
    from pipelines.evaluate import evaluate
    from pipelines.train import train

    folder = given.out / "once"
    if not (folder / "scores-test.parquet").exists():
        shutil.rmtree(folder, ignore_errors=True)
        settings = (f"data.log={json.dumps(str(given.log.absolute()))}", "checkpoint.every_steps=0")
        with redirect_stdout(io.StringIO()):
            train(given.config, folder, [*given.overrides, *settings])
            for split in _SPLITS:
                evaluate(folder, split)
    return pa.concat_tables([pq.read_table(folder / f"scores-{split}.parquet") for split in _SPLITS])


def scores_for(table: pa.Table, scored: pa.Table, task: str) -> npt.NDArray[np.float32]:
    """The score of each candidate of the table.

    Raises:
        SystemExit: a candidate has none, or has several.
    """
    scored = scored.select([*_KEYS, f"score_{task}"]).rename_columns([*_KEYS, "score"])
    numbered = table.select(_KEYS).append_column("place", pa.array(np.arange(table.num_rows)))
    joined = numbered.join(scored, _KEYS, join_type="inner").sort_by("place")
    if joined.num_rows != table.num_rows or scored.num_rows != table.num_rows:
        raise SystemExit(f"{joined.num_rows:,} of {table.num_rows:,} candidates have a score")
    found: npt.NDArray[np.float32] = joined["score"].to_numpy()
    return found


def auc_of(score: npt.NDArray[Any], label: npt.NDArray[Any], which: Flags) -> float:
    """NaN where some class is missing."""
    y = label[which]
    return float(auc(score[which], y)) if 0 < y.sum() < y.size else float("nan")


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("online december", __doc__)
    options.add_argument("--config", type=Path, required=True)
    options.add_argument("--log", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--every", action="append", help="of a window, such as 1d; repeatable")
    options.add_argument("--first", default="2017-12-01", help="the first day that is measured")
    options.add_argument("--image", type=Path, help="an SVG of the days")
    options.overriding()
    options.add_argument(
        "--online-set",
        action="append",
        default=[],
        dest="online_overrides",
        metavar="KEY=VALUE",
        help="as --set, of those that learn windows",
    )
    given = options.read(words)
    given.out.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(given.log)
    table = candidates_of(given.log, manifest, _SPLITS)
    new = pc.invert(pc.is_in(table["item_id"], value_set=known_items(given.log, manifest))).to_numpy()
    models = {"trained once": once(given)}
    models |= {f"windows of {every}": learn(every, given) for every in given.every or ("1d", "3h")}
    scores = {name: scores_for(table, each, manifest.tasks[0]) for name, each in models.items()}
    report = Report(given, "Trained once, every day, all the time", n=1)
    label = table["label"].to_numpy().astype(np.float64)
    days = table["time"].to_numpy() // _DAY
    _report(report, scores, label, days - second_of(given.first, "--first") // _DAY, new)
    if given.image:
        numbers = np.unique(days)
        lines = {
            name: [auc_of(score, label, days == day) for day in numbers] for name, score in scores.items()
        }
        words_of_days = [str(np.datetime64(int(day), "D"))[5:] for day in numbers]
        given.image.write_text(line_plot("AUC of each day", "day", words_of_days, lines), encoding="utf-8")
    report.close()


def _report(
    report: Report,
    scores: Mapping[str, npt.NDArray[np.float32]],
    label: npt.NDArray[np.float64],
    day: npt.NDArray[np.int64],
    new: Flags,
) -> None:
    everything = np.ones(label.size, dtype=bool)
    parts = {"all": everything, "known items": ~new, "new items": new}
    parts |= {f"week {week + 1}": day // 7 == week for week in range(4)}
    rows = []
    for name, score in scores.items():
        row: dict[str, Any] = {"model": name, "logloss": logloss(score, label)}
        row |= {part: auc_of(score, label, which) for part, which in parts.items()}
        rows.append(row)
    report.rows = rows
    head = {"model": "{model}", **{part: f"{{{part}:.4f}}" for part in parts}, "logloss": "{logloss:.4f}"}
    report.table(head, rows)
    shown = (
        f"{label.size:,} candidates, of which {new.sum():,} have a new item ({label[new].mean():.1%} positive"
    )
    report.line(f"AUC; {shown}, {label[~new].mean():.1%} of the others).")
