"""The harness of the benchmarks, and `tandemrec bench`: subjects, options, timing, reports."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_packages

from benchmarks.__main__ import FOLDER, main, subjects, title
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.harness.timing import Seconds, rounds, seconds_of, spread, time_process
from embeddings.errors import ConfigError, TandemError
from launch.cli import main as tandemrec
from tests.helpers.launching import ROOT


def report_of(folder: Path, *words: str) -> Report:
    given = (
        Options("made_up", "Told.")
        .measuring()
        .read(["--json", str(folder / "f.json"), "--page", str(folder / "f.md"), *words])
    )
    return Report(given, "Made up", seed=3)


def test_every_subject_has_a_line_in_the_readme_and_a_title() -> None:
    rows = [line.split("|") for line in (FOLDER / "README.md").read_text().splitlines() if line[:2] == "| "]
    assert [row[1].strip() for row in rows[1:]] == list(subjects())
    for row in rows[1:]:
        page = re.search(r"\]\((.+)\)", row[3])
        assert page is not None and (FOLDER / page[1]).exists()
    for name, path in subjects().items():
        assert 15 < len(title(path)) <= 110, name
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert any(node.name == "main" and len(node.args.args) == 1 for node in functions), name


def test_a_new_file_is_a_new_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "new" not in subjects()
    (tmp_path / "new.py").write_text('"""How new a file is\n\nMore.\n"""\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("")
    monkeypatch.setattr("benchmarks.__main__.FOLDER", tmp_path)
    assert list(subjects()) == ["folder", "new"]
    assert title(subjects()["new"]) == "How new a file is"


def test_the_example_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {
        "Options": Options,
        "Report": Report,
        "rounds": rounds,
        "spread": spread,
        "seconds_of": seconds_of,
    }
    names |= {"partial": partial, "__doc__": "Told.", "ours": lambda: sum(range(9_000))}
    names |= {"theirs": lambda: sum(range(90_000)), "Sequence": Sequence}
    exec(block[1], names)
    names["main"](["--repeats", "2", "--json", str(tmp_path / "f.json")])
    assert {row["name"] for row in json.loads((tmp_path / "f.json").read_text())["rows"]} == {
        "ours",
        "theirs",
    }
    assert re.search(r"^theirs_to_ours: [\d.]+ \(", capsys.readouterr().out, re.MULTILINE)


def test_the_verb_lists_subjects_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert tandemrec(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in subjects())
    assert tandemrec(["bench", "readers"]) == 2
    first, second, *_ = subjects()
    assert f"'readers' is not one of {first}, {second}, " in capsys.readouterr().err
    assert tandemrec(["bench", "serch"]) == 2
    assert "did you mean 'search'?" in capsys.readouterr().err
    assert tandemrec(["bench", "reader"]) == 2
    assert "give --config" in capsys.readouterr().err
    assert tandemrec(["bench", "search", "--fast"]) == 2
    assert "unrecognized arguments: --fast; see `tandemrec bench search --help`" in capsys.readouterr().err
    assert tandemrec(["bench", "search", "--repeats", "0"]) == 2
    assert "0 is not a number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["search"], ["--help"]])
def test_without_a_checkout_the_verb_says_how_to_get_benchmarks(tmp_path: Path, words: list[str]) -> None:
    """As in an installed wheel: the packages lie together, and nothing else does."""
    for package in ("launch", "embeddings"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "bench", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    assert "benchmarks are no part of the package: clone the repository" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_wheel_holds_neither_benchmarks_nor_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    tops = {name.partition(".")[0] for name in find_packages(str(ROOT), include=include)}
    assert tops == {"launch", "pipelines", "trainer", "embeddings"}


def test_rounds_take_turns_and_leave_out_what_is_slow() -> None:
    calls: list[str] = []

    def way(name: str) -> Seconds:
        calls.append(name)
        return Seconds(len(calls), 0.0)

    taken = rounds({name: lambda name=name: way(name) for name in "ab"}, 3, most={"b": 1})  # type: ignore[misc]
    assert calls == ["a", "b", "a", "b", "a", "a"]
    assert {name: [seconds.wall for seconds in each] for name, each in taken.items()} == {
        "a": [3, 5, 6],
        "b": [4],
    }


def test_processes_are_timed_with_their_memory() -> None:
    code = "x = b'x' * 150_000_000; sum(range(2_000_000))"
    seconds, peak = time_process([sys.executable, "-c", code])
    # Beside its own, nothing of this process, which is larger.
    assert 150e6 < peak < 200e6 and seconds.cpu > 0 and seconds.wall > 0
    with pytest.raises(TandemError, match="failed with exit code 3"):
        time_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_report_says_the_same_in_three_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(tmp_path, "--repeats", "2")
    report.rows = [{"name": "a", **spread([3.0, 1.0, 2.0], "ms")}, {"name": "b"}]
    report.table({"way": "{name}", "ms": "{ms:.1f}", "min-max": "{min:.0f}-{max:.0f}"}, report.rows)
    report.ratio("a_to_b", [4.0, 9.0, 1.0], [2.0, 3.0, 1.0])
    report.close()
    said, page = capsys.readouterr().out, (tmp_path / "f.md").read_text()
    assert re.search(r"^way +ms +min-max\n-+ .*\na +2\.0 +1-3\nb$", said, re.MULTILINE)
    assert page.startswith(
        "# Made up\n\n| way | ms | min-max |\n|---|--:|--:|\n| a | 2.0 | 1-3 |\n| b |  |  |\n\n"
    )
    for text in (said, page):
        assert "a_to_b: 2.00 (1.00-3.00)" in text and "seed 3; n = 2; tandemrec bench made_up --json" in text
    tree = json.loads((tmp_path / "f.json").read_text())
    assert tree["ratios"] == {"a_to_b": 2.0} and tree["rows"][0] == {
        "name": "a",
        "ms": 2.0,
        "min": 1.0,
        "max": 3.0,
        "n": 3,
    }
    assert tree["facts"] == {"a_to_b_min": 1.0, "a_to_b_max": 3.0}
    assert (tree["seed"], tree["n"]) == (3, 2) and {
        "machine",
        "load",
        "versions",
        "commit",
        "command",
    } <= tree.keys()


def test_options_are_refused_in_one_line() -> None:
    options = Options("made_up", None).measuring(config=True)
    with pytest.raises(ConfigError, match="give --config"):
        options.read([])
    with pytest.raises(ConfigError, match="see `tandemrec bench made_up --help`"):
        options.read(["--rep", "3"])
    assert options.read(["--config", "a.toml", "--set", "a=1", "--set", "b=2"]).overrides == ["a=1", "b=2"]


def test_main_runs_a_subject_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Sequence[str]] = []
    monkeypatch.setattr("benchmarks.tree.main", heard.append)
    assert main(["tree", "--log", "x"]) == 0 and heard == [["--log", "x"]]
