"""The GPU check runs dry: every step about being right, with tiny sizes on a CPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu.catalogue import STEPS, chosen
from tests.helpers.gpu_steps import Lines, checked
from tests.helpers.launching import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, str]:
    return checked(tmp_path_factory.mktemp("check"), "--dry", "--budget", "560", "right", timeout=580)


@pytest.mark.parametrize("step", chosen(["right"]))
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
    question, expected = STEPS[step].told()
    assert len(question) > 20 and len(expected) > 5
    assert all(other in STEPS for other in STEPS[step].after)
    places = {name: place for place, name in enumerate(STEPS)}
    assert all(places[other] < places[step] for other in STEPS[step].after)
    assert (ROOT / "benchmarks" / "gpu" / f"{STEPS[step].module.rpartition('.')[2]}.py").exists()


def test_parts_and_names_of_steps_are_understood() -> None:
    assert chosen([]) == list(STEPS)
    assert chosen(["guard", "speed", "guard"])[0] == "guard"
    assert set(chosen(["right"])) | set(chosen(["speed"])) == set(STEPS)
    with pytest.raises(ValueError, match=r"no step 'sharding'; there are right, speed, environment, "):
        chosen(["sharding"])
