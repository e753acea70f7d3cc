"""STCA: layers of attention from the candidate to its whole history, which does not attend to itself."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.bags import rows_at
from trainer.model.read.multi_head import heads_problem, join_heads, never_empty, split_heads, start_sharp
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeEncoding


class SwiGlu(nn.Module):
    """(x U * swish(x V)) O, from any width back to the same one.

    Args:
        width: D; hidden: columns of U and of V.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 2 * hidden, bias=False)
        self.leave = nn.Linear(hidden, width, bias=False)

    def forward(self, part: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        plain, gate = self.enter(part).chunk(2, dim=-1)
        out: Tensor = self.leave(plain * F.silu(gate))
        return out


class CrossAttention(nn.Module):
    """One layer: the query of each candidate, and the keys and values of the history.

    Args:
        width: D; hidden: of the SwiGLU networks; time: encodings of keys and values, 2 D wide.
        former: outputs of earlier layers that the query is made of, besides the candidate.
    """

    def __init__(self, width: int, hidden: int, time: TimeEncoding, former: int) -> None:
        super().__init__()
        self.compress = nn.Linear((former + 1) * width, width, bias=False) if former else None
        self.of_history = nn.Sequential(SwiGlu(width, hidden), nn.LayerNorm(width))
        self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.time = time
        start_sharp(self.key, 2**0.5)
        # The candidate's maps start as the history's: a behavior of its own item has the largest score then.
        self.of_query, self.query = deepcopy(self.of_history), deepcopy(self.key)
        if self.compress is not None:
            with torch.no_grad():
                passed_on = torch.cat([torch.zeros(width, former * width), torch.eye(width)], dim=1)
                self.compress.weight.copy_(passed_on)

    def asked(self, given: list[Tensor]) -> Tensor:
        """Outputs of the layers before and the candidate's vector, [C, D] each -> queries [C, D]."""
        mixed_CD = given[-1] if self.compress is None else self.compress(torch.cat(given, dim=1))
        query_CD: Tensor = self.query(self.of_query(mixed_CD))
        return query_CD

    def remembered(self, value_SD: Tensor) -> Tensor:
        """Keys and values of behaviors side by side, [S, 2 D]; they know neither candidate nor request."""
        history_SD = self.of_history(value_SD)
        return torch.cat([self.key(history_SD), self.value(history_SD)], dim=1)


class TargetToHistory(TargetPooling):
    """Stacked Target-to-History Cross Attention (Guan et al., arXiv 2511.06077, section 3.1).

    Each layer maps the history by a SwiGLU network of its own, and one query a candidate attends to all of
    it. The query of a layer is made of the outputs of all layers before and the candidate; z, what is pooled,
    of the outputs of all layers and the candidate. Keys and values are computed once for each behavior of a
    batch, whatever the requests and candidates. What depends on the request is added to them: encodings of
    ages (and ranks). docs/specs/stca.md has the equations, and what of them is ours.

    Args:
        width: D; heads: divide it; hidden: of the SwiGLU networks.
        times: of each layer, encodings that are 2 D wide.
        target_aware: the head is given the product of candidate and z besides.
    """

    uses = frozenset({"layers", "heads", "expansion"})
    on_windows = True

    @classmethod
    def problem(cls, settings: Any) -> str:
        if settings.clusters:
            return 'sequence = "stca" reads single behaviors: leave clusters out'
        return "" if settings.time_target == "shared" else 'sequence = "stca" has time_target = "shared"'

    @classmethod
    def width_problem(cls, settings: Any, width: int) -> str:
        return heads_problem(settings.heads, width)

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> TargetToHistory:
        width, rows = sizes.representation.width, sizes.mark_rows("values")
        times = [TimeEncoding(rows, 2 * width) for _ in range(settings.layers)]
        return cls(width, settings.heads, settings.expansion * width, times, settings.target_aware)

    def __init__(
        self, width: int, heads: int, hidden: int, times: list[TimeEncoding], target_aware: bool
    ) -> None:
        super().__init__(width, target_aware)
        self.heads = heads
        self.layers = nn.ModuleList(
            CrossAttention(width, hidden, time, former) for former, time in enumerate(times)
        )
        self.unite = nn.Linear((len(times) + 1) * width, width, bias=False)
        self.pool = SwiGlu(width, hidden)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        """-> the candidate, z, and with `target_aware` their product."""
        target_CD = behaviors.target_CD
        seen_WX = never_empty(behaviors.windows.mask)
        holds_W = behaviors.windows.mask.any(1)
        there_CD = holds_W[behaviors.windows.of_candidate].unsqueeze(1).to(target_CD.dtype)
        given = [target_CD]
        for layer in self.layers:
            assert isinstance(layer, CrossAttention)
            given.insert(-1, layer.out(self._read(layer, given, behaviors, seen_WX)) * there_CD)
        pooled_CD: Tensor = self.pool(self.unite(torch.cat(given, dim=1)))
        return self.parts(target_CD, pooled_CD)

    def _read(
        self, layer: CrossAttention, given: list[Tensor], behaviors: Behaviors, seen_WX: Tensor
    ) -> Tensor:
        """What the heads of a layer read of each candidate's window, side by side: [C, D]."""
        slots, marks = behaviors.windows.slots, behaviors.windows.marks
        known_WXD = rows_at(layer.remembered(behaviors.value_SD), behaviors.place)
        known_WXD = known_WXD + layer.time.behaviors(marks, behaviors.group_C)
        key, value = (split_heads(part, self.heads) for part in known_WXD.chunk(2, dim=2))
        query = split_heads(slots.spread(layer.asked(given)), self.heads)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_WX[:, None, None])
        return slots.collect(join_heads(read))
