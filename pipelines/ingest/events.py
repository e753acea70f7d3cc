"""Opens and checks the tables of events and of impressions before anything is computed from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import ColumnNeed, needs_of
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.faults import number_of
from pipelines.ingest.files import RawFiles
from pipelines.ingest.sections import DomainConfig, ImpressionsConfig, LabelConfig, RoleColumns
from pipelines.ingest.sources import RawTable, Survey, columns_of, open_files
from pipelines.ingest.values import UNITS

# The engine keeps them while they are needed: text is slow to parse, and a query plan wants to know sizes.
RAW_TABLES = EVENTS, IMPRESSIONS = ("raw_events", "raw_impressions")
_KEYS = ("user_id", "item_id", "timestamp")
_YEAR_5000 = 95_617_584_000  # unix seconds; a larger timestamp is in milli- or microseconds


def open_events(
    engine: Engine, files: RawFiles, config: IngestConfig, survey: Survey, given: Collection[str] = ()
) -> ir.Table:
    """The events as user_id, request_id, timestamp (int64), one raw column a feature, and context_*.

    Users and requests are integers or text.

    Args:
        given: the features that another table gives, of which the events need no column.

    Raises:
        DataError: a file or a column is missing, of a wrong type, or holds impossible values.
    """
    named = {feature.name for feature in config.features}
    wanted = roles("events", config.events)
    wanted |= {
        entry.name: ColumnNeed.of("features" if entry.name in named else "events.taxonomy", entry)
        for entry in config.all_features
        if entry.side != "candidate" and entry.name not in (*given, "item_id")
    }
    wanted |= needs_of("context", config.context_of("events"))
    table = open_files(engine, files, wanted, config, survey)
    raw = engine.keep(EVENTS, _with_requests(table.table))
    survey.loose[EVENTS] = table.loose
    check_values(engine, raw, table, _KEYS, config.csv.nulls)
    return raw


def open_impressions(engine: Engine, files: RawFiles, config: IngestConfig, survey: Survey) -> ir.Table:
    """The impressions as user_id, request_id, timestamp, item_id, their numbers, and context_*.

    The numbers are label_*, numeric_*, weight and weight_* (of a label). A label that is declared partial is
    null where it was not observed, and its weight is 0 where it has none there. Features of the item are
    there if the table has their columns.

    Raises:
        DataError: a file or a column is missing, of a wrong type, or holds impossible values.
    """
    columns, given = config.impressions, config.numbers
    present = columns_of(files, [columns.user, columns.item, columns.timestamp], config)
    entries = {
        entry.name: entry
        for entry in config.all_features
        if entry.name != "item_id"
        and (entry.side == "candidate" or (entry.side == "both" and entry.source in present))
    }
    numbers = _number_needs(columns, given)
    wanted = roles("impressions", columns) | numbers | needs_of("features", entries)
    wanted |= needs_of("context", config.context_of("impressions"))
    table = open_files(engine, files, wanted, config, survey)
    values = {name: table.table[name].cast("float32") for name in numbers}
    may_lack = {
        f"{kind}_{task}"
        for task, label in columns.labels.items()
        for kind in ("label", "weight")
        if label.partial and f"{kind}_{task}" in numbers
    }
    for name in may_lack:
        values[name] = ibis.ifelse(values[name].isnan(), ibis.null("float32"), values[name])
    if config.domains:
        # In the spelling that items have in the merged events.
        values["item_id"] = ibis.literal(f"{columns.domain}/") + table.table.item_id.cast("string")
        for name, entry in entries.items():
            if entry.encoder is None:
                values[name] = table.table[name].cast("array<string>" if entry.multi else "string")
        values["domain_id"] = ibis.literal(columns.domain)
    raw = engine.keep(IMPRESSIONS, _with_requests(table.table.mutate(**values)))
    survey.loose[IMPRESSIONS] = table.loose
    required = [*_KEYS, *(["request_id"] if columns.request else [])]
    required += [name for name in numbers if name not in may_lack]
    check_values(engine, raw, table, required, config.csv.nulls)
    return _with_labels(engine, raw, table, columns, list(numbers))


def _number_needs(columns: ImpressionsConfig, numbers: Mapping[str, str]) -> dict[str, ColumnNeed]:
    """label_*, numeric_*, weight and weight_*."""
    labels = columns.labels
    needs = {
        f"label_{task}": ColumnNeed(f"impressions.labels: {task}", label.column, "number")
        for task, label in labels.items()
    }
    for name, column in numbers.items():
        key = "impressions.numeric" if name in columns.numeric else "features"
        needs[f"numeric_{name}"] = ColumnNeed(f"{key}: {name}", column, "number")
    if columns.weight:
        needs["weight"] = ColumnNeed("impressions.weight", columns.weight, "number")
    return needs | {
        f"weight_{task}": ColumnNeed(f"impressions.labels.{task}.weight", label.weight, "number")
        for task, label in labels.items()
        if label.weight
    }


def roles(section: str, columns: RoleColumns | DomainConfig) -> dict[str, ColumnNeed]:
    """The columns that say who did what, and when."""
    wanted = {
        "user_id": ColumnNeed(f"{section}.user", columns.user, "key"),
        "timestamp": ColumnNeed(f"{section}.timestamp", columns.timestamp, "time", columns.timestamp_unit),
    }
    if isinstance(columns, RoleColumns) and columns.request:
        wanted["request_id"] = ColumnNeed(f"{section}.request", columns.request, "key")
    return wanted | {"item_id": ColumnNeed(f"{section}.item", columns.item, "id")}


def _with_requests(table: ir.Table) -> ir.Table:
    """Without ids of requests, a user's rows of one second are one request."""
    return table if "request_id" in table.columns else table.mutate(request_id=table.timestamp)


def check_values(
    engine: Engine, raw: ir.Table, table: RawTable, required: Sequence[str], nulls: Collection[str]
) -> None:
    """Refuses an empty table, nulls and NaN in required columns, and times that cannot be.

    Args:
        table: the files that `raw` was made of, to name the place of a fault; nulls: their words for nothing.
    """
    missing = {name: raw[name].isnull() for name in required}
    missing |= {
        name: missing[name] | raw[name].isnan() for name in required if raw[name].type().is_floating()
    }
    sums = {f"bad_{name}": bad.sum() for name, bad in missing.items()}
    times = {"earliest": raw.timestamp.min(), "latest": raw.timestamp.max()}
    found = engine.rows(raw.aggregate(rows=raw.count(), **times, **sums))[0]
    if not found["rows"]:
        raise DataError("has no rows; ingest needs some", file=table.label)

    def is_given(cell: object) -> bool:
        return cell not in (None, "", *nulls) and str(cell).strip().lower() != "nan"

    for name in required:
        if count := found[f"bad_{name}"]:
            problem = f"null in {int(count):,} of {found['rows']:,} rows; remove or fill them"
            if table.columns[name].need.is_label:
                problem += ", or declare the label with partial = true if it was not observed there"
            raise table.fault(name, problem, is_given)
    if found["latest"] > _YEAR_5000 or found["earliest"] < 0:
        raise _odd_time(table, int(found["earliest"]), int(found["latest"]))


def _odd_time(table: RawTable, earliest: int, latest: int) -> DataError:
    """The error about times that lie before 1970, or so late that they must have another unit."""
    column = table.columns["timestamp"]
    unit = column.need.unit
    if latest <= _YEAR_5000:
        problem = f"{earliest} is before 1970; remove or mend such rows"
    elif column.has_own_unit:
        problem = f"{latest} unix seconds lie after the year 5000; mend how the column is written"
    else:
        others = [f'"{one}"' for one in UNITS if UNITS[one] > UNITS[unit]]
        key = f"{column.need.key}_unit"
        problem = f"{latest} is too large for unix seconds"
        problem += f' ({key} = "{unit}" was counted in)' if unit != "s" else ""
        problem += f"; set {key} = {' or '.join(others)}" if others else "; mend such rows"

    def fits(cell: object) -> bool:
        number = number_of(cell)
        return number is None or 0 <= number / UNITS[unit] <= _YEAR_5000

    return table.fault("timestamp", problem, fits)


def _with_labels(
    engine: Engine, raw: ir.Table, table: RawTable, columns: ImpressionsConfig, numbers: Sequence[str]
) -> ir.Table:
    """The impressions with labels of 0 to 1; what training would refuse is refused here.

    Args:
        raw: its numbers are neither null nor NaN, except partial labels and their weights, which may be null;
            table: the files that it was made of.
        numbers: label_*, numeric_*, weight and weight_*.

    Raises:
        DataError: a number is infinite, a weight negative or lacking, or a label not of its declared kind.
    """
    labels = {f"label_{task}": label for task, label in columns.labels.items()}
    weights = {f"weight_{task}": f"label_{task}" for task in columns.labels if f"weight_{task}" in numbers}
    sums: dict[str, ir.Value] = {"_rows": raw.count()}
    for name in numbers:
        value = raw[name]
        sums |= {f"_least_{name}": value.min(), f"_most_{name}": value.max()}
        if name in labels and labels[name].positive_from is None:
            odd = (value < 0) | (value > 1)
            if labels[name].kind == "binary":
                odd = (value != 0) & (value != 1)
            sums[f"_odd_{name}"] = odd.cast("int64").sum()
        if name in weights:
            sums[f"_lacks_{name}"] = (value.isnull() & raw[weights[name]].notnull()).cast("int64").sum()
    found = engine.rows(raw.aggregate(**sums))[0]
    for name in numbers:
        # Of a label that no row has, and of its weight, there is no number at all.
        least, most = (float(found[f"_{end}_{name}"] or 0) for end in ("least", "most"))
        if max(abs(least), abs(most)) == float("inf"):
            problem = f"holds infinity ({least:g} to {most:g}); remove or mend such rows"
            raise table.fault(name, problem, lambda cell: abs(_number_or_zero(cell)) < float("inf"))
        if (name == "weight" or name in weights) and least < 0:
            problem = f"{least:g} is negative, and a weight is at least 0; mend or leave out such rows"
            raise table.fault(name, problem, lambda cell: _number_or_zero(cell) >= 0)
        if count := int(found.get(f"_lacks_{name}") or 0):
            problem = f"null in {count:,} rows that have the label it weighs; fill them"
            raise DataError(problem, file=table.label, column=table.columns[name].need.column)
        if count := int(found.get(f"_odd_{name}") or 0):
            share = f"{count:,} of {int(found['_rows']):,} rows"
            label = labels[name]
            problem = _label_problem(name.removeprefix("label_"), label, f"{least:g} to {most:g}", share)
            if label.kind == "binary":
                raise table.fault(name, problem, lambda cell: _number_or_zero(cell) in (0, 1))
            raise table.fault(name, problem, lambda cell: 0 <= _number_or_zero(cell) <= 1)
    # As a 32-bit number, like the column: 4.1 is not at least the 64-bit 4.1.
    reached = {
        name: (raw[name] >= ibis.literal(label.positive_from).cast("float32")).cast("float32")
        for name, label in labels.items()
        if label.positive_from is not None
    }
    return raw.mutate(**reached, **{name: raw[name].fill_null(0) for name in weights})


def _number_or_zero(cell: object) -> float:
    """The number of a cell; 0, which every label and weight may be, where it holds none or NaN."""
    number = number_of(cell)
    return 0.0 if number is None or math.isnan(number) else number


def _label_problem(task: str, label: LabelConfig, span: str, share: str) -> str:
    key = f"impressions.labels.{task}"
    positive = f'{key} = {{ column = "{label.column}", positive_from = NUMBER }}'
    if label.kind == "probability":
        return f"holds {span}, but {key} is a probability, 0 to 1 ({share} are outside); say {positive}"
    probable = f'{key} = {{ column = "{label.column}", kind = "probability" }}'
    return (
        f"holds {span}, but {key} is binary, 0 or 1 ({share} are neither): "
        f"say from which number on a row is positive, {positive}, or, where all lie in 0 to 1, {probable}"
    )
