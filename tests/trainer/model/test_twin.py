"""TWIN and its relatives: one score for both stages, cross features, heads, and what each table decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.models import (
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
)
from tests.trainer.model.retrieve.test_search import walk
from trainer.model.branch import CrossBias
from trainer.model.read.target_attention import TargetAttention
from trainer.model.time import TimeEncoding
from trainer.model.windows import first_ids

WIDTH = 6


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("twin") / "log")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with an action of behaviors alone, among other things."""
    rows = enrich(random_rows(4, Shape(users=8)), 1)
    return write_log(tmp_path_factory.mktemp("twin") / "rich", {"train": rows}, rich=True)


@pytest.mark.parametrize("name", ["twin", "dare", "twin_proj", "tdpe", "dpe", "stacked_tin", "dsi_tin"])
def test_t1_presets_search_by_the_scores_that_they_attend_with(log: Path, name: str) -> None:
    """Every branch that searches keeps the best of what its own stage two would score."""
    config = preset(name, log)
    model, batch = model_of(config), batch_of(config)
    with torch.no_grad():
        for branch, found in stage_one(model, batch).items():
            if model.branches[branch].settings.search != "dot":
                continue
            everything, k = found.windows.of_candidates(), config.model.k
            score = model.branches[branch].scorer.of_kept(found.vectors, everything)
            score = score.masked_fill(~everything.mask[:, None], -torch.inf)
            assert (everything.mask.sum(1) > k).any()
            weight = model.branches[branch].weigh(found)
            for c, index in enumerate(found.selection.index):
                best = walk(score[c], k)
                mask = found.selection.mask[c]
                assert index[mask].tolist() == everything.index[c, best].tolist()
                assert torch.allclose(weight[c][:, mask], score[c][:, best].softmax(1), atol=1e-5)


CROSS = ("groups.cross.dim=8", 'groups.cross.features=["action"]', "model.roles.cross=cross")


def test_t4_a_planted_cross_signal_decides_what_is_kept(rich: Path) -> None:
    """Action 3 scores high: it is kept before anything else, and not once the bias is taken away."""
    config = preset("twin", rich, 'groups.shared.features=["item_id", "category_id"]', *CROSS)
    model, batch = model_of(config), batch_of(config)
    branch, k = model.branches["main"], config.model.k
    with torch.no_grad():
        table = model.collections["cross"].cross__action
        table.zero_()
        table[3] = 100 * branch.cross.compress / branch.cross.compress.square().sum()
        action = first_ids(batch, "action")[0]
        planted = model.search(batch)["main"]
        branch.cross.beta.zero_()
        without = model.search(batch)["main"]
    window = stage_one(model, batch)["main"].windows.of_candidates()
    available = ((action[window.index] == 3) & window.mask).sum(1)
    held, held_without = (((action[kept.index] == 3) & kept.mask).sum(1) for kept in (planted, without))
    assert torch.equal(held, available.clamp(max=k)) and (available >= k).any()
    assert held_without.sum() < 0.8 * held.sum()


def test_t4_the_cross_bias_weighs_what_is_kept(rich: Path) -> None:
    """In stage two as in stage one: the same action takes the attention of whatever is kept beside it."""
    config = preset("twin", rich, 'groups.shared.features=["item_id", "category_id"]', "model.k=40", *CROSS)
    model, batch = model_of(config), batch_of(config)
    branch = model.branches["main"]
    with torch.no_grad():
        table = model.collections["cross"].cross__action
        table.zero_()
        table[3] = 100 * branch.cross.compress / branch.cross.compress.square().sum()
        found = stage_one(model, batch)["main"]
        weight = branch.weigh(found)
    mine = (first_ids(batch, "action")[0][found.selection.index] == 3) & found.selection.mask
    some = mine.any(1) & (mine != found.selection.mask).any(1)
    assert some.any()
    assert ((weight * mine[:, None]).sum(2)[some] > 0.999).all()


def test_t5_cross_bias_is_a_dense_map_with_nothing_off_its_blocks() -> None:
    """(K_c W^c) beta, W^c block-diagonal: each feature's part compressed to one scalar."""
    widths, rng = (4, 8, 3), drawing(1)
    cross = CrossBias(widths)
    draw(cross, rng)
    dense = torch.block_diag(*(part[:, None] for part in cross.compress.detach().split(widths)))
    vectors = torch.randn(9, sum(widths), generator=rng)
    assert dense.shape == (15, 3)
    assert torch.allclose(cross(vectors), vectors @ dense @ cross.beta, atol=1e-5)
    assert cross.beta.unique().numel() == 3


@pytest.mark.parametrize("whole", [False, True])
def test_value_maps_after_pooling_equal_value_maps_before(whole: bool) -> None:
    """sum_k w_k (W_h e_k) = W_h sum_k w_k e_k for every head, then one map unites the heads."""
    rng, heads = drawing(2), 3
    sequence = TargetAttention(WIDTH, TimeEncoding(MARK_ROWS, WIDTH), heads=heads)
    draw(sequence, rng)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, 4, 7, 6), WIDTH, whole=whole)
    weight = torch.rand(6, heads, 7, generator=rng) * behaviors.selection.mask[:, None]
    encoded = behaviors.value_SD[behaviors.selection.index] + sequence.time.behaviors(
        behaviors.selection.marks, behaviors.group_C
    )
    projected = sequence.per_head(encoded).unflatten(2, (heads, WIDTH))
    pooled = torch.einsum("chk,ckhd->chd", weight, projected).flatten(1)
    target, united, product = sequence(behaviors, weight)
    assert torch.allclose(united, sequence.unite(pooled), atol=1e-5) and united.abs().max() > 0.1
    assert torch.allclose(product, target * united)


@pytest.mark.parametrize("branch", ["main", "recent"])
def test_values_are_the_unsplit_k_of_the_paper(rich: Path, branch: str) -> None:
    """softmax(alpha) K W^v for every head, K = [K_h | K_c]; then W^o. `recent` keeps whole windows."""
    config = preset("twin", rich, 'groups.shared.features=["item_id", "category_id"]', *CROSS)
    model, batch = model_of(config), batch_of(config)
    seen = watch(model)
    with torch.no_grad():
        draw(model.branches[branch].sequence.per_head, drawing(4))
        model(batch)
        cross_ND = model.lookups({"cross": model.collections["cross"](batch.features)})["cross"]
        behaviors, weight, parts = seen[branch]
        sequence, kept = model.branches[branch].sequence, behaviors.selection
        inherent = behaviors.value_SD[behaviors.place_CK] + sequence.time.behaviors(
            kept.marks, behaviors.group_C
        )
        unsplit_CKD = torch.cat([inherent, cross_ND[kept.index]], dim=2)
        values = sequence.per_head(unsplit_CKD).unflatten(2, (config.model.heads, -1))
        united = sequence.unite(torch.einsum("chk,ckhd->chd", weight, values).flatten(1))
    assert unsplit_CKD.shape[2] == 24 and (weight.sum(2) > 0.99).all(1).any()
    assert torch.allclose(parts[1], united, atol=1e-4)


def test_cross_vectors_of_known_behaviors_are_those_that_were_looked_up(rich: Path) -> None:
    """A server knows them beforehand, as all else that follows from behaviors alone."""
    config = preset("twin", rich, 'groups.shared.features=["item_id", "category_id"]', *CROSS)
    model, batch = model_of(config), batch_of(config)
    branch, n = model.branches["main"], batch.behaviors
    with torch.no_grad():
        vectors = model.lookups({name: model.collections[name](batch.features) for name in model.first})
        known = branch.of_behaviors({name: vectors[name][:n] for name in branch.behavior_groups})
        windows = stage_one(model, batch)["main"].windows
        of_candidates = {name: vectors[name][n:] for name in vectors}
        found = branch.retrieve(batch, of_candidates, windows, known)
        plain = branch.retrieve(batch, vectors, windows)
    assert torch.equal(found.raw.beside_ND, plain.raw.beside_ND) and plain.raw.beside_ND.shape == (n, 8)
    assert torch.equal(found.raw.cross_N, plain.raw.cross_N)


def test_cross_features_of_scores_alone_leave_values_as_they_are(rich: Path) -> None:
    words = ('groups.shared.features=["item_id", "category_id"]', *CROSS)
    branch = model_of(preset("twin", rich, *words, 'model.cross_in=["scores"]')).branches["main"]
    assert branch.cross is not None and branch.sequence.per_head.in_features == 16
    branch = model_of(preset("twin", rich, *words, 'model.cross_in=["values"]')).branches["main"]
    assert branch.cross is None and branch.sequence.per_head.in_features == 24


@pytest.mark.parametrize(
    ("name", "searching", "other"),
    [
        ("twin_3e", ["query", "key"], ["representation"]),
        ("twin_4e", ["query", "key"], ["target", "value"]),
        ("twin_paper_dare", ["shared"], []),
    ],
)
def test_g2_only_attention_tables_change_what_is_retrieved(
    log: Path, name: str, searching: list[str], other: list[str]
) -> None:
    config = preset(name, log)
    model, batch = model_of(config), batch_of(config)
    assert set(model.collections) == {*searching, *other}
    before = model.search(batch)["main"].index

    def redrawn(group: str) -> Tensor:
        kept = {n: p.detach().clone() for n, p in model.collections[group].named_parameters()}
        for parameter in model.collections[group].parameters():
            nn.init.normal_(parameter, generator=drawing(6))
        found = model.search(batch)["main"].index
        model.collections[group].load_state_dict(kept)
        return found

    for group in other:
        assert torch.equal(redrawn(group), before)
    for group in searching:
        assert not torch.equal(redrawn(group), before)
