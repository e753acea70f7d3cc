"""The loss of the auxiliary head `retrieval`: margin metric softmax (MMS of CLIPood, 2023) within a step.

User u_i of a positive i, items v_j of all candidates of the step, y_i the item of the positive:

    logit_ij = scale * (<u_i, v_j> + margin * d(y_i, j)) - log q_j,    loss_i = -log softmax(logit_i)[i]

where d, from 0 to 1, is how far two items are from each other in a taxonomy: 0 for the positive itself, so
that the farther an item is, the smaller its product must be. The paper has d = 1 - <s_y, s_j> of frozen text
features, and writes scale * <u_i - margin * s_y, s_j>, since its items are these features: the two differ by
a number of the row, which a softmax does not see. q_j is the item's share of the step's candidates, since
popular items are there more often (Yi et al., 2019). Other candidates of the positive's item are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embeddings.errors import ConfigError, hint_of
from trainer.config.tasks import Task, names_of
from trainer.model.heads.retrieval import Retrieved
from trainer.model.ops.bags import rows_at
from trainer.objectives.exchange import of_all_ranks, on_all_hosts
from trainer.objectives.given import Entry, Given

# Pairs of a positive and a candidate that are looked at together; beyond them the backward pass computes
# logits again, so that the memory is that of so many.
_PAIRS = 1 << 22


@dataclass(frozen=True)
class RetrievalLoss:
    """How the loss is taken.

    Attributes:
        task: whose positives are retrieved; column: its place among all tasks.
        scale, margin: see above.
    """

    task: Task
    column: int
    scale: float
    margin: float

    def of(self, retrieved: Retrieved, given: Given) -> tuple[Tensor, Entry]:
        """The mean over the positives of the step, times its candidates and the task's weight: this rank's
        part, whose values and gradients add up over ranks; and what it adds to the report.

        Collective where candidates are on several ranks.
        """
        step, shares = given.step, given.step.shares
        positives = step.batch.host_sizes.positives[self.column] if step.counted else 0
        user, item, path = retrieved
        facts = torch.stack([given.labels[:, self.column], given.weight_of(self.column)], dim=1)
        own, count = slice(0, user.shape[0]), positives
        if len(shares) > 1:
            count = sum(each for (each,) in on_all_hosts([positives], len(shares)))
            width = user.shape[1]
            floats = torch.cat([user, item, facts.to(user.dtype)], dim=1)
            every, own = of_all_ranks(floats, shares, given.rank)
            path, _ = of_all_ranks(path, shares, given.rank)
            if not step.counted:
                # It has a gradient of zero of all that others have one of.
                return floats.sum() * 0, Entry(floats.new_zeros(1), 0)
            user, item, facts = every.split([width, width, 2], dim=1)
        label, weight = facts.detach().unbind(1)
        # As many as the host knows of: no device is waited for.
        row = (label >= 0.5).argsort(descending=True, stable=True)[:count]
        losses = weight[row] * self.losses(user, item, path, row)
        mine = (own.start <= row) & (row < own.stop)
        # Of other ranks' positives the value is theirs; the gradient of these candidates is owed here.
        value = torch.where(mine, losses, losses - losses.detach()).sum()
        factor = self.task.weight * step.batch.step_candidates / max(1, count)
        return factor * value, Entry(value.detach()[None], positives)

    def losses(self, user_CD: Tensor, item_CD: Tensor, path: Tensor, row_P: Tensor) -> Tensor:
        """[P], of the candidates `row_P`, each among all C."""
        log_share_C = log_shares(path[:, 0].contiguous())

        def of_rows(row: Tensor) -> Tensor:
            paths = path[row]
            distance = tree_distance(paths, path)
            return margin_metric_softmax(
                rows_at(user_CD, row),
                item_CD,
                row,
                distance,
                self.scale,
                self.margin,
                log_share_C,
                paths[:, :1] == path[:, 0],
            )

        parts = row_P.split(max(1, _PAIRS // max(1, path.shape[0])))
        if len(parts) == 1:
            return of_rows(row_P)
        again: list[Tensor] = [
            checkpoint(of_rows, part, use_reentrant=False, preserve_rng_state=False) for part in parts
        ]
        return torch.cat(again)


def margin_metric_softmax(
    user_PD: Tensor,
    item_CD: Tensor,
    own_P: Tensor,
    distance_PC: Tensor,
    scale: float,
    margin: float,
    log_share_C: Tensor | None = None,
    same_PC: Tensor | None = None,
) -> Tensor:
    """The losses [P] of P positives among C candidates.

    Args:
        user_PD, item_CD: of length 1; own_P: int64, which candidate each positive is.
        distance_PC: from 0 to 1; no gradient reaches it, or a model would shrink its own margin.
        log_share_C: log q; None: all are as frequent.
        same_PC: bool, candidates that are the positive's item and so no negatives; the own one may be among
            them, and counts.
    """
    place = own_P[:, None]
    far = distance_PC.detach().scatter(1, place, 0.0)
    logits = scale * (user_PD @ item_CD.T + margin * far.to(user_PD.dtype))
    if log_share_C is not None:
        logits = logits - log_share_C.to(logits.dtype)
    if same_PC is not None:
        logits = logits.masked_fill(same_PC.scatter(1, place, False), -torch.inf)
    return logits.logsumexp(1) - logits.gather(1, place)[:, 0]


def tree_distance(path_P: Tensor, path_C: Tensor) -> Tensor:
    """How far items of a taxonomy of M levels are from each other, [P, C] from 0 to 1.

    It is the way from leaf to leaf in the tree, by the longest that there is: 0 for the same item, else
    (M + 1 - levels that both share) / (M + 1). What is not known (id 0) is shared with nobody.

    Args:
        path_P, path_C: int64 [*, 1 + M], the item, then its ids, coarsest first.
    """
    levels = path_C.shape[1] - 1
    # Filled on the device, since a copy from the host would have it wait.
    shared = torch.zeros((), device=path_C.device)
    so_far = torch.ones((), dtype=torch.bool, device=path_C.device)
    for level in range(1, levels + 1):
        one, other = path_P[:, level, None], path_C[:, level]
        so_far = so_far & (one == other) & (one != 0)
        shared = shared + so_far
    distance = (levels + 1 - shared) / (levels + 1)
    return distance.masked_fill(path_P[:, :1] == path_C[:, 0], 0.0)


def log_shares(item_C: Tensor) -> Tensor:
    """log of the part of all candidates that are the same item, float32 [C]."""
    ordered = item_C.sort().values
    # Not unique, which a device must be waited for.
    count = torch.searchsorted(ordered, item_C, right=True) - torch.searchsorted(ordered, item_C)
    return (count / max(1, item_C.numel())).log()


def retrieval_loss_of(model: Any, tasks: Sequence[Task]) -> RetrievalLoss | None:
    """The loss that a model's settings ask for, None where they ask for none.

    Raises:
        ConfigError: it names no task of the run, or one without a loss.
    """
    if model.auxiliary_kind is None or not model.auxiliary_kind.retrieves:
        return None
    config, names = model.retrieval, names_of(tasks)
    wanted = config.task or names[0]
    if wanted not in names:
        known = hint_of(wanted, names, f"they are {', '.join(names)}")
        raise ConfigError(f"model.retrieval.task = {wanted!r}: no task has that name; {known}")
    column = names.index(wanted)
    if tasks[column].settings.loss == "none":
        problem = 'this task has no loss of its own (loss = "none"); name another'
        raise ConfigError(f"model.retrieval.task = {wanted!r}: {problem}")
    return RetrievalLoss(tasks[column], column, config.scale, config.margin)
