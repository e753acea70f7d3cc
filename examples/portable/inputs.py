"""Write recorded.npz of a portable model as the file that score.cpp reads; needs numpy alone.

python inputs.py MODEL_FOLDER INPUTS.bin
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(folder: Path, out: Path) -> None:
    names = [each["name"] for each in json.loads((folder / "signature.json").read_text())["inputs"]]
    with np.load(folder / "recorded.npz") as recorded, out.open("wb") as file:
        for name in names:
            part = np.ascontiguousarray(recorded[name])
            file.write(b"i" if part.dtype == np.int64 else b"f")
            file.write(np.array([part.ndim, *part.shape], dtype=np.int64).tobytes())
            file.write(part.tobytes())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
