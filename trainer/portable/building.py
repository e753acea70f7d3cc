"""A snapshot's model made ready to be written in a portable form, or the reason why it cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import SnapshotError
from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.stored import StoredTable
from trainer.data.batch import RequestBatch
from trainer.model.branch import Branch
from trainer.model.retrieve.score import DotScorer
from trainer.portable.requests import Arrays, padded_requests
from trainer.portable.scorer import Columns, PortableScorer
from trainer.portable.signature import Signature, columns_of, signature_of
from trainer.snapshot import Snapshot


@dataclass(frozen=True)
class Portable:
    """A model that can be written.

    Attributes:
        snapshot: that it is of; columns, signature: its inputs; scorer: what is written.
    """

    snapshot: Snapshot
    columns: Columns
    signature: Signature
    scorer: PortableScorer

    def arrays(self, batch: RequestBatch) -> Arrays:
        """The inputs for a batch as the reader gives it: with ids, not rows."""
        return padded_requests(self.snapshot.with_rows(batch), self.columns, self.signature.names)

    def expected(self, batch: RequestBatch, inputs: Arrays) -> npt.NDArray[np.float32]:
        """The snapshot's scores of a batch, padded like its inputs: [B, C, T]."""
        scores_CT, length_B = self.snapshot.score(batch).numpy(), inputs["candidate_length"]
        most = max(int(length_B.max(initial=0)), 1)
        padded = np.zeros((length_B.size, most, scores_CT.shape[1]), dtype=np.float32)
        padded[np.arange(most) < length_B[:, None]] = scores_CT
        return padded


def portable_of(snapshot: Snapshot) -> Portable:
    """The model of a snapshot.

    Raises:
        SnapshotError: it cannot be written in a portable form.
    """
    if problem := obstacle(snapshot):
        raise SnapshotError(snapshot.path, f"this model has no portable form: {problem}")
    columns = columns_of(snapshot)
    signature = signature_of(snapshot, columns)
    model = snapshot.model
    tables: dict[str, StoredTable] = {}
    for collection in model.collections.values():
        assert isinstance(collection, PlainBagCollection)
        names = [collection.group.table_name(table) for table in collection.group.all_tables]
        tables |= {name: getattr(collection, name) for name in names}
    groups = {name: model.lookups.groups[name] for name in model.collections}
    scorer = PortableScorer(model, groups, tables, columns, signature.names)
    return Portable(snapshot, columns, signature, scorer.eval())


def obstacle(snapshot: Snapshot) -> str:
    """Why a model has no portable form; empty if it has one."""
    multi = {name for name, given in snapshot.manifest.table_inputs.items() if given.multi}
    for name, branch in snapshot.model.branches.named().items():
        if reason := _obstacle_of_branch(branch, multi):
            return f"{reason} (branch {name!r})"
    return ""


def _obstacle_of_branch(branch: Branch, multi: set[str]) -> str:
    search = branch.search
    if search is None or search.keeps_all:
        return ""
    ranks_by_scorer = search.by_score and branch.settings.search == "dot"
    if ranks_by_scorer and not isinstance(branch.scorer, DotScorer):
        return (
            'a search by score = "mlp" ranks by a network, whose rounding decides among close scores; only '
            'inner products can be ranked exactly: use score = "dot" or search = "all"'
        )
    if (compared := branch.settings.ids_feature) in multi:
        return f"the search compares {compared!r}, of which there may be any number of ids"
    return ""
