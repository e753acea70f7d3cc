"""The most memory that each stage of a run had resident, each in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pipelines.export
import pipelines.plan.plan
import pipelines.train  # noqa: F401 - imported before the fork
from launch.cli import main
from tests.helpers.forked import fork, one_thread, wait_all

SETTINGS = Path("settings.json")


def peak_of(work: Callable[[], int], file: Path) -> None:
    """Do the work and write down the most that was resident."""
    code = work()
    assert code == 0, code
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    file.write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")), encoding="utf-8")


def run(root: Path) -> None:
    words = json.loads((root / SETTINGS).read_text(encoding="utf-8"))
    found: dict[str, int] = {}

    def stage(name: str, *command: str) -> None:
        file = root / "peak"
        codes = wait_all([fork(partial(peak_of, lambda: main(list(command)), file))], seconds=120)
        assert codes == [0], (name, codes)
        found[name] = 1024 * int(file.read_text(encoding="utf-8"))

    few, many = words["rows"]
    for rows, modes in ((few, ["sync"]), (many, ["async", "sync"])):
        sized = [*words["train"], "--set", f"tables.item_id.rows={rows}"]
        for mode in modes:
            folder = root / f"{mode}-{rows}"
            how = ["--set", f'checkpoint.mode="{mode}"', "--out", str(folder)]
            stage(f"{mode} {rows}", "train", *sized, *how)
        stage(f"export {rows}", "export", "--run", str(folder), "--out", str(root / f"snapshot-{rows}"))
    stage(f"resume {many}", "train", *sized, *how, "--set", "train.max_steps=3")
    alone = ["--world-size", "1", "--device", "cpu", "--set", 'checkpoint.mode="async"']
    stage("plan", "plan", *sized, *alone, "--json", str(root / "plan.json"))
    (root / "report.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    one_thread()
    run(Path(sys.argv[1]))
