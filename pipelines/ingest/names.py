"""What the raw tables must have in common, and the numbers of users and requests whose names are text.

A log stores users and requests as integers. Where the raw tables name them with text, they are numbered in
the order of their names, and the log keeps the names in `vocab/`, as it keeps the values of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.events import EVENTS, IMPRESSIONS
from pipelines.ingest.sources import Survey
from pipelines.ingest.vocabulary import OlderVocabulary, build, write
from trainer.log.schema import FeatureInfo

NAMES = ("user_id", "request_id")
NUMBERED = _EVENTS, _SHOWN = ("numbered_events", "numbered_impressions")


def agree(
    tables: Mapping[str, ir.Table], older: Mapping[str, OlderVocabulary], survey: Survey
) -> dict[str, ir.Table]:
    """The tables with columns of one type: where one holds text, integers of CSV are text as well.

    Such a column was read as integers because each of its cells is the plain spelling of one, so that nothing
    is lost. An older log's text is text too.

    Args:
        tables: by the names under which the engine keeps them.
    """
    given = dict(tables)
    loose = {name: survey.loose.get(name, set()) for name in given}
    loose[EVENTS] = loose[EVENTS] | survey.loose.get("trajectories", set())
    for column in dict.fromkeys(name for table in given.values() for name in table.columns):
        having = [name for name, table in given.items() if column in table.columns]
        old = older.get(column)
        text = old is not None and old.rows > 1 and old.table["value"].type().is_string()
        text = text or any(given[name][column].type().is_string() for name in having)
        if column == "timestamp" or not text:
            continue
        for name in having:
            if column in loose[name] and given[name][column].type().is_integer():
                given[name] = given[name].mutate(**{column: given[name][column].cast("string")})
                survey.notes.append(
                    f"{column} of the {name.removeprefix('raw_')} is text, as it is elsewhere"
                )
    return given


def with_numbers(
    engine: Engine,
    tables: Mapping[str, ir.Table],
    older: Mapping[str, OlderVocabulary],
    root: Path,
    source: str | None,
    config: IngestConfig,
) -> tuple[dict[str, ir.Table], dict[str, FeatureInfo]]:
    """The tables with integers for users and requests, and what the manifest says of their names.

    With an older log known names keep their numbers, and new ones follow: a user is never unknown. A user of
    the table of users who has no event and no impression gets no number, but null.

    Raises:
        DataError: one table has integers where the other, or the older log, has text.
    """
    given = dict(tables)
    events = given[EVENTS]
    if not config.request_protocol.reads_request_ids and events.request_id.type().is_string():
        # Nothing reads these: a request is an impression, an event or a second.
        asked = ibis.ifelse(events.request_id.notnull(), events.timestamp, ibis.null("int64"))
        given[EVENTS] = events.mutate(request_id=asked)
    infos: dict[str, FeatureInfo] = {}
    for name in NAMES:
        having = {key for key, table in given.items() if name in table.columns}
        text = {key for key in having if given[key][name].type().is_string()}
        old = older.get(name)
        if name == "user_id" and text and text != having:
            some, other = (min(keys).removeprefix("raw_") for keys in (text, having - text))
            problem = f"text in the {some} and integers in the {other}; name the user column in text_columns"
            raise DataError(problem, file=source, column=name)
        if old is not None and not text and old.rows > 1:
            problem = "the older log's are text, the raw tables' are integers"
            raise DataError(f"{problem}; name the column in text_columns", file=old.file, column="value")
        if not text:
            continue
        sources = [given[key] for key in (EVENTS, IMPRESSIONS) if key in text]
        vocabulary = build(engine, name, sources, old)
        infos[name] = write(engine, name, vocabulary, root)
        words = vocabulary.words.select(_word=vocabulary.words["value"], _code=vocabulary.words["id"])
        for key in text:
            joined = given[key].left_join(words, given[key][name] == words["_word"])
            given[key] = joined.mutate(**{name: joined["_code"]}).select(*given[key].columns)
    if infos:
        kept = {EVENTS: _EVENTS, IMPRESSIONS: _SHOWN}
        given |= {key: engine.keep(name, given[key]) for key, name in kept.items() if key in given}
    return given, infos
