"""Names that a request may hold: any other is a misspelled one, which would give wrong scores in silence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from embeddings.errors import hint_of
from trainer.log.schema import CLUSTER_COLUMNS, REQUEST_COLUMNS
from trainer.serving.exploration import ExplorationFields
from trainer.serving.request import RequestError

# Columns of the sequence log that are no part of a request pass, so that its rows may be sent as they are.
_COLUMNS = (
    *("user_id", "history_timestamp", "weight", "num_behaviors", "num_requests", "num_candidates"),
    *CLUSTER_COLUMNS,
    *(f"request_{name}" for name in REQUEST_COLUMNS),
)
_PREFIXES = ("history_", "candidate_", "context_", "numeric_", "label_", "weight_")
# Of the metadata of an Arrow body, and parameters of a call with tensors.
KEYS = ("ids", *ExplorationFields.model_fields)
# Names are compared up to this many characters.
_LONGEST = 80


def check_columns(given: Iterable[str], needed: Iterable[str], what: str) -> None:
    """Refuse names of columns or tensors that are none of the sequence log.

    Features that no snapshot knows have a known prefix, and pass.

    Args:
        needed: columns of the features that the snapshot knows; what: `column` or `tensor`.

    Raises:
        RequestError: 422 with the first such name, and the nearest known one.
    """
    for name in given:
        if name in _COLUMNS or name.startswith(_PREFIXES):
            continue
        problem = f"{what} {name[:_LONGEST]}: no such {what} is known"
        otherwise = f"features begin with {', '.join(_PREFIXES[:4])}"
        hint = hint_of(name[:_LONGEST], [*_COLUMNS, *needed], otherwise)
        raise RequestError(422, f"{problem}; {hint}")


def check_keys(given: Iterable[str], where: str) -> None:
    """Refuse `explain`, and misspelled keys. Others pass: pandas and other servers have keys of their own.

    Args:
        where: they stand, for messages.

    Raises:
        RequestError: 422, naming the key.
    """
    for key in given:
        if key == "explain":
            raise RequestError(422, f"{where}: explain is for bodies in JSON alone")
        near = get_close_matches(key[:_LONGEST].lower(), KEYS, 1, 0.75)
        if near and key not in KEYS:
            raise RequestError(422, f"{where}: {key[:_LONGEST]} is not known; did you mean {near[0]}?")
