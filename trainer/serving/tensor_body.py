"""One request as named tensors, as protocols for any kind of model send it.

A tensor is named like the column of the sequence log (`history_timestamp`, `candidate_<feature>`, ...) and
holds one number for each behavior or candidate. Where a behavior or a candidate has several ids,
`<name>.lengths` says how many each has. The tensors become one row of an Arrow body, so that whatever is
checked there is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from trainer.serving.arrow_body import ArrowForm, ValuesLeft, checked_columns
from trainer.serving.body import Body, as_read
from trainer.serving.exploration import check_exploration, exploration_of
from trainer.serving.histories import HistoryStore
from trainer.serving.request import History, Limits, RequestError
from trainer.serving.scorer import Answer, Scorer
from trainer.serving.vocabulary import Translation

LENGTHS = ".lengths"
# These hold one value of the request itself.
_SINGLE = ("user_id", "request_timestamp")


def decode_tensors(
    tensors: Mapping[str, pa.Array],
    asked: Mapping[str, str],
    scorer: Scorer,
    histories: HistoryStore | None,
    limits: Limits,
) -> Body:
    """The request of some tensors, checked.

    Args:
        tensors: flat values by name; texts are `large_binary` in UTF-8.
        asked: `ids`, dense or raw, and what is asked of how sure the model is, spelled as in the metadata
            of an Arrow body.

    Raises:
        RequestError: 413 above a limit, 404 for an unknown user, 422 for anything else.
    """
    ids = asked.get("ids", "dense")
    if ids not in ("dense", "raw"):
        raise RequestError(422, f"the parameter ids is {ids[:40]!r}; dense and raw are known")
    exploration = exploration_of({name.encode(): value.encode() for name, value in asked.items()})
    if exploration is not None:
        check_exploration(scorer.snapshot)
    for name in tensors:
        if name.endswith(LENGTHS) and name.removesuffix(LENGTHS) not in tensors:
            raise RequestError(422, f"tensor {name}: there is no tensor {name.removesuffix(LENGTHS)}")
    users = None if histories is None else histories.users
    stored: Mapping[int, History] = histories or {}
    try:
        columns = {name: _column(name, tensors) for name in tensors if not name.endswith(LENGTHS)}
        row = checked_columns(pa.RecordBatch.from_pydict(columns), scorer.needs, "tensor")
        translation = Translation(scorer.vocabularies, users) if ids == "raw" else None
        form = _TensorForm(row, 0, 0, ValuesLeft(limits.ids), scorer.needs, translation)
        request = form.request(stored, limits)
    except pa.ArrowException as error:
        raise RequestError(422, f"the tensors are no request: {str(error).splitlines()[0][:200]}") from None
    return Body(scorer, [as_read(request, scorer)], raw=ids == "raw", exploration=exploration)


def tensors_of(answer: Answer, tasks: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What an answer says, by the names of the columns of an Arrow answer.

    Returns:
        `score_<task>`: float32 [C]; `history_used`, `unknown`: int64 [1]; `mean_<task>` and the like, float32
        [C], where they were asked for.
    """
    found = {f"score_{task}": answer.probabilities[:, t] for t, task in enumerate(tasks)}
    for place, task in enumerate(tasks):
        named = {} if answer.sureness is None else answer.sureness.by_name()
        found |= {f"{name}_{task}": values[:, place] for name, values in named.items()}
    found["history_used"] = np.array([answer.history_used])
    found["unknown"] = np.array([sum(answer.unknown.values())])
    return found


class _TensorForm(ArrowForm):
    """The one row, with messages that name tensors."""

    def where(self, column: str) -> str:
        return f"tensor {column}"


def _column(name: str, tensors: Mapping[str, pa.Array]) -> pa.Array:
    """A tensor as a column of one row."""
    values = tensors[name]
    if pa.types.is_large_binary(values.type):
        values = values.cast(pa.large_string())
    lengths = tensors.get(name + LENGTHS)
    if name in _SINGLE:
        if len(values) != 1 or lengths is not None:
            raise RequestError(422, f"tensor {name}: {len(values):,} values, expected 1")
        return values
    if lengths is not None:
        values = pa.LargeListArray.from_arrays(_offsets(name, lengths, len(values)), values)
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def _offsets(name: str, lengths: pa.Array, count: int) -> pa.Array:
    """Where the ids of each behavior or candidate begin, and where the last ones end: int64 [n + 1]."""
    if not pa.types.is_integer(lengths.type) or lengths.null_count:
        raise RequestError(422, f"tensor {name}{LENGTHS}: holds {lengths.type}, expected INT64")
    sizes = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    # Each is bounded first, so that their sum does not overflow.
    if sizes.size and (sizes.min() < 0 or sizes.max() > count or int(sizes.sum()) != count):
        raise RequestError(422, f"tensor {name}{LENGTHS}: must be sizes that add up to {count:,}")
    if not sizes.size and count:
        raise RequestError(422, f"tensor {name}{LENGTHS}: is empty, and {name} has {count:,} values")
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())
