"""Tables of marks: the three forms against plain indexing, and target groups that stay apart (TdPE, dPE)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import FORMS, GROUPS, MARK_ROWS, draw, drawing, drawn_windows
from trainer.model.time import Form, Marks, TimeBias, TimeEncoding, group_rows

WIDTH = 6
DECOUPLED = ("target", "joint")


def marks_of(seed: int, candidates: int = 5, width: int = 4) -> Marks:
    return drawn_windows(drawing(seed), candidates, width, candidates, full=True).marks


@pytest.mark.parametrize("form", FORMS)
def test_encodings_of_all_uses_come_from_the_same_rows(form: Form) -> None:
    """Behaviors, pooled sums and scores against plain indexing; the target is at mark 0 (of its group)."""
    rng, marks = drawing(1), marks_of(1)
    encoding = TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS)
    draw(encoding, rng)
    group = torch.tensor([0, 1, 2, 1, 0])
    plain, of_target = torch.zeros(5, 4, WIDTH), torch.zeros(5, WIDTH)
    for c, g in enumerate(group.tolist()):
        for name, rows in MARK_ROWS.items():
            first = g * rows if form == "joint" else 0
            of_target[c] += encoding.tables[name][first].detach()
            for k in range(4):
                plain[c, k] += encoding.tables[name][first + getattr(marks, name)[c, k]].detach()
        if form == "target":
            of_target[c] = encoding.targets[g].detach()
    weight, vector = torch.randn(5, 4, generator=rng), torch.randn(5, WIDTH, generator=rng)
    assert torch.allclose(encoding.behaviors(marks, group), plain, atol=1e-5)
    assert torch.allclose(encoding.target(vector, group), vector + of_target, atol=1e-5)
    pooled = vector + torch.einsum("ck,ckd->cd", weight, plain)
    for many in (False, True):
        assert torch.allclose(encoding.pooled(vector, weight, marks, group, many=many), pooled, atol=1e-5)
    assert torch.allclose(
        encoding.scores(vector, marks, group), (plain @ vector[:, :, None])[..., 0], atol=1e-5
    )


def test_tables_that_no_stage_uses_add_nothing() -> None:
    encoding, vector, group = TimeEncoding({}, WIDTH), torch.randn(5, WIDTH), torch.zeros(5).long()
    assert torch.equal(encoding.target(vector, group), vector)
    assert torch.equal(encoding.pooled(vector, torch.ones(5, 4), marks_of(1), group), vector)
    assert (encoding.scores(vector, marks_of(1), group) == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_targets_group_changes_the_score_of_time_alone(form: Form) -> None:
    """TdPE and dPE: every group its own decay; TIN and DARE: one for all."""
    bias, encoding = TimeBias(MARK_ROWS, form, GROUPS, 3), TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS)
    draw(bias, drawing(2)), draw(encoding, drawing(3))
    marks, nothing = marks_of(2), torch.zeros(5, WIDTH)

    def scores(group: int) -> torch.Tensor:
        of_group = torch.full((5,), group)
        encoded = encoding.scores(encoding.target(nothing, of_group), marks, of_group)
        return torch.stack([bias(marks, of_group), encoded])

    first, second = scores(0), scores(2)
    if form == "shared":
        assert torch.equal(first, second)
    else:
        assert ((first - second).abs() > 1e-3).all()
    assert (first.std(dim=2) > 1e-3).all()  # not merely one number a candidate


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 6))
def test_joint_rows_of_two_groups_never_meet(rows: int, groups: int) -> None:
    """Marks 0 to L in L + 1 rows a group: all rows of the table, each once."""
    found = group_rows(torch.arange(rows).expand(groups, -1), torch.arange(groups), rows)
    assert found.flatten().tolist() == list(range(groups * rows))


@pytest.mark.parametrize("form", DECOUPLED)
def test_an_update_for_one_group_moves_no_other_groups_rows(form: Form) -> None:
    bias, encoding = TimeBias(MARK_ROWS, form, GROUPS, 3), TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS)
    marks, group = marks_of(4, width=30), torch.full((5,), 1)
    own = {"joint": ("tables",), "target": ("targets",)}[form]
    for module in (bias, encoding):
        draw(module, drawing(5))
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        weight = torch.randn(5, 30, generator=drawing(6))
        if module is bias:
            out = bias(marks, group) * weight
        else:
            vector = encoding.target(torch.randn(5, WIDTH), group)
            out = encoding.scores(vector, marks, group) + encoding.pooled(vector, weight, marks, group).sum()
        out.square().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        checked = 0
        for name, parameter in module.named_parameters():
            if name.split(".")[0] not in own:
                continue
            moved = (parameter.detach() != before[name]).view(GROUPS, -1).any(1)
            assert moved.tolist() == [False, True, False], name
            checked += 1
        assert checked == (len(MARK_ROWS) if form == "joint" else 1)


def test_dpe_target_sits_at_row_0_of_its_group() -> None:
    """At the largest mark too: a stride of L instead of L + 1 would read the next group's target."""
    encoding = TimeEncoding({"position": 9}, WIDTH, "joint", GROUPS)
    draw(encoding, drawing(7))
    table = encoding.tables["position"].view(GROUPS, 9, WIDTH)
    for group in range(GROUPS):
        found = encoding.target(torch.zeros(1, WIDTH), torch.tensor([group]))
        assert torch.equal(found[0], table[group, 0])
        oldest = Marks(*[torch.full((1, 1), 8)] * 3)
        assert torch.equal(encoding.behaviors(oldest, torch.tensor([group]))[0, 0], table[group, 8])
