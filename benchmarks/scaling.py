"""Draws what `tandemrec bench scaling --json F` measured: one panel a size, both axes logarithmic.

    python -m benchmarks.scaling F benchmarks/images/scaling.png

Needs matplotlib (requirements/bench.txt).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_NAMES = {
    "length": "history length L",
    "k": "kept behaviors K",
    "dim": "width of a table",
    "users": "users in a step (57 candidates each)",
    "candidates": "candidates of a request",
    "rows": "table rows (10,000 of them touched)",
}


def draw(tree: dict[str, Any], out: Path) -> None:
    """Times on the left axis, memory on the right, with the fitted exponents in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for panel, (sweep, name) in zip(panels.flat, _NAMES.items(), strict=True):
        rows = [row for row in tree["rows"] if row["sweep"] == sweep]
        size, beside = [row["value"] for row in rows], panel.twinx()
        time = [row["cpu_us_a_sample"] for row in rows]
        spread = [[t - row["min"] for t, row in zip(time, rows, strict=True)]]
        spread.append([row["max"] - t for t, row in zip(time, rows, strict=True)])
        exponents = [tree["ratios"][f"{sweep}_{kind}_exponent"] for kind in ("time", "memory")]
        label = f"processor time, exponent {exponents[0]:.2f}"
        lines = [panel.errorbar(size, time, spread, fmt="o-", color="tab:blue", capsize=2, label=label)]
        memory = [row["bytes_a_sample"] / 1024 for row in rows]
        label = f"peak memory, exponent {exponents[1]:.2f}"
        lines += beside.plot(size, memory, "s--", color="tab:orange", label=label)
        panel.set(xscale="log", yscale="log", xlabel=name, ylabel="microseconds a sample")
        panel.set_xticks(size, [f"{value:,}" for value in size], fontsize=7)
        panel.minorticks_off()
        panel.set_ylim(min(time) / 3, max(time) * 3)
        beside.set(yscale="log", ylabel="KiB a sample")
        beside.minorticks_off()
        beside.set_ylim(min(memory) / 3, max(memory) * 3)
        panel.legend(handles=lines, loc="best", fontsize=8)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
