"""VISTA: a history summarised in tokens that know no candidate, and candidates that attend to these alone."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.model import BranchKeys
from trainer.model.ops.bags import rows_at
from trainer.model.read.multi_head import join_heads, split_heads, start_silent
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeEncoding
from trainer.model.windows import Selection


class VistaKeys(BranchKeys):
    """What a branch may set besides, for the sequence model `vista`."""

    seeds: int = Field(32, ge=1, le=4096)
    """The number of tokens that `vista` summarises a history in."""


class QuasiLinearLayer(nn.Module):
    """Quasi-linear attention and a gated layer, each after a norm and with a residual (VISTA, section 3.2.2).

    O = SiLU(Q) SiLU(SiLU(K)^T V / N): tokens meet in a matrix [d, d] a head, so the cost is linear in their
    number. The division by N is ours, see docs/specs/vista.md.

    Args:
        width: D; heads, dim: H and d; scale: 1 / N.
    """

    def __init__(self, width: int, heads: int, dim: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, heads * dim, bias=False) for _ in range(3))
        self.norm_pooled = nn.LayerNorm(heads * dim)
        self.out = nn.Linear(heads * dim, width)
        self.norm_gated = nn.LayerNorm(width)
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))

    def memory(self, normed: Tensor, mask: Tensor) -> Tensor:
        """What tokens leave to be read: normed states [W, n, D] and their mask [W, n] -> [W, H, d, d]."""
        # A key of nothing is not nothing, but its value is.
        value = split_heads(self.value(normed) * mask[:, :, None], self.heads)
        key = split_heads(F.silu(self.key(normed)), self.heads)
        memory: Tensor = F.silu(key.transpose(2, 3) @ value * self.scale)
        return memory

    def forward(self, state: Tensor, mask: Tensor, read: int) -> Tensor:
        """The next states of the last `read` of the tokens: [W, n, D] -> [W, read, D]."""
        normed = self.norm(state)
        memory = self.memory(normed, mask)
        reading = normed[:, normed.shape[1] - read :]
        pooled = join_heads(split_heads(F.silu(self.query(reading)), self.heads) @ memory)
        state = state[:, state.shape[1] - read :] + self.out(self.norm_pooled(pooled))
        normed = self.norm_gated(state)
        next_state: Tensor = state + self.down(self.gate(normed) * self.up(normed))
        return next_state


class SummaryAttention(nn.Module):
    """Attention of candidates to summary tokens, and a layer after it (a transformer block, section 3.3).

    Args:
        width: D; heads, dim: H and d.
    """

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_tokens, self.norm_hidden = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, heads * dim, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * dim, width)
        last = nn.Linear(2 * width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), last)
        start_silent(self.out, last)

    def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Candidates [W, n, D] and tokens [W, S, D] -> [W, n, D]."""
        tokens = self.norm_tokens(tokens)
        query, key, value = (
            split_heads(part, self.heads)
            for part in (self.query(self.norm(state)), self.key(tokens), self.value(tokens))
        )
        weight = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(3)
        state = state + self.out(join_heads(weight @ value))
        next_state: Tensor = state + self.hidden(self.norm_hidden(state))
        return next_state


class Vista(TargetPooling):
    """Virtual sequential target attention: a summary of S tokens, and candidates that attend to it.

    Learned seeds, the same for all users, join the behaviors; layers of quasi-linear attention make the
    summary of what becomes of them. It knows no candidate, so that a server may store it by user. Candidates
    read the summary and nothing else. The head is given [v_t ; y ; v_t * y]. The paper's reconstruction loss
    is missing; see docs/specs/vista.md.

    Args:
        width: D; layers, heads, dim: of the summary; seeds: S; longest: most behaviors of a window.
        time: encodings of behaviors; target_aware: without it the head is given [v_t ; y].
    """

    keys = VistaKeys
    uses = frozenset({"layers", "heads", "head_dim"})
    on_windows = True
    needs_stretch = True
    scales_by_longest = True

    @classmethod
    def problem(cls, settings: Any) -> str:
        if settings.time_target == "shared":
            return ""
        return 'sequence = "vista" knows no candidate, so it takes time_target = "shared"'

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> Vista:
        return cls(
            sizes.representation.width,
            settings.layers,
            settings.heads,
            settings.head_dim,
            settings.seeds,
            sizes.longest,
            sizes.encoding(),
            target_aware=settings.target_aware,
        )

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        dim: int,
        seeds: int,
        longest: int,
        time: TimeEncoding,
        *,
        target_aware: bool = True,
    ) -> None:
        super().__init__(width, target_aware)
        self.seeds = nn.Parameter(torch.randn(seeds, width))
        self.time = time
        self.layers = nn.ModuleList(QuasiLinearLayer(width, heads, dim, 1 / longest) for _ in range(layers))
        self.attention = SummaryAttention(width, heads, dim)

    def summary(self, value_WXD: Tensor, selection: Selection) -> Tensor:
        """The stored tokens of windows, [W, S, D]: of behaviors' vectors [W, X, D], and of no candidate."""
        windows, seeds = value_WXD.shape[0], self.seeds.shape[0]
        no_group = torch.zeros(windows, dtype=torch.int64, device=value_WXD.device)
        behaviors = value_WXD + self.time.behaviors(selection.marks, no_group)
        state = torch.cat([behaviors, self.seeds.expand(windows, -1, -1)], dim=1)
        mask = F.pad(selection.mask, (0, seeds), value=True)
        for number, layer in enumerate(self.layers, start=1):
            # Of the last layer the summary alone is asked for.
            state = layer(state, mask, seeds if number == len(self.layers) else state.shape[1])
        return state

    def attend(self, target_CD: Tensor, tokens_WSD: Tensor, behaviors: Behaviors) -> Tensor:
        """What candidates make of the summaries of their windows, [C, D]."""
        slots = behaviors.windows.slots
        return slots.collect(self.attention(slots.spread(target_CD), tokens_WSD))

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        tokens_WSD = self.summary(rows_at(behaviors.value_SD, behaviors.place), behaviors.selection)
        return self.parts(behaviors.target_CD, self.attend(behaviors.target_CD, tokens_WSD, behaviors))
