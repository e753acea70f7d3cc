"""MUSE: contents are searched by cosine and never trained; scores mix them with ids; cosines are counted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embeddings.errors import ConfigError
from tests.helpers.launching import ROOT
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
    with_ids,
)
from tests.helpers.stretches import Array, mapped, numbers
from trainer.assemble import resolve_groups
from trainer.data.similarity.directions import LENGTH, directions_of
from trainer.data.similarity.given_rows import rows_of_vectors
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.model.frame import TwoStageModel
from trainer.model.read.muse import Muse
from trainer.model.read.sequence import Behaviors
from trainer.model.time import TimeEncoding
from trainer.run_config import Config, load_config

WIDTH, TIERS, CONTENT = 6, 5, 4


def made(seed: int) -> Muse:
    model = Muse(WIDTH, TIERS, TimeEncoding(MARK_ROWS, WIDTH))
    draw(model, drawing(seed))
    return model


def with_directions(behaviors: Behaviors) -> Behaviors:
    """With contents as a file of vectors gives them: exact, and of length 1 but for that."""
    for part in (behaviors.raw.query_CD, behaviors.raw.key_ND):
        part.copy_(torch.from_numpy(directions_of(part.numpy()).astype(np.float32) / LENGTH))
    return behaviors


def time_of(model: Muse, marks: dict[str, int]) -> Array:
    return np.sum([numbers(model.time.tables[name][mark]) for name, mark in marks.items()], axis=0)


def reference(model: Muse, behaviors: Behaviors) -> tuple[Array, Array]:
    """What is pooled, and the histogram, one candidate and one behavior at a time."""
    kept, pooled, tiers = behaviors.selection, [], []
    for c in range(kept.index.shape[0]):
        query = mapped(
            numbers(behaviors.target_CD[c]) + time_of(model, dict.fromkeys(MARK_ROWS, 0)), model.query
        )
        scores, values, counts = [], [], np.zeros(TIERS)
        for k in range(kept.index.shape[1]):
            if not kept.mask[c, k]:
                continue
            content = numbers(behaviors.raw.key_ND[kept.index[c, k]])
            cosine = float(numbers(behaviors.raw.query_CD[c]) @ content)
            marks = {name: int(getattr(kept.marks, name)[c, k]) for name in MARK_ROWS}
            value = numbers(behaviors.value_SD[behaviors.place_CK[c, k]]) + time_of(model, marks)
            score = query @ mapped(value, model.key) / math.sqrt(WIDTH)
            one, two, three = numbers(model.mix)
            scores.append(one * score + two * cosine + three * score * cosine)
            values.append(mapped(value, model.value))
            counts[[n for n in range(TIERS) if cosine >= -1 + n * 2 / TIERS][-1]] += 1
        weights = np.exp(np.array(scores) - max(scores, default=0))
        pooled.append(weights / weights.sum() @ np.array(values) if values else np.zeros(WIDTH))
        tiers.append(np.log1p(counts) * numbers(model.tier_scale))
    return np.array(pooled), np.array(tiers)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 8), candidates=st.integers(1, 4))
def test_weights_and_tiers_equal_one_pair_at_a_time(seed: int, width: int, candidates: int) -> None:
    """With empty windows and padding, which no tier counts."""
    rng = drawing(seed)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, 3, width, candidates), WIDTH, CONTENT)
    behaviors, model = with_directions(behaviors), made(seed)
    with torch.no_grad():
        target, pooled, product, tiers = model(behaviors, None)
    assert torch.equal(product, target * pooled)
    for mine, theirs in zip((pooled, tiers), reference(model, behaviors), strict=True):
        assert np.allclose(numbers(mine), theirs, atol=1e-5)


def test_bounds_of_tiers() -> None:
    """A tier has its lower bound, and the last one 1 as well; what rounding adds to 1 changes nothing."""
    model = Muse(WIDTH, 4, TimeEncoding({}, WIDTH))
    cosine = torch.tensor([[-1.0, -0.5, -0.51, 0.0, 0.5, 1.0, 1.0 + 1e-6, 0.2]])
    mask = torch.tensor([[True] * 7 + [False]])
    found = model.histogram(cosine, mask).expm1()
    assert torch.allclose(found, torch.tensor([[2.0, 1.0, 1.0, 3.0]]))


def test_what_weights_depend_on() -> None:
    """Without contents it is plain target attention; with contents alone, ids do not matter."""
    rng, model = drawing(5), made(5)
    behaviors = with_directions(drawn_behaviors(rng, drawn_windows(rng, 3, 6, 5, full=True), WIDTH, CONTENT))
    score, cosine = torch.randn(5, 6, generator=rng), torch.rand(5, 6, generator=rng)
    with torch.no_grad():
        model.mix.copy_(torch.tensor([1.0, 0.0, 0.0]))
        assert torch.equal(model.mixed(score, cosine), score)
        before = model(behaviors, None)[1]
        behaviors.raw.key_ND.neg_()
        assert torch.equal(model(behaviors, None)[1], before)
        model.mix.copy_(torch.tensor([0.0, 2.0, 0.0]))
        assert torch.equal(model.mixed(score, cosine), 2 * cosine)


def built(folder: Path) -> tuple[Config, TwoStageModel]:
    config = preset("muse", small_log(folder / "log"))
    return config, model_of(config)


def test_a_search_keeps_the_nearest_contents_and_no_id_embedding_has_a_say(tmp_path: Path) -> None:
    config, model = built(tmp_path)
    batch = batch_of(config)
    before = model.search(batch)["main"]
    content = model.collections["content"].state_dict()
    (rows,) = content.values()
    ids = batch.features["item_id"].values()
    of_behaviors, of_candidates = ids[: batch.behaviors], ids[batch.behaviors :]
    narrow = False
    for c, request in enumerate(batch.candidate_request.tolist()):
        window = range(int(batch.window_start[request]), int(batch.window_end[request]))
        cosine = rows[of_behaviors[window.start : window.stop]].double() @ rows[of_candidates[c]].double()
        # Of equal ones the most recent.
        order = sorted(range(len(window)), key=lambda j: (-float(cosine[j]), -j))
        wanted = sorted(window[j] for j in order[: config.model.k])
        assert sorted(before.index[c][before.mask[c]].tolist()) == wanted
        narrow |= len(window) > config.model.k
    assert narrow
    with torch.no_grad():
        for weight in model.collections["representation"].parameters():
            weight.copy_(torch.randn(weight.shape, generator=drawing(1)))
    assert torch.equal(model.search(batch)["main"].index, before.index)


def test_training_leaves_contents_as_the_file_has_them(tmp_path: Path) -> None:
    """No gradient reaches them, even where gradients reach all other tables."""
    config, model = built(tmp_path)
    groups = model.lookups.groups
    file_rows, counts = rows_of_vectors(
        config.data, read_manifest(config.data.log), groups["content"], "content"
    )
    model.train()(batch_of(config)).logits.square().sum().backward()
    (rows,) = model.collections["content"].parameters()
    assert torch.equal(rows, file_rows) and rows.grad is None
    assert all(weight.grad is not None for weight in model.collections["representation"].parameters())
    # An item without a vector has zeros, every other one the length 1.
    length = rows.detach().norm(dim=1)
    assert counts.used == int((length > 0).sum()) < len(rows) - 1
    assert torch.allclose(length[length > 0], torch.ones(1), atol=1e-3)
    products = (rows.detach() @ rows.detach().T) * 2.0**24
    assert torch.equal(products, products.round()) and float(products.max()) <= 2**24


def test_an_item_without_a_content_is_near_nothing(tmp_path: Path) -> None:
    config, model = built(tmp_path)
    batch = batch_of(config)

    def to_seven(key: str, ids: Tensor) -> Tensor:
        # The seventh item's vector is one of zeros.
        return torch.full_like(ids, 7) if key == "item_id" else ids

    sequence, seen = model.branches["main"].sequence, []
    sequence.register_forward_hook(lambda _, __, parts: seen.append(parts))
    with torch.no_grad():
        model(with_ids(batch, to_seven))
    counts = (seen[0][3] / sequence.tier_scale.detach()).expm1()
    middle = sequence.tiers // 2
    assert counts[:, middle].max() > 0 and float(counts.sum()) == pytest.approx(
        float(counts[:, middle].sum())
    )


REFUSALS = [
    (["groups.content.vectors=other"], r"groups.content.vectors = 'other': \[data.vectors\] has content"),
    (["model.roles.attention_target=representation"], 'sequence = "muse" compares contents'),
    (["groups.content.sets=2"], "vectors are the rows of one table"),
    (['groups.content.features=["item_id", "category_id"]'], "vectors are the rows of one table"),
    (["groups.content.dtype=fp16"], "vectors are the rows of one table"),
    (["ids.item_id.capacity=100"], r"groups.content.vectors: ids.item_id gives rows to ids as they come"),
    (["groups.representation.init_like=content"], "whose rows are pre-trained and not drawn"),
    (
        ['model.time_in=["scores", "values"]'],
        r'searches by contents alone .* it takes time_in = \["values"\]',
    ),
    (["model.projection=heads"], r'it takes projection = "none"'),
    (["model.weights=sigmoid"], r'it takes weights = "softmax"'),
    (["model.attention_owner=click"], "it takes no attention_owner"),
]


@pytest.mark.parametrize(("words", "message"), REFUSALS)
def test_groups_that_are_no_contents_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/muse.toml", words)


def test_what_would_train_contents_is_said_to_have_no_effect(tmp_path: Path) -> None:
    """A group of pre-trained rows takes settings of trained ones; none of them is dropped in silence."""
    words = ["groups.content.learning_rate=0.3", "groups.content.init_scale=0.1"]
    phase = 'phases=[{name="one", passes=1, freeze=["groups.content"], table_learning_rates={content=0.1}}]'
    config = preset("muse", small_log(tmp_path / "log"), *words, phase)
    manifest = read_manifest(config.data.log)
    (line,) = [
        each for each in remarks(config, manifest, resolve_groups(config, manifest)) if "content" in each
    ]
    for part in (
        "groups.content.learning_rate (its rows are pre-trained",
        "groups.content.init_scale (its rows are pre-trained",
        "phases.0.freeze = 'groups.content' (its rows are pre-trained",
        "phases.0.table_learning_rates.content (its rows are pre-trained",
    ):
        assert part in line
    lines = remarks(load_config(ROOT / "configs/muse.toml"), manifest, resolve_groups(config, manifest))
    assert not any("content" in each for each in lines)


def test_files_of_other_vectors_are_refused(tmp_path: Path) -> None:
    config, model = built(tmp_path)
    group, manifest = model.lookups.groups["content"], read_manifest(config.data.log)
    file = tmp_path / "wide.parquet"
    pq.write_table(pa.table({"item_id": [1, 2], "vector": [[1.0, 2.0], [2.0, 1.0]]}), file)

    def data_with(**changes: object) -> Config:
        section = config.data.vectors["content"].model_copy(update=changes)
        return config.model_copy(
            update={"data": config.data.model_copy(update={"vectors": {"content": section}})}
        )

    with pytest.raises(ConfigError, match=r"vectors of 2 numbers; set groups.content.dim = 2"):
        rows_of_vectors(data_with(file=file).data, manifest, group, "content")
    with pytest.raises(ConfigError, match="vectors of category_id, and the group has item_id"):
        rows_of_vectors(data_with(key="category_id").data, manifest, group, "content")
