"""What the launcher says of this start: which job it is of, and whether it was started before."""

from __future__ import annotations

import os


def launcher_name() -> str:
    """What torchrun and Slurm call this job, the same after each restart; empty where neither says so."""
    # Without a name of its own torchrun calls every job `none`.
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    job = os.environ.get("SLURM_JOB_ID", "")
    parts = {"torchrun": "" if run == "none" else run, "Slurm job": job}
    return ", ".join(" ".join(f"{name} {part}".split()) for name, part in parts.items() if part)


def restarted() -> bool:
    """Whether torchrun or Slurm starts this job again."""
    counts = os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), os.environ.get("SLURM_RESTART_COUNT", "")
    return any(count.isdecimal() and int(count) > 0 for count in counts)
