"""Target-decoupled SASRec: users know no candidates, states nothing newer, groups not each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.models import GROUPS, batch_of, draw, drawing, model_of, preset, small_log, with_ids
from trainer.model.read.sasrec import TargetDecoupledSasrec
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.score import AttentionVectors
from trainer.model.time import Marks
from trainer.model.windows import Selection, Windows

WIDTH, LENGTH = 8, 6


def made() -> tuple[TargetDecoupledSasrec, Tensor, Selection]:
    """Three windows, newest first: full, half full, empty."""
    rng = drawing(1)
    model = TargetDecoupledSasrec(WIDTH, LENGTH, GROUPS, 2, 2)
    draw(model, rng)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 3, 0])[:, None]
    rank = torch.where(mask, torch.arange(1, LENGTH + 1), 0)
    index = torch.where(mask, torch.arange(3 * LENGTH).view(3, LENGTH), 0)
    none = torch.zeros_like(rank)
    return (
        model,
        torch.randn(3, LENGTH, WIDTH, generator=rng),
        Selection(index, mask, Marks(rank, none, none)),
    )


def test_s1_user_matrix_is_the_same_whoever_the_candidates_are(tmp_path: Path) -> None:
    config = preset("td_sasrec", small_log(tmp_path / "log"))
    model, batch = model_of(config).eval(), batch_of(config)
    sequence, seen = model.branches["main"].sequence, []
    compute = sequence.user_matrix
    sequence.user_matrix = lambda *given: seen.append(compute(*given)) or seen[-1]
    rows = {"item_id": 60, "category_id": 9}
    candidate = torch.arange(batch.features.stride()) >= batch.behaviors

    def next_id(key: str, ids: Tensor) -> Tensor:
        return (ids + 1) % rows[key]

    with torch.no_grad():
        logits = [
            model(asked).logits
            for asked in (
                batch,
                with_ids(batch, lambda key, ids: torch.where(candidate, next_id(key, ids), ids)),
                with_ids(batch, lambda key, ids: torch.where(candidate, ids, next_id(key, ids))),
            )
        ]
    users, same, others = seen
    assert users.shape == (batch.requests, 9, model.branches["main"].sequence.width)
    assert torch.equal(users, same) and not torch.equal(logits[0], logits[1])
    assert not torch.equal(users, others)


@pytest.mark.parametrize("serving", [False, True])
def test_s2_a_state_knows_nothing_newer_and_no_padding(serving: bool) -> None:
    """Bit for bit, in training and in the fused kernel that torch takes without gradient."""
    model, value, kept = made()
    model.train(not serving)

    def hidden(value: Tensor, kept: Selection = kept) -> Tensor:
        with torch.set_grad_enabled(not serving):
            return model.hidden(value, kept).detach()

    before = hidden(value)
    assert torch.isfinite(before).all()
    for j in range(LENGTH):
        changed = value.clone()
        changed[:, j] += 3
        rank = kept.marks.position.clone()
        rank[:, j] = LENGTH - rank[:, j]
        moved = hidden(changed, replace(kept, marks=replace(kept.marks, position=rank)))
        place = torch.arange(LENGTH)
        # Behavior j and what is newer see it; a padding place is seen by itself alone.
        seeing = torch.where(kept.mask[:, j, None], place <= j, place == j)
        assert torch.equal((moved != before).any(2), seeing)


def test_s2_the_fused_kernel_gives_the_same_states() -> None:
    model, value, kept = made()
    slow = model.train().hidden(value, kept)
    with torch.no_grad():
        fast = model.eval().hidden(value, kept)
    assert torch.allclose(fast, slow, atol=1e-5)


def test_s3_a_loss_on_one_group_trains_no_other() -> None:
    model, value, kept = made()
    asked, of_candidate = 1, torch.tensor([0, 0, 1])
    windows = Windows(kept.index, kept.mask, kept.marks, None, of_candidate)
    group = torch.full((3,), asked)
    raw = AttentionVectors(torch.zeros(3, 1), torch.zeros(1, 1), group)
    rows = value.flatten(0, 1)
    behaviors = Behaviors(windows, raw, raw, kept, False, torch.ones(3, WIDTH), rows, kept.index)
    user, _ = model(behaviors, None)
    user.square().sum().backward()
    for name in ("query", "bias", "out"):
        moved = getattr(model, name).grad.view(GROUPS, -1).abs().amax(1) > 0
        assert moved.tolist() == [g == asked for g in range(GROUPS)], name
    assert all((p.grad != 0).any() for name, p in model.named_parameters() if name.startswith("blocks"))


def test_user_matrix_equals_one_group_at_a_time() -> None:
    """Each group's own query, bias and map over the states of what is there; zero for nothing."""
    model, value, kept = made()
    with torch.no_grad():
        users, state = model.user_matrix(value, kept), model.hidden(value, kept)
        for w, length in enumerate((LENGTH, 3)):
            h, rank = state[w, :length], kept.marks.position[w, :length]
            for g in range(GROUPS):
                share = (h @ model.query[g] / WIDTH**0.5 + model.bias[g][rank]).softmax(0)
                assert torch.allclose(users[w, g], (share @ h) @ model.out[g], rtol=1e-4, atol=1e-5)
    assert (users[2] == 0).all()
