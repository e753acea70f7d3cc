"""A model in machine code, and the program in C++ that scores with it, without Python in its process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.launching import ROOT, tandemrec
from tests.helpers.models import small_log
from tests.helpers.snapshots import exported, save_run
from trainer.portable.folder import read, read_recorded


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_the_program_gives_the_scores(tmp_path: Path) -> None:
    version = exported(save_run(tmp_path / "run", small_log(tmp_path / "log"), "dare"), tmp_path / "snap")
    model = tmp_path / "model"
    # In a process of its own: the compiler's warnings are not ours to judge.
    given = ["--snapshot", str(version), "--out", str(model), "--parity-requests", "0"]
    exporting = tandemrec("export", "--format", "pt2", *given, timeout=800)
    assert exporting.returncode == 0, exporting.stderr
    program, library = tmp_path / "score", Path(torch.__file__).parent
    include = [f"-I{library / path}" for path in ("include", "include/torch/csrc/api/include")]
    link = [f"-L{library / 'lib'}", f"-Wl,-rpath,{library / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = ROOT / "examples/portable"
    words = ["g++", "-std=c++20", *include, str(source / "score.cpp"), "-o", str(program), *link]
    subprocess.run(words, check=True, timeout=300)
    inputs = tmp_path / "inputs.bin"
    subprocess.run(
        [sys.executable, str(source / "inputs.py"), str(model), str(inputs)], check=True, timeout=60
    )
    done = subprocess.run(
        [str(program), str(model / "model.pt2"), str(inputs)],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    scores = np.array([line.split() for line in done.stdout.splitlines()], dtype=np.float32)
    _, expected = read_recorded(model, read(model)[1])
    assert np.abs(scores - expected[:, :, 0]).max() <= 1e-6
    printed = tmp_path / "scores.txt"
    printed.write_text(done.stdout)
    compare = [sys.executable, str(source / "compare.py"), str(model), str(printed)]
    said = subprocess.run(compare, capture_output=True, check=True, text=True, timeout=60).stdout.split()
    assert said[:2] == ["largest", "difference"] and float(said[2].rstrip(",")) <= 1e-6
