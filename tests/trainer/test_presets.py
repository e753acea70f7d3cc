"""Every preset: trains on one rank and on two alike, and scores a request alike in any company."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.launching import launched
from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.presets import PRESETS, fill_given, of_tasks
from tests.programs.preset_steps import STEPS, small_config
from trainer.assemble import build_model, count_numbers, feature_rows, resolve_groups
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import FeatureInfo, read_manifest
from trainer.model.branch import Reading
from trainer.model.frame import TwoStageModel
from trainer.quality.evaluate import score_split
from trainer.quality.scored import Scored
from trainer.run_config import Config


def preset_log(path: Path) -> Path:
    """Short and empty histories beside long ones, with the taxonomy of the demo log."""
    rows = random_rows(4, Shape(users=30))
    for row in rows:
        for feature, divisor in (("department_id", 3), ("type_id", 1)):
            row[f"history_{feature}"] = [i // divisor for i in row["history_category_id"]]
            row[f"candidate_{feature}"] = [
                [i // divisor for i in ids] for ids in row["candidate_category_id"]
            ]
    return write_log(path, {"train": rows, "validation": rows[:5]}, more={"department_id": 3, "type_id": 9})


def log_of_tasks(path: Path) -> Path:
    """Two tasks in three domains: some candidates were never asked for their conversion."""
    rng, rows = np.random.default_rng(4), random_rows(4, Shape(users=30))
    for row in rows:
        counts = row["request_num_candidates"]
        row["candidate_domain_id"] = [rng.integers(0, 3, count).tolist() for count in counts]
        converted = [rng.choice([0.0, 1.0, None], count, p=[0.4, 0.4, 0.2]).tolist() for count in counts]
        row["label_conversion"] = converted
    domain = {"domain_id": FeatureInfo(rows=3, side="candidate")}
    facts = {"tasks": ["click", "conversion"], "partial": ["conversion"]}
    return write_log(path, {"train": rows, "validation": rows[:5]}, more=domain, **facts)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Preset -> the log that it is tried on: one of several tasks if it has a tower for each."""
    folder = tmp_path_factory.mktemp("presets")
    one, several = preset_log(folder / "one"), log_of_tasks(folder / "several")
    found = {preset: several if of_tasks(preset) else one for preset in PRESETS}
    assert set(found.values()) == {one, several}
    return found


@pytest.fixture
def log(preset: str, logs: dict[str, Path]) -> Path:
    return logs[preset]


def batch_of(config: Config, rows: dict[str, int]) -> RequestBatch:
    tasks = resolve_tasks(config.tasks, read_manifest(config.data.log).tasks)
    return next(iter(SequenceLogReader(config.data, "train", rows, tasks=tasks, seed=1).steps())).batch


def model_of(config: Config, log: Path) -> tuple[TwoStageModel, dict[str, int]]:
    """A model over plain tables with its first weights; time tables drawn, for zeros would hide mistakes."""
    manifest = read_manifest(log)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dense_init": "default"})})
    groups = resolve_groups(config, manifest)
    weights = {g.table_name(t): torch.empty(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, True) for name, group in groups.items()}
    tasks = resolve_tasks(config.tasks, manifest.tasks)
    model = build_model(config, groups, collections, tasks, count_numbers(config, manifest.numeric))
    initialise_unsharded(model, groups, config.train.seed)
    fill_given(model, groups, config)
    rng = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not name.startswith("collections.") and (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=0.5, generator=rng)
    return model.eval(), feature_rows(groups)


@pytest.mark.slow
def test_two_ranks_equal_one_for_every_preset(logs: dict[str, Path], tmp_path: Path) -> None:
    """Losses of some steps, and scores of a whole split after them."""
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        pairs = [f"{preset}@{log}" for preset, log in logs.items()]
        done = launched("tests.programs.preset_steps", str(out), *pairs, ranks=ranks, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found.append(json.loads(out.read_text()))
    one, two = found
    assert set(one) == set(two) == set(PRESETS)
    for preset in PRESETS:
        assert len(one[preset]["losses"]) == STEPS, preset
        if small_config(preset, logs[preset]).model.norm == "batch":  # takes its statistics rank by rank
            continue
        assert np.allclose(one[preset]["losses"], two[preset]["losses"], atol=1e-4), preset
        assert np.allclose(one[preset]["scores"], two[preset]["scores"], atol=2e-3), preset
        assert np.std(one[preset]["scores"]) > 1e-3, preset


def scored_in(config: Config, log: Path, model: TwoStageModel, rows: dict[str, int]) -> Scored:
    with torch.no_grad():
        tasks = resolve_tasks(config.tasks, read_manifest(log).tasks)
        reader = SequenceLogReader(config.data, "validation", rows, tasks=tasks)
        return score_split(model, reader, torch.device("cpu"))


@pytest.fixture
def one_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.quality.evaluate.gather_rows", lambda rows: rows)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("one_process_group")
def test_a_request_scores_alike_alone_and_among_others(preset: str, log: Path) -> None:
    """Blocks, padding to other windows and other requests' behaviors change nothing."""
    config = small_config(preset, log)
    model, rows = model_of(config, log)
    alone = config.data.model_copy(update={"requests_per_block": 1, "batch_candidates": 1})
    together = scored_in(config, log, model, rows)
    apart = scored_in(config.model_copy(update={"data": alone}), log, model, rows)
    key = [together.candidate, together.request_id], [apart.candidate, apart.request_id]
    a, b = (scored.score[np.lexsort(keys)] for scored, keys in zip((together, apart), key, strict=True))
    assert np.allclose(a, b, atol=1e-5)
    assert np.unique(np.round(a, 6)).size > a.size / 2


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_has_no_weight_and_nothing_is_kept_twice(preset: str, log: Path) -> None:
    config = small_config(preset, log)
    model, rows = model_of(config, log)
    batch = batch_of(config, rows)
    seen: dict[str, Reading] = {}
    model.pooling.register_forward_hook(lambda _, __, pooled: seen.update(pooled.of_branch))
    logits = model(batch).logits
    assert torch.isfinite(logits).all() and logits.shape == batch.labels.shape
    short = batch.window_end - batch.window_start < config.model.k
    assert short.any()
    for _, behaviors, weights in seen.values():
        kept = behaviors.selection
        if weights is not None:
            outside = ~kept.mask[:, None].expand_as(weights)
            assert outside.any() and (weights[outside] == 0).all() and (weights >= 0).all()
        for index, mask in zip(kept.index, kept.mask, strict=True):
            assert index[mask].unique().numel() == int(mask.sum())
    model.train()
    prediction = model(batch)
    total = prediction.logits.square().sum()
    if prediction.auxiliary is not None:
        total = total + prediction.auxiliary.square().sum()
    total.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("collections.")]
    assert not unused


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_built_without_memory_takes_over_all_weights(preset: str, log: Path) -> None:
    """What loading a snapshot does: nothing of the score may live outside of the state dict."""
    config = small_config(preset, log)
    model, rows = model_of(config, log)
    groups = resolve_groups(config, read_manifest(log))
    numbers = count_numbers(config, read_manifest(log).numeric)
    tasks = resolve_tasks(config.tasks, read_manifest(log).tasks)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 999})})
    with torch.device("meta"):
        loaded = build_model(other, groups, dict(model.collections.items()), tasks, numbers)
    dense = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("collections.")}
    loaded.load_state_dict({**model.state_dict(), **dense}, assign=True)
    batch = batch_of(config, rows)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch).logits, model(batch).logits)
