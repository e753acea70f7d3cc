"""The GPU check runs dry: its steps about speed; and what surrounds steps: the runner, the page, packing."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu import runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.catalogue import STEPS, Step, choose
from benchmarks.gpu.check import Answer, Check, answer
from benchmarks.gpu.needs import pins, requirements
from benchmarks.gpu.report import name_of, table, write_page
from benchmarks.gpu.shrink import entries, fat_binaries, keep_one
from tests.helpers.gpu_steps import Lines, run_check

NO_KERNEL = "ValueError: no such kernel"
# Python 3.12 warns of every fork beside threads; these children only wait or end.
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, str]:
    return run_check(tmp_path_factory.mktemp("check"), "--dry", "--budget", "560", "speed", timeout=580)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", choose(["speed"]))
def test_a_step_runs_dry(step: str, found: tuple[Lines, str]) -> None:
    lines, said = found
    line = lines[step]
    assert line["ok"] and not line["different"], f"{line}\n{said}"
    assert line["rows"] or line["facts"]
    assert not [row for row in line["rows"] if "error" in row]


class Made(Step):
    """A step that a test has made up."""

    def load(self) -> Callable[[Check], Answer]:
        return BEHAVIORS[self.where]


def hangs(check: Check) -> Answer:
    check.keep(answer([{"way": "first", "ms": 1.0}]))
    time.sleep(60)
    return answer()


def dies(_: Check) -> Answer:
    os.kill(os.getpid(), signal.SIGKILL)
    return answer()


def fails(_: Check) -> Answer:
    raise ValueError("no\nsuch kernel")


BEHAVIORS: dict[str, Callable[[Check], Answer]] = {
    "hangs": hangs,
    "dies": dies,
    "fails": fails,
    "differs": lambda _: answer([{"way": "a", "error": "KeyError: b"}], ["a"]),
    "answers": lambda check: answer([{"way": check.step}], [], number=2),
}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    for name in BEHAVIORS:
        monkeypatch.setitem(STEPS, name, Made(name, 1.0 if name == "hangs" else 30.0, "right"))
    monkeypatch.setattr(runner, "_preload", lambda names: None)
    return Check(True, tmp_path / "out", tmp_path / "work")


@FORKS
def test_a_step_that_hangs_dies_or_fails_costs_no_other_step_anything(
    check: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = runner.run(check, list(BEHAVIORS), 60, ["right"])
    about, *lines = [json.loads(line) for line in (check.out / "results.jsonl").read_text().splitlines()]
    assert about["run"]["command"] == "python -m benchmarks.gpu right" and about["run"]["dry"]
    by_step = {line["step"]: line for line in lines}
    assert list(by_step) == list(BEHAVIORS) and bad == len(BEHAVIORS) - 1
    assert by_step["hangs"]["error"] == "stopped after 1 s, its limit"
    # What it had found until then is not lost.
    assert by_step["hangs"]["rows"] == [{"way": "first", "ms": 1.0}]
    assert by_step["dies"]["error"] == f"ended by signal {int(signal.SIGKILL)}"
    assert by_step["fails"]["error"] == NO_KERNEL
    assert "no\nsuch kernel" in (check.out / "log.txt").read_text()
    assert by_step["differs"]["ok"] and by_step["differs"]["different"] == ["a"]
    assert by_step["answers"]["rows"] == [{"way": "answers"}]
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == ["FAIL", "FAIL", "FAIL", "DIFF", "ok"]
    assert printed[3].endswith("different: a; KeyError: b; 1 rows")
    assert printed[5].startswith("2 of 5 steps ended, 1 of them found something different")


@FORKS
def test_steps_beyond_the_budget_are_not_begun(check: Check) -> None:
    assert runner.run(check, ["answers"], 4.0, []) == 1
    line = json.loads((check.out / "results.jsonl").read_text().splitlines()[-1])
    assert not line["ok"] and line["error"] == "not begun: the budget of 4 s is spent"


@FORKS
def test_a_step_that_the_budget_ends_and_one_without_its_files_say_so(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS, "hangs", Made("hangs", 30.0, "right"))
    monkeypatch.setitem(STEPS, "fails", Made("fails", 30.0, "right", after=("answers", "dies")))
    runner.run(check, ["answers", "fails"], 60, [])
    runner.run(check, ["fails", "hangs"], 6.0, [])
    lines = [json.loads(line) for line in (check.out / "results.jsonl").read_text().splitlines()]
    *failed, hung = [line for line in lines if line.get("step") in ("fails", "hangs")]
    # What an earlier run into the same folders has left counts.
    assert [line["error"] for line in failed] == [f"run dies first, whose files it reads ({NO_KERNEL})"] * 2
    assert hung["error"].endswith(" s, where the budget ended")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked_but_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "out"), "forms"])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "there is no GPU to check: " in said and "--dry runs the same steps on a CPU, tiny" in said


def test_a_folder_without_results_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert f"{tmp_path} has no results.jsonl" in capsys.readouterr().err


@FORKS
def test_steps_are_run_anew_where_the_driver_was_started_before_the_fork(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps keep errors of single ways in their rows, so those are looked at too."""
    said = "RuntimeError: Cannot re-initialize CUDA in forked subprocess."
    monkeypatch.setitem(BEHAVIORS, "differs", lambda _: answer([{"way": "a", "error": said}], ["a"]))
    forked: list[tuple[str, bool]] = []
    one = runner.one

    def noted(check: Check, name: str, limit_s: float, fork: bool) -> runner.Line:
        forked.append((name, fork))
        return one(check, name, limit_s, fork) if fork else {"step": name, "ok": True, "seconds": 0.0}

    monkeypatch.setattr(runner, "one", noted)
    assert runner.run(check, ["answers", "differs", "answers"], 60, []) == 0
    assert forked == [("answers", True), ("differs", True), ("differs", False), ("answers", False)]


RUN = {
    "date": "2026-01-02 03:04 UTC",
    "command": "python -m benchmarks.gpu right",
    "commit": "abc1234",
    "changed": False,
    "device": "NVIDIA H100 80GB HBM3, 81559 MiB, 570.1",
    "versions": {"python": "3.12.1", "torch": "2.11.0+cu130"},
    "dry": False,
}


def write_results(out: Path, *lines: object) -> None:
    out.mkdir()
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_shows_what_was_found_where_and_when(tmp_path: Path) -> None:
    rows = [{"way": "none", "loss": 0.00025}, {"way": "a|b", "samples/s": 1234567.8, "alike": True}]
    facts = {"copy GB/s": 3e3}
    write_results(
        tmp_path / "out",
        {"run": RUN},
        {"step": "guard", "ok": True, "seconds": 1.0, "different": ["none"], "rows": rows, "facts": {}},
        {"step": "sharded", "ok": False, "seconds": 2.0, "error": "killed"},
        {"run": {**RUN, "command": "python -m benchmarks.gpu guard search", "date": "2026-01-02 03:09 UTC"}},
        {
            "step": "guard",
            "ok": True,
            "seconds": 3.0,
            "different": [],
            "rows": rows,
            "facts": facts,
        },
        {"step": "bags", "ok": True, "seconds": 0.1, "skipped": "it needs 2 GPUs, there is 1"},
    )
    path = write_page(tmp_path / "out", tmp_path)
    assert path == tmp_path / "RESULTS-nvidia-h100-80gb-hbm3.md"
    text = path.read_text()
    for line in (
        "# The check on NVIDIA H100 80GB HBM3",
        "* device: NVIDIA H100 80GB HBM3, 81559 MiB, 570.1",
        "* versions: python 3.12.1, torch 2.11.0+cu130",
        "* commit: abc1234",
        "* 2026-01-02 03:04 UTC: `python -m benchmarks.gpu right`",
        "* 2026-01-02 03:09 UTC: `python -m benchmarks.gpu guard search`",
        "| sharded | **failed** | 2.0 | killed |",
        "| guard | ok | 3.0 |  |",
        "| bags | skipped | 0.1 | it needs 2 GPUs, there is 1 |",
        "* copy GB/s: 3000",
        "| way | loss | samples/s | alike |",
        "| none | 0.00025 |  |  |",
        "| a\\|b |  | 1,234,568 | yes |",
    ):
        assert f"{line}\n" in text, line
    assert text.index("| sharded |") < text.index("| guard |") < text.index("| bags |")
    assert "dry run" not in text


def test_a_dry_page_stays_where_it_is_and_says_so(tmp_path: Path) -> None:
    write_results(tmp_path / "out", {"run": {**RUN, "dry": True, "device": "cpu", "changed": True}})
    path = write_page(tmp_path / "out", tmp_path)
    assert path == tmp_path / "out" / "RESULTS-dry.md"
    assert "no number here is a measurement" in path.read_text()
    assert "abc1234 (with changes that are not committed)" in path.read_text()


def test_a_page_keeps_answers_of_other_runs_apart(tmp_path: Path) -> None:
    line = {"ok": True, "seconds": 1.0, "different": [], "rows": [], "facts": {}}
    write_results(
        tmp_path / "out",
        {"run": {**RUN, "commit": "0ld"}},
        {"step": "guard", **line},
        {"step": "forms", **line},
        {"run": RUN},
        {"step": "forms", **line},
        {"run": {**RUN, "dry": True, "device": "cpu"}},
        {"step": "saves", **line},
    )
    path = write_page(tmp_path / "out", tmp_path)
    assert path.name == "RESULTS-nvidia-h100-80gb-hbm3.md"
    text = path.read_text()
    assert "| guard | ok | 1.0 | (of 0ld) |\n" in text and "| forms | ok | 1.0 |  |\n" in text
    assert "saves" not in text


def test_names_and_empty_tables() -> None:
    assert name_of("Tesla V100-SXM2, 1 MiB, 2") == "tesla-v100-sxm2"
    assert table([{"a": 1}, {"b": 2}]) == ["| a | b |", "|---|---|", "| 1 |  |", "|  | 2 |"]


def fat_binary(codes: list[tuple[int, int, bytes]]) -> bytes:
    """As nvcc lays it out: (kind, architecture, code) of each entry behind a header of 64 bytes."""
    body = b""
    for kind, arch, code in codes:
        head = struct.pack("<HHIQ", kind, 257, 64, len(code)).ljust(28, b"\1") + struct.pack("<I", arch)
        body += head.ljust(64, b"\2") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


CODES = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([80, 90, 100]), st.binary(max_size=40)), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CODES, max_size=4), st.sampled_from([None, 80, 90]), st.binary(max_size=20))
def test_only_machine_code_of_one_architecture_stays_and_nothing_moves(
    tmp_path_factory: pytest.TempPathFactory,
    binaries: list[list[tuple[int, int, bytes]]],
    arch: int | None,
    between: bytes,
) -> None:
    parts = [fat_binary(codes) for codes in binaries]
    library = tmp_path_factory.mktemp("wheel") / "lib.so"
    # The same four bytes by chance are no fat binary.
    strange = struct.pack("<IHHQ", 0xBA55ED50, 1, 99, 1)
    library.write_bytes(between + b"x" + b"".join(part + between for part in parts) + strange)
    before = library.read_bytes()
    wanted = [[code for kind, of, code in codes if (kind, of) == (2, arch)] for codes in binaries]
    kept, freed = keep_one(library, arch)
    after = library.read_bytes()
    assert len(after) == len(before) and kept == sum(map(len, wanted))
    assert freed == sum(map(len, parts)) - 16 * len(parts) - sum(
        64 + len(c) for codes in wanted for c in codes
    )
    starts = [start for start, _, _ in fat_binaries(before)]
    found = list(fat_binaries(after))
    assert [start for start, _, _ in found] == starts and len(starts) == len(parts)
    for (_, first, end), codes in zip(found, wanted, strict=True):
        assert [code[64:] for _, _, code in entries(after, first, end)] == codes


def test_bytes_that_are_no_entries_are_refused() -> None:
    data = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64) + b"\7" * 64
    with pytest.raises(ValueError, match="no entry of a fat binary at byte 16"):
        list(entries(data, 16, 80))


def test_what_is_carried_is_pinned_as_here_and_not_there_already() -> None:
    names = ["pydantic", "pydantic-core", "numpy", "torch", "torchrec", "not-pinned-here"]
    assert requirements(names, has=["NumPy"]) == [pins()["pydantic"], pins()["pydantic-core"]]
    assert pins()["pydantic-core"].startswith("pydantic_core==")
