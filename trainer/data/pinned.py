"""Batches in pinned memory, from where they are copied to a device while the host goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.data.batch import RequestBatch


def pinning(device: torch.device) -> Callable[[RequestBatch], RequestBatch] | None:
    """What puts a batch into pinned memory; None for a device that has no use for it.

    The function may be called in any thread: in the reader's own, pinning costs training no time.
    """
    if device.type != "cuda":
        return None

    def pin(batch: RequestBatch) -> RequestBatch:
        # A new thread stands on the first device, where it would open a context of its own.
        torch.cuda.set_device(device)
        return batch.pin_memory()

    return pin
