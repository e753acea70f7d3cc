"""Columns that predict a label all alone: most often they hold the answer, known only after the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.portable_hash import digest
from trainer.quality.ranking import auc

_ROWS = 40_000  # candidates that are looked at
_EACH = 10  # positives and negatives of the half that measures, at least
_TOO_GOOD = 0.99
Values = npt.NDArray[Any]


def lone_predictors(engine: Engine, offered: ir.Table, config: IngestConfig) -> list[dict[str, Any]]:
    """column, task, auc: what predicts a label of training too well to be known before it.

    A column is judged on one half of a seeded sample of requests by the label rates of its values in the
    other half: a value that is there once says nothing, so that an id does not look good by chance.
    """
    train = offered.filter(offered.split == "train")
    total = int(engine.rows(train.aggregate(rows=train.num_candidates.sum()))[0]["rows"] or 0)
    key = digest(config.seed, "alone", train.user_id, train.request_id)
    context = [f"context_{entry.name}" for entry in config.context]
    sample = train.select("candidates", *context, _key=key)
    if total > _ROWS:
        sample = sample.filter(sample["_key"] < f"{(_ROWS << 32) // total:08x}")
    found = _columns(list(engine.stream(sample, 1024)), context)
    if not found:
        return []
    fits = found.pop("_key") == 0
    labels = {task: found.pop(f"label_{task}") >= 0.5 for task in config.tasks}
    odd: list[dict[str, Any]] = []
    for name, values in found.items():
        for task, label in labels.items():
            value = _alone(values, label, fits)
            if value > _TOO_GOOD:
                odd.append({"column": name.removeprefix("numeric_"), "task": task, "auc": round(value, 4)})
    return sorted(odd, key=lambda one: (one["task"], one["column"]))


def _columns(batches: list[pa.RecordBatch], context: list[str]) -> dict[str, Values]:
    """name -> one value a candidate; `_key` is the half that its request belongs to."""
    parts: dict[str, list[Values]] = {}
    for batch in batches:
        lists = batch.column("candidates")
        owner, flat = pc.list_parent_indices(lists), pc.list_flatten(lists)
        halves = [int(key[-1], 16) % 2 for key in batch.column("_key").to_pylist()]
        columns = {"_key": pa.array(halves, pa.int8()).take(owner)}
        columns |= {name: batch.column(name).take(owner) for name in context}
        columns |= {field.name: flat.field(field.name) for field in flat.type}
        for name in columns.keys() - {"_order", "weight"}:
            parts.setdefault(name, []).append(_plain(columns[name]))
    return {name: np.concatenate(part) for name, part in parts.items()}


def _plain(column: pa.Array) -> Values:
    """Numbers as they are; the ids of a multi-valued feature as one text."""
    if pa.types.is_nested(column.type):
        return np.array([str(ids) for ids in column.to_pylist()], dtype=object)
    values: Values = column.to_numpy(zero_copy_only=False)
    return values


def _alone(values: Values, label: Values, fits: Values) -> float:
    """The area under the ROC curve of the half that does not fit; 0 where it has too few of either class."""
    measured = label[~fits]
    if min(measured.sum(), (~measured).sum()) < _EACH or not fits.any():
        return 0.0
    words, codes = np.unique(values, return_inverse=True)
    prior = label[fits].mean()
    seen = np.bincount(codes[fits], minlength=words.size)
    hits = np.bincount(codes[fits], weights=label[fits], minlength=words.size)
    best = auc(((hits + prior) / (seen + 1))[codes[~fits]], measured)
    if values.dtype.kind == "f":
        # A number with many values tells more by its order.
        ordered = auc(values[~fits], measured)
        best = max(best, ordered, 1 - ordered)
    return best


def lone_lines(report: Mapping[str, Any], candidate_features: Mapping[str, Any]) -> list[str]:
    """A warning a column."""
    lines = []
    for one in report.get("predicts_alone", []):
        name = one["column"]
        if name == "item_id":
            lines.append(
                f"WARNING: the item alone tells the label {one['task']} (AUC {one['auc']:.4f}): then it is a"
                " property of items, and there is nothing of users to learn"
            )
            continue
        remedy = "leave it out"
        if name in candidate_features:
            remedy = 'give it side = "history", or leave it out'
        called = name.replace("context_", "context ")
        lines.append(
            f"WARNING: {called} alone predicts the label {one['task']} of its own row"
            f" (AUC {one['auc']:.4f}): if it is known only after the request, {remedy}"
        )
    return lines
