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
from trainer.log.schema import VOCABULARIES, FeatureInfo, LogManifest, schema_of
from trainer.log.writer import check_target, staged, write_manifest, write_split

TRUTH = "truth.parquet"
_LAYOUT = (256, 4096)  # rows a row group (some MB) and a file


def synth(
    out: Path, kind: str = "relevance", seed: int = 7, users: int = 0, overwrite: bool = False
) -> LogManifest:
    """Write a planted log at `out`, with `<out>/truth.parquet`, and print what an oracle achieves on it.

    The same arguments write the same bytes. The truth has one row a candidate: split, user_id, request_id,
    candidate and probability, keyed like the scores that `evaluate` keeps. The manifest repeats the
    arguments under `ingest` and the oracle's metrics under `report`.

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
    oracle = {split: part.oracle().as_dict() for split, part in log.splits.items()}
    facts = {"kind": kind, "seed": seed, "users": count, "history_length": planted.history_length}
    manifest = LogManifest(
        features={name: FeatureInfo(rows=rows) for name, rows in log.features.items()},
        tasks=["click"],
        taxonomy=list(log.taxonomy),
        splits={},
        ingest={"synth": facts},
        report={"oracle": oracle},
    )
    truth = pa.concat_tables(part.truth(split) for split, part in log.splits.items())
    with staged(out, overwrite) as root:
        splits = {
            split: write_split([part.rows()], root, split, schema_of(manifest), _LAYOUT)
            for split, part in log.splits.items()
        }
        _write_parquet(truth, root / TRUTH)
        (root / VOCABULARIES).mkdir()
        for name, rows in log.features.items():
            # Ids stand for themselves; `count` is how often each occurs in the histories of the train split.
            ids = np.arange(rows)
            counts = np.bincount(log.splits["train"].history[name].reshape(-1), minlength=rows)
            table = pa.table({"value": ids, "id": ids, "count": counts})
            _write_parquet(table, root / VOCABULARIES / f"{name}.parquet")
        manifest = manifest.model_copy(update={"splits": splits})
        write_manifest(root, manifest)
    print("\n".join(_report(kind, out, manifest)), flush=True)
    return manifest


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _report(kind: str, out: Path, manifest: LogManifest) -> list[str]:
    head = ["oracle on", "requests", "candidates", "clicked", "AUC", "GAUC", "logloss"]
    rows = []
    for split, info in manifest.splits.items():
        oracle: dict[str, Any] = manifest.report["oracle"][split]
        rows.append(
            [
                split,
                f"{info.requests:,}",
                f"{info.candidates:,}",
                f"{info.positives / info.candidates:.4f}",
                *(f"{oracle[name]:.5f}" for name in ("auc", "gauc", "logloss")),
            ]
        )
    facts = manifest.ingest["synth"]
    ids = ", ".join(f"{name} {info.rows:,}" for name, info in manifest.features.items())
    return [
        *table_lines(head, rows),
        f"planted log {kind!r}, seed {facts['seed']}, {facts['users']:,} users to train on; rows: {ids}",
        f"train on it with --set data.log={out} --set data.history_length={facts['history_length']}; "
        f"the truth is in {out / TRUTH}",
    ]
