"""Compare what score.cpp printed with the scores that were recorded at export; needs numpy alone.

python compare.py MODEL_FOLDER SCORES.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(folder: Path, scores: Path) -> None:
    with np.load(folder / "recorded.npz") as recorded:
        expected = recorded["expected"]
    found = np.loadtxt(scores, dtype=np.float32, ndmin=2).reshape(expected.shape)
    print(f"largest difference {np.abs(found - expected).max():.3g}, of {found.size:,} probabilities")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
