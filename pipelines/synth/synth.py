"""`tandemrec synth`: a sequence log with a planted signal, and the truth that its labels were drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import ConfigError, hint_of
from pipelines.console import table_lines
from pipelines.synth.kinds import KINDS
from pipelines.synth.log import nested
from trainer.log.schema import VOCABULARIES, FeatureInfo, LogManifest, schema_of
from trainer.log.writer import check_target, staged, write_manifest, write_split
from trainer.quality.metrics import entry_of

TRUTH, VECTORS = "truth.parquet", "vectors.parquet"
_LAYOUT = (256, 4096)  # rows a row group (some MB) and a file


def synth(
    out: Path, kind: str = "relevance", seed: int = 7, users: int = 0, overwrite: bool = False
) -> LogManifest:
    """Write a planted log at `out`, with `<out>/truth.parquet`, and print what an oracle achieves on it.

    Pre-trained vectors of items, where the kind has some, go to `<out>/vectors.parquet`.

    The same arguments write the same bytes. The truth has one row a candidate: split, user_id, request_id,
    candidate and probability, keyed like the scores that `evaluate` keeps; see `PlantedSplit.truth` for logs
    of several tasks. The manifest repeats the arguments under `ingest` and the oracle's metrics under
    `report`: `oracle` is of the first task, and `oracles` of every task where there are several.

    Args:
        kind: one of `pipelines.synth.kinds.KINDS`.
        users: to train on; 0 = the kind's own number.
        overwrite: replace a sequence log that is there.

    Raises:
        ConfigError: there is no such kind. DataError: `out` must not be replaced.
    """
    if kind not in KINDS:
        hint = hint_of(kind, KINDS, f"there are {', '.join(KINDS)}")
        raise ConfigError(f"--kind {kind}: no such kind of planted log; {hint}")
    check_target(out, overwrite)  # before the work, not only after it
    planted, count = KINDS[kind], users or KINDS[kind].users
    log = planted.generate(seed, count)
    oracles = {split: part.oracles() for split, part in log.splits.items()}
    report = {"oracle": {split: metrics[log.tasks[0]].as_dict() for split, metrics in oracles.items()}}
    if len(log.tasks) > 1:
        report["oracles"] = {split: entry_of(metrics)["tasks"] for split, metrics in oracles.items()}
    facts = {"kind": kind, "seed": seed, "users": count, "history_length": planted.history_length}
    facts |= log.facts
    features = {
        name: FeatureInfo(rows=rows, raw=name in log.raw, side=log.side(name), encoder=log.encoders.get(name))
        for name, rows in log.features.items()
    }
    manifest = LogManifest(
        features=features,
        numeric=list(log.splits["train"].numbers),
        tasks=log.tasks,
        partial=log.partial,
        taxonomy=list(log.taxonomy),
        splits={},
        ingest={"synth": facts},
        report=report,
    )
    truth = pa.concat_tables(part.truth(split) for split, part in log.splits.items())
    with staged(out, overwrite) as root:
        splits = {
            split: write_split([part.rows()], root, split, schema_of(manifest), _LAYOUT)
            for split, part in log.splits.items()
        }
        _write_parquet(truth, root / TRUTH)
        if log.vectors is not None:
            ids = pa.array(np.arange(1, len(log.vectors)))
            vectors = nested(log.vectors[1:].astype(np.float32))
            _write_parquet(pa.table({"item_id": ids, "vector": vectors}), root / VECTORS)
        (root / VOCABULARIES).mkdir()
        for name, rows in log.features.items():
            if name in log.raw or name in log.encoders:
                continue
            # Ids stand for themselves; `count` is how often each occurs in the histories of the train split,
            # or among its candidates where behaviors do not have the feature.
            ids, train = np.arange(rows), log.splits["train"]
            occur = train.history[name] if name in train.history else train.candidates[name]
            counts = np.bincount(occur.reshape(-1), minlength=rows)
            table = pa.table({"value": ids, "id": ids, "count": counts})
            _write_parquet(table, root / VOCABULARIES / f"{name}.parquet")
        manifest = manifest.model_copy(update={"splits": splits})
        write_manifest(root, manifest)
    print("\n".join(_report(kind, out, manifest)), flush=True)
    return manifest


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _rows_of(info: FeatureInfo) -> str:
    if info.encoder is not None:
        return info.encoder.kind
    return "raw" if info.raw else f"{info.rows:,}"


def _report(kind: str, out: Path, manifest: LogManifest) -> list[str]:
    head = ["oracle on", "requests", "candidates", "task", "rate", "AUC", "GAUC", "logloss"]
    rows = []
    for split, info in manifest.splits.items():
        first = {manifest.tasks[0]: manifest.report["oracle"][split]}
        by_task: dict[str, Any] = manifest.report.get("oracles", {}).get(split, first)
        for task, oracle in by_task.items():
            shown = [f"{oracle[name]:.5f}" for name in ("auc", "gauc", "logloss")]
            candidates = f"{oracle['samples']:,}"  # that the task was observed of
            rows.append([split, f"{info.requests:,}", candidates, task, f"{oracle['rate']:.4f}", *shown])
    facts = manifest.ingest["synth"]
    ids = ", ".join(f"{name} {_rows_of(info)}" for name, info in manifest.features.items())
    return [
        *table_lines(head, rows),
        f"planted log {kind!r}, seed {facts['seed']}, {facts['users']:,} users to train on; rows: {ids}",
        f"train on it with --set data.log={out} --set data.history_length={facts['history_length']}; "
        f"the truth is in {out / TRUTH}",
    ]
