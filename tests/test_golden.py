"""What an earlier version made still works: its run goes on, its snapshot loads, and both give the same bits.

`tests/golden/README.md` says what the files are and how they were made.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from tests.helpers.launching import tandemrec

GOLDEN = Path(__file__).parent / "golden"
LOG = GOLDEN / "89f0e71" / "log"
# Metrics come from ranks of scores, bins or counts: they jump where a score moves by one rounding.
MEASURED = {"loss", "logloss", "ne", "pcoc"}


def _same_kernels() -> bool:
    """Whether this processor adds up in the order in which the expected sums were added.

    Torch, MKL and FBGEMM choose their kernels by the processor, and another order rounds otherwise.
    """
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), flags=re.M)
    here = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor.group(1) if vendor else "",
    }
    return bool(here == json.loads((GOLDEN / "kernels.json").read_text()))


EXACT = _same_kernels()


def _equal(now: npt.NDArray[Any], then: npt.NDArray[Any], where: str) -> None:
    if EXACT or now.dtype.kind != "f":
        np.testing.assert_array_equal(now, then, err_msg=where)
    else:
        np.testing.assert_allclose(now, then, rtol=1e-4, atol=1e-6, err_msg=where)


def _equal_tensors(now: Path, then: Path) -> None:
    """All safetensors files below both folders have the same names, tensors and values.

    But for matrices of the search: rows of a table as they are were written twice, and now are that table.
    """
    names = sorted(p.relative_to(then) for p in then.rglob("*.safetensors") if p.parent.name != "search")
    assert names and names == sorted(path.relative_to(now) for path in now.rglob("*.safetensors"))
    for name in names:
        got, expected = load_file(now / name), load_file(then / name)
        assert {key: (value.dtype, value.shape) for key, value in got.items()} == {
            key: (value.dtype, value.shape) for key, value in expected.items()
        }, name
        for key, value in expected.items():
            _equal(got[key], value, f"{name}: {key}")


def _numbers(line: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The leaves of a line of metrics.jsonl, without times."""
    leaves: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            leaves |= _numbers(value, f"{place}{key}.")
        elif key != "samples_per_s":
            leaves[place + key] = value
    return leaves


def _equal_metrics(now: Path, then: Path) -> None:
    """Every number that was in a line is there with the same value; a later version may add others."""
    lines, expected = (
        [_numbers(json.loads(line)) for line in path.read_text().splitlines()] for path in (now, then)
    )
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        for key, value in wanted.items():
            name = key.rsplit(".", 1)[-1]
            if EXACT or not isinstance(value, float):
                assert line[key] == value, key
            elif name in MEASURED:
                assert line[key] == pytest.approx(value, rel=1e-4), key


def _names_no_module(folder: Path) -> None:
    """Whoever reads the files later may have moved our modules."""
    module = re.compile(rb"\b(?:launch|pipelines|trainer|embeddings)\.[a-z_]+\b")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not module.search(path.read_bytes()), path


def _run(*words: str | Path) -> None:
    done = tandemrec(*map(str, words))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("commit", ["89f0e71", "dd6faf0"])
def test_a_run_goes_on_to_the_same_end(commit: str, tmp_path: Path) -> None:
    """From the checkpoint after half of its steps, with the configuration the run was started with."""
    golden, run = GOLDEN / commit, tmp_path / "run"
    shutil.copytree(golden / "run", run)
    _run("train", "--config", run / "config.toml", "--out", run, "--set", f"data.log={LOG}")
    _equal_metrics(run / "metrics.jsonl", golden / "metrics.jsonl")
    _run("unshard", "--run", run, "--out", tmp_path / "final")
    _equal_tensors(tmp_path / "final", golden / "final")
    fp32 = ("--dtype", "fp32", "--attention-dtype", "fp32")
    _run("export", "--run", run, "--out", tmp_path / "snapshot", *fp32)
    _equal_tensors(tmp_path / "snapshot", golden / "snapshot")
    for folder in ("run", "final", "snapshot"):
        _names_no_module(tmp_path / folder)


@pytest.mark.parametrize("commit", ["89f0e71", "dd6faf0"])
def test_a_snapshot_scores_the_same(commit: str, tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    _run(
        "score",
        "--snapshot",
        GOLDEN / commit / "snapshot",
        "--requests",
        LOG,
        "--split",
        "test",
        "--out",
        scores,
    )
    now, then = pq.read_table(scores), pq.read_table(GOLDEN / commit / "scores.parquet")
    assert now.column_names == then.column_names and now.num_rows == then.num_rows > 50
    for name in then.column_names:
        _equal(now[name].to_numpy(), then[name].to_numpy(), name)
