"""The numbers of impressions: labels are made 0 to 1, and what training would refuse is refused here."""

from __future__ import annotations

from collections.abc import Mapping

import ibis
from ibis.expr import types as ir

from pipelines.ingest.config import ImpressionsConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.faults import fault_of, number_of
from pipelines.ingest.sections import LabelConfig
from pipelines.ingest.sources import RawTable


def checked_labels(
    engine: Engine, raw: ir.Table, table: RawTable, columns: ImpressionsConfig, numbers: Mapping[str, str]
) -> ir.Table:
    """The table with labels of 0 to 1.

    Args:
        raw: its numbers are neither null nor NaN; table: the files that it was made of.
        numbers: name in `raw` (label_*, numeric_*, weight) -> in the file.

    Raises:
        DataError: a number is infinite, a weight negative, or a label not of its declared kind.
    """
    labels = {f"label_{task}": label for task, label in columns.labels.items()}
    sums: dict[str, ir.Value] = {"_rows": raw.count()}
    for name in numbers:
        value = raw[name]
        sums |= {f"_least_{name}": value.min(), f"_most_{name}": value.max()}
        if name in labels and labels[name].positive_from is None:
            sums[f"_odd_{name}"] = _odd(value, labels[name]).cast("int64").sum()
    found = engine.rows(raw.aggregate(**sums))[0]
    for name, column in numbers.items():
        least, most = (float(found[f"_{end}_{name}"]) for end in ("least", "most"))
        problem, fits = "", _is_finite
        if max(abs(least), abs(most)) == float("inf"):
            problem = f"holds infinity ({least:g} to {most:g}); remove or mend such rows"
        elif name == "weight" and least < 0:
            problem = f"{least:g} is negative, and a weight is at least 0; mend or leave out such rows"
            fits = _is_not_negative
        elif odd := int(found.get(f"_odd_{name}", 0)):
            share = f"{odd:,} of {int(found['_rows']):,} rows"
            problem = _explained(name.removeprefix("label_"), labels[name], f"{least:g} to {most:g}", share)
            fits = _is_binary if labels[name].kind == "binary" else _is_probability
        if problem:
            raise fault_of(table.files, column, problem, table.label, fits)
    return raw.mutate(**{name: _label(raw[name], label) for name, label in labels.items()})


def _is_finite(cell: object) -> bool:
    return abs(number_of(cell) or 0) < float("inf")


def _is_not_negative(cell: object) -> bool:
    return (number_of(cell) or 0) >= 0


def _is_binary(cell: object) -> bool:
    return (number_of(cell) or 0) in (0, 1)


def _is_probability(cell: object) -> bool:
    return 0 <= (number_of(cell) or 0) <= 1


def _odd(value: ir.Value, label: LabelConfig) -> ir.BooleanValue:
    if label.kind == "binary":
        return (value != 0) & (value != 1)
    return (value < 0) | (value > 1)


def _explained(task: str, label: LabelConfig, found: str, share: str) -> str:
    key = f"impressions.labels.{task}"
    positive = f'{key} = {{ column = "{label.column}", positive_from = NUMBER }}'
    if label.kind == "probability":
        return f"holds {found}, but {key} is a probability, 0 to 1 ({share} are outside); say {positive}"
    probable = f'{key} = {{ column = "{label.column}", kind = "probability" }}'
    return (
        f"holds {found}, but {key} is binary, 0 or 1 ({share} are neither): "
        f"say from which number on a row is positive, {positive}, or, where all lie in 0 to 1, {probable}"
    )


def _label(value: ir.Value, label: LabelConfig) -> ir.Value:
    if label.positive_from is None:
        return value
    # As a 32-bit number, like the column: 4.1 is not at least the 64-bit 4.1.
    return (value >= ibis.literal(label.positive_from).cast("float32")).cast("float32")
