"""Values of the raw tables become dense ids, and users are divided into buckets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import ibis
import ibis.expr.operations as ops
from ibis.expr import types as ir

from pipelines.ingest.engine import Engine
from pipelines.ingest.portable_hash import number

# Vocabularies that one statement joins, each a hash table in memory while it runs; the time that an engine
# needs to plan a statement grows with their cube.
_AT_ONCE = 32
_PREFIX = 4  # hexadecimal digits of the row key that choose a bucket


def encode(
    engine: Engine,
    name: str,
    raw: ir.Table,
    features: Mapping[str, bool],
    words: Mapping[str, ir.Table],
    finish: Callable[[ir.Table], ir.Table],
) -> ir.Table:
    """The table with dense ids instead of values: 0 for null; of a multi-valued feature the sorted ids.

    Args:
        name: under which the engine keeps it; what it keeps for a while begins so, too.
        features: column -> whether it is multi-valued; words: their vocabularies.
        finish: what is left to do to the table before it is kept.
    """
    names, passing = list(features), []

    def keep_for_now(what: str, table: ir.Table) -> ir.Table:
        if isinstance(table.op(), ops.DatabaseTable):
            return table
        passing.append(f"{name}_{what}")
        return engine.keep(passing[-1], table)

    table = raw
    for first in range(0, len(names), _AT_ONCE):
        some = names[first : first + _AT_ONCE]
        table, stale = keep_for_now(f"from_{first}", table), passing[:-1]
        for old in stale:
            engine.drop(old)
            passing.remove(old)
        multi = {feature for feature in some if features[feature]}
        coded = {feature: words[feature] for feature in some}
        coded |= {
            feature: _bags(narrow(engine, table, [feature]), feature, words[feature]) for feature in multi
        }
        coded = {feature: keep_for_now(f"ids_of_{feature}", codes) for feature, codes in coded.items()}
        table = _with_ids(engine, table, coded, multi)
    done = engine.keep(name, finish(table))
    for old in passing:
        engine.drop(old)
    return done


def _with_ids(
    engine: Engine, table: ir.Table, coded: Mapping[str, ir.Table], multi: Collection[str]
) -> ir.Table:
    """The table with ids in place of the values of some columns; all tables are kept in the engine.

    As SQL: Ibis takes minutes for a hundred joins, and its recursion ends at fifty.
    """
    columns, joins = [], []
    for name in table.columns:
        if name in coded:
            nothing = "CAST([] AS BIGINT[])" if name in multi else "0"
            columns.append(f'COALESCE("codes_{name}"."id", {nothing}) AS "{name}"')
            joins.append(
                f'LEFT JOIN "{coded[name].get_name()}" AS "codes_{name}" '
                f'ON "raw"."{name}" = "codes_{name}"."value"'
            )
        else:
            columns.append(f'"raw"."{name}" AS "{name}"')
    query = f'SELECT {", ".join(columns)} FROM "{table.get_name()}" AS "raw" {" ".join(joins)}'
    ids = {name: "array<int64>" if name in multi else "int64" for name in coded}
    return engine.query(query, {**table.schema(), **ids})


def narrow(engine: Engine, table: ir.Table, columns: Sequence[str]) -> ir.Table:
    """Some columns of a table: an expression on a wide one makes Ibis walk over all of its columns."""
    if not isinstance(table.op(), ops.DatabaseTable):
        return table.select(*columns)
    names = ", ".join(f'"{name}"' for name in columns)
    kinds = {name: table.schema()[name] for name in columns}
    return engine.query(f'SELECT {names} FROM "{table.get_name()}"', kinds)


def _bags(raw: ir.Table, name: str, vocabulary: ir.Table) -> ir.Table:
    """value (a list), id (the sorted distinct ids of its members)."""
    lists = raw.select(value=raw[name]).distinct()
    members = lists.mutate(member=lists["value"].unnest())
    words = vocabulary.select(member=vocabulary["value"], code=vocabulary["id"])
    coded = members.inner_join(words, "member").select("value", "code").distinct()
    return coded.group_by("value").aggregate(id=coded.code.collect().sort())


def no_ids() -> ir.ArrayValue:
    """An empty list of ids."""
    return ibis.literal([], type="array<int64>")


def in_buckets(raw: ir.Table, buckets: int, seed: int) -> ir.Table:
    """Adds `bucket` to a table with user_id, and sorts by it, so that one can be read without the others."""
    if buckets == 1:
        return raw
    prefix = number(seed, "row", raw.user_id, digits=_PREFIX)
    return raw.mutate(bucket=(prefix * buckets // 16**_PREFIX).cast("int64")).order_by("bucket")
