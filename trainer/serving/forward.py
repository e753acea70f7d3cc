"""A model's forward pass as a server runs it: it says when stage one was done, and what stage two read.

Training's own, `TwoStageModel.forward`, looks behaviors up in tables. Where they are known, candidates and
requests alone are looked up here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.lookup.jagged import select_bags
from trainer.data.batch import RequestBatch
from trainer.model.branch import Reading
from trainer.model.frame import Prediction, Retrievals, TwoStageModel, bags_of_candidates
from trainer.model.known import KnownBehaviors


class Forward:
    """One forward pass of a model in eval mode, of a batch with rows of tables in the place of ids.

    Args:
        clock: seconds.
        known: what is known of a batch's behaviors before it is scored; None: nothing ever is.

    Attributes:
        searched: when all branches had retrieved; read: branch -> what its stage two read.
    """

    def __init__(
        self,
        model: TwoStageModel,
        clock: Callable[[], float],
        known: Callable[[RequestBatch], KnownBehaviors | None] | None = None,
    ) -> None:
        self.model, self.clock, self.known = model, clock, known
        self.searched = clock()
        self.read: Mapping[str, Reading] = {}

    def __call__(self, batch: RequestBatch) -> Prediction:
        """What `model(batch)` gives; but for rounding where behaviors are known."""
        model, known = self.model, None if self.known is None else self.known(batch)
        bags = batch.features
        if known is not None:
            bags = select_bags(bags, bags_of_candidates(batch), batch.host_sizes.one_id)
        pooled = {name: model.look_up(name, bags) for name in model.first}
        pooled |= {name: model.look_up(name, batch.context) for name in model.of_requests}
        first = model.lookups(pooled)
        retrievals = model.branches(batch, first, known)
        self.searched = self.clock()
        bags_of = self._bags_of_late(retrievals, known, bags)
        late = model.lookups({name: model.look_up(name, own) for name, own in bags_of.items()})
        read = model.pooling(batch, retrievals, first, late, known)
        self.read = read.of_branch
        output = model.judge(read)
        return Prediction(output.logits, None, output.base, output.experts)

    def _bags_of_late(
        self, retrievals: Retrievals, known: KnownBehaviors | None, candidates: KeyedJaggedTensor
    ) -> dict[str, KeyedJaggedTensor]:
        """What each group is asked for after stage one; `candidates`: of what is known, nothing else is."""
        model = self.model
        if known is None:
            alone = dict.fromkeys(model.alone, retrievals.candidates)
            return dict.fromkeys(model.late, retrievals.bags) | alone
        branches = retrievals.branches.named().values()
        behaviors = [branch.settings.roles.representation_behavior for branch in branches]
        # A group of both stages too, where its vectors are not kept: they were not asked for before.
        unknown = [name for name in behaviors if name not in known.rows]
        return dict.fromkeys(model.late, candidates) | dict.fromkeys(unknown, retrievals.bags)
