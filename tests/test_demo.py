"""The README's commands: `make train` through the real launcher, and all command lines of the first pages."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.main import get_command

from launch import components
from launch.cli import app
from tests.helpers.launching import ROOT, losses, tandemrec

# What a newcomer reads first, and in which all commands must work.
PAGES = ("README.md", "docs/demo.md", "docs/own_data.md")
LINKED = (*PAGES, "docs/guarantees.md", "docs/architecture.md")


def make_train(*flags: str) -> str:
    """What `make train` on the slice says; with -n, its commands."""
    done = subprocess.run(
        ["make", *flags, "train", "SMOKE=1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def repeated(out: Path) -> str:
    """What the steps say when they find the results of the first time, without launcher and slow imports."""
    said, commands = "", make_train("-n", f"OUT={out}").replace("\\\n", " ").splitlines()
    steps = [shlex.split(line) for line in commands if line.startswith(("tandemrec ", "torchx "))]
    assert len(steps) == 7
    for program, *words in steps:
        if program == "torchx":
            job = words[words.index("launch/components.py:train") + 1 :]
            shape = job.index("-j")
            assert job[shape + 2] == "--"
            ranks = int(job[shape + 1].removeprefix("1x"))
            done = tandemrec("train", *job[:shape], *job[shape + 3 :], ranks=ranks)
        else:
            done = tandemrec(*words)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        said += done.stdout + done.stderr
    return said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_make_train_on_a_slice(tmp_path: Path) -> None:
    """All seven steps, through `torchx run` on two ranks; then each again, of which training resumes."""
    out = tmp_path / "demo"
    for shown in (make_train(f"OUT={out}"), repeated(out)):
        assert "sharding plan for 2 rank(s)" in shown
        assert "100.00% bit-equal" in shown
    assert "resumed from" in shown
    assert len(losses(out / "run")) == 4
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 40 and summary["samples"] > 0
    assert summary["wall_s"] > 0 and summary["cpu_s"] > 0 and "torchrec" in summary["versions"]
    assert {"auc", "gauc", "logloss", "pcoc"} <= summary["test"].keys()
    assert {"auc", "gauc"} <= summary["baselines"]["popularity"].keys()
    scores = pq.read_table(out / "scores.parquet")
    assert scores.num_rows > 1000
    assert summary["test"]["samples"] >= scores.num_rows
    assert list((out / "run" / "tensorboard").iterdir()) and (out / "run" / "config.toml").is_file()
    assert (out / "snapshot" / "LATEST").is_file() and (out / "log" / "manifest.json").is_file()


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def shell_lines(page: str) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text_of(page), flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_make_online_in_small(tmp_path: Path) -> None:
    """A stream, a training that follows it and a server that follows that; every request is answered."""
    command = ["make", "online", "SMOKE=1", f"OUT={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    page = (tmp_path / "online" / "freshness.md").read_text(encoding="utf-8")
    assert "event to served score" in page and (tmp_path / "online" / "scores.svg").exists()
    lines = (tmp_path / "online" / "online" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    windows = [entry["window"] for entry in entries if entry["split"] == "window"]
    versions = [entry["version"] for entry in entries if entry["split"] == "version"]
    assert len(windows) > 1 and windows == sorted(set(windows))
    assert versions == [f"v{number:08d}" for number in range(1, len(windows) + 1)]


def test_the_two_commands_are_there() -> None:
    lines = shell_lines("README.md")
    assert {"make train", "make test"} <= set(lines)
    for line in lines:
        if line.startswith("make "):
            target = line.split()[1]
            found = subprocess.run(
                ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert found.returncode == 0, line


def test_make_alone_lists_what_there_is() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rules = re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), flags=re.M)
    assert {"train", "test", "help", "serve"} <= set(rules)
    for rule in rules:
        assert re.search(rf"^  {rule} +\S", done.stdout, flags=re.M), rule
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_readme_counts_the_presets() -> None:
    presets = [path for path in (ROOT / "configs").glob("*.toml") if "extends" in path.read_text()]
    assert re.search(rf"\b{len(presets)}\s+\[presets\]", text_of("README.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_parses(page: str) -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    lines, seen = shell_lines(page), 0
    for line in lines:
        words = shlex.split(line.removeprefix(".venv/bin/"))
        if words[0] == "tandemrec":
            verb = verbs[words[1]]
            verb.make_context(words[1], words[2:], resilient_parsing=False)
            seen += 1
        elif words[0] == "torchx":
            file, job = words[words.index("local_cwd") + 1].split(":")
            assert file == "launch/components.py" and callable(getattr(components, job))
        else:
            assert words[0] == "make", line
    assert seen >= {"README.md": 4, "docs/demo.md": 1, "docs/own_data.md": 6}[page]


@pytest.mark.parametrize("page", LINKED)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
    before_examples = text.partition("\n## Adding")[0]
    for path in re.findall(r"`((?:configs|launch|docs|benchmarks)/[\w./-]+)`", before_examples):
        assert (ROOT / path).exists(), path
    assert shutil.which("make")
