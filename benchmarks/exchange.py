"""Bytes that two ranks exchange in a training step: `selected` beside `full`, and the plan's forecast

Two ranks on the CPU (gloo) train configs/dare.toml on a made-up log; every collective is counted where torch
is given it. These are counts, not times: a busy machine gives the same.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from benchmarks.harness.collectives import CollectiveCounter
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.two_ranks import RANKS, add_rank_of, start_ranks
from embeddings.plan.planner import offline_plan
from embeddings.plan.request import Cluster
from embeddings.plan.traffic import Traffic
from pipelines.plan.report import Report as PlanReport
from pipelines.start import open_split
from trainer.assemble import build_sharded, build_trainable, feature_rows, plan_request
from trainer.log.schema import FeatureInfo, LogManifest, read_manifest, schema_of
from trainer.log.writer import write_manifest, write_split
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.step_size import lookups, step_size
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

ROOT = Path(__file__).parent.parent
LOOKUPS, STEPS, SEED = ("full", "selected"), 5, 0
USERS, REQUESTS, CANDIDATES, ITEMS, CATEGORIES = 80, 8, 20, 100_000, 300
Counts = dict[str, float]
COLUMNS = {
    "L": "{length:,}",
    "lookup": "{lookup}",
    "late bags": "{late_bags}",
    "forecast of bags": "{plan_late_bags}",
    "ids MB": "{ids_mb:.2f}",
    "vectors": "{forward_mb:.2f}",
    "gradients": "{backward_mb:.2f}",
    "all": "{all_mb:.2f}",
    "forecast": "{plan_mb:.2f}",
    "ratio": "{ratio:.3f}",
}


def write_log(path: Path, length: int) -> None:
    """Histories of L / 2 to 2 L behaviors; the requests of a user lie in the last tenth of their history."""
    rng = np.random.default_rng(SEED + length)
    infos = {"item_id": FeatureInfo(rows=ITEMS), "category_id": FeatureInfo(rows=CATEGORIES)}
    path.mkdir(parents=True)
    manifest = LogManifest(
        features=infos, tasks=["click"], taxonomy=["category_id"], splits={}, ingest={}, report={}
    )
    schema = schema_of(manifest)
    table = pa.Table.from_pylist([user_row(rng, user, length) for user in range(USERS)], schema=schema)
    train = write_split(table.to_batches(), path, "train", schema, (4, 16))
    write_manifest(path, manifest.model_copy(update={"splits": {"train": train}}))


def user_row(rng: np.random.Generator, user: int, length: int) -> dict[str, Any]:
    """Items by popularity 1 / (rank + 50); one behavior a minute."""
    n = int(rng.integers(length // 2, 2 * length))

    def items(count: int) -> list[int]:
        return ((50 * (ITEMS / 50) ** rng.random(count)).astype(np.int64) - 49).tolist()

    ends = np.sort(rng.integers(n - n // 10, n + 1, REQUESTS))
    history, chosen = items(n), [items(CANDIDATES) for _ in range(REQUESTS)]
    return {
        "user_id": user,
        "history_timestamp": (60 * np.arange(n)).tolist(),
        "history_item_id": history,
        "history_category_id": [item % CATEGORIES for item in history],
        "request_id": (REQUESTS * user + np.arange(REQUESTS)).tolist(),
        "request_timestamp": (60 * ends).tolist(),
        "request_history_end": ends.tolist(),
        "request_num_candidates": [CANDIDATES] * REQUESTS,
        "candidate_item_id": chosen,
        "candidate_category_id": [[item % CATEGORIES for item in each] for each in chosen],
        "label_click": [rng.integers(0, 2, CANDIDATES).astype(np.float32).tolist() for _ in chosen],
        "num_behaviors": n,
        "num_requests": REQUESTS,
        "num_candidates": REQUESTS * CANDIDATES,
    }


def measure(log: Path, length: int, lookup: str, ranks: Ranks) -> Counts:
    """Bytes of a step over all ranks, mean of some steps; and the plan's forecast."""
    words = [f"data.log={log}", f"data.history_length={length}", f"model.lookup={lookup}", "data.prefetch=0"]
    config = load_config(ROOT / "configs/dare.toml", [*words, f"train.seed={SEED}"])
    manifest = read_manifest(log)
    sharded = build_sharded(config, manifest, ranks, training=True)
    step = TrainStep(
        config, sharded.model, make_optimizer(sharded.model, config.train), RANKS, Guard(ranks, log)
    )
    counts: Counter[str] = Counter()
    # The bags that the late lookup is asked for.
    sharded.model.module.branches.register_forward_hook(
        lambda _, __, out: counts.update(late=0 if out.bags is None else out.bags.stride())
    )
    reader = open_split(config, "train", feature_rows(sharded.groups), ranks, seed=SEED)
    with closing(reader.steps()) as steps:
        for each in islice(steps, STEPS):
            with CollectiveCounter() as exchanged:
                step.zero_grad()
                loss, _ = step.forward(each)
                forward = len(exchanged.sent)
                loss.backward()
                step.step()
            vectors = exchanged.bytes_of(floats=True)
            back = exchanged.bytes_of(floats=True, since=forward)
            counts.update(ids=exchanged.bytes_of(floats=False), forward=vectors - back, backward=back)
            counts.update(behaviors=each.batch.behaviors, candidates=each.batch.candidates)
    names = ("ids", "forward", "backward", "behaviors", "candidates", "late")
    total = torch.tensor([counts[name] for name in names], dtype=torch.float64) / STEPS
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True)) | forecast(config, manifest)


def forecast(config: Config, manifest: LogManifest) -> Counts:
    """The figures that `tandemrec plan --world-size 2` prints for the config's lookup and bags."""
    size = step_size(config.data, manifest)
    built = build_trainable(config, manifest, torch.device("meta"))
    task = plan_request(config, manifest, built, Cluster("cpu", RANKS, RANKS, 0, 8 << 30), size)
    plan, lookup = offline_plan(task), config.model.lookup
    requested: dict[str, Any] = {lookup: lookups(config, built[1], manifest, size, lookup)}
    report = PlanReport(plan, task, size, requested, lookup)
    sent = sum((report.sent(option, lookup, True) for option in report.options), Traffic())
    late = requested[lookup]["representation__item_id"].bags
    parts = {"ids": sent.ids, "forward": sent.forward, "backward": sent.backward, "late": late}
    parts |= {"behaviors": size.behaviors, "candidates": size.candidates}
    return {f"plan_{name}": value for name, value in parts.items()}


def run_rank(folder: Path, lengths: Sequence[int]) -> None:
    """Be one of the ranks; rank 0 writes folder/counts.json."""
    with process_group(300) as ranks:
        counts = [
            {"length": length, "lookup": lookup, **measure(folder / str(length), length, lookup, ranks)}
            for length in lengths
            for lookup in LOOKUPS
        ]
    if ranks.speaks:
        (folder / "counts.json").write_text(json.dumps(counts))


def main(words: Sequence[str]) -> None:
    options = Options("exchange", __doc__)
    options.add_argument("--lengths", default="1000,10000", metavar="L,L", help="of the histories")
    add_rank_of(options)
    given = options.read(words)
    lengths = [int(length) for length in given.lengths.split(",")]
    if given.rank_of:
        run_rank(given.rank_of, lengths)
        return
    report = Report(given, "Exchange", seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            write_log(Path(folder) / str(length), length)
        start_ranks("exchange", Path(folder), words, 600)
        report.rows = json.loads((Path(folder) / "counts.json").read_text())
    shown = [_shown(row) for row in report.rows]
    report.table(COLUMNS, shown)
    sums = {(row["length"], row["lookup"]): row["all_mb"] for row in shown}
    for length in lengths:
        report.ratios[f"selected_to_full_at_{length}"] = sums[length, "selected"] / sums[length, "full"]
    saved = [f"{1 - report.ratios[f'selected_to_full_at_{n}']:.0%} at L = {n:,}" for n in lengths]
    report.line(f"`selected` sends {' and '.join(saved)} less than `full`.")
    report.close()


def _shown(row: Row) -> Row:
    """A row with its sums in MB, and without bags for `full`, which has no late lookup."""
    mb = {f"{name}_mb": row[name] / 1e6 for name in ("ids", "forward", "backward")}
    plan = sum(row[f"plan_{name}"] for name in ("ids", "forward", "backward")) / 1e6
    total, late = sum(mb.values()), row["lookup"] == "selected"
    bags = {f"{name}_bags": f"{row[name]:,.0f}" if late else "-" for name in ("late", "plan_late")}
    return {**row, **mb, **bags, "all_mb": total, "plan_mb": plan, "ratio": plan / total}
