"""The section online of the trainer's configuration: what `tandemrec online` does with each window."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from trainer.config.toml import Settings

Width = Literal["fp32", "fp16", "int8"]


class OnlineConfig(Settings):
    """Windows of a stream are trained one after the other, and versions published, see docs/online.md."""

    evaluate: bool = True
    """Whether each window is scored before it is trained. Its metrics then tell how well the model of that
    moment does on what it has not seen."""
    publish_every: PositiveInt = 1
    """The number of trained windows between two versions of the snapshot."""
    full_every: int = Field(10, ge=1, le=30)
    """Every how many versions one holds everything. The versions between are deltas."""
    keep: int = Field(20, ge=0)
    """The number of newest versions that stay, besides what these build on. 0 means all."""
    dtype: Width = "fp32"
    """How tables of the representation are stored in a version."""
    attention_dtype: Width = "fp16"
    """How tables of the attention are stored in a version."""
    compare_requests: int = Field(200, ge=0)
    """The number of requests of the newest window on which a version must rank as the trainer does, besides
    the recorded ones."""
    publish_timeout_s: float = Field(3600.0, gt=0, allow_inf_nan=False)
    """How long training waits for a version in the making, in seconds, before the run ends."""
    poll_s: float = Field(0.5, gt=0, le=60)
    """Seconds between two looks for new windows."""
    retry_s: float = Field(60.0, ge=0)
    """How long a window that cannot be read is tried again, in seconds, before the run ends."""
