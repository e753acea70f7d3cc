"""Why a snapshot answers with NaN: mostly a table that was overwritten where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from embeddings.errors import SnapshotError
from embeddings.lookup.plain import PlainBagCollection
from trainer.serving.request import Request, RequestError
from trainer.serving.scorer import Scorer


class UnsoundError(RequestError):
    """A snapshot whose answers are no numbers, through no fault of the request; status 503.

    Args:
        where: what of the snapshot is wrong, as far as it can be told.
    """

    def __init__(self, version: str, where: str) -> None:
        self.where = where
        super().__init__(503, f"the version {version} answers with what is no number: {where}")


def error_of(scorer: Scorer, request: Request, known: bool = False) -> UnsoundError:
    """What to answer to a request whose scores are no numbers.

    A request alone cannot bring this about: its ids are those of rows, and its numbers are finite and reach
    the model by their logarithm.

    Args:
        known: the snapshot is known to be unsound: nothing is scored again to find out why.
    """
    if known:
        return UnsoundError(scorer.version, "see the server's log")
    if table := _table_of(scorer, request):
        return UnsoundError(scorer.version, f"rows of the table {table} hold NaN or infinity")
    snapshot = scorer.snapshot
    try:
        snapshot.check_own(snapshot.score(snapshot.recorded.batch))
    except SnapshotError as error:
        return UnsoundError(scorer.version, str(error))
    return UnsoundError(scorer.version, "all rows are numbers, and its recorded requests score as they did")


def _table_of(scorer: Scorer, request: Request) -> str:
    """`group/feature` of the first table whose rows for a request are no numbers; empty: all are."""
    found: list[str] = []
    with _watched(scorer.snapshot.model, found):
        scorer.snapshot.score(scorer.batch([request]))
    return found[0] if found else ""


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Notes look-ups of what is no number."""

    def note(collection: Any, _: Any, looked_up: KeyedTensor) -> None:
        for key, vectors in looked_up.to_dict().items():
            if not vectors.isfinite().all():
                found.append(f"{collection.group.name}/{key}")

    collections = [module for module in model.modules() if isinstance(module, PlainBagCollection)]
    hooks = [collection.register_forward_hook(note) for collection in collections]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
