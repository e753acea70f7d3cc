"""Columns of numbers that an encoder is for: their codes, what is told of them, and edges of buckets.

The codes are those of `trainer.log.encoders.code`, computed by the engine with the same operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import ibis
from ibis.expr import types as ir

from pipelines.ingest.columns import CSV, NULL
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.values import NO_NUMBER, NUMBER, whole_part
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import ABOVE, BELOW, LARGEST, MISSING, WHOLE_FROM
from trainer.log.encoders.encoder import Encoder
from trainer.log.encoders.table import AnyEncoder
from trainer.log.schema import FeatureInfo

_INTEGER = r"^[+-]?[0-9]+$"
_SPELLED = {CSV, "text"}


def encoders_of(config: IngestConfig) -> dict[str, AnyEncoder]:
    """Column of the raw tables -> what encodes its numbers."""
    entries = {entry.name: entry for entry in config.all_features}
    columns = {**entries, **{f"context_{entry.name}": entry for entry in config.context}}
    return {name: entry.encoder for name, entry in columns.items() if entry.encoder is not None}


def odd_numbers(value: ir.Value, family: str, encoder: Encoder) -> Mapping[str, ir.Value]:
    """The cells that are no numbers, as `pipelines.ingest.values.look_at` gives them.

    With the step 1, which nobody needs to have chosen, also those that lose a part of 1: `cut`.
    """
    facts: dict[str, ir.Value] = {}
    real = value
    if family in _SPELLED:
        word = value.strip()
        number = word.re_search(NUMBER) | word.lower().isin(["true", "false", *NO_NUMBER])
        facts["bad"] = ibis.ifelse(value.notnull() & ~number, value, ibis.null("string"))
        real = ibis.ifelse(word.re_search(_INTEGER), ibis.null("float64"), word.try_cast("float64"))
    if encoder.step == 1 and family in (*_SPELLED, "float", "decimal"):
        real = real.cast("float64")
        facts["cut"] = ((real.abs() < WHOLE_FROM) & (real != whole_part(real))).fill_null(False)
    return facts


def codes(value: ir.Value, family: str, encoder: Encoder) -> ir.IntegerValue:
    """The codes of a column's cells."""
    exact = encoder.step == 1
    if family in (NULL, "list of null"):
        return ibis.literal(MISSING, type="int64")
    if family in _SPELLED:
        found = _of_text(value.strip(), encoder)
    elif family in ("int", "bool") and exact:
        found = _of_integers(value.cast("int64"), encoder)
    elif exact and (family == "uint64" or (family == "decimal" and not value.type().scale)):
        whole = value.try_cast("int64")
        found = _beyond(whole.isnull(), value > 0, value < 0, _of_integers(whole, encoder))
    else:
        number = value.cast("int64") if family == "bool" else value
        found = _of_reals(number.cast("float64"), encoder)
    return found.fill_null(MISSING).cast("int64")


def _of_text(word: ir.Value, encoder: Encoder) -> ir.Value:
    low = word.lower()
    real = ibis.cases((low == "true", 1.0), (low == "false", 0.0), else_=word.try_cast("float64"))
    negative = word.startswith("-")
    # A number beyond all floats may be read as none.
    found = _of_reals(real.cast("float64"), encoder)
    found = _beyond(real.isnull() & word.re_search(NUMBER), ~negative, negative, found)
    if encoder.step != 1:
        return found
    whole = word.try_cast("int64")
    exact = _beyond(whole.isnull(), ~negative, negative, _of_integers(whole, encoder))
    return ibis.ifelse(word.re_search(_INTEGER), exact, found)


def _of_integers(whole: ir.Value, encoder: Encoder) -> ir.Value:
    low, high = encoder.limits
    above, below = (ibis.literal(code, type="int64") for code in (ABOVE, BELOW))
    # Engines compute branches that they do not take: even there nothing must overflow.
    positive = ibis.least(whole, ibis.literal(LARGEST, type="int64")) + 1
    return ibis.cases(
        (whole > high, above),
        (whole < low, below),
        (whole >= 0, positive.cast("int64")),
        else_=whole,
    )


def _of_reals(real: ir.Value, encoder: Encoder) -> ir.Value:
    # As text, or an engine takes the step for a decimal number.
    share = real if encoder.step == 1 else real / ibis.literal(repr(float(encoder.step))).cast("float64")
    small = share.abs() < ibis.literal(WHOLE_FROM, type="float64")
    whole = ibis.ifelse(small, whole_part(share + 0.5), share.try_cast("int64"))
    found = _beyond(whole.isnull(), share > 0, share < 0, _of_integers(whole, encoder))
    return ibis.ifelse(real.isnan(), ibis.literal(MISSING, type="int64"), found)


def _beyond(lost: ir.Value, above: ir.Value, below: ir.Value, found: ir.Value) -> ir.Value:
    """Overflow where a number was too large for 64 bits."""
    codes = (ibis.literal(code, type="int64") for code in (ABOVE, BELOW))
    return ibis.cases((lost & above, next(codes)), (lost & below, next(codes)), else_=found)


def numbers_in(codes: ir.Value) -> ir.Value:
    """The quantised integers of codes; null where missing or beyond the range."""
    known = ibis.ifelse(codes > BELOW, codes, ibis.null("int64")).nullif(MISSING)
    return ibis.ifelse(known > 0, known - 1, known).cast("int64")


def missing_and_beyond(codes: ir.Value, encoder: Encoder) -> tuple[ir.Value, ir.Value]:
    """Whether numbers are missing, and whether they are beyond an encoder's range: 0 or 1.

    Args:
        codes: that no range has cut.
    """
    low, high = encoder.limits
    value = numbers_in(codes)
    beyond = (codes <= BELOW) | (value < low).fill_null(False) | (value > high).fill_null(False)
    return (codes == MISSING).cast("int64"), beyond.cast("int64")


@dataclass(frozen=True)
class NumberColumns:
    """The columns of numbers of the raw tables.

    Attributes:
        infos: column -> what the manifest says of it.
        report: column -> rows, missing, overflow, those of it below the range, and least and greatest in the
            column's unit.
    """

    infos: Mapping[str, FeatureInfo]
    report: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def of(
        engine: Engine,
        tables: Mapping[str, ir.Table],
        sides: Mapping[str, Any],
        older: Mapping[str, AnyEncoder],
        config: IngestConfig,
    ) -> NumberColumns:
        """Measure the columns, and give their encoders the edges that they lack.

        Args:
            tables: with codes, the events first; sides: column -> side.
            older: encoders of the log whose vocabulary is continued; edges stay what they are there.
        """
        infos, report = {}, {}
        cutoff = config.split.validation_start if config.split else None
        for name, encoder in encoders_of(config).items():
            having = [table for table in tables.values() if name in table.columns]
            settled = older.get(name, encoder)
            if isinstance(settled, Buckets) and settled.edges is None:
                edges = quantile_edges(engine, having[0], name, settled.count, cutoff)
                given = tuple(edge if settled.step == 1 else edge * settled.step for edge in edges)
                settled = Buckets(kind="buckets", step=settled.step, edges=given)
            infos[name] = FeatureInfo(rows=1, side=sides[name], encoder=settled)
            report[name] = _measured(engine, [table.select(code=table[name]) for table in having], encoder)
        return NumberColumns(infos, report)


def _measured(engine: Engine, tables: Sequence[ir.Table], encoder: Encoder) -> dict[str, Any]:
    codes = reduce(lambda one, other: one.union(other), tables)
    known = numbers_in(codes.code)
    sums = {"rows": codes.count(), "missing": (codes.code == MISSING).cast("int64").sum()}
    sums |= {"overflow": (codes.code <= BELOW).cast("int64").sum()}
    sums |= {"below": (codes.code == BELOW).cast("int64").sum()}
    row = engine.rows(codes.aggregate(**sums, least=known.min(), greatest=known.max()))[0]
    found: dict[str, Any] = {name: int(row[name] or 0) for name in sums}
    for end in ("least", "greatest"):
        value = row[end]
        found[end] = value if value is None or encoder.step == 1 else value * encoder.step
    return found


def quantile_edges(engine: Engine, table: ir.Table, name: str, count: int, cutoff: int | None) -> list[int]:
    """Edges of so many buckets with about as many numbers each, ascending; fewer where numbers repeat.

    The edge after a share of k / count of the numbers is the first number that has as many before it.

    Args:
        table: with codes.
        cutoff: Unix second before which rows count, and those without a time; None: all do.
    """
    # What a table of users or items says has no time.
    early = table.timestamp.isnull() | (table.timestamp < cutoff) if cutoff is not None else None
    rows = table if early is None else table.filter(early)
    values = rows.select(value=numbers_in(rows[name]))
    values = values.filter(values["value"].notnull())
    total = int(engine.rows(values.aggregate(total=values.count()))[0]["total"])
    if not total:
        return []
    counts = values.group_by("value").aggregate(times=values.count())
    upto = counts.times.cumsum(order_by=counts["value"]).cast("int64")
    before = counts.select("value", before=(upto - counts.times).cast("int64"))
    placed = before.select("value", bucket=(before.before * count // total).cast("int64"))
    edges = placed.group_by("bucket").aggregate(edge=placed["value"].min())
    return sorted(int(row["edge"]) for row in engine.rows(edges) if row["bucket"])


def _plain(value: float | None) -> str:
    """Without the last bits that multiples of a step have."""
    return f"{value:,.15g}" if isinstance(value, float) else f"{value or 0:,}"


def number_lines(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a column, for people."""
    lines = []
    for column, found in report.items():
        name, rows = column.replace("context_", "context "), found["rows"]
        least, greatest = (_plain(found[end]) for end in ("least", "greatest"))
        span = "no value" if found["least"] is None else f"{least} to {greatest}"
        lost = f"{found['missing']:,} of {rows:,} missing, {found['overflow']:,} beyond the range"
        lines.append(f"{name}: numbers, {span}; {lost}")
        if found["missing"] == rows:
            lines.append(f"WARNING: {name} has no value in any row")
        elif found["overflow"] * 100 > rows:
            lines.append(
                f"WARNING: more than 1% of {name} lies beyond the range of its encoder"
                f"{_sides(found)}; widen it if they are real"
            )
    return lines


def _sides(found: Mapping[str, Any]) -> str:
    """How many numbers lie on each side of the range; logs of earlier versions do not know."""
    if "below" not in found:
        return ""
    return f" ({found['below']:,} below, {found['overflow'] - found['below']:,} above)"
