"""Tables as they live: rows that nothing updates, norms by frequency, hot rows, and how stale ids are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from embeddings.errors import TandemError
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Bars, Cell, Figure, Finding, Line, Lines, Section, Table
from pipelines.analyze.runs import AnalysedRun, NamedTable
from pipelines.analyze.table_ids import IdsOfTable, ids_of, names_of
from trainer.analysis.table_life import (
    AGES,
    NormBand,
    hottest,
    median_age,
    middle_and_high,
    norms_by_count,
    row_norms,
    share_of_top,
    staleness,
    updated_rows,
)

_INTRODUCTION = (
    "Which rows of each table training has reached, how long their vectors are, which ids are hot, and when "
    "ids were seen last. A row is dead if the optimizer's state of it is zero: no gradient has ever reached "
    "it, so that it holds its first random weights. Of several seeds of a config the first is analysed."
)
# So large a part of dead rows is worth a sentence, of tables of so many rows.
_MANY_DEAD, _ROWS = 0.5, 1000
_HOTTEST = 5
_FLOAT = 4
_AGE_NAMES = ("same day", "1 to 6 days", "7 to 29 days", "30 to 89 days", "90 to 364 days", "a year or more")


@dataclass(frozen=True)
class TableLife:
    """What is known of one table of a run.

    Attributes:
        dead: rows that were never updated, -1 where the optimizer keeps no state.
        owned: rows that stand for an id; median, high: of their norms, high is the 99th percentile.
        seen: owned rows whose id was seen; top: share of the look-ups of the most frequent 1 % of them.
        age: median days since they were seen; ages: how many by days, see `AGES`.
        bands: norms by look-ups; hot: cells of the most frequent rows.
        read: the share of the training split that was counted, 0 = look-ups are not known; counted: what a
            look-up is, in words.
    """

    run: AnalysedRun
    table: NamedTable
    dead: int
    owned: int
    median: float
    high: float
    seen: int = 0
    top: float = math.nan
    age: float = math.nan
    ages: tuple[int, ...] = (0,) * len(AGES)
    bands: tuple[NormBand, ...] = ()
    hot: tuple[tuple[Cell, ...], ...] = ()
    read: float = 0.0
    counted: str = ""

    @property
    def rows(self) -> int:
        return self.table.spec.rows


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """How the tables of all configs live."""
    firsts = list({run.label: run for run in reversed(runs)}.values())[::-1]
    # Tables that are looked up by the same ids follow each other: these are counted once.
    wanted = [(run, table) for run in firsts for table in run.tables()]
    places = sorted(range(len(wanted)), key=lambda place: _key(*wanted[place]))
    lives, skipped, before, ids = dict[int, TableLife](), list[str](), None, None
    for place in places:
        run, table = wanted[place]
        if _key(run, table) != before:
            before = _key(run, table)
            try:
                ids = ids_of(run, table)
            except TandemError as error:
                ids = None
                skipped.append(f"look-ups of {table.spec.key} ({run.name}): {error}")
        lives[place] = _life(run, table, ids)
    return _section([lives[place] for place in range(len(wanted))], skipped)


def _key(run: AnalysedRun, table: NamedTable) -> tuple[str, str, str, int]:
    """What decides what the rows of a table stand for, and how often they were looked up."""
    living = str(run.checkpoint) if table.spec.key in run.id_maps else ""
    return str(run.config.data.log), table.spec.key, living, table.spec.rows


def _life(run: AnalysedRun, table: NamedTable, ids: IdsOfTable | None) -> TableLife:
    norms, updated = row_norms(run.tensors, table.tensor), updated_rows(run.tensors, table.tensor)
    dead = -1 if updated is None else int((~updated).sum())
    if ids is None:
        return TableLife(run, table, dead, norms.size, *middle_and_high(norms))
    seen = ids.seen & ids.owned
    last, total, top = ids.last[seen], int(ids.count.sum()), hottest(ids.count, _HOTTEST)
    hot = tuple(
        (run.label, table.name, name, int(ids.count[row]), int(ids.count[row]) / total, float(norms[row]))
        for name, row in zip(names_of(run, table.spec.feature, ids, top), top.tolist(), strict=True)
    )
    return TableLife(
        run,
        table,
        dead,
        int(ids.owned.sum()),
        *middle_and_high(norms[ids.owned]),
        seen=last.size,
        top=share_of_top(ids.count),
        age=median_age(last, ids.now),
        ages=tuple(staleness(last, ids.now).tolist()),
        bands=tuple(norms_by_count(norms[ids.owned], ids.count[ids.owned])),
        hot=hot,
        read=ids.read,
        counted=ids.counted,
    )


def _section(lives: Sequence[TableLife], skipped: list[str]) -> Section:
    stateless = sorted({f"{life.table.group} ({life.run.label})" for life in lives if life.dead < 0})
    if stateless:
        skipped.append(
            f"dead rows of {', '.join(stateless)}: their optimizer keeps no state; one that does (adagrad, "
            "rowwise_adagrad) tells them"
        )
    partial = {f"{life.table.spec.key}: {life.read:.1%}" for life in lives if 0 < life.read < 1}
    if partial:
        skipped.append(
            "ids that were never seen: look-ups were counted in a part of the training split's row groups "
            f"only ({', '.join(sorted(partial))}), since it is larger than a report reads"
        )
    figures: list[Figure | Table] = [_whole(lives)]
    figures += [*_dead(lives), *_norms(lives), *_traffic(lives), *_stale(lives), *_hot(lives)]
    findings = tuple(finding for life in lives for finding in _findings(life))
    return Section("tables", "Tables as they live", _INTRODUCTION, tuple(figures), findings, tuple(skipped))


def _whole(lives: Sequence[TableLife]) -> Table:
    columns = (
        *("config", "table", "rows", "width", "MB", "never updated", "share never updated"),
        *("rows with an id", "ids seen", "share never seen", "look-ups of the top 1 %"),
        *("median norm", "norm, 99th percentile", "median days since seen"),
    )
    rows = []
    for life in lives:
        spec, whole = life.table.spec, life.read == 1
        dead = (life.dead, life.dead / life.rows) if life.dead >= 0 else (None, None)
        never = 1 - life.seen / life.owned if whole and life.owned else None
        ids = (life.owned, life.seen if life.read else None, never, life.top)
        size = (life.rows, spec.dim, life.rows * spec.dim * _FLOAT / 1e6)
        rows.append((life.run.label, life.table.name, *size, *dead, *ids, life.median, life.high, life.age))
    counted = sorted({life.counted for life in lives if life.counted})
    caption = (
        "A row for each table: GROUP / FEATURE, with the set between where there are several. MB are those "
        "of 32-bit weights without the optimizer's state. Norms are Euclidean, of rows with an id. Shares "
        f"are fractions of 1. What is counted: {' or '.join(counted) or 'nothing'}; a behavior counts once "
        "for each row of the log, candidates and features of requests once each. The look-ups of the top 1 % "
        "are the share that goes to the most frequent 1 % of the seen ids. Days are of the log's own time, "
        "back from its newest request."
    )
    return Table("tables_rows", "All tables", caption, columns, tuple(rows))


def _bars(
    lives: Sequence[TableLife], title: str, y_label: str, value: Callable[[TableLife], float]
) -> Bars | None:
    """One bar a table and config; None where no table has a value."""
    names = tuple(dict.fromkeys(life.table.name for life in lives))
    bars = {
        label: [
            next(
                (value(each) for each in lives if (each.run.label, each.table.name) == (label, name)),
                math.nan,
            )
            for name in names
        ]
        for label in dict.fromkeys(life.run.label for life in lives)
    }
    known = any(not math.isnan(each) for own in bars.values() for each in own)
    return Bars(title, y_label, names, bars) if known else None


def _dead(lives: Sequence[TableLife]) -> Iterator[Figure]:
    def dead(life: TableLife) -> float:
        return life.dead / life.rows if life.dead >= 0 else math.nan

    def unseen(life: TableLife) -> float:
        return 1 - life.seen / life.owned if life.read == 1 and life.owned else math.nan

    charts = (
        _bars(lives, "rows never updated", "share of all rows", dead),
        _bars(lives, "ids never seen in training", "share of rows with an id", unseen),
    )
    if there := tuple(chart for chart in charts if chart is not None):
        caption = (
            "Left: rows whose optimizer state is zero. Right: rows whose id the training split never holds. "
            "The first may be larger: gradients reach candidates and those behaviors that a search kept, and "
            "a run may have ended before it had read the whole split. Such rows cost memory and answer at "
            "random."
        )
        yield Figure("tables_dead", "Rows that nothing reached", caption, there)


def _norms(lives: Sequence[TableLife]) -> Iterator[Figure]:
    """Norms by look-ups: a figure a group, a chart a feature, a line a config and set."""
    for number, group in enumerate(dict.fromkeys(life.table.group for life in lives), start=1):
        own = [life for life in lives if life.table.group == group and life.bands]
        charts = []
        for feature in dict.fromkeys(life.table.spec.feature for life in own):
            of_feature = [life for life in own if life.table.spec.feature == feature]
            lines = tuple(map(_norm_line, of_feature))
            charts.append(Lines(feature, "look-ups", "norm", lines, log_x=True))
        if charts:
            caption = (
                "The median Euclidean norm of rows by how often their id was looked up, from the 10th to the "
                "90th percentile; rows without a look-up are drawn at 0.5. First weights are short; rows "
                "that grow with their frequency have learned, those without a look-up show where all began."
            )
            yield Figure(f"tables_norms_{number}", f"Norms by frequency: {group}", caption, tuple(charts))


def _norm_line(life: TableLife) -> Line:
    name = f"{life.run.label}, {life.table.spec.set}" if life.table.spec.set else life.run.label
    x = [
        0.5 if not band.low else math.sqrt(band.low * ((band.high or 2 * band.low) - 1))
        for band in life.bands
    ]
    y, low, high = ([getattr(band, part) for band in life.bands] for part in ("median", "tenth", "ninetieth"))
    return Line(name, x, y, low, high)


def _traffic(lives: Sequence[TableLife]) -> Iterator[Figure]:
    if chart := _bars(lives, "look-ups of the top 1 %", "share of all look-ups", lambda life: life.top):
        caption = (
            "The share of all look-ups that goes to the most frequent 1 % of the ids that were seen. Where "
            "it is large, few rows are learned well, and a cache of them saves most of the traffic."
        )
        yield Figure("tables_traffic", "How uneven look-ups are", caption, (chart,))


def _stale(lives: Sequence[TableLife]) -> Iterator[Figure]:
    """Seen ids by the days since, of each feature once."""
    bars: dict[str, list[float]] = {}
    several = len({str(life.run.config.data.log) for life in lives}) > 1
    for life in lives:
        name = f"{life.table.spec.key} ({life.run.label})" if several else life.table.spec.key
        if life.seen and name not in bars:
            bars[name] = [number / life.seen for number in life.ages]
    if bars:
        chart = Bars("days since an id was seen last", "share of seen ids", _AGE_NAMES, bars)
        caption = (
            "Ids by the days between their last sighting and the newest request of training, in the log's "
            "own time. Vectors of ids that were not seen for long describe the world as it was then; for ids "
            "that come and go, `ttl` of [ids.FEATURE] frees their rows."
        )
        yield Figure("tables_staleness", "Staleness", caption, (chart,))


def _hot(lives: Sequence[TableLife]) -> Iterator[Table]:
    rows = tuple(row for life in lives for row in life.hot)
    if rows:
        columns = ("config", "table", "id", "look-ups", "share of all", "norm")
        caption = (
            "The most frequent ids of each table, called by the log's vocabulary where it has one; `unknown` "
            "is id 0. One that takes a large share is often a default value of the source."
        )
        yield Table("tables_hottest", "Hottest rows", caption, columns, rows)


def _findings(life: TableLife) -> Iterator[Finding]:
    if life.dead > _MANY_DEAD * life.rows and life.rows >= _ROWS:
        megabytes = life.dead * life.table.spec.dim * _FLOAT / 1e6
        text = (
            f"{life.dead:,} of {life.rows:,} rows of {life.table.name} ({life.run.label}) were never "
            f"updated: {megabytes:,.1f} MB of first weights"
        )
        yield Finding("notice", text, "tables_dead")
