"""The `impressions` protocol: the requests, candidates and labels that were logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ibis.expr import types as ir

from pipelines.ingest.exposure import with_exposures
from pipelines.ingest.protocols.protocol import REQUEST, RequestProtocol, Tables

if TYPE_CHECKING:
    from pipelines.ingest.config import IngestConfig


class Impressions(RequestProtocol):
    """Requests, candidates and labels are those of the table of impressions."""

    reads_impressions = True
    draws_negatives = False

    def check(self, name: str, config: IngestConfig) -> None:
        super().check(name, config)
        if problem := _exposure_problem(config):
            raise ValueError(problem)
        if config.domains and config.impressions.domain not in {domain.name for domain in config.domains}:
            raise ValueError("impressions.domain must name one of the domains: it says whose items are shown")
        if config.requests.new_items == "drop":
            raise ValueError("requests.new_items is about drawn candidates: impressions are kept as shown")

    def tasks(self, config: IngestConfig) -> tuple[str, ...]:
        return tuple(config.impressions.labels)

    def requests(self, tables: Tables, config: IngestConfig) -> ir.Table:
        """user_id, request_id, timestamp, context_*: one row for each request.

        A request whose rows differ in time happened at the earliest; where they differ in context, the
        largest value counts.
        """
        shown = _shown(tables)
        context = {name: shown[name].max() for name in config.context_of("impressions")}
        return shown.group_by(REQUEST).aggregate(timestamp=shown.timestamp.min(), **context)

    def candidates(self, tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
        """user_id, request_id, item_id, label_*, and what else an impression says of its candidate.

        Where earlier exposures decide on weights, also how many there were (`EXPOSURES`).
        """
        shown = _shown(tables)
        if config.exposure is None:
            shown = shown.semi_join(asked, REQUEST)
        else:
            shown = with_exposures(shown, asked, tables.items, config.exposure)
        return shown.drop("timestamp", *config.context_of("impressions"))


def _shown(tables: Tables) -> ir.Table:
    if tables.impressions is None:
        raise ValueError("the impressions protocol was called without its table")
    return tables.impressions


def _exposure_problem(config: IngestConfig) -> str:
    """What is wrong with the feature whose exposures are counted; empty if nothing is."""
    if config.impressions.exposure is None:
        return ""
    name, key = config.impressions.exposure.feature, "impressions.exposure.feature"
    counted = {one.name: one.multi for one in config.all_features if one.side != "history"}
    if name not in counted:
        return f"{key} = {name!r} is no feature of candidates; they have {', '.join(counted)}"
    return (
        f"{key} = {name!r} has several values in a candidate; count a feature with one"
        if counted[name]
        else ""
    )
