"""The cells of one raw column as ingest wants them (Ibis values of any engine), and which do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ibis
from ibis.expr import types as ir

from pipelines.ingest.columns import CSV, NULL, Kind, Target
from pipelines.ingest.sections import Unit

UNITS: dict[Unit, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_INT64 = 2**63 - 1
_EXACT = 2**53  # a float holds every integer up to here
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
NO_NUMBER = ["nan", "inf", "-inf", "+inf", "infinity", "-infinity"]
# In small letters: what pandas, Hive, R and people write for nothing.
_NOTHING = ["null", "none", "nan", "na", "n/a", "<na>", "\\n", "nil", "(null)"]
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]+)?)?"
_OFFSET = r"([+-])([0-9]{2}):?([0-9]{2})?$"
_ISO = rf"{_DATE}({_CLOCK} ?(Z|z|UTC|[+-][0-9]{{2}}(:?[0-9]{{2}})?)?)?$"


def of_text(value: ir.Value, nulls: Sequence[str]) -> ir.Value:
    """A cell of CSV: null where it is empty, quoted or not, or one of the words for nothing."""
    value = value.nullif("")
    return ibis.ifelse(value.isin(list(nulls)), ibis.null("string"), value) if nulls else value


def may_be_broken(text: ir.Value) -> ir.Value:
    """Whether a cell looks like what a lenient reader makes of a lost quote or of bytes that are no UTF-8."""
    return (text.contains("\ufffd") | text.contains("\n") | text.startswith('"')).fill_null(False)


def look_at(
    value: ir.Value, family: str, kind: Kind, target: Target | None, unit: Unit
) -> Mapping[str, ir.Value]:
    """What decides about the cells of a column of some files; what is not of interest is left out.

    bad: the cell as text, where it is no value of its kind. wide: the cell as text, where it is a value that
    only text can hold. word: the cell, where it is a word that other programs write for nothing. All three
    are null elsewhere. cut: whether it loses a part of a second. known: whether it is not null.
    """
    facts: dict[str, ir.Value | None] = {}
    if kind == "time":
        facts = _times(value, family, unit)
    elif kind == "number" and family == CSV:
        word = value.strip()
        number = word.re_search(NUMBER) | word.lower().isin(["true", "false", *NO_NUMBER])
        number = ibis.ifelse(_is_integer(value), True, number)
        facts = {"bad": _where(value, value.notnull() & ~number)}
    elif kind in ("key", "id"):
        facts = _ids(value, family, target)
    return {name: fact for name, fact in facts.items() if fact is not None}


def _ids(value: ir.Value, family: str, target: Target | None) -> dict[str, ir.Value | None]:
    word = _where(value, value.lower().isin(_NOTHING)) if family in (CSV, "text") else None
    if family == CSV and not target:
        wide = _where(value, value.notnull() & ~_is_integer(value))
        return {"wide": wide, "known": value.notnull(), "word": word}
    if family == "uint64":
        return {"wide": _where(value, value > _INT64)}
    if family == "float":
        number = value.cast("float64")
        parts = whole_part(number).isnull() | (number != whole_part(number)) | (number.abs() > _EXACT)
        return {"bad": _where(value, value.notnull() & ~value.isnan() & parts)}
    if family == "decimal":
        beyond = (value > _INT64) | (value < -_INT64)
        return {"bad": _where(value, value != value.floor()), "wide": _where(value, beyond)}
    return {"word": word}


def convert(value: ir.Value, family: str, kind: Kind, target: Target, unit: Unit) -> ir.Value:
    """The column in its target type, where all of its cells fit."""
    if family in (NULL, "list of null"):
        return ibis.null(target)
    if kind == "time":
        return _seconds(value, family, unit)
    if family == "float":
        value = ibis.ifelse(value.isnan(), ibis.null(value.type()), value)
    if target == "int64":
        return (value.try_cast("int64") if family in (CSV, "float") else value.cast("int64")).cast("int64")
    if kind == "number" and family == CSV:
        word = value.strip().lower()
        truth = ibis.cases(
            (word == "true", 1.0), (word == "false", 0.0), else_=value.strip().try_cast("float64")
        )
        return truth.cast("float64")
    if target == "string" and family in ("float", "decimal"):
        return value.try_cast("decimal(38, 0)").cast("string")
    return value.cast(target)


def _where(value: ir.Value, condition: ir.Value) -> ir.StringValue:
    return ibis.ifelse(condition, value.cast("string"), ibis.null("string"))


def _is_integer(text: ir.Value) -> ir.Value:
    """Whether text is an integer, and the only way to spell it: not 01, +1, 1e3, -0 or one with a blank."""
    return (text.try_cast("int64").cast("string") == text).fill_null(False)


def _times(value: ir.Value, family: str, unit: Unit) -> dict[str, ir.Value | None]:
    size = UNITS[unit]
    if family in ("int", "uint64"):
        bad = _where(value, value > _INT64) if family == "uint64" else None
        return {"bad": bad, "cut": value % size != 0 if size > 1 else None}
    if family in ("float", "decimal"):
        parts = value.cast("float64") / size
        known = value.notnull() & ~parts.isnan()
        bad, cut = known & whole_part(parts).isnull(), known & (parts != whole_part(parts))
        return {"bad": _where(value, bad), "cut": cut}
    if family == "time":
        is_number = value.type().is_integer()
        return {"cut": value % UNITS["ns"] != 0 if is_number else value != value.truncate("s")}
    if family not in (CSV, "text"):
        return {}
    word = value.strip()
    number, moment = word.re_search(NUMBER), word.re_search(_ISO)
    # Plain integers are most of what there is, and the quickest to know.
    plain = _is_integer(value)
    parts = word.try_cast("float64") / size
    fits = (number & whole_part(parts).notnull()) | (moment & _moment(word).notnull())
    whole = ibis.literal(False) if size == 1 else value.try_cast("int64") % size != 0
    cut = ibis.cases(
        (plain, whole),
        (number, parts != whole_part(parts)),
        (moment, word.re_search(r"[.,][0-9]*[1-9]")),
        else_=False,
    )
    return {"bad": _where(value, value.notnull() & ibis.ifelse(plain, False, ~fits)), "cut": cut}


def _seconds(value: ir.Value, family: str, unit: Unit) -> ir.Value:
    """Unix seconds; a part of a second is cut off."""
    size = UNITS[unit]
    if family in ("int", "uint64"):
        return _over(value.cast("int64"), size)
    if family in ("float", "decimal"):
        return whole_part(value.cast("float64") / size)
    if family == "time" and value.type().is_integer():
        # Spark gives nanoseconds as a number.
        return _over(value, UNITS["ns"])
    if family == "time":
        return value.truncate("s").epoch_seconds().cast("int64")
    if family == "date":
        return value.cast("timestamp").epoch_seconds().cast("int64")
    word = value.strip()
    whole = word.try_cast("int64")
    parts = whole_part(word.try_cast("float64") / size)
    number = ibis.ifelse(word.re_search(r"^[+-]?[0-9]+$"), _over(whole, size), parts)
    slow = ibis.ifelse(word.re_search(NUMBER), number, _moment(word)).cast("int64")
    return ibis.ifelse(_is_integer(value), _over(value.try_cast("int64"), size), slow).cast("int64")


def whole_part(number: ir.Value) -> ir.Value:
    """A float without its parts as a 64-bit integer, null where none holds it.

    DuckDB computes whole dictionaries of a file, also entries that a condition leaves out, so that a cast
    which may fail does so. Its `try_cast` rounds, and Spark's cuts.
    """
    whole = number.try_cast("int64")
    return ibis.ifelse(whole.cast("float64") > number, whole - 1, whole)


def _over(whole: ir.Value, size: int) -> ir.Value:
    return whole if size == 1 else (whole // size).cast("int64")


def _moment(word: ir.Value) -> ir.Value:
    """Unix seconds of ISO 8601 text: UTC, unless it names its offset."""
    day, clock = word.substr(0, 10), word.substr(11, 5)
    seconds = ibis.ifelse(word.re_search(r"^.{16}:"), word.substr(16, 3), ":00")
    stamp = ibis.ifelse(word.length() == 10, day + " 00:00:00", day + " " + clock + seconds)
    zone = word.substr(16)
    sign = ibis.ifelse(zone.re_extract(_OFFSET, 1) == "-", -1, 1)
    hours, minutes = (zone.re_extract(_OFFSET, part).try_cast("int64").fill_null(0) for part in (2, 3))
    offset = ibis.ifelse(zone.re_search(_OFFSET), sign * (hours * 3600 + minutes * 60), 0)
    return (stamp.try_cast("timestamp").epoch_seconds().cast("int64") - offset).cast("int64")
