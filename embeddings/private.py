"""Every private part of torch, TorchRec and FBGEMM that this project uses; no other file uses one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def detach(pipeline: Any) -> None:
    """Give the model that one of TorchRec's pipelines has taken its own forward pass back.

    Where the first exchange of ids has failed, TorchRec 1.8 has taken the forward passes but not yet what
    exchanges the ids, gives the former back, and then says that these are unequally many
    (`_pipeline_detach_model` in train_pipeline/utils.py), in the place of what went wrong.
    """
    with suppress(AssertionError):
        pipeline.detach()
