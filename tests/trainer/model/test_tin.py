"""TIN and Stacked TIN: the identities, invariances and orders that make them what their names say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.models import (
    FORMS,
    GROUPS,
    MARK_ROWS,
    batch_of,
    draw,
    drawing,
    drawn_behaviors,
    drawn_windows,
    model_of,
    preset,
    small_log,
    stage_one,
    watch,
    with_ids,
)
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.model.read.sequence import Behaviors
from trainer.model.read.stacked import StackedTin
from trainer.model.read.target_attention import TargetAttention
from trainer.model.time import TimeEncoding
from trainer.model.windows import Windows

WIDTH = 6
Change = Callable[[Windows], Windows]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("tin") / "log")


@pytest.fixture(scope="module")
def tin(log: Path) -> tuple[TwoStageModel, RequestBatch]:
    config = preset("tin", log)
    return model_of(config).eval(), batch_of(config)


@torch.no_grad()
def u_of(tin: tuple[TwoStageModel, RequestBatch], change: Change = lambda windows: windows) -> Tensor:
    """u = sum_k w_k (e_k * v_t) of every candidate, [C, D], with the windows changed."""
    model, batch = tin
    branch, found = model.branches["main"], stage_one(model, batch)["main"]
    windows = change(found.windows)
    retrieval = replace(found, windows=windows, selection=windows.of_candidates())
    shared = model.lookups({"shared": model.collections["shared"](batch.features)})["shared"]
    n = batch.behaviors
    rows = {"target_CD": shared[n:], "value_SD": shared[:n], "place": retrieval.index}
    return branch.sequence(Behaviors(**vars(retrieval), **rows), branch.weigh(retrieval))[2]


def shuffled(windows: Windows, marks: bool, index: bool) -> Windows:
    """The behaviors of every window in another order, with their marks or one without the other."""
    rng, order = drawing(8), torch.arange(windows.index.shape[1]).repeat(windows.index.shape[0], 1)
    for row, mask in zip(order, windows.mask, strict=True):
        row[: int(mask.sum())] = torch.randperm(int(mask.sum()), generator=rng)

    def moved(part: Tensor) -> Tensor:
        return part.gather(1, order)

    return replace(
        windows,
        index=moved(windows.index) if index else windows.index,
        marks=windows.marks.each(moved) if marks else windows.marks,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [False, True])
def test_p1_product_inside_the_sum_equals_the_factorised_form(form: str, whole: bool) -> None:
    """sum_k w_k (e_k * v_t) = (sum_k w_k e_k) * v_t, with encodings in both, of every form."""
    rng = drawing(1)
    time = TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS)  # type: ignore[arg-type]
    sequence = TargetAttention(WIDTH, time)
    draw(sequence, rng)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, 4, 7, 6), WIDTH, whole=whole)
    weight = torch.rand(6, 1, 7, generator=rng) * behaviors.selection.mask[:, None]
    encodings = time.behaviors(behaviors.selection.marks, behaviors.group_C)
    encoded = behaviors.value_SD[behaviors.selection.index] + encodings
    target = time.target(behaviors.target_CD, behaviors.group_C)
    inside = torch.einsum("ck,ckd->cd", weight[:, 0], encoded * target[:, None])
    parts = sequence(behaviors, weight)
    assert torch.equal(parts[0], target) and inside.abs().max() > 0.1
    assert torch.allclose(parts[2], inside, atol=1e-5)


def test_p1_attention_is_over_encoded_target_and_behaviors(tin: tuple[TwoStageModel, RequestBatch]) -> None:
    """Weights and u of the preset from equations 4 to 6 alone."""
    model, batch = tin
    seen = watch(model)
    with torch.no_grad():
        model(batch)
    behaviors, weight, parts = seen["main"]
    main, shared = (
        model.branches["main"],
        model.lookups({"shared": model.collections["shared"](batch.features)})["shared"].detach(),
    )
    own, kept = shared[batch.behaviors :], behaviors.selection

    def encoded(time: TimeEncoding, c: int) -> tuple[Tensor, Tensor]:
        """The candidate's vector and those of what it keeps."""
        rank, age = time.tables["position"], time.tables["age"]
        marks, mask = kept.marks, kept.mask[c]
        keys = shared[kept.index[c]] + rank[marks.position[c]] + age[marks.age[c]]
        return own[c] + rank[0] + age[0], keys[mask]

    for c in range(batch.candidates):
        target, keys = encoded(main.scorer.encoding, c)
        alpha = (keys @ target / shared.shape[1] ** 0.5).softmax(0)
        assert torch.allclose(weight[c, 0][kept.mask[c]], alpha, atol=1e-5)
        target, values = encoded(main.sequence.time, c)
        assert torch.allclose(parts[2][c], (alpha[:, None] * values * target).sum(0), atol=1e-5)


def test_p2_order_of_behaviors_matters_through_their_marks_alone(
    tin: tuple[TwoStageModel, RequestBatch],
) -> None:
    before = u_of(tin)
    several = stage_one(*tin)["main"].windows.mask.sum(1)[tin[1].candidate_request] > 2
    assert several.any()
    together = u_of(tin, lambda windows: shuffled(windows, marks=True, index=True))
    assert torch.allclose(together, before, atol=1e-5)
    for part in ("marks", "index"):
        alone = u_of(
            tin, lambda windows, part=part: shuffled(windows, marks=part == "marks", index=part == "index")
        )
        assert ((alone - before)[several].abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("extra", [1, 5, 300])
def test_p3_masked_entries_change_nothing(tin: tuple[TwoStageModel, RequestBatch], extra: int) -> None:
    """To 1e-6, not bit for bit: sums over a longer row add their terms in another order."""

    def longer(windows: Windows) -> Windows:
        def padded(part: Tensor) -> Tensor:
            return F.pad(part, (0, extra))

        return replace(
            windows, index=padded(windows.index), mask=padded(windows.mask), marks=windows.marks.each(padded)
        )

    before = u_of(tin)
    assert before.abs().max() > 0.1
    assert torch.allclose(u_of(tin, longer), before, rtol=0, atol=1e-6)


def test_p3_what_lies_under_the_mask_is_never_read(tin: tuple[TwoStageModel, RequestBatch]) -> None:
    """Bit for bit: any behavior and any mark may stand where the mask is False."""

    def littered(windows: Windows) -> Windows:
        hidden = ~windows.mask
        assert hidden.any()
        return replace(
            windows,
            index=torch.where(hidden, tin[1].behaviors - 1, windows.index),
            marks=windows.marks.each(lambda mark: torch.where(hidden, 3, mark)),
        )

    assert torch.equal(u_of(tin, littered), u_of(tin))


@pytest.mark.parametrize("name", ["tin", "stacked_tin", "tdpe", "dpe", "dsi_tin", "td_sasrec", "twin"])
def test_p4_shifting_all_times_changes_nothing(log: Path, name: str) -> None:
    """Time is relative to the request; shifting the requests alone changes every model that sees ages."""
    config = preset(name, log)
    model, batch = model_of(config).eval(), batch_of(config)
    later = replace(batch, request_time=batch.request_time + 10**7)
    both = replace(later, behavior_time=batch.behavior_time + 10**7)
    with torch.no_grad():
        before = model(batch).logits
        assert torch.equal(model(both).logits, before)
        assert torch.equal(model(later).logits, before) == (name == "td_sasrec")  # ranks alone


@pytest.mark.parametrize("target_aware", [True, False])
def test_tr_target_reaches_u_through_the_product_with_weights_frozen(target_aware: bool) -> None:
    """du / dv is the pooled vector itself; without the product the pool does not know the target."""
    rng = drawing(2)
    sequence = TargetAttention(WIDTH, TimeEncoding(MARK_ROWS, WIDTH), target_aware=target_aware)
    draw(sequence, rng)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, 4, 7, 6, full=True), WIDTH)
    weight = torch.rand(6, 1, 7, generator=rng)
    target = behaviors.target_CD.requires_grad_()
    _, *parts = sequence(behaviors, weight)
    slope = torch.autograd.grad(sum(part.sum() for part in parts), target, allow_unused=True)[0]
    assert len(parts) == (2 if target_aware else 1)
    if target_aware:
        assert torch.allclose(slope, parts[0]) and slope.abs().min() > 1e-3
    else:
        assert slope is None


def test_tr_target_item_moves_u_of_a_frozen_pool(tin: tuple[TwoStageModel, RequestBatch]) -> None:
    """At the whole model: other candidates over the same history, with the weights of the first."""
    model, batch = tin
    seen = watch(model)
    is_candidate = torch.arange(batch.features.stride()) >= batch.behaviors
    rows = {"item_id": 60, "category_id": 9}
    other = with_ids(batch, lambda key, ids: torch.where(is_candidate, (ids + 1) % rows[key], ids))
    with torch.no_grad():
        model(batch)
        behaviors, weight, (_, pooled, u) = seen["main"]
        model(other)
        again = model.branches["main"].sequence(seen["main"][0], weight)
    full = behaviors.selection.mask.any(1)
    assert torch.equal(again[1], pooled)
    assert ((again[2] - u)[full].abs().amax(1) > 1e-3).all()


def order_of(parts: list[Tensor], scaled: list[Tensor]) -> list[float]:
    """The power of the scale, found for every part."""
    return [float((b.abs().sum() / a.abs().sum()).log2()) for a, b in zip(parts, scaled, strict=True)]


def test_stacked_order_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all weights held, twice the behaviors' encodings give 2 ** l times u_l, bit for bit."""
    rng = drawing(3)
    windows = drawn_windows(rng, 4, 7, 6, full=True)
    weight = torch.rand(6, 1, 7, generator=rng)
    monkeypatch.setattr("trainer.model.read.stacked.softmax_weights", lambda score, mask: weight[:, 0] * mask)
    stacked = StackedTin(WIDTH, TimeEncoding(MARK_ROWS, WIDTH), 4)
    draw(stacked, rng)
    behaviors = drawn_behaviors(rng, windows, WIDTH)
    with torch.no_grad():
        parts = stacked(behaviors, weight)
        for name, table in stacked.time.tables.items():
            assert (getattr(windows.marks, name) > 0).all()  # row 0 is the target's
            table[1:] *= 2
        twice = stacked(replace(behaviors, value_SD=2 * behaviors.value_SD), weight)
    for order, (a, b) in enumerate(zip(parts, twice, strict=True)):
        assert torch.equal(b, 2**order * a) and a.abs().min() > 0
    assert order_of(parts, twice) == pytest.approx([0, 1, 2, 3, 4])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [False, True])
def test_stacked_first_layer_is_tin(form: str, whole: bool) -> None:
    rng = drawing(4)
    time = TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS)  # type: ignore[arg-type]
    draw(time, rng)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, 4, 7, 6), WIDTH, whole=whole)
    weight = torch.rand(6, 1, 7, generator=rng) * behaviors.selection.mask[:, None]
    target, _, u = TargetAttention(WIDTH, time)(behaviors, weight)
    stacked = StackedTin(WIDTH, time, 1)(behaviors, weight)
    assert len(stacked) == 2 and torch.equal(stacked[0], target)
    assert torch.allclose(stacked[1], u, atol=1e-5) and u.abs().max() > 0.1


def test_stacked_further_layers_attend_with_the_layer_below() -> None:
    """a_k = softmax(<e_k W_k, u W_q> / sqrt(D)), u' = (sum_k a_k e_k W_v) * u, one candidate at a time."""
    rng = drawing(5)
    stacked = StackedTin(WIDTH, TimeEncoding(MARK_ROWS, WIDTH), 3)
    draw(stacked, rng)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, 4, 7, 6), WIDTH)
    kept = behaviors.selection
    weight = torch.rand(6, 1, 7, generator=rng) * kept.mask[:, None]
    encoded = behaviors.value_SD[behaviors.place] + stacked.time.behaviors(kept.marks, behaviors.group_C)
    with torch.no_grad():
        parts = stacked(behaviors, weight)
        for c in range(6):
            e, u = encoded[c][kept.mask[c]], parts[1][c]
            for layer, maps in enumerate(stacked.further):
                query, key, value = (maps[name].weight for name in ("query", "key", "value"))
                alpha = ((e @ key.T) @ (query @ u) / WIDTH**0.5).softmax(0)
                u = (alpha @ (e @ value.T)) * u
                assert torch.allclose(parts[2 + layer][c], u, rtol=1e-4, atol=1e-5)
