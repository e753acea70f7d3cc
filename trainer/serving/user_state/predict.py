"""A model's forward pass where behaviors are known: candidates and requests alone are looked up."""

from __future__ import annotations

from torch import Tensor

from embeddings.lookup.jagged import select_bags
from trainer.data.batch import RequestBatch
from trainer.model.frame import Prediction, TwoStageModel, bags_of_candidates
from trainer.model.known import KnownBehaviors


def predict(model: TwoStageModel, batch: RequestBatch, known: KnownBehaviors) -> Prediction:
    """What `model(batch)` gives, but for rounding; the batch has rows of tables in the place of ids.

    Groups of the representation that are not known are looked up for the behaviors that are kept.
    """
    candidates = select_bags(batch.features, bags_of_candidates(batch), batch.host_sizes.one_id)

    def of_candidates(names: list[str]) -> dict[str, Tensor]:
        return {name: model.look_up(name, candidates) for name in names}

    requests = {name: model.look_up(name, batch.context) for name in model.of_requests}
    first = model.lookups(of_candidates(model.first) | requests)
    retrievals = model.branches(batch, first, known)
    behaviors = {
        branch.settings.roles.representation_behavior for branch in retrievals.branches.named().values()
    }
    unknown = behaviors - known.rows.keys()
    late = of_candidates([name for name in model.late if name not in unknown])
    late |= {name: model.look_up(name, retrievals.bags) for name in sorted(unknown)}
    pooled = model.pooling(batch, retrievals, first, model.lookups(late), known)
    output = model.judge(pooled)
    return Prediction(output.logits, None, output.base, output.experts)
