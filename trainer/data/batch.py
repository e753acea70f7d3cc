"""RequestBatch: the jagged, contiguous unit that travels from the reader to the loss.

Shape legend used in the whole trainer:
    N behaviors of the batch    R requests    C candidates    F features    T tasks
    L history length            K kept behaviors              D embedding width

All behaviors of all blocks lie one after the other, oldest first within a block; request r sees the slice
[window_start[r], window_end[r]) of them. One KeyedJaggedTensor of stride N + C holds behaviors first, then
candidates: a bag is one behavior or one candidate, so target and behavior share a table by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class RequestBatch(Pipelineable):  # type: ignore[misc]
    """One rank's part of one step.

    Attributes:
        features: KJT, keys = features, stride N + C (behaviors, then candidates).
        behavior_time: int64 [N], seconds.
        request_time: int64 [R], seconds.
        window_start, window_end: int64 [R], the behaviors a request may see.
        user_id, request_id: int64 [R], names of the request (grouping key of GAUC).
        candidate_request: int64 [C], ascending: which request a candidate belongs to.
        labels: float32 [C, T].
        step_candidates: candidates of all ranks in this step, so that a mean over ranks is exact.
    """

    features: KeyedJaggedTensor
    behavior_time: Tensor
    request_time: Tensor
    window_start: Tensor
    window_end: Tensor
    user_id: Tensor
    request_id: Tensor
    candidate_request: Tensor
    labels: Tensor
    step_candidates: int

    @property
    def behaviors(self) -> int:
        """N."""
        return self.behavior_time.numel()

    @property
    def candidates(self) -> int:
        """C."""
        return self.candidate_request.numel()

    @property
    def requests(self) -> int:
        """R."""
        return self.request_time.numel()

    def to(self, device: torch.device, non_blocking: bool = False) -> RequestBatch:
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if not isinstance(value := getattr(self, field.name), int)
        }
        return RequestBatch(**moved, step_candidates=self.step_candidates)

    def record_stream(self, stream: torch.Stream) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int):
                value.record_stream(stream)

    def pin_memory(self) -> RequestBatch:
        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if not isinstance(value := getattr(self, field.name), int)
        }
        return RequestBatch(**pinned, step_candidates=self.step_candidates)
