"""Time tables that scores and values share (TIN, TdPE), and time beside the features (DARE's code)."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import (
    FORMS,
    GROUPS,
    MARK_ROWS,
    batch_of,
    draw,
    drawing,
    model_of,
    preset,
    small_log,
    watch,
)
from trainer.model.branch import Branch
from trainer.model.read.sequence import Behaviors
from trainer.model.time import Form, Marks, TimeEncoding, group_rows
from trainer.model.time_vectors import EncodingBias, TimeVectors

WIDTH, MARKS = 6, ("position", "age")
CONCAT = ("model.time=concat", "model.time_tables=group", "model.time_dim=3")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("time") / "log")


def read_of(model: nn.Module, config: object) -> tuple[Branch, Behaviors, Tensor, list[Tensor]]:
    """The main branch, what it read and by which weights, and what it made of that."""
    seen = watch(model)  # type: ignore[arg-type]
    model(batch_of(config))  # type: ignore[arg-type]
    return model.branches["main"], *seen["main"]  # type: ignore[index]


def time_parameters(model: nn.Module) -> list[str]:
    """Names in the state dict of all that has a row for each mark."""
    return [n for n in model.state_dict() if n.split(".")[-1] in MARKS or n.endswith("targets")]


def test_tin_equals_the_paper_with_one_table(log: Path) -> None:
    """e + p and v + p from one table: softmax of their products, and (sum w (e + p)) * (v + p)."""
    config = preset("tin", log)
    model = model_of(config)
    _, behaviors, _, parts = read_of(model, config)
    assert time_parameters(model) == [f"branches.main.sequence.time.tables.{name}" for name in sorted(MARKS)]
    tables = {name: model.state_dict()[f"branches.main.sequence.time.tables.{name}"] for name in MARKS}
    selection, checked = behaviors.windows.of_candidates(), 0
    for c in range(len(behaviors.target_CD)):
        seen = selection.mask[c]
        target = behaviors.target_CD[c] + sum(tables[name][0] for name in MARKS)
        at = {name: getattr(selection.marks, name)[c][seen].long() for name in MARKS}
        row = behaviors.place_CK[c][seen]
        encoded = behaviors.value_SD[row] + sum(tables[name][at[name]] for name in MARKS)
        weight = (encoded @ target * target.numel() ** -0.5).softmax(0)
        pooled = weight @ encoded
        assert torch.allclose(
            torch.stack([part[c] for part in parts]),
            torch.stack([target, pooled, pooled * target]),
            atol=1e-4,
        )
        checked += int(seen.sum()) > 3
    assert checked > 5


@pytest.mark.parametrize(
    ("name", "kept"), [("tin", 2), ("stacked_tin", 2), ("tdpe", 3), ("dpe", 1), ("dsi_tin", 4)]
)
def test_scores_and_values_of_one_group_have_one_parameter(log: Path, name: str, kept: int) -> None:
    """In the state dict once, and both stages' gradients reach it: rows of targets and of behaviors."""
    config = preset(name, log)
    model = model_of(config)
    apart = model_of(preset(name, log, "model.time_tables=stage"))
    assert len(time_parameters(model)) == kept < len(time_parameters(apart))
    branch, behaviors, weight, _ = read_of(model, config)
    time = branch.sequence.time
    table = time.tables["age"]
    by_scores = torch.autograd.grad((weight * torch.randn_like(weight)).sum(), table, retain_graph=True)[0]
    pooled = branch.sequence(behaviors, weight.detach())
    by_values = torch.autograd.grad(sum((part * torch.randn_like(part)).sum() for part in pooled), table)[0]
    for gradient in (by_scores, by_values):
        rows = (
            gradient.view(time.groups if time.form == "joint" else 1, -1, gradient.shape[1]).abs().sum((0, 2))
        )
        assert rows[1:].max() > 0
        # The target's own place, unless its side is looked up by its group.
        assert (rows[0] > 0) == (time.form != "target")
    if time.form == "target":
        assert torch.autograd.grad(branch.weigh(behaviors).square().sum(), time.targets)[0].abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_score_of_encodings_alone_is_their_product(form: Form) -> None:
    groups = 1 if form == "shared" else GROUPS
    encoding = TimeEncoding(MARK_ROWS, WIDTH, form, groups)
    bias = EncodingBias(encoding, WIDTH)
    assert not list(bias.parameters()) and all(table.abs().max() > 0 for table in encoding.parameters())
    draw(encoding, drawing(1))
    shape = (5, 7)
    marks = Marks(*(torch.randint(0, rows, shape, generator=drawing(2)) for rows in MARK_ROWS.values()))
    group_C = torch.randint(0, groups, (5,), generator=drawing(3))
    target_CD = encoding.target(torch.zeros(5, WIDTH), group_C)
    expected = torch.zeros(shape)
    for c, k in product(range(5), range(7)):
        for name, rows in MARK_ROWS.items():
            mark = getattr(marks, name)[c, k]
            row = group_rows(mark[None, None], group_C[c : c + 1], rows)[0, 0] if form == "joint" else mark
            expected[c, k] += target_CD[c] @ encoding.tables[name][row] * WIDTH**-0.5
    assert torch.allclose(bias(marks, group_C), expected, atol=1e-5)
    assert float(expected.abs().max()) <= bias.most() + 1e-5


def roles_of(branch: Branch) -> dict[str, TimeVectors]:
    """Who looks time up where: query, key, target, value."""
    (query, key), (target, value) = branch.scorer.bias.vectors, branch.sequence.time.vectors  # type: ignore[union-attr]
    return {"query": query, "key": key, "target": target, "value": value}


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("twin_paper_dare", 1),
        ("twin_proj", 1),
        ("dare", 2),
        ("dare_paper", 2),
        ("twin_3e", 3),
        ("twin_4e", 4),
    ],
)
def test_time_beside_the_features_is_that_of_dares_code(log: Path, name: str, tables: int) -> None:
    """A table for each group; each role of `TWIN w/ proj.` maps it; scores scale features and time apart."""
    config = preset(name, log, *CONCAT)
    model = model_of(config).eval()
    branch, behaviors, weight, parts = read_of(model, config)
    vectors, marks = roles_of(branch), [n for n in MARKS if n == "position" or config.model.age]
    assert len({id(each) for each in vectors.values()}) == tables
    assert len(time_parameters(model)) == tables * len(marks)
    bias, sequence, scorer = branch.scorer.bias, branch.sequence, branch.scorer  # type: ignore[union-attr]
    maps = {
        "query": bias.query,
        "key": bias.key,
        "target": sequence.time.of_target,
        "value": sequence.time.of_value,
    }
    of_features = {
        "query": scorer.query,
        "key": scorer.key,
        "target": sequence.target,
        "value": sequence.value,
    }
    assert (maps["query"] is not None) == (name == "twin_proj")

    def features(role: str, vector: Tensor) -> Tensor:
        return vector if of_features[role] is None else of_features[role](vector[None])[0]

    def time(role: str, mark: str, row: int) -> Tensor:
        vector = vectors[role].tables[mark][row]
        return vector if maps[role] is None else maps[role][mark].weight @ vector

    raw, kept = behaviors.raw, behaviors.selection
    for c in range(0, len(kept.index), 5):
        seen = [k for k in range(kept.index.shape[1]) if kept.mask[c, k]]
        scores, values = [], []
        for k in seen:
            query, key = features("query", raw.query_CD[c]), features("key", raw.key_ND[kept.index[c, k]])
            score, columns = query @ key * query.numel() ** -0.5, []
            for mark in marks:
                row = int(getattr(kept.marks, mark)[c, k])
                score = score + time("query", mark, 0) @ time("key", mark, row) * 3**-0.5
                columns.append(time("value", mark, row))
            scores.append(score)
            values.append(torch.cat([features("value", behaviors.value_SD[behaviors.place[c, k]]), *columns]))
        if not seen:
            continue
        expected = torch.stack(scores).softmax(0)
        assert torch.allclose(weight[c, 0][kept.mask[c]], expected, atol=1e-5)
        target = torch.cat(
            [features("target", behaviors.target_CD[c]), *(time("target", m, 0) for m in marks)]
        )
        pooled = expected @ torch.stack(values)
        expected_parts = torch.stack([target, pooled, target * pooled])
        assert torch.allclose(torch.stack([part[c] for part in parts]), expected_parts, atol=1e-4)


def test_with_tables_by_stage_each_stage_has_one(log: Path) -> None:
    branch = model_of(preset("twin_4e", log, *CONCAT, "model.time_tables=stage")).branches["main"]
    assert set(branch.times) == {"of_scores", "of_values"}
    vectors = roles_of(branch)
    assert vectors["query"] is vectors["key"] and vectors["target"] is vectors["value"] is not vectors["key"]


def test_attention_that_a_task_owns_has_the_tables_that_scores_alone_read(log: Path) -> None:
    dare, twin = (
        model_of(preset(name, log, *CONCAT)).branches["main"] for name in ("dare", "twin_paper_dare")
    )
    assert (
        dare.times["attention"] in dare.of_attention and dare.times["representation"] not in dare.of_attention
    )
    assert twin.times["shared"] not in twin.of_attention
