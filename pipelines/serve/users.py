"""What the page is told of the users of a sequence log: histories and logged requests, with names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from trainer.config.tasks import Task
from trainer.data.labels import TaskLabels
from trainer.data.row_group import Floats
from trainer.log.bags import Bags, Ints
from trainer.log.schema import FeatureInfo
from trainer.serving.histories import HistoryStore, as_user, known_user
from trainer.serving.numbers import values_of_codes
from trainer.serving.request import Limits

_MOST_USERS, _MOST_REQUESTS = 500, 12
# Surely of 64 bits.
_WHOLE = re.compile(r"\s*-?[0-9]{1,18}\s*")


Numbers = list[int | float | str | None]
Ids = list[int] | list[str] | list[list[int]] | list[list[str]] | Numbers


class UserLine(BaseModel):
    """A user and how long their history is; `name` is the user's own, or the number where there is none."""

    user_id: int
    name: str
    behaviors: int


class UsersBody(BaseModel):
    """The first users, or the one that was asked for, and how many there are."""

    total: int
    users: list[UserLine]


class RequestLine(BaseModel):
    """A logged request, in the form of a body's request, and its labels by task; None: not observed.

    Ids that come and go are decimal text, since they may be larger than a browser's numbers are exact.
    """

    time: int
    candidates: dict[str, Ids]
    context: dict[str, list[int] | list[str] | Numbers]
    numeric: dict[str, list[float]]
    labels: dict[str, list[float | None]]


class UserBody(BaseModel):
    """A user's history and their newest logged requests.

    Attributes:
        name: the user's own, or the number where there is none.
        skipped: older behaviors that are left out here.
        features: ids of behaviors, one each (of several only the first); names: feature -> id -> value.
        taxonomy: features that classify items, coarse to fine.
    """

    user_id: int
    name: str
    skipped: int
    timestamp: list[int]
    features: dict[str, list[int] | list[str] | Numbers]
    requests: list[RequestLine]
    names: dict[str, dict[int, str]]
    taxonomy: list[str]


def users_body(histories: HistoryStore | None, name: str | None = None) -> UsersBody:
    """Users by number, or the one that has a name.

    Raises:
        RequestError: 404 for a name that nobody has, 422 for text where users are integers.
    """
    if histories is None:
        return UsersBody(total=0, users=[])
    if name is None:
        users = histories.first(_MOST_USERS)
    else:
        # Digits are a name where the log's users are text.
        text = histories.users is not None and histories.users.text
        user = as_user(name if text or not _WHOLE.fullmatch(name) else int(name))
        users = [known_user(histories, user, histories.users, "name")]
    lines = [UserLine(user_id=u, name=histories.name(u), behaviors=histories.behaviors(u)) for u in users]
    return UsersBody(total=len(histories), users=lines)


def user_body(
    histories: HistoryStore,
    user: int,
    tasks: Sequence[Task],
    limits: Limits,
    living: Collection[str] = (),
) -> UserBody:
    """The newest behaviors that a model may read, and labels of its tasks; KeyError for an unknown user.

    Args:
        living: features whose ids come and go.
    """
    history, manifest = histories[user], histories.manifest
    rows, logged = histories.requests(user)
    logged = logged[-_MOST_REQUESTS:]
    wanted = TaskLabels.of(manifest, tasks)
    requests, infos, contexts = [], manifest.features, manifest.context

    def values(known: Mapping[str, FeatureInfo], name: str, bags: Bags) -> Ids:
        """What a client would send of a feature: its ids, or its numbers."""
        encoder = known[name].encoder
        if encoder is None:
            return _lists(bags, name in living)
        return cast("Ids", values_of_codes(bags.values.astype(np.int64), encoder))

    for r in logged:
        part = slice(*rows.candidate_offsets[r : r + 2].tolist())
        request = RequestLine(
            time=int(rows.request_time[r]),
            candidates={n: values(infos, n, bags.part(part)) for n, bags in rows.candidates.items()},
            context={
                n: cast("Any", values(contexts, n, Bags(bags.part(slice(r, r + 1)).values)))
                for n, bags in rows.context.items()
            },
            numeric={name: rows.numeric[part, x].tolist() for x, name in enumerate(manifest.numeric)},
            labels=_labels(wanted, dict(zip(manifest.tasks, rows.labels[part].T, strict=True))),
        )
        requests.append(request)
    features = {name: _first_ids(bags)[-limits.history :] for name, bags in history.features.items()}
    shown = slice(*rows.candidate_offsets[[logged.start, logged.stop]].tolist())
    candidates = {name: _first_ids(bags.part(shown)) for name, bags in rows.candidates.items()}
    names = {}
    for name, ids in features.items():
        if infos[name].encoder is not None:
            continue
        of_candidates = [candidates[name]] if name in candidates else []
        names[name] = histories.names(name, np.unique(np.concatenate([ids, *of_candidates])).tolist())
    return UserBody(
        user_id=user,
        name=histories.name(user),
        skipped=max(history.time.size - limits.history, 0),
        timestamp=history.time[-limits.history :].tolist(),
        features={name: cast("Any", values(infos, name, Bags(ids))) for name, ids in features.items()},
        requests=requests,
        names=names,
        taxonomy=manifest.taxonomy,
    )


def _labels(wanted: TaskLabels, of_log: Mapping[str, Floats]) -> dict[str, list[float | None]]:
    """Labels of the tasks by their names, from those of the log.

    Args:
        of_log: label -> [candidates].
    """
    count = next(iter(of_log.values())).size
    columns = wanted.of_tasks(of_log, count).T.tolist()
    return {
        task: [None if math.isnan(label) else label for label in column]
        for task, column in zip(wanted.names, columns, strict=True)
    }


def _lists(bags: Bags, text: bool) -> Ids:
    if bags.offsets is None:
        return _listed(bags.values, text)
    return cast("Ids", [_listed(ids, text) for ids in np.split(bags.values, bags.offsets[1:-1])])


def _listed(ids: npt.NDArray[np.integer[Any]], text: bool) -> list[int] | list[str]:
    return cast("list[int] | list[str]", (ids.astype(str) if text else ids).tolist())


def _first_ids(bags: Bags) -> Ints:
    """One id a bag, 0 where it is empty."""
    if bags.offsets is None:
        return bags.values.astype(np.int64)
    values = np.append(bags.values, 0).astype(np.int64)
    ids: Ints = np.where(np.diff(bags.offsets) > 0, values[bags.offsets[:-1]], 0)
    return ids
