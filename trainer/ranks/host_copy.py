"""Numbers on their way from the device to the host, without a wait at the place that sends them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in host memory, on its way from the device.

    On CUDA the copy goes to pinned memory behind the work that was given to the current stream so far, and
    the host goes on at once. On other devices the copy is finished when this object has been made.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            # A blocking event lets the waiting thread sleep, so that its core decodes data meanwhile.
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.to("cpu", copy=True)

    def wait(self) -> Tensor:
        """The numbers, as soon as they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._host


class Unloading:
    """Collects tensors from the device: the host waits for the oldest only, once `ahead` are under way.

    Pinned memory is held by those under way alone; what has arrived is kept in ordinary memory.

    Args:
        ahead: tensors under way at most, at least 1; send: starts a copy.
    """

    def __init__(self, ahead: int, send: Callable[[Tensor], HostCopy] = HostCopy) -> None:
        self._ahead, self._send = ahead, send
        self._under_way: deque[HostCopy] = deque()
        self._arrived: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Start to copy one more; a tensor that lies on the CPU is kept as it is."""
        if tensor.device.type == "cpu" and not self._under_way:
            self._arrived.append(tensor)
            return
        self._under_way.append(self._send(tensor))
        if len(self._under_way) > self._ahead:
            self._receive()

    def all(self) -> list[Tensor]:
        """Every tensor, in the order in which they were added."""
        while self._under_way:
            self._receive()
        return self._arrived

    def arrived(self) -> list[Tensor]:
        """Those that have arrived since the last call, in order; they are held no longer."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def _receive(self) -> None:
        host = self._under_way.popleft().wait()
        # The clone gives the pinned memory back; PyTorch uses it again for the next copy of its size.
        self._arrived.append(host.clone() if host.is_pinned() else host)
