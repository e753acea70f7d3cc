"""Runs steps one after the other, each in a process of its own with a time limit.

The parent imports what the steps need and never touches the GPU; a step is a fork of it. So a step that
crashes, hangs or leaves the device in a bad state costs no other step anything, and none pays the imports
again.
"""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.catalogue import STEPS, Step
from benchmarks.gpu.check import ROOT, Check, reason_of

Line = dict[str, Any]
_LEAST_S = 5.0
# Characters of what a step found that a terminal gets, where something is wrong and where all is well.
_SHOWN, _SHOWN_OK = 400, 120
# What torch says, and what CUDA says where torch does not know that the driver was started before the fork.
_NO_FORKS = ("forked subprocess", "initialization error")


def run(check: Check, names: Sequence[str], budget_s: float, command: Sequence[str]) -> int:
    """Run the steps within the budget; -> how many failed or found something different.

    `<out>/results.jsonl` gets a line about the run and one a step; `<out>/log.txt` what the steps printed.
    """
    began = time.monotonic()
    # torch would else start the driver to see whether there is a device, and no fork could use it any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for folder in (check.out, check.work):
        folder.mkdir(parents=True, exist_ok=True)
    _preload(names)
    forks, failed, differ = True, 0, 0
    done = _ended_steps(check.out / "results.jsonl")
    with (check.out / "results.jsonl").open("a") as results:
        _write(results, {"run": about(check, command)})
        for name in names:
            left = budget_s - (time.monotonic() - began)
            if left < _LEAST_S:
                spent = f"not begun: the budget of {budget_s:.0f} s is spent"
                line: Line = {"step": name, "ok": False, "seconds": 0.0, "error": spent}
            else:
                limit = min(STEPS[name].limit_s, left)
                line = one(check, name, limit, forks and not STEPS[name].fresh)
                if forks and any(words in json.dumps(line) for words in _NO_FORKS):
                    # Something that was imported has started the driver after all.
                    forks = False
                    line = one(check, name, min(limit, left), False)
            if line["ok"]:
                done.add(name)
            elif missing := [other for other in STEPS[name].after if other not in done]:
                lacks = f"run {' and '.join(missing)} first, whose files it reads"
                line["error"] = f"{lacks} ({line.get('error', 'it told nothing')})"
            failed += not line["ok"]
            differ += bool(line["ok"] and line.get("different"))
            _write(results, line)
            print(short(line), flush=True)
    ended = f"{len(names) - failed} of {len(names)} steps ended, {differ} of them found something different"
    print(f"{ended}; {time.monotonic() - began:.0f} s", flush=True)
    return failed + differ


def _ended_steps(results: Path) -> set[str]:
    """The steps that an earlier run into the same folder brought to their end."""
    if not results.exists():
        return set()
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    newest = {line["step"]: line["ok"] for line in lines if "step" in line}
    return {name for name, ok in newest.items() if ok}


def one(check: Check, name: str, limit_s: float, fork: bool) -> Line:
    """Run one step in a fork of this process, or in a new interpreter; -> its line of the results."""
    check, started = replace(check, step=name), time.monotonic()
    answer = check.answer_file
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be(check, name, STEPS[name], fork)
    status = _wait(child, started + limit_s)
    line: Line = {"step": name, "ok": status == 0, "seconds": round(time.monotonic() - started, 2)}
    if status is None:
        of = "its limit" if limit_s >= STEPS[name].limit_s else "where the budget ended"
        line["error"] = f"stopped after {limit_s:.0f} s, {of}"
    elif os.WIFSIGNALED(status):
        line["error"] = f"ended by signal {os.WTERMSIG(status)}"
    if answer.exists():
        # What a step had found when it was stopped counts too.
        line |= json.loads(answer.read_text(encoding="utf-8"))
        answer.unlink()
    return line


def _wait(child: int, until: float) -> int | None:
    """The status that a process ended with, or None where it had to be ended; what it started ends with
    it.
    """
    status: int | None = None
    while time.monotonic() < until:
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            status = found
            break
        time.sleep(0.05)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def _be(check: Check, name: str, step: Step, fork: bool) -> None:
    """The child's life; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(check.out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        os.environ.update(step.environment)
        print(f"\n===== {name} {time.strftime('%H:%M:%S')} {dict(step.environment) or ''}", flush=True)
        if not fork:
            words = [sys.executable, "-m", "benchmarks.gpu", "--one", *options(check), name]
            os.chdir(ROOT)
            os.execv(sys.executable, words)
        code = answer_of(check, name)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Whatever happens, the child must not go on as a second parent.
        os._exit(code)


def answer_of(check: Check, name: str) -> int:
    """Take the step in this very process and keep its answer for the parent; -> the exit code."""
    check, code = replace(check, step=name), 0
    try:
        if check.dry:
            # Tiny work among several threads takes longer than on one.
            torch.set_num_threads(1)
        with quiet():
            found = STEPS[name].load()(check)
    except BaseException as error:
        traceback.print_exc()
        found, code = {"error": reason_of(error)}, 1
    check.keep(found)
    return code


def options(check: Check) -> list[str]:
    """The command line's options that say the same as `check`."""
    words = ["--out", str(check.out.absolute()), "--work", str(check.work.absolute())]
    return [*words, *(["--log", str(check.log.absolute())] if check.log else []), *(["--dry"] * check.dry)]


@contextmanager
def quiet() -> Iterator[None]:
    """Third parties' warnings would hide what steps say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _preload(names: Sequence[str]) -> None:
    """Import what the steps are made of; one that cannot be imported fails alone, later."""
    with quiet():
        # pyarrow imports pandas at its first table.
        for module in sorted({STEPS[name].module for name in names if not STEPS[name].fresh} | {"pandas"}):
            try:
                importlib.import_module(module)
            except Exception as error:
                print(f"{module} was not imported: {reason_of(error)}", flush=True)


def about(check: Check, command: Sequence[str]) -> Line:
    """Where, when and of what this run is; asks no driver that forks would need."""
    from trainer.run_folder import versions

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *command]),
        "commit": _output_of("git", "rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "device": _output_of(
            "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
        )
        or "cpu",
        "versions": versions(),
        "dry": check.dry,
    }


def _output_of(*words: str) -> str:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def short(line: Line) -> str:
    """A step's line for a terminal."""
    state = "skip" if "skipped" in line else "ok" if line["ok"] else "FAIL"
    if line["ok"] and line.get("different"):
        state = "DIFF"
    what = line.get("error") or line.get("skipped")
    if what is None:
        different = ", ".join(line.get("different", []))
        facts = ", ".join(f"{name} {cell_text(value)}" for name, value in line.get("facts", {}).items())
        rows = line.get("rows", [])
        errors = [row["error"] for row in rows if "error" in row][:1]
        counted = f"{len(rows)} rows" if rows else ""
        parts = [f"different: {different}" if different else "", *errors, counted, facts]
        what = "; ".join(part for part in parts if part)
    most = _SHOWN_OK if state == "ok" else _SHOWN
    return f"{state:<4} {line['step']:<12} {line['seconds']:>6.1f} s  {what[:most]}"


def cell_text(value: Any) -> str:
    """A value of a table's cell."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _write(results: Any, line: Line) -> None:
    results.write(json.dumps(line, default=str) + "\n")
    results.flush()
