"""The GPU check runs dry: every step about being right, with tiny sizes on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.catalogue import STEPS, choose
from benchmarks.gpu.jobs import marked_files, model_files
from tests.helpers.gpu_steps import Lines, run_check
from tests.helpers.launching import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, str]:
    return run_check(tmp_path_factory.mktemp("check"), "--dry", "--budget", "560", "right", timeout=580)


@pytest.mark.parametrize("step", choose(["right"]))
def test_a_step_runs_dry_and_finds_nothing_different(step: str, found: tuple[Lines, str]) -> None:
    lines, said = found
    line = lines[step]
    assert line["ok"] and not line["different"], f"{line}\n{said}"
    assert line["rows"] or line["facts"]


def test_the_page_on_the_check_has_a_row_for_every_step() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert rows == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_says_what_it_answers_and_what_is_expected(step: str) -> None:
    question, expected = STEPS[step].docs()
    assert len(question) > 20 and len(expected) > 5
    assert all(other in STEPS for other in STEPS[step].after)
    places = {name: place for place, name in enumerate(STEPS)}
    assert all(places[other] < places[step] for other in STEPS[step].after)
    assert (ROOT / "benchmarks" / "gpu" / f"{STEPS[step].module.rpartition('.')[2]}.py").exists()


def test_files_of_tests_that_the_check_names_are_there() -> None:
    """A dry run does not run them."""
    assert all(Path(file).exists() for file in model_files())
    assert str(ROOT / "tests" / "gpu" / "test_forms.py") in marked_files()


def test_parts_and_names_of_steps_are_understood() -> None:
    assert choose([]) == list(STEPS)
    assert choose(["guard", "speed", "guard"])[0] == "guard"
    assert set(choose(["right"])) | set(choose(["speed"])) == set(STEPS)
    with pytest.raises(ValueError, match=r"no step 'sharding'; there are right, speed, environment, "):
        choose(["sharding"])
