"""How often a user was shown the same thing before, and what a further showing without success weighs.

A user who saw the same ad ten times without a click gives ten negatives, which say little more of the user's
interest than one. So a negative counts less, the more often the same thing was shown before it ("repeated
exposure weights" of Ads Recommendation in a Collapsed and Entangled World, arXiv 2403.00793, which gives the
name and the purpose; the rule is ours).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import ibis
from ibis.expr import types as ir

from embeddings.errors import ConfigError
from pipelines.ingest.engine import Engine
from pipelines.ingest.exposure_config import ExposureConfig
from pipelines.ingest.protocols.protocol import REQUEST
from pipelines.ingest.sections import ImpressionsConfig

EXPOSURES = "_exposures"
"""The column of n. No feature has a name that begins so."""
# The first numbers of the bins in which the report counts n.
_BINS = (0, 1, 2, 3, 5, 10, 20, 50)


def check_feature(settings: ImpressionsConfig, shown: ir.Table, items: ir.Table | None) -> None:
    """Refuses a feature of which neither the impressions nor the item table says anything.

    What only the events say of items is no fact of an impression: it would be the item's value of another
    time.

    Raises:
        ConfigError: neither table has the feature.
    """
    if settings.exposure is None:
        return
    name = settings.exposure.feature
    if name not in shown.columns and (items is None or name not in items.columns):
        raise ConfigError(
            f"impressions.exposure.feature = {name!r}: neither the impressions nor the item table has this "
            "column; add it to one of them, or count another feature"
        )


def with_exposures(
    shown: ir.Table, asked: ir.Table, items: ir.Table | None, settings: ExposureConfig
) -> ir.Table:
    """The impressions of some requests with n, the column `EXPOSURES`.

    The number of a user's impressions of a value before a second is a running sum over the seconds in which
    something was shown or is asked, and those within a window are the difference of two such sums.

    Args:
        shown: all impressions of some users, with the second of each; asked: requests of these users, with
            the second of each; items: the item table.
    """
    columns, shown = shown.columns, _with_value(shown, items, settings.feature)
    times = asked.select(*REQUEST, _asked="timestamp")
    offered = shown.inner_join(times, REQUEST)
    offered = offered.mutate(_begin=offered["_asked"] - settings.window)
    none, one = (ibis.literal(number).cast("int64") for number in (0, 1))
    seen = shown.semi_join(asked.select("user_id"), "user_id")
    marks = [seen.select("user_id", "_value", _at="timestamp", _shown=one)]
    edges = ["_asked", *(["_begin"] if settings.window else [])]
    marks += [offered.select("user_id", "_value", _at=edge, _shown=none) for edge in edges]
    marked = ibis.union(*marks)
    pair = ["user_id", "_value"]
    seconds = marked.group_by([*pair, "_at"]).aggregate(_shown=marked["_shown"].sum().cast("int64"))
    so_far = seconds["_shown"].cumsum(group_by=pair, order_by="_at").cast("int64")
    before = seconds.select(*pair, "_at", _before=so_far - seconds["_shown"])
    for edge in edges:
        known = before.rename({edge: "_at", f"_before{edge}": "_before"})
        offered = offered.inner_join(known, [*pair, edge])
    count = offered["_before_asked"] - (offered["_before_begin"] if settings.window else none)
    # Id 0 is no value, but of items: an item may have the raw id 0, and none is without an id.
    nothing = (offered["_value"] == 0) if settings.feature != "item_id" else ibis.literal(False)
    return offered.select(*columns, **{EXPOSURES: ibis.ifelse(nothing, none, count).cast("int64")})


def _with_value(shown: ir.Table, items: ir.Table | None, feature: str) -> ir.Table:
    """Adds `_value`, the id of the feature; 0 where there is none."""
    if feature in shown.columns:
        return shown.mutate(_value=shown[feature])
    assert items is not None  # see `check_feature`
    theirs = items.select(_item="item_id", _value=feature)
    joined = shown.left_join(theirs, shown.item_id == theirs["_item"])
    return joined.select(*shown.columns, _value=joined["_value"].fill_null(0))


def weighted(candidates: ir.Table, labels: Iterable[str], settings: ExposureConfig | None) -> ir.Table:
    """The candidates with a weight for every label, and without n.

    A label's own weight, or 1, is multiplied by what n makes of it where the label is negative. A label that
    was not observed keeps its weight, which nobody reads.
    """
    if settings is None:
        return candidates
    factor = _factor(candidates[EXPOSURES], settings)
    weights = {}
    for task in labels:
        given = _given(candidates, f"weight_{task}")
        negative = candidates[f"label_{task}"] < 0.5
        weights[f"weight_{task}"] = ibis.ifelse(negative, given * factor, given).cast("float32")
    return candidates.mutate(**weights).drop(EXPOSURES)


def _factor(exposures: ir.Value, settings: ExposureConfig) -> ir.Value:
    """`ExposureConfig.factor`, of a column: the same operations on the same 64-bit numbers."""
    if settings.rule == "hyperbolic":
        return _exact(1.0) / (_exact(1.0) + _exact(settings.rate) * exposures.cast("float64"))
    *firsts, last = map(_exact, settings.weights)
    each = [(exposures == n, weight) for n, weight in enumerate(firsts)]
    return ibis.cases(*each, else_=last) if each else last


def _exact(number: float) -> ir.Value:
    """A 64-bit number: written with digits and a point it would be a decimal, which engines round apart."""
    return ibis.literal(repr(number)).cast("float64")


def _given(candidates: ir.Table, name: str) -> ir.Value:
    return candidates[name].cast("float64") if name in candidates.columns else _exact(1.0)


class ExposureCounts:
    """What the report says of exposures, from the candidates of one round after the other."""

    def __init__(self, labels: Iterable[str], settings: ExposureConfig | None) -> None:
        self._labels, self._settings = tuple(labels), settings
        self._candidates: Counter[int] = Counter()
        # (split, task) -> the sum of weights, before and after.
        self._sums: dict[tuple[str, str], tuple[float, float]] = {}

    def add(self, engine: Engine, candidates: ir.Table, asked: ir.Table) -> None:
        """Counts candidates with n and the weights that were given; `asked`: their requests, with splits."""
        if self._settings is None:
            return
        rows = candidates.inner_join(asked.select(*REQUEST, "split"), REQUEST)
        weight, sums = _given(rows, "weight"), {}
        for task in self._labels:
            label, own = rows[f"label_{task}"], weight * _given(rows, f"weight_{task}")
            # A weight that all candidates have is no column, and has no sum of its own.
            sums[f"_negative_{task}"] = ibis.ifelse(label < 0.5, own, _exact(0.0)).sum()
            sums[f"_positive_{task}"] = ibis.ifelse(label >= 0.5, own, _exact(0.0)).sum()
        grouped = rows.group_by(["split", EXPOSURES]).aggregate(_rows=rows.count(), **sums)
        found = sorted(engine.rows(grouped), key=lambda row: (row["split"], row[EXPOSURES]))
        for row in found:
            self._candidates[int(row[EXPOSURES])] += int(row["_rows"])
            factor = self._settings.factor(int(row[EXPOSURES]))
            for task in self._labels:
                negative, positive = (float(row[f"_{sign}_{task}"] or 0) for sign in ("negative", "positive"))
                before, after = self._sums.get((row["split"], task), (0.0, 0.0))
                self._sums[row["split"], task] = (
                    before + negative + positive,
                    after + factor * negative + positive,
                )

    def report(self) -> dict[str, Any]:
        """`histogram`: n, in bins -> candidates. `weights`: split -> label -> sums `before` and `after`.

        Empty without an exposure rule. Sums are rounded to 0.001: engines add in different orders.
        """
        if self._settings is None:
            return {}
        weights: dict[str, dict[str, dict[str, float]]] = {}
        for (split, task), (before, after) in sorted(self._sums.items()):
            weights.setdefault(split, {})[task] = {"before": round(before, 3), "after": round(after, 3)}
        return {"histogram": _histogram(self._candidates), "weights": weights}


def _histogram(candidates: Mapping[int, int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for place, first in enumerate(_BINS):
        end = _BINS[place + 1] if place + 1 < len(_BINS) else None
        name = f"{first} or more" if end is None else str(first) if end == first + 1 else f"{first}-{end - 1}"
        counts[name] = sum(
            count for n, count in candidates.items() if n >= first and (end is None or n < end)
        )
    return {name: count for name, count in counts.items() if count}


def exposure_lines(report: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What an ingest with an exposure rule says of it.

    Args:
        report: of `ExposureCounts.report`; settings: the section `[impressions.exposure]`.
    """
    if not report:
        return []
    within = f" within {settings['window_days']:,} days" if settings["window_days"] else ""
    told = ", ".join(f"{n}: {count:,}" for n, count in report["histogram"].items())
    lines = [f"earlier exposures of {settings['feature']} to the user{within}: candidates: {told}"]
    for split, tasks in report["weights"].items():
        lines += [
            f"label {task}, {split}: weights add up to {sums['after']:,.1f}, without exposures to"
            f" {sums['before']:,.1f}"
            for task, sums in tasks.items()
        ]
    return lines
