"""The GPU check's steps about being right, as they are: on a GPU nothing may differ from the CPU.

They run in processes of their own, so what one leaves behind on the device, another does not meet.
"""

from __future__ import annotations

import pytest

from benchmarks.gpu.catalogue import choose
from tests.helpers.gpu_steps import Lines, run_check

# `pytest` would run these tests again.
STEPS = [name for name in choose(["right"]) if name not in ("pytest", "bags")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, str]:
    return run_check(tmp_path_factory.mktemp("check"), "--budget", "900", *STEPS, timeout=1000)


@pytest.mark.gpu
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_finds_nothing_different_on_the_device(step: str, found: tuple[Lines, str]) -> None:
    lines, said = found
    line = lines[step]
    assert line["ok"] and not line["different"], f"{line}\n{said}"


@pytest.mark.gpu2
def test_row_wise_bags_of_unequal_numbers_need_no_padding_over_nccl(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    lines, said = run_check(tmp_path_factory.mktemp("bags"), "bags", timeout=280)
    assert lines["bags"]["ok"] and not lines["bags"]["different"], f"{lines}\n{said}"
    assert len(lines["bags"]["rows"]) == 2
