"""The command line's verbs on the device, as a user would call them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import ROOT, Answer, Check, Row, answer, skipped
from benchmarks.gpu.measure import forget_memory, memory
from pipelines.evaluate import evaluate as evaluate_run
from pipelines.export import export as export_run
from pipelines.score import score as score_requests
from pipelines.synth.synth import synth as write_planted
from pipelines.train import train as train_run
from trainer.quality.compare import compare_scores
from trainer.quality.scored import read_scores
from trainer.run_folder import RunFolder

CONFIG = ROOT / "configs" / "dare.toml"
_LARGEST_AUC, _LARGEST_SCORE = 0.002, 1e-4


@dataclass(frozen=True)
class TrainingRun:
    """What a run folder tells of a training: losses by line of its log, and one line for a table."""

    losses: list[float]
    row: Row


def run_of(
    check: Check,
    name: str,
    settings: Sequence[str],
    *,
    log: Path | None = None,
    fresh: bool = True,
    profiled: bool = False,
) -> TrainingRun:
    """`tandemrec train` of DARE into `<work>/<name>`, on the planted log unless another is given."""
    out = check.work / name
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    where = [f"data.log={log or planted(check)}"]
    where += [] if log else [f"data.history_length={check.size(200, 24)}"]
    forget_memory()
    started = time.perf_counter()
    train_run(CONFIG, out, [*where, *settings], profiled=profiled)
    wall = time.perf_counter() - started
    folder = RunFolder(out)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    summary = folder.read_summary()
    row = {
        "seconds": wall,
        "samples": summary.get("samples", 0),
        "best samples/s": max(line["samples_per_s"] for line in trained),
        "last loss": trained[-1]["loss"],
        "AUC": (summary.get("validation") or {}).get("auc", float("nan")),
        **memory(),
    }
    return TrainingRun([line["loss"] for line in trained], row)


def planted(check: Check) -> Path:
    """The planted log; written where no step has done so yet."""
    path = check.work / "planted"
    if not path.exists():
        write_planted(path, users=check.size(0, 60))
    return path


def _short(check: Check, steps: int) -> list[str]:
    return [f"train.max_steps={steps}", "train.log_every=2"] if check.dry else ["train.log_every=5"]


def _large(candidates: int) -> list[str]:
    return [f"data.batch_candidates={candidates}", "data.workers=4", "data.prefetch=8"]


def synth(check: Check) -> Answer:
    """Whether `tandemrec synth` writes the planted log that the next steps train on.

    Expected: it ends.
    """
    path = planted(check)
    return answer(MB=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6)


def train(check: Check) -> Answer:
    """`tandemrec train` of DARE on one GPU: as configured, with a larger step, in bf16, without the pipeline.

    Expected: the AUC of each is that of `train_cpu`, or better for more data; bf16 within 0.002 of fp32.
    """
    ways: dict[str, tuple[str, list[str]]] = {"as configured": ("run", [])}
    if not check.dry:
        ways["16,384 candidates"] = "run-large", _large(16_384)
        ways["16,384 candidates, bf16"] = "run-bf16", [*_large(16_384), "train.precision=bf16"]
        ways["pipeline none"] = "run-none", ["train.pipeline=none"]
    found = {name: run_of(check, out, [*_short(check, 12), *more]).row for name, (out, more) in ways.items()}
    rows = [{"way": name, **row} for name, row in found.items()]
    different = []
    if "16,384 candidates" in found:
        apart = found["16,384 candidates"]["AUC"] - found["16,384 candidates, bf16"]["AUC"]
        different = ["bf16"] if abs(apart) > _LARGEST_AUC else []
    return answer(rows, different)


def train_cpu(check: Check) -> Answer:
    """The same log, order, seeds and settings as `train` as configured, on this machine's CPU.

    Expected: losses of the first steps alike to 1e-3 (relative), and an AUC within 0.002; in between they
    drift apart as rounding adds up.
    """
    cpu = run_of(check, "run-cpu", _short(check, 12))
    folder = RunFolder(check.work / "run")
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    apart = [abs(a - b) / abs(a) for a, b in zip(cpu.losses, losses, strict=True)]
    auc = abs(cpu.row["AUC"] - folder.read_summary()["validation"]["auc"])
    different = [*(["losses"] if apart[0] > 1e-3 else []), *(["AUC"] if auc > _LARGEST_AUC else [])]
    facts = {"first difference": apart[0], "largest difference": max(apart), "AUC apart": auc}
    return answer([{"way": "CPU", **cpu.row}], different, **facts)


def evaluate(check: Check) -> Answer:
    """`tandemrec evaluate` of that run on the test split.

    Expected: an AUC as on validation.
    """
    started = time.perf_counter()
    found = evaluate_run(check.work / "run", "test")
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return answer([], [], seconds=time.perf_counter() - started, **numbers)


def export(check: Check) -> Answer:
    """`tandemrec export` of a run that was trained on the GPU, whose snapshot a CPU serves: it scores
    recorded requests with both and refuses a snapshot that differs.

    Expected: it ends, so the snapshot is within export's own bounds.
    """
    out = check.work / "snapshot"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    version = export_run(check.work / "run", out, attention_dtype="fp32", parity_requests=check.size(200, 10))
    return answer([], [], seconds=time.perf_counter() - started, version=str(version.name))


def score(check: Check) -> Answer:
    """`tandemrec score` of the snapshot on the CPU against the scores that `evaluate` kept on the GPU.

    Expected: probabilities at most 1e-4 apart; where the two devices keep another behavior of two whose
    scores differ by rounding, a few candidates may be further apart.
    """
    started = time.perf_counter()
    out = check.work / "scores.parquet"
    score_requests(check.work / "snapshot", planted(check), "test", check.size(500, 20), out)
    seconds = time.perf_counter() - started
    kept = RunFolder(check.work / "run").scores("test")
    worst, equal = compare_scores(read_scores(out), read_scores(kept))
    facts = {"seconds": seconds, "largest difference": worst, "bit-equal": equal}
    return answer([], ["scores"] if worst > _LARGEST_SCORE else [], **facts)


def profile(check: Check) -> Answer:
    """Where a step's time goes: `tandemrec train --profile`; the table and the trace come back as files.

    Expected: the device is busy for most of a step of 4,096 candidates, and no phase waits for the host.
    """
    candidates = _large(check.size(4_096, 128))
    run_of(
        check,
        "profiled",
        [*candidates, f"train.max_steps={check.size(32, 12)}", "train.log_every=5"],
        profiled=True,
    )
    kept = {}
    for path in sorted((check.work / "profiled" / "profile").iterdir()):
        shutil.copy(path, check.out / f"profile-{path.name}")
        kept[f"profile-{path.name}, bytes"] = path.stat().st_size
    return answer(**kept)


def demo(check: Check) -> Answer:
    """DARE on Complete Journey, where its log was brought along (--log): one pass, then the test split.

    Expected: the AUC that the README tells of a whole log; less of a slice.
    """
    if check.log is None and not check.dry:
        return skipped("no log was brought along (--log)")
    settings = ["data.workers=8", "data.prefetch=8"]
    trained = run_of(check, "demo", [*settings, *(_short(check, 6) if check.dry else [])], log=check.log)
    test = evaluate_run(check.work / "demo", "test")
    return answer([{"way": "demo", **trained.row}], **{"test AUC": test["auc"]})


def pytest(check: Check) -> Answer:
    """The project's own tests that are marked gpu or gpu2, and the model's tests with a GPU in sight.

    Expected: all pass; tests marked gpu2 are skipped on a machine with one GPU.
    """
    # A file that needs a package which is not here counts as failed, but keeps no other from being run.
    files = marked_files()[:1] if check.dry else marked_files()
    ways = {"gpu": ["-m", "gpu or gpu2", "--continue-on-collection-errors", *files]}
    ways |= {} if check.dry else {"model": ["-m", "not slow", *model_files()]}
    rows: list[Row] = []
    for name, words in ways.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout[-60_000:], done.stderr[-5_000:])
        said: Any = done.stdout.strip().splitlines()[-1:]
        rows.append({"tests": name, "exit": done.returncode, "said": "".join(said)})
    # On a GPU, tests of which all are skipped have answered nothing.
    silent = [row["tests"] for row in rows if check.on_cuda and " passed" not in row["said"]]
    return answer(rows, [row["tests"] for row in rows if row["exit"] or row["tests"] in silent])


def model_files() -> list[str]:
    """The model's tests that start one rank only: one GPU is too few for more."""
    names = ("ops/test_bags", "ops/test_top", "retrieve/test_search", "test_frame")
    return [str(ROOT / "tests" / "trainer" / "model" / f"{name}.py") for name in names]


def marked_files() -> list[str]:
    """Files with tests that need a GPU, but for those that would run the steps of this check again."""
    folder = ROOT / "tests"
    files = [
        path for path in folder.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    return sorted(str(path) for path in files if path != folder / "gpu" / "test_steps.py")
