"""Bytes that two ranks exchange in a training step: `selected` against `full`, and the plan's forecast.

    python -m benchmarks.exchange

prints the table of benchmarks/exchange.md. Two ranks on the CPU (gloo) train configs/dare.toml on a
made-up log; every collective is counted where torch is given it. These are counts, not times: a busy machine
gives the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
LENGTHS, LOOKUPS, STEPS, RANKS, SEED = (1_000, 10_000), ("full", "selected"), 5, 2, 0
USERS, REQUESTS, CANDIDATES, ITEMS, CATEGORIES = 80, 8, 20, 100_000, 300
Found = dict[str, float]


def write_log(path: Path, length: int) -> None:
    """Histories of L / 2 to 2 L behaviors; the requests of a user lie in the last tenth of his history."""
    from trainer.log.schema import FeatureInfo, LogManifest, schema_of
    from trainer.log.writer import write_manifest, write_split

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


def measured(log: Path, length: int, lookup: str, ranks: Any) -> Found:
    """Bytes of a step over all ranks, mean of some steps; and the plan's forecast."""
    from benchmarks.exchanged import Exchanged
    from pipelines.start import open_split
    from trainer.assemble import build_sharded, feature_rows
    from trainer.log.schema import read_manifest
    from trainer.run_config import load_config
    from trainer.update.guard import Guard
    from trainer.update.step import TrainStep, make_optimizer

    words = [f"data.log={log}", f"data.history_length={length}", f"model.lookup={lookup}", "data.prefetch=0"]
    config = load_config(ROOT / "configs/dare.toml", [*words, f"train.seed={SEED}"])
    manifest = read_manifest(log)
    sharded = build_sharded(config, manifest, ranks, training=True)
    step = TrainStep(
        config, sharded.model, make_optimizer(sharded.model, config.train), RANKS, Guard(ranks, log)
    )
    found: Counter[str] = Counter()
    # What the late lookup is asked for.
    sharded.model.module.branches.register_forward_hook(
        lambda _, __, made: found.update(late=0 if made.selected is None else made.selected.stride())
    )
    reader = open_split(config, "train", feature_rows(sharded.groups), ranks, seed=SEED)
    with closing(reader.steps()) as steps:
        for each in islice(steps, STEPS):
            with Exchanged() as exchanged:
                step.zero_grad()
                loss, _ = step.forward(each)
                forward = len(exchanged.sent)
                loss.backward()
                step.step()
            vectors = exchanged.bytes_of(floats=True)
            back = exchanged.bytes_of(floats=True, since=forward)
            found.update(ids=exchanged.bytes_of(floats=False), forward=vectors - back, backward=back)
            found.update(behaviors=each.batch.behaviors, candidates=each.batch.candidates)
    names = ("ids", "forward", "backward", "behaviors", "candidates", "late")
    total = torch.tensor([found[name] for name in names], dtype=torch.float64) / STEPS
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True)) | forecast(config, manifest)


def forecast(config: Any, manifest: Any) -> Found:
    """What `tandemrec plan --world-size 2` prints for the config's lookup and bags."""
    from embeddings.plan.planner import offline_plan
    from embeddings.plan.request import Cluster
    from embeddings.plan.traffic import Traffic
    from pipelines.plan.report import Report
    from trainer.assemble import build_trainable, plan_request
    from trainer.step_size import lookups, step_size

    size = step_size(config.data, manifest)
    built = build_trainable(config, manifest, torch.device("meta"))
    task = plan_request(config, manifest, built, Cluster("cpu", RANKS, RANKS, 0, 8 << 30), size)
    found, lookup = offline_plan(task), config.model.lookup
    asked = {lookup: lookups(config, built[1], manifest, size, lookup)}
    report = Report(found, task, size, asked, lookup)
    sent = sum((report.sent(option, lookup, True) for option in report.options), Traffic())
    late = asked[lookup]["representation__item_id"].bags
    parts = {"ids": sent.ids, "forward": sent.forward, "backward": sent.backward, "late": late}
    parts |= {"behaviors": size.behaviors, "candidates": size.candidates}
    return {f"plan_{name}": value for name, value in parts.items()}


def on_a_rank(folder: Path) -> None:
    """One of the ranks; rank 0 leaves folder/counts.json."""
    from pipelines.console import quiet_third_parties
    from trainer.ranks.process_group import process_group

    quiet_third_parties()
    with process_group(300) as ranks:
        found = [
            {"length": length, "lookup": lookup, **measured(folder / str(length), length, lookup, ranks)}
            for length in LENGTHS
            for lookup in LOOKUPS
        ]
    if ranks.speaks:
        (folder / "counts.json").write_text(json.dumps(found))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for length in LENGTHS:
            write_log(Path(folder) / str(length), length)
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        subprocess.run(
            [sys.executable, *ranks, "-m", "benchmarks.exchange", folder],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=600,
        )
        found = json.loads((Path(folder) / "counts.json").read_text())
    print("\n".join(table(found)))


def table(found: list[dict[str, Any]]) -> list[str]:
    """Measured and forecast, and what `selected` saves."""
    lines = [
        "| L | lookup | late bags | forecast | ids MB | vectors | gradients | all | forecast | ratio |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    sums = {}
    for row in found:
        parts = [row[name] for name in ("ids", "forward", "backward")]
        said = sum(row[f"plan_{name}"] for name in ("ids", "forward", "backward"))
        sums[row["length"], row["lookup"]] = sum(parts)
        late = (
            [f"{row['late']:,.0f}", f"{row['plan_late']:,.0f}"] if row["lookup"] == "selected" else ["-", "-"]
        )
        cells = [
            f"{row['length']:,}",
            row["lookup"],
            *late,
            *(f"{part / 1e6:.2f}" for part in (*parts, sum(parts), said)),
        ]
        lines.append(f"| {' | '.join([*cells, f'{said / sum(parts):.3f}'])} |")
    saved = [f"{1 - sums[n, 'selected'] / sums[n, 'full']:.0%} at L = {n:,}" for n in LENGTHS]
    return [*lines, "", f"`selected` sends {' and '.join(saved)} less than `full`."]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        on_a_rank(Path(sys.argv[1]))
    else:
        main()
