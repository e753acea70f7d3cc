"""Groups with several sets in a plan: their lines, what is sent and asked for them, and remedies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from embeddings.plan.memory import TableNeed
from embeddings.plan.request import Cluster, PlanRequest
from embeddings.plan.traffic import Lookup
from launch.cli import main
from pipelines.plan.remedies import remedies
from tests.embeddings.plan.test_plan import GB, words
from tests.helpers.logs import Shape, enrich, random_rows, small_log, write_log
from trainer.assemble import resolve_groups
from trainer.log.schema import read_manifest
from trainer.run_config import Config, load_config
from trainer.step_size import StepSize, lookups


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("plan") / "log", seed=1, users=40)


def test_sets_share_a_line_and_their_ids_are_counted_once(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--world-size", "4", "--hbm", "141GB", "--behaviors-per-step", "5000000"]
    rule = ["--set", 'plan.tables.representation/1/item_id.sharding=["table_wise"]']

    def printed(sets: int, *more: str) -> tuple[list[str], float]:
        given = words(log, groups__representation__sets=sets, groups__representation__sharding=["row_wise"])
        assert main(["plan", *given, *sizes, *more, "--json", str(tmp_path / "plan.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
        (row,) = (line.split() for line in lines if line.startswith("full, bag"))
        return lines, float(row[2].replace(",", "")) * {"MB": 1, "GB": 1000}[row[3]]

    one, several = printed(1), printed(3)
    names = [line.split()[0] for line in several[0] if line.startswith("representation/")]
    assert "representation/{0,1,2}/item_id" in names and "representation/1/item_id" not in names
    assert several[1] == one[1]
    mixed = printed(3, *rule)
    names = [line.split()[0] for line in mixed[0] if line.startswith("representation/")]
    assert "representation/{0,2}/item_id" in names and "representation/1/item_id" in names
    assert mixed[1] > several[1]
    placed = json.loads((tmp_path / "plan.json").read_text())["modules"]["collections.representation"]
    assert placed["representation/1/item_id"]["sharding_type"] == "table_wise"
    assert placed["representation/0/item_id"]["sharding_type"] == "row_wise"


def test_sets_are_asked_alike_and_priors_for_candidates_or_requests(tmp_path: Path) -> None:
    rows = {"train": enrich(random_rows(5, Shape(users=4)), seed=1)}
    log = write_log(tmp_path / "log", rows, rich=True)
    manifest, features = read_manifest(log), 'features = ["item_id"]'
    given = [
        f"data.log={log}",
        f"groups.attention={{{features}}}",
        f"groups.representation={{sets = 2, {features}}}",
        f"groups.near={{{features}}}",
        'groups.asking={features = ["city"]}',
        "model.head=experts",
        "model.mixer={kind = 'softmax', gate = 'prior'}",
        "model.roles.prior=near",
        "model.roles.prior_context=asking",
    ]
    config = load_config(Path("configs/dare.toml"), given)
    groups = resolve_groups(config, manifest)
    size = StepSize(100, 40, 10, ((100, 40),), "as given")
    said = lookups(config, groups, manifest, size, "full")
    assert said["representation/0/item_id"] == said["representation/1/item_id"] == Lookup(140, 140)
    assert said["near__item_id"] == Lookup(40, 40) and said["asking__city"] == Lookup(10, 10)


def test_remedies_know_the_group_of_a_set(log: Path) -> None:
    config = load_config(Path("configs/dare.toml"), ["groups.representation.sets=2", f"data.log={log}"])
    cluster, tried = Cluster("cpu", 2, 2, 0, GB), []
    need = TableNeed("representation/1/item_id", GB, GB, "table_wise")

    def build(changed: Config, _: Cluster) -> PlanRequest:
        tried.append(changed)
        raise ConfigError("does not fit either")

    lines = remedies(config, cluster, [need], build)
    assert "no single change" in lines[0]
    assert any("representation/1/item_id" in each.plan.tables for each in tried)
    assert any(each.groups["representation"].dtype == "fp16" for each in tried)
