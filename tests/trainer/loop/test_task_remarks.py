"""What a run says of labels and tasks before its first step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.helpers.logs import IN_PART, enrich, observed_in_part, random_rows, write_log
from trainer.assemble import resolve_groups
from trainer.log.schema import FeatureInfo, read_manifest
from trainer.loop.remarks import remarks
from trainer.run_config import load_config

CLICK = "tasks.click.weight=1"


def said(log: Path, *words: str) -> list[str]:
    config, manifest = (
        load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *words]),
        read_manifest(log),
    )
    lines = remarks(config, manifest, resolve_groups(config, manifest))
    return [line for line in lines if "label" in line or "task" in line or "context" in line]


@pytest.mark.parametrize(("place", "value"), [("all", None), ("all", math.nan), ("some", None)])
def test_labels_without_a_task_and_tasks_without_a_label_are_said(
    tmp_path: Path, place: str, value: float | None
) -> None:
    rows = observed_in_part(enrich(random_rows(3), 3), 3)
    if place == "all":
        rows = [{**row, "label_buy": [[value for _ in part] for part in row["label_buy"]]} for row in rows]
    log = write_log(tmp_path / "log", {"train": rows}, rich=True, **IN_PART)
    never = "no candidate of the training split has the label buy"
    context = said(log)[:1]
    assert context[0].startswith("not used: 2 context features (city, segments)")
    assert said(log) == context + ([f"task buy is not trained: {never}"] if place == "all" else [])
    unused = "not used: 1 label (buy) of the log; a section [tasks.buy] makes it a task"
    assert said(log, CLICK) == [*context, unused]
    # A mask looks at a label, too.
    masked = said(log, "tasks.click.mask=buy == 0")
    assert masked == context + ([f"task click is not trained: {never}"] if place == "all" else [])
    # A domain is read, though no table has it.
    assert said(log, "data.domain=city")[0].startswith("not used: 1 context feature (segments)")


def test_a_domain_with_very_many_values_is_said(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(3)})
    context = {"shop": FeatureInfo(rows=1001), "page": FeatureInfo(rows=1000)}
    manifest = read_manifest(log).model_copy(update={"context": context})
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}"])
    groups = resolve_groups(config, manifest)
    lines = {}
    for domain in ("shop", "page"):
        data = config.data.model_copy(update={"domain": domain})
        found = remarks(config.model_copy(update={"data": data}), manifest, groups)
        lines[domain] = [line for line in found if line.startswith("data.domain")]
    assert not lines["page"] and lines["shop"][0].startswith('data.domain = "shop" has 1,001 ids, and a ')


def test_an_older_log_counts_no_labels(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(3)})
    manifest = read_manifest(log)
    splits = {name: split.model_copy(update={"labels": {}}) for name, split in manifest.splits.items()}
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}"])
    older = manifest.model_copy(update={"splits": splits})
    assert not [line for line in remarks(config, older, resolve_groups(config, older)) if "task" in line]


def test_a_product_whose_label_is_known_of_few_candidates_is_said(tmp_path: Path) -> None:
    """ESMM's product is about all candidates; a label of clicked ones would undo that."""
    rows = observed_in_part(enrich(random_rows(3), 3), 3)
    log = write_log(tmp_path / "log", {"train": rows, "validation": rows[:3]}, rich=True, **IN_PART)
    parts = ["tasks.click.weight=1", "tasks.of_clicks.label=buy", "tasks.of_clicks.loss=none"]
    product = 'tasks.buy.product=["click","of_clicks"]'
    (line,) = [line for line in said(log, *parts, product) if "product" in line]
    assert "tasks.buy: a product is to be known on all candidates of click" in line
    assert not [line for line in said(log, *parts, product, "tasks.buy.label=click") if "product" in line]
