"""Collapse: how many of its dimensions a table uses, beside a random table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Bars, Figure, Finding, Line, Lines, Section, Table
from pipelines.analyze.runs import AnalysedRun, NamedTable
from trainer.analysis.spectra import TableSpectrum, random_seed, table_spectrum

# A table has collapsed where both measures, beyond the one dimension that every table has, are below these
# shares of the random table's. Trained tables of the demo and of planted logs have 0.3 to 1.0 and 0.6 to 1.0.
_LEAST_ABUNDANCE, _LEAST_RANK_ME = 0.2, 0.4
# A table of fewer rows than this share of its dimensions is a case of its own.
_FEW = 0.5
# Features whose spectra are drawn; the others are in the table.
_DRAWN = 9
_RANDOM = "random table"
_INTRODUCTION = (
    "A table of many dimensions may use only a few of them: its vectors then lie near a plane, and a wider "
    "table would not help. This section counts the dimensions that each table uses. Two things take them "
    "away: a feature with fewer ids than dimensions, and a product with the vectors of such a feature, which "
    "pulls the others into the same few directions (Guo et al., On the Embedding Collapse When Scaling Up "
    "Recommendation Models, 2024)."
)
_MEASURES = (
    "Information abundance is the sum of the singular values by the largest one; RankMe is exp of the "
    "entropy of the singular values by their sum. Both are measured on the rows that ever had a gradient, "
    "exactly, in double precision, and both are divided by the dimensions of the table."
)


@dataclass(frozen=True)
class _Measured:
    """One table of one run."""

    run: AnalysedRun
    table: NamedTable
    found: TableSpectrum

    @property
    def line(self) -> str:
        """What the table is called beside others of its feature."""
        return f"{self.run.label}: {_place(self.table)}"


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """The spectra of all tables of all runs, read band by band."""
    measured = [_measure(run, table, options) for run in runs for table in run.tables()]
    trained = [each for each in measured if each.found.trained.rows]
    findings = [*_broken(measured), *_few_ids(trained), *_collapsed(trained)]
    figures: tuple[Figure | Table, ...] = (_abundance(trained), *_spectra(trained), _numbers(measured))
    skipped = tuple(dict.fromkeys(_skipped(measured)))
    return Section("collapse", "Collapse", _INTRODUCTION, figures, tuple(findings), skipped)


def _measure(run: AnalysedRun, table: NamedTable, options: AnalyzeOptions) -> _Measured:
    bands = ((rows, updated) for _, rows, updated in run.bands(table))
    seed = random_seed(run.seed if options.seed is None else options.seed, table.tensor)
    first = run.groups[table.group].first
    return _Measured(run, table, table_spectrum(bands, table.spec.dim, first, seed))


def _broken(measured: Sequence[_Measured]) -> Iterator[Finding]:
    for each in measured:
        if each.found.broken:
            what = f"{each.found.broken:,} rows of {each.table.name} hold NaN or infinity ({each.run.name})"
            yield Finding("alarm", f"{what}: go back to an earlier checkpoint.", "collapse-tables")


def _few_ids(trained: Sequence[_Measured]) -> Iterator[Finding]:
    """One finding a feature, however many tables it has."""
    few: dict[str, list[_Measured]] = {}
    for each in trained:
        if each.found.trained.rows < each.table.spec.dim:
            few.setdefault(each.table.spec.feature, []).append(each)
    for feature, several in few.items():
        tables = {each.table.name: each for each in several}
        rows = sorted({each.found.trained.rows for each in several})
        counts = " or ".join(f"{count:,}" for count in rows)
        ids = "id that was" if rows[-1] == 1 else "ids that were"
        span = ", ".join(f"{name} has {each.table.spec.dim} dimensions" for name, each in tables.items())
        text = f"{feature} has only {counts} {ids} trained, so its vectors span no more dimensions: {span}."
        wide = any(each.found.trained.rows < _FEW * each.table.spec.dim for each in several)
        if wide:
            text += (
                " Whatever the model multiplies with them is pulled into as few. Give the feature a narrower"
                " group of its own, or the group several sets (groups.GROUP.sets)."
            )
        yield Finding("alarm" if wide else "notice", text, "collapse-abundance")


def _collapsed(trained: Sequence[_Measured]) -> Iterator[Finding]:
    for each in trained:
        found = each.found
        if found.trained.rows < each.table.spec.dim:
            continue
        beyond = (
            _beyond_one(found.trained.abundance, found.random.abundance),
            _beyond_one(found.trained.rank_me, found.random.rank_me),
        )
        if beyond[0] < _LEAST_ABUNDANCE and beyond[1] < _LEAST_RANK_ME:
            text = (
                f"{each.table.name} of {each.run.name} has collapsed: {found.trained.rows:,} trained rows "
                f"of {found.trained.dim} dimensions have an information abundance of "
                f"{found.trained.abundance:.1f}, a random table of this shape {found.random.abundance:.1f}; "
            )
            share = found.trained.largest_share
            # A table of zeros has no direction.
            zero = math.isnan(share)
            text += "all of them are zero." if zero else f"one direction holds {share:.0%} of all."
            yield Finding("alarm", text, "collapse-abundance")


def _beyond_one(value: float, of: float) -> float:
    """The share of dimensions but the first; NaN where a random table has no other."""
    return (value - 1) / (of - 1) if of > 1 else float("nan")


def _skipped(measured: Sequence[_Measured]) -> Iterator[str]:
    for each in measured:
        if each.found.broken and not each.found.whole.rows:
            yield (
                f"{each.table.name} of {each.run.name} is not drawn: all of its rows hold NaN or infinity. "
                "An earlier checkpoint may be whole."
            )
        elif not each.found.trained.rows:
            yield (
                f"{each.table.name} of {each.run.name} is not drawn: none of its rows ever had a gradient. "
                "It would be measured once a part of the model that is trained reads it."
            )
        elif not each.found.tells:
            yield (
                f"{each.table.name} of {each.run.name} is measured with all its rows: its optimizer keeps no "
                "state that tells which of them ever had a gradient."
            )


def _abundance(trained: Sequence[_Measured]) -> Figure:
    """Both measures of every table, beside the random table."""
    names = [*dict.fromkeys(each.table.name for each in trained)]
    labels = [*dict.fromkeys(each.run.label for each in trained)]

    def chart(title: str, measure: str) -> Bars:
        def of(table: str, label: str, which: str) -> list[float]:
            return [
                getattr(getattr(each.found, which), measure) / each.table.spec.dim
                for each in trained
                if each.table.name == table and label in (each.run.label, "")
            ]

        values = {label: [of(name, label, "trained") for name in names] for label in labels}
        values[_RANDOM] = [of(name, "", "random") for name in names]
        low, high = ({k: [_or_nan(end, v) for v in each] for k, each in values.items()} for end in (min, max))
        means = {k: [_or_nan(np.mean, v) for v in each] for k, each in values.items()}
        several = len({each.run.name for each in trained}) > len(labels)
        return Bars(title, "share of the dimensions", tuple(names), means, *((low, high) if several else ()))

    return Figure(
        "collapse-abundance",
        "The dimensions that each table uses",
        f"{_MEASURES} 1 means that all dimensions are used alike. The random table has as many rows as were "
        "trained, with the distribution of the first weights: no more can be expected. A bar near it is "
        "healthy, half of it is common after training, and a tenth of it is a collapse. Of several seeds of "
        "a config the mean is drawn, with the lowest and the highest.",
        (chart("Information abundance", "abundance"), chart("RankMe", "rank_me")),
        references=(_RANDOM,),
    )


def _or_nan(measure: object, values: Sequence[float]) -> float:
    return float(measure(values)) if values and callable(measure) else float("nan")


def _spectra(trained: Sequence[_Measured]) -> Iterator[Figure]:
    """A chart a feature, those with the lowest share of abundance first."""
    worst: dict[str, float] = {}
    for each in trained:
        feature = each.table.spec.feature
        worst[feature] = min(worst.get(feature, np.inf), each.found.abundance_share)
    drawn = sorted(worst, key=lambda feature: worst[feature])[:_DRAWN]
    if not drawn:
        return
    left = f" The {_DRAWN} features with the lowest abundance are drawn." if len(worst) > _DRAWN else ""
    yield Figure(
        "collapse-spectra",
        "Singular spectra",
        "The singular values of each table, from the largest to the smallest, by the largest. A line that "
        "stays high uses all its dimensions; one that falls at once uses few of them; one that ends has "
        "fewer ids than dimensions. The dashed line is a random table of as many rows." + left,
        tuple(_chart(feature, [e for e in trained if e.table.spec.feature == feature]) for feature in drawn),
        references=(_RANDOM,),
    )


def _chart(feature: str, several: Sequence[_Measured]) -> Lines:
    by_line: dict[str, list[_Measured]] = {}
    for each in several:
        by_line.setdefault(each.line, []).append(each)
    lines = [_line(name, [each.found.trained.by_largest for each in own]) for name, own in by_line.items()]
    widest = max(several, key=lambda each: each.table.spec.dim)
    values = widest.found.random.by_largest
    lines.append(Line(_RANDOM, np.arange(1, len(values) + 1), values, dashed=True))
    return Lines(feature, "number of the singular value", "share of the largest", tuple(lines))


def _line(name: str, spectra: Sequence[np.ndarray]) -> Line:
    """The mean over seeds, with the lowest and the highest; as long as the shortest of them."""
    length = min(map(len, spectra))
    values = np.stack([each[:length] for each in spectra])
    band = (values.min(0), values.max(0)) if len(spectra) > 1 else (None, None)
    return Line(name, np.arange(1, length + 1), values.mean(0), *band)


def _numbers(measured: Sequence[_Measured]) -> Table:
    columns = (
        *("run", "table", "rows", "trained", "dimensions"),
        *(
            "abundance",
            "of random",
            "share",
            "RankMe",
            "RankMe of random",
            "RankMe share",
            "largest direction",
        ),
    )
    rows = tuple(
        (
            *(each.run.name, each.table.name, found.whole.rows, found.trained.rows, found.trained.dim),
            *(found.trained.abundance, found.random.abundance, found.abundance_share),
            *(found.trained.rank_me, found.random.rank_me, found.rank_me_share, found.trained.largest_share),
        )
        for each in measured
        for found in (each.found,)
    )
    return Table(
        "collapse-tables",
        "Every table",
        "Rows of the table, those that ever had a gradient, and both measures of these, in dimensions. Share "
        "is the part of the random table's. Largest direction is its part of the sum of squares: near 1, the "
        "vectors differ in their length alone.",
        columns,
        rows,
    )


def _place(table: NamedTable) -> str:
    """Its group, and its set where there are several."""
    return " / ".join(part for part in (table.group, table.spec.set) if part)
