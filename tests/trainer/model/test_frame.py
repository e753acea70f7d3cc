"""The block model against a per-sample reference in plain nn.Embedding, and its isolation properties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.groups import TableGroup
from embeddings.lookup.compile import make_collection
from embeddings.lookup.jagged import one_id_bags
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.logs import FEATURES, Shape, random_rows, write_log
from trainer.assemble import build_model
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.model.frame import TwoStageModel
from trainer.model.heads.head import HeadInput
from trainer.objectives.bce import loss_sum
from trainer.objectives.losses import rank_loss
from trainer.run_config import Config, build_groups

DARE = {"attention": {"dim": 4, "init_scale": 1.0}, "representation": {"dim": 8, "init_scale": 1.0}}
TWIN = {"shared": {"dim": 4, "init_scale": 1.0}}
SUMMED = {"dim": 8, "init_scale": 1.0, "fusion": "sum"}
SHARED_ROLES = dict.fromkeys(
    ("attention_target", "attention_behavior", "representation_target", "representation_behavior"), "shared"
)
FOUR = {name: {"dim": 4, "init_scale": 1.0} for name in ("at", "ab", "rt", "rb")}
FOUR_ROLES = dict(zip(SHARED_ROLES, FOUR, strict=True))


def config(
    log: Path, groups: dict = DARE, roles: dict | None = None, history_length: int = 8, **model
) -> Config:  # type: ignore[type-arg, no-untyped-def]
    tree = {
        "data": {"log": str(log), "history_length": history_length, "batch_candidates": 60, "prefetch": 0},
        "groups": groups,
        "model": {"k": 3, "hidden": [8], **model, **({"roles": roles} if roles else {})},
    }
    return Config.model_validate(tree)


def model_of(config: Config, trainable: bool = True) -> tuple[TwoStageModel, dict[str, TableGroup]]:
    """Plain tables with trained-looking time tables (zeros would hide mistakes)."""
    groups = build_groups(config, FEATURES)
    weights = {g.table_name(t): torch.empty(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, trainable) for name, group in groups.items()}
    model = build_model(config, groups, collections, resolve_tasks({}, ["click"]))
    initialise_unsharded(model, groups, config.train.seed)
    rng = torch.Generator().manual_seed(3)
    main = model.branches["main"]
    for module in (main.scorer.bias, main.sequence.time):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5, generator=rng)
    return model, groups


def batch_of(config: Config, split: str = "train") -> RequestBatch:
    return next(iter(SequenceLogReader(config.data, split, FEATURES, seed=1).steps())).batch


def one_sample(
    config: Config, model: TwoStageModel, groups: dict[str, TableGroup], batch: RequestBatch, c: int
) -> Tensor:
    """Logit of candidate c by the textbook, with plain indexing into nn.Embedding-like tables."""
    roles, n = config.model.roles, batch.behaviors
    r = int(batch.candidate_request[c])
    window = list(range(int(batch.window_start[r]), int(batch.window_end[r])))

    def vector(role: str, bag: int) -> Tensor:
        group = groups[getattr(roles, role)]
        tables = model.collections[group.name]
        rows = [
            nn.functional.embedding(
                batch.features[t.feature].values()[bag : bag + 1], getattr(tables, group.table_name(t))
            )[0]
            for t in group.tables
        ]
        return torch.stack(rows).sum(0) if group.fusion == "sum" else torch.cat(rows)

    def bucket(i: int) -> int:
        age = float(batch.request_time[r] - batch.behavior_time[i])
        return min(63, 1 + int(2 * torch.log2(torch.tensor(max(age, 1.0), dtype=torch.float64)).item()))

    query = vector("attention_target", n + c)
    times = {i: (int(batch.window_end[r]) - i, bucket(i)) for i in window}
    main = model.branches["main"]
    bias, time = main.scorer.bias.tables, main.sequence.time.tables
    score = {
        i: query @ vector("attention_behavior", i) / query.numel() ** 0.5
        + bias["position"][times[i][0]]
        + bias["age"][times[i][1]]
        for i in window
    }
    kept = sorted(window, key=lambda i: -float(score[i].detach()))[: config.model.k]
    target = vector("representation_target", n + c) + time["position"][0] + time["age"][0]
    pooled = torch.zeros_like(target)
    if kept:
        values = torch.stack([score[i] for i in kept])
        weights = values.softmax(0) if config.model.weights == "softmax" else values.sigmoid()
        for w, i in zip(weights, kept, strict=True):
            pooled = pooled + w * (
                vector("representation_behavior", i)
                + time["position"][times[i][0]]
                + time["age"][times[i][1]]
            )
    return model.head(HeadInput({"": [x[None] for x in (target, pooled, target * pooled)]}, [])).logits[0]


CASES = {
    "dare": (DARE, None, {}),
    "dare, pointwise": (DARE, None, {"weights": "sigmoid"}),
    "twin": (TWIN, SHARED_ROLES, {}),
    "four groups": (FOUR, FOUR_ROLES, {}),
    "k beyond the history": (DARE, None, {"k": 30}),
    "features summed": (
        {"attention": DARE["attention"] | {"fusion": "sum"}, "representation": SUMMED},
        None,
        {},
    ),
    "features summed, one group": ({"shared": SUMMED}, SHARED_ROLES, {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_blocks_equal_one_sample_at_a_time(tmp_path: Path, case: tuple, lookup: str) -> None:  # type: ignore[type-arg]
    """Forward, and all weights after one SGD step on the loss."""
    groups, roles, changes = case
    log = write_log(tmp_path / "log", {"train": random_rows(5)})
    settings = config(log, groups, roles, lookup=lookup, **changes)
    batch = batch_of(settings)
    fast, _ = model_of(settings)
    slow, tables = model_of(settings)
    logits = fast(batch).logits
    reference = torch.stack([one_sample(settings, slow, tables, batch, c) for c in range(batch.candidates)])
    assert torch.allclose(logits, reference, atol=1e-5)
    for model, output in ((fast, logits), (slow, reference)):
        rank_loss(
            loss_sum(output, batch.labels, batch.weight), batch.step_candidates, 1, counted=True
        ).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    pairs = list(zip(fast.named_parameters(), slow.named_parameters(), strict=True))
    assert len(pairs) > 8
    for (name, a), (_, b) in pairs:
        assert torch.allclose(a, b, atol=1e-5), name


def test_bag_collection_equals_plain_tables(tmp_path: Path) -> None:
    settings = config(tmp_path)
    groups = build_groups(settings, FEATURES)
    group = groups["attention"]
    fbgemm = make_collection(group, torch.device("cpu"))
    weights = {group.table_name(t): torch.randn(t.rows, t.dim) for t in group.tables}
    fbgemm.load_state_dict({f"embedding_bags.{name}.weight": w for name, w in weights.items()})
    ids = torch.stack([torch.randint(0, rows, (50,)) for rows in FEATURES.values()])
    kjt = one_id_bags(list(FEATURES), ids)
    assert torch.equal(fbgemm(kjt).values(), PlainBagCollection(group, weights)(kjt).values())


@pytest.mark.parametrize("groups, roles", [(DARE, None), (TWIN, SHARED_ROLES), (FOUR, FOUR_ROLES)])
def test_full_lookup_equals_selected_lookup(tmp_path: Path, groups: dict, roles: dict | None) -> None:  # type: ignore[type-arg]
    log = write_log(tmp_path / "log", {"train": random_rows(6)})
    results = []
    for lookup in ("full", "selected"):
        settings = config(log, groups, roles, lookup=lookup)
        model, _ = model_of(settings)
        batch = batch_of(settings)
        logits = model(batch).logits
        loss_sum(logits, batch.labels, batch.weight).backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (full, full_grads), (selected, selected_grads) = results
    assert torch.equal(full, selected)
    for name, grad in full_grads.items():
        assert torch.allclose(grad, selected_grads[name], atol=1e-6), name


def test_selected_lookup_asks_for_the_kept_rows_only(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log", {"train": random_rows(6, Shape(behaviors=200, requests=2, candidates=2))}
    )
    settings = config(log, history_length=200)
    model, _ = model_of(settings)
    seen: dict[str, int] = {}
    for name, collection in model.collections.items():
        collection.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].stride()}))
    batch = batch_of(settings)
    model(batch)
    assert seen["attention"] == batch.behaviors + batch.candidates
    assert batch.candidates < seen["representation"] <= batch.candidates * (1 + settings.model.k)
    assert seen["representation"] < seen["attention"]


def gradients(model: TwoStageModel, group: str) -> Tensor:
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else p.flatten() * 0
            for p in model.collections[group].parameters()
        ]
    )


def test_g1_scores_train_attention_tables_only_and_values_representation_tables_only(tmp_path: Path) -> None:
    """DARE's isolation: no gradient reaches one group through the other's path."""
    log = write_log(tmp_path / "log", {"train": random_rows(7)})
    settings = config(log)
    batch = batch_of(settings)

    def run(detach: Callable[[TwoStageModel], None]) -> TwoStageModel:
        model, _ = model_of(settings)
        detach(model)
        loss_sum(model(batch).logits, batch.labels, batch.weight).backward()
        return model

    def detach_scores(model: TwoStageModel) -> None:
        scorer = model.branches["main"].scorer
        of_kept = scorer.of_kept
        scorer.of_kept = lambda vectors, kept: of_kept(vectors, kept).detach()

    def detach_values(model: TwoStageModel) -> None:
        def detached(_: object, given: tuple) -> tuple:  # type: ignore[type-arg]
            *others, late = given
            return *others, {name: vectors.detach() for name, vectors in late.items()}

        model.pooling.register_forward_pre_hook(detached)

    frozen_scores, frozen_values = run(detach_scores), run(detach_values)
    assert gradients(frozen_scores, "attention").abs().max() == 0
    assert gradients(frozen_scores, "representation").abs().max() > 0
    assert gradients(frozen_values, "representation").abs().max() == 0
    assert gradients(frozen_values, "attention").abs().max() > 0


def test_g2_representation_tables_never_change_what_is_retrieved(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(7)})
    settings = config(log)
    batch = batch_of(settings)
    model, _ = model_of(settings)
    before = model.search(batch)["main"].index
    for parameter in model.collections["representation"].parameters():
        nn.init.normal_(parameter)
    assert torch.equal(model.search(batch)["main"].index, before)
    for parameter in model.collections["attention"].parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model.search(batch)["main"].index, before)


def test_no_behavior_at_or_after_a_request_changes_its_scores(tmp_path: Path) -> None:
    """In a block, later requests' behaviors lie beside the earlier ones': they must stay invisible."""
    settings = config(write_log(tmp_path / "log", {"train": random_rows(8)}), k=20, history_length=50)
    model, _ = model_of(settings)
    batch = batch_of(settings)
    with torch.no_grad():
        before = model(batch).logits
        for r in range(batch.requests):
            if int(batch.window_end[r]) == batch.behaviors:
                continue
            hidden = torch.arange(batch.behaviors) >= batch.window_end[r]
            changed = [
                torch.where(
                    torch.cat([hidden, torch.zeros(batch.candidates, dtype=torch.bool)]), rows - 1 - ids, ids
                )
                for ids, rows in zip(
                    batch.features.values().view(len(FEATURES), -1), FEATURES.values(), strict=True
                )
            ]
            other = RequestBatch(
                **{**vars(batch), "features": one_id_bags(list(FEATURES), torch.stack(changed))}
            )
            mine = batch.candidate_request == r
            assert torch.equal(model(other).logits[mine], before[mine])
        assert not torch.equal(model(other).logits, before)


def test_empty_histories_score_without_padding_weight(tmp_path: Path) -> None:
    rows = random_rows(9, Shape(behaviors=1, requests=1))
    for row in rows:
        row.update(
            history_timestamp=[],
            num_behaviors=0,
            request_history_end=[0],
            history_item_id=[],
            history_category_id=[],
        )
    for lookup in ("selected", "full"):
        settings = config(write_log(tmp_path / lookup, {"train": rows}), lookup=lookup)
        model, _ = model_of(settings)
        batch = batch_of(settings)
        assert batch.behaviors == 0
        logits = model(batch).logits
        loss_sum(logits, batch.labels, batch.weight).backward()
        assert torch.isfinite(logits).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_time_shift_changes_nothing(tmp_path: Path) -> None:
    """TIN's P4: time is relative to the request."""
    settings = config(write_log(tmp_path / "log", {"train": random_rows(8)}))
    model, _ = model_of(settings)
    batch = batch_of(settings)
    moved = RequestBatch(
        **{
            **vars(batch),
            "behavior_time": batch.behavior_time + 10**9,
            "request_time": batch.request_time + 10**9,
        }
    )
    assert torch.equal(model(moved).logits, model(batch).logits)
