"""The requests of a protocol, as Ibis tables of any engine: some are chosen by history and get candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import ibis
from ibis.expr import types as ir

from pipelines.ingest.attributes import Attributes, item_attributes, with_attributes
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.encode import no_ids
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.exposure import ExposureCounts, weighted
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.negatives import past_events
from pipelines.ingest.protocols.protocol import REQUEST, Past, Tables
from pipelines.ingest.rows import draw_rounds
from pipelines.ingest.sections import ContextConfig


@dataclass(frozen=True)
class Requests:
    """The requests of a log.

    Attributes:
        every: all that the protocol makes; eligible: those with enough history, and not too many of a user.
        offers: the eligible ones with their candidates.
        attributes: what the events say of the candidates' items.
        new_positives: split -> positives whose item no earlier event has.
        exposures: how often users were shown before what they are offered.
    """

    every: ir.Table
    eligible: ir.Table
    offers: ir.Table
    attributes: Attributes
    new_positives: Mapping[str, int]
    exposures: ExposureCounts


def make_requests(
    engine: Engine, tables: Tables, events: int, buckets: int, config: IngestConfig
) -> Requests:
    """Makes the requests and what they offer, for some users at a time.

    Args:
        events: how many there are; buckets: of users, into which the tables are cut.
    """
    protocol = config.request_protocol
    attributes = item_attributes(engine, tables, config, buckets)
    if protocol.draws_negatives:
        past = {
            name: engine.keep(f"past_{name}", table)
            for name, table in vars(past_events(tables.events, config.requests.popularity_days)).items()
        }
        tables = replace(tables, past=Past(**past))
    users = None
    if config.users:
        users = engine.keep("users", trial_users(protocol.requests(tables, config), config))
    for bucket in range(buckets):
        part = tables.of_buckets(bucket, bucket + 1)
        timed = timed_requests(part, protocol.requests(part, config), users, config)
        every = engine.append("requests", timed.mutate(bucket=ibis.literal(bucket).cast("int64")))
        eligible = engine.append("asked", eligible_requests(every.filter(every.bucket == bucket), config))
    exposures = ExposureCounts(config.labels, config.exposure)
    rounds, new = draw_rounds(count_rows(engine, eligible), events, buckets, config), Counter[str]()
    for round_ in range(rounds):
        first, end = (buckets * edge // rounds for edge in (round_, round_ + 1))
        some = eligible.filter((eligible.bucket >= first) & (eligible.bucket < end))
        drawn = protocol.candidates(tables.of_buckets(first, end), some.drop("bucket"), config)
        candidates = engine.keep("candidates", drawn)
        if tables.past is not None:
            # Positives whose item no event before their request has.
            chosen = candidates.filter(candidates[f"label_{config.task}"] > 0).select(*REQUEST, "item_id")
            timed = chosen.inner_join(some.select(*REQUEST, "timestamp", "split"), REQUEST)
            timed = timed.inner_join(tables.past.items, "item_id")
            unseen = timed.filter(timed.since >= timed.timestamp)
            counts = engine.rows(unseen.group_by("split").aggregate(rows=unseen.count()))
            new.update({row["split"]: int(row["rows"]) for row in counts})
        exposures.add(engine, candidates, some)
        candidates = weighted(candidates, config.labels, config.exposure)
        full = with_attributes(engine, attributes, candidates, some, round_)
        offered = engine.append("offers", offers(some, full, config))
    for name in ("candidates", "past_events", "past_seconds"):
        engine.drop(name)
    return Requests(every, eligible, offered, attributes, new, exposures)


def trial_users(requests: ir.Table, config: IngestConfig) -> ir.Table:
    """user_id of the `config.users` users whose requests a trial log keeps."""
    users = requests.select("user_id").distinct()
    return users.order_by(digest(config.seed, "user", users.user_id)).limit(config.users)


def timed_requests(
    tables: Tables, requests: ir.Table, users: ir.Table | None, config: IngestConfig
) -> ir.Table:
    """Adds history_end, the number of the user's events strictly before the request, and the split.

    Context of the user comes from the newest event before the request; of several in that second the
    largest value counts.

    Args:
        users: those of `trial_users`; None: all.
    """
    events = tables.events
    if users is not None:
        requests = requests.semi_join(users, "user_id")
    asked = requests.select("user_id", "timestamp", events=ibis.literal(0).cast("int64"))
    happened = events.select("user_id", "timestamp", events=ibis.literal(1).cast("int64"))
    marks = ibis.union(happened.semi_join(asked, "user_id"), asked)
    seconds = marks.group_by(["user_id", "timestamp"]).aggregate(happened=marks.events.sum())
    so_far = seconds.happened.cumsum(group_by="user_id", order_by="timestamp")
    busy = (seconds.happened > 0).cast("int64")
    busy_so_far = busy.cumsum(group_by="user_id", order_by="timestamp")
    earlier = seconds.select(
        "user_id",
        "timestamp",
        history_end=(so_far - seconds.happened).cast("int64"),
        # The number of the last second before the request in which the user did something.
        seconds=(busy_so_far - busy).cast("int64"),
    )
    timed = requests.inner_join(earlier, ["user_id", "timestamp"])
    if context := config.context_of("events"):
        grouped = events.group_by(["user_id", "timestamp"])
        states = grouped.aggregate(**{name: events[name].max() for name in context})
        number = ibis.row_number().over(group_by="user_id", order_by=states.timestamp) + 1
        states = states.mutate(seconds=number.cast("int64")).drop("timestamp")
        joined = timed.left_join(states, ["user_id", "seconds"], rname="{name}_right")
        timed = joined.select(*timed.columns, **_known_or_nothing(joined, context))
    timed = timed.drop("seconds")
    if tables.users is not None:
        # A user whom the table of users lacks has no value.
        theirs = tables.users.rename(_user="user_id")
        joined = timed.left_join(theirs, timed.user_id == theirs["_user"])
        timed = joined.select(*timed.columns, **_known_or_nothing(joined, config.context_of("users")))
    if "split" in timed.columns:
        return timed
    if config.split is None:
        raise ValueError("a protocol without its own split needs the dates of one")
    split = ibis.cases(
        (timed.timestamp < config.split.validation_start, "train"),
        (timed.timestamp < config.split.test_start, "validation"),
        else_="test",
    )
    return timed.mutate(split=split)


def _known_or_nothing(joined: ir.Table, context: Mapping[str, ContextConfig]) -> dict[str, ir.Value]:
    """context_* with 0, or no ids at all, where there is no value."""
    return {
        name: ibis.coalesce(joined[name], no_ids()) if entry.multi else joined[name].fill_null(0)
        for name, entry in context.items()
    }


def eligible_requests(timed: ir.Table, config: IngestConfig) -> ir.Table:
    """The requests with enough history, at most `requests.per_user` of a user in a split."""
    asked = timed.filter(timed.history_end >= config.requests.min_history)
    if not config.requests.per_user:
        return asked
    order = [digest(config.seed, "request", asked.user_id, asked.request_id)]
    place = ibis.row_number().over(group_by=["user_id", "split"], order_by=order)
    asked = asked.mutate(place=place)
    return asked.filter(asked.place < config.requests.per_user).drop("place")


def offers(asked: ir.Table, candidates: ir.Table, config: IngestConfig) -> ir.Table:
    """The asked requests with `bucket`, `candidates` (a list of structs in seeded order) and their number.

    Args:
        candidates: user_id, request_id, item_id, label_*, and all that the log says of a candidate.
    """
    # Engines disagree whether a null comes first, so that equal items are told apart by having the label.
    lacks = {f"_lacks_{task}": f"label_{task}" for task, label in config.labels.items() if label.partial}
    # Without a shuffle a model could tell a positive by its place in the list.
    order = digest(config.seed, "candidate", candidates.user_id, candidates.request_id, candidates.item_id)
    names = [feature.name for feature in config.all_features if feature.side != "history"]
    names += [name for name in candidates.columns if name not in (*REQUEST, *names)]
    nested = candidates.group_by(REQUEST).aggregate(
        candidates=ibis.struct(
            {
                "_order": order,
                **{name: candidates[label].isnull() for name, label in lacks.items()},
                **{name: candidates[name] for name in names},
            }
        ).collect(),
        num_candidates=candidates.count(),
    )
    nested = nested.mutate(candidates=nested.candidates.sort())
    context = [f"context_{entry.name}" for entry in config.context]
    wanted = asked.select(*REQUEST, "timestamp", "history_end", "split", "bucket", *context)
    return wanted.inner_join(nested, REQUEST)
