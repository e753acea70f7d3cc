"""Cross-domain trajectories: the events of several sources as one history a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ibis
from ibis.expr import types as ir

from pipelines.ingest.balanced import all_rows

_SAME = ("user_id", "item_id", "action_id", "timestamp")


def scoped(
    table: ir.Table, columns: Mapping[str, ir.Value], domain: str, further: Mapping[str, ir.Value]
) -> ir.Table:
    """One domain's events in common columns: user_id, request_id, timestamp, item_id, domain_id, ..., key.

    Items and scenarios carry the domain's name, so that equal numbers of two domains are never one id;
    actions do not: a click is a click. `key` is what the domain's mapping explains.

    Args:
        columns: user, timestamp, item, and scenario, action, key where the domain has them.
    """

    def text(column: str) -> ir.Value:
        return columns[column].cast("string") if column in columns else ibis.null("string")

    prefix = ibis.literal(f"{domain}/")
    return table.select(
        user_id=columns["user"],
        request_id=columns["timestamp"],
        timestamp=columns["timestamp"],
        item_id=prefix + text("item"),
        domain_id=ibis.literal(domain),
        scenario_id=prefix + text("scenario"),
        action_id=text("action"),
        key=text("key"),
        **further,
    )


def merge(sources: Sequence[ir.Table]) -> ir.Table:
    """All events, one of each (user, item, action, second): of several the least in its other columns."""
    names = list(sources[0].columns)
    everything = all_rows([table.select(names) for table in sources])
    others = [everything[name] for name in names if name not in _SAME]
    place = ibis.row_number().over(group_by=list(_SAME), order_by=others)
    numbered = everything.mutate(place=place)
    return numbered.filter(numbered.place == 0).drop("place")
