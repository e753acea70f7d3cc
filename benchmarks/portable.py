"""Which presets have a portable form, how near it scores, and how fast it runs (portable.md)

Every preset of configs/ gets a snapshot with random weights over a small log. Its portable form is written,
run by its own runtime, and compared with the snapshot as `tandemrec export --format` compares: on the
recorded requests, on the same in other shapes, and on all requests of the training split. Then one long
request is scored by ONNX Runtime and by the scorer of the server, on one thread, over the same snapshot.
--config is a TOML of `PortableBench`.
"""

from __future__ import annotations

import io
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from pydantic import NonNegativeInt, PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread, rounds, seconds_of
from benchmarks.inputs.served_model import ServedModel, draw
from embeddings.errors import TandemError
from pipelines.cluster import cluster
from pipelines.console import quiet_third_parties
from pipelines.score import open_requests
from tests.helpers.presets import PRESETS, of_tasks
from tests.helpers.snapshots import exported, save_run
from tests.trainer.test_presets import log_of_tasks, preset_log
from trainer.config.toml import Settings, load_settings
from trainer.log.clusters import ClusterInfo
from trainer.portable.building import portable_of
from trainer.portable.formats import FORMATS
from trainer.portable.onnx_model import MODEL, write_onnx
from trainer.portable.parity import Comparison
from trainer.portable.runtimes import onnx_runtime
from trainer.serving.scorer import Scorer
from trainer.snapshot import load_snapshot
from trainer.snapshot.code import dense_obstacle, dense_part

_CLUSTERED = "twin_v2"
_PRESET_COLUMNS = {
    "preset": "{preset}",
    "largest difference": "{worst:.2g}",
    "candidates": "{candidates:,}",
    "stage two alone": "{dense}",
    "CPU s": "{cpu_s:.1f}",
    "why not": "{refusal}",
}
_SPEED_COLUMNS = {"one thread": "{name}", "CPU ms": "{cpu_ms:.1f}", "min-max": "{min:.1f}-{max:.1f}"}


class PortableBench(Settings):
    """The settings of this benchmark.

    Attributes:
        presets: to try; empty = all of configs/. form: a format of `tandemrec export --format`.
        processes: that try presets at the same time.
        inside: bytes of tables that model.onnx may hold itself.
        length: behaviors of the request that is timed; 0 = no request is timed.
        candidates, k, rows, dim, width: of it: candidates, behaviors kept, rows of each table, widths of the
            vectors of attention and of the representation.
    """

    presets: tuple[str, ...] = ()
    form: str = "onnx"
    processes: PositiveInt = 2
    inside: NonNegativeInt = 1_000_000
    length: NonNegativeInt = 10_000
    candidates: PositiveInt = 500
    k: PositiveInt = 50
    rows: PositiveInt = 100_000
    dim: PositiveInt = 16
    width: PositiveInt = 128


@one_thread()
def main(words: Sequence[str]) -> None:
    given = Options("portable", __doc__).measuring(config=False, repeats=12).read(words)
    settings = load_settings(PortableBench, given.config, given.overrides)
    report = Report(given, "Portable models", seed=5)
    report.facts = settings.model_dump()
    with tempfile.TemporaryDirectory() as folder:
        presets = settings.presets or sorted([*PRESETS, _CLUSTERED])
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(settings.processes, context) as workers:
            for row in workers.map(_Presets.made(Path(folder), settings).row, presets):
                report.rows.append(row)
                print(row, flush=True)
        report.table(_PRESET_COLUMNS, report.rows)
        if settings.length:
            timed = _timed_rows(Path(folder) / "timed", settings, given.repeats, report)
            report.table(_SPEED_COLUMNS, timed)
            report.rows += timed
    report.close()


@dataclass(frozen=True)
class _Presets:
    """Presets with random weights, on small logs.

    Attributes:
        one, several: logs of one task and of several; folder: for all that is written.
    """

    folder: Path
    settings: PortableBench
    one: Path
    several: Path

    @classmethod
    def made(cls, folder: Path, settings: PortableBench) -> _Presets:
        """With logs that it writes."""
        return cls(folder, settings, preset_log(folder / "one"), log_of_tasks(folder / "several"))

    @one_thread()
    def row(self, preset: str) -> Row:
        """One preset: how near its portable form scores, or why there is none."""
        quiet_third_parties()
        seconds, row = None, Row(preset=preset, refusal="")
        with redirect_stdout(io.StringIO()):
            try:
                version, log = self._version(preset)
                seconds = seconds_of(lambda: row.update(self._compared(version, log)))
            except TandemError as error:
                row["refusal"] = str(error)
            except Exception as error:  # The table says what broke, and the rest is measured.
                row["refusal"] = f"broke: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return row if seconds is None else {**row, "cpu_s": seconds.cpu}

    def _compared(self, version: Path, log: Path) -> Row:
        form, snapshot = FORMATS[self.settings.form], load_snapshot(version)
        portable = portable_of(snapshot)
        folder = version.parent / "portable"
        folder.mkdir()
        form.write(folder, portable, self.settings.inside)
        comparison = Comparison(portable, form.load(folder / form.model), folder / form.model)
        recorded = comparison.of_recorded()
        # Random weights give probabilities next to 1, which rounding alone puts in order: AUC says nothing.
        split = comparison.of_split(open_requests(snapshot, log, "train")[0], 0, auc_bound=1.0)
        return {
            "worst": max(recorded.worst, split.worst),
            "candidates": recorded.candidates + split.candidates,
            "dense": "none" if dense_obstacle(snapshot.model) else dense_part(snapshot).name,
        }

    def _version(self, preset: str) -> tuple[Path, Path]:
        """Its snapshot and log."""
        log = self.several if of_tasks(preset) else self.one
        if preset != _CLUSTERED:
            return self._exported(preset, log), log
        clustered = self.folder / "clustered"
        cluster(log, self._exported("dare", log, of=preset), clustered, ClusterInfo(chunk=12, cap=4))
        return self._exported(preset, clustered, "data.recent=4", "model.branches.recent.k=4"), clustered

    def _exported(self, preset: str, log: Path, *overrides: str, of: str = "") -> Path:
        """A snapshot; `of`: what it is for, if not for the preset itself."""
        folder = self.folder / f"{preset}-{of or preset}"
        return exported(save_run(folder / "run", log, preset, *overrides), folder / "snapshot")


def _timed_rows(folder: Path, settings: PortableBench, repeats: int, report: Report) -> list[Row]:
    """One long request by ONNX Runtime and by the scorer, in turn; their scores must agree."""
    model = ServedModel(settings.rows, settings.dim, settings.width, settings.k, settings.length)
    request = draw(model, 0, settings.length, settings.candidates)
    version = model.publish(folder, seed=0)
    # The scorer changes how its own model searches.
    portable, scorer = portable_of(load_snapshot(version)), Scorer(load_snapshot(version))
    write_onnx(folder, portable, settings.inside)
    run, inputs = onnx_runtime(folder / MODEL, threads=1), portable.arrays(scorer.batch([request]))
    worst = float(abs(run(inputs)[0] - scorer.score([request])[0][0].probabilities).max())
    if not worst <= 1e-6:
        raise TandemError(f"ONNX Runtime scores the timed request otherwise, by {worst:.3g}")
    report.line(f"L = {settings.length:,}, C = {settings.candidates:,}: largest difference {worst:.2g}")
    ways = {"scorer": partial(scorer.score, [request]), "ONNX Runtime": partial(run, inputs)}
    taken = rounds({name: partial(seconds_of, way) for name, way in ways.items()}, repeats)
    cpu = {name: [1e3 * seconds.cpu for seconds in each] for name, each in taken.items()}
    report.ratio("onnx_runtime_to_scorer", cpu["ONNX Runtime"], cpu["scorer"])
    return [
        {"name": name, "cpu_ms": median(each), "min": min(each), "max": max(each)}
        for name, each in cpu.items()
    ]
