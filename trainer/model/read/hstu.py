"""HSTU: gated pointwise attention among behaviors, and of each candidate to them in every layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.model.ops.bags import rows_at
from trainer.model.ops.traced import is_traced
from trainer.model.read.multi_head import join_heads, split_heads, start_silent
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.sizes import BranchSizes
from trainer.model.time import AGE_BUCKETS, age_bucket
from trainer.model.windows import Windows

# Pairs of behaviors, times heads, that are scored at once: tensors of 64 MiB.
_PAIRS = 1 << 24
# Tensors of so many bytes a pair and head are in memory at once.
_PAIR_BYTES = 24


class PointwiseLayer(nn.Module):
    """One layer of HSTU (Zhai et al. 2024, section 3): x + f2(norm(A V) * U), A = SiLU(Q K^T + bias) / N.

    U, V, Q and K are four parts of SiLU(f1(norm(x))). The bias is one number for each distance in places and
    one for each distance in time, the same for all heads.

    Args:
        width: D; heads, dim: H and d; positions: distances in places; scale: 1 / N.
    """

    def __init__(self, width: int, heads: int, dim: int, positions: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.parts = nn.Linear(width, 4 * heads * dim)
        self.norm_pooled = nn.LayerNorm(heads * dim, eps=1e-6)
        self.out = nn.Linear(heads * dim, width)
        nn.init.xavier_uniform_(self.parts.weight)
        nn.init.zeros_(self.parts.bias)
        start_silent(self.out)
        # U and V begin as one map, and so do Q and K: from independent draws the first scores of equal items
        # are noise, and so is what a candidate's gate lets through of a behavior like it.
        with torch.no_grad():
            gate, value, query, key = self.parts.weight.chunk(4)
            value.copy_(gate)
            key.copy_(query)
        self.position = nn.Parameter(torch.randn(positions) * 0.02)
        self.age = nn.Parameter(torch.randn(AGE_BUCKETS) * 0.02)

    def project(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[W, n, D] -> U [W, n, H d], and V, Q, K [W, H, n, d]."""
        gate, *others = F.silu(self.parts(self.norm(state))).chunk(4, dim=2)
        value, query, key = (split_heads(part, self.heads) for part in others)
        return gate, value, query, key

    def bias(self, position: Tensor, bucket: Tensor) -> Tensor:
        """What distances add to a score: [..., n, X] each -> [W, n, X]."""
        return rows_at(self.position, position) + rows_at(self.age, bucket)

    def pooled(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """sum_j A(i, j) V_j -> [W, H, n, d].

        Args:
            query: [W, H, n, d]; key, value: [W, H, X, d]; bias, seen: [W, 1 or n, X], of the pairs.
        """
        score = query @ key.transpose(2, 3) + bias[:, None]
        # SiLU of nothing seen is not nothing, so what is not seen is taken out after it.
        return (F.silu(score) * seen[:, None]) @ value * self.scale

    def updated(self, state: Tensor, gate: Tensor, pooled: Tensor) -> Tensor:
        """State, U and what was pooled, [W, H, n, d] -> the next state [W, n, D]."""
        updated: Tensor = state + self.out(self.norm_pooled(join_heads(pooled)) * gate)
        return updated


class Hstu(TargetPooling):
    """Hierarchical sequential transduction units over a window, and the candidate as its last token.

    Behaviors attend to themselves and to older ones. A candidate attends to all behaviors and to itself, in
    every layer, so that behaviors know no candidate and candidates do not know each other: the states of a
    window are computed once, whoever is asked for. The head is given [v_t ; y ; v_t * y] with y the
    candidate's last state. See docs/specs/hstu.md for what is the paper's and what is ours.

    Args:
        width: D; layers, heads, dim: of the layers; longest: N, most behaviors of a window.
        target_aware: without it the head is given [v_t ; y].
    """

    uses = frozenset({"layers", "heads", "head_dim"})
    on_windows = True
    needs_stretch = True
    needs_seconds = True
    scales_by_longest = True

    @classmethod
    def problem(cls, settings: Any) -> str:
        if not (settings.position and settings.age):
            return 'sequence = "hstu" has a bias of places and of ages in any case: leave position and age on'
        return "" if settings.time_target == "shared" else 'sequence = "hstu" has time_target = "shared"'

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> Hstu:
        return cls(
            sizes.representation.width,
            settings.layers,
            settings.heads,
            settings.head_dim,
            sizes.longest,
            target_aware=settings.target_aware,
        )

    @classmethod
    def memory_problem(cls, settings: Any, section: str, window: int, requests: int, memory: int) -> str:
        """All pairs of a window's behaviors are scored at once."""
        longest = min(window, settings.newest or window)
        need = settings.heads * longest**2 * _PAIR_BYTES
        if 2 * need <= memory:
            return ""
        return (
            f'{section}.sequence = "hstu" compares all {longest:,} behaviors of a window with each other, '
            f"which takes {need / 1e9:,.1f} GB, and a rank has {memory / 1e9:,.1f} GB: let it look at the "
            'newest k alone with search = "recent"'
        )

    def __init__(
        self, width: int, layers: int, heads: int, dim: int, longest: int, *, target_aware: bool = True
    ) -> None:
        super().__init__(width, target_aware)
        self.longest = longest
        self.layers = nn.ModuleList(
            PointwiseLayer(width, heads, dim, longest + 1, 1 / longest) for _ in range(layers)
        )

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        windows, slots = behaviors.windows, behaviors.windows.slots
        known = self.of_history(rows_at(behaviors.value_SD, behaviors.place), windows)
        # A behavior's place and age, seen from the request: the same for all candidates of a window.
        position, bucket = (
            part[:, None] for part in (windows.marks.index("position"), windows.marks.index("age"))
        )
        state = slots.spread(behaviors.target_CD)
        for layer, (key, value) in zip(self.layers, known, strict=True):
            assert isinstance(layer, PointwiseLayer)
            gate, own_value, query, own_key = layer.project(state)
            pooled = layer.pooled(query, key, value, layer.bias(position, bucket), windows.mask[:, None])
            own = F.silu((query * own_key).sum(3, keepdim=True) + layer.position[0] + layer.age[0])
            state = layer.updated(state, gate, pooled + own * own_value * layer.scale)
        return self.parts(behaviors.target_CD, slots.collect(state))

    def of_history(self, state: Tensor, windows: Windows) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [W, H, X, d] of a window's behaviors in every layer; they know no candidate.

        Args:
            state: [W, X, D], the behaviors' vectors; what stands under the mask is seen by no other place.
        """
        seconds = windows.seconds
        assert seconds is not None
        size = state.shape[0]
        if not is_traced():
            first = self.layers[0]
            assert isinstance(first, PointwiseLayer)
            size = max(1, _PAIRS // (first.heads * state.shape[1] ** 2))
        run = self._of_some
        if torch.is_grad_enabled() and size < state.shape[0]:
            # Once more in the backward pass, which then holds the pairs of some windows at a time.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        parts = zip(state.split(size), windows.mask.split(size), seconds.split(size), strict=True)
        of_parts = [run(*part) for part in parts]
        if len(of_parts) == 1:
            return of_parts[0]
        of_layers = (zip(*of_layer, strict=True) for of_layer in zip(*of_parts, strict=True))
        return [(torch.cat(keys), torch.cat(values)) for keys, values in of_layers]

    def _of_some(self, state: Tensor, mask: Tensor, seconds: Tensor) -> list[tuple[Tensor, Tensor]]:
        column = torch.arange(mask.shape[1], device=mask.device)
        # Columns are newest first: a behavior sees itself and those to its right.
        place = column[None, :] - column[:, None]
        seen = mask[:, None, :] & (place >= 0)
        # Padding may be wider than any window is long.
        place = place.clamp(min=0, max=self.longest)[None]
        bucket = age_bucket(seconds[:, None, :] - seconds[:, :, None])
        bucket = torch.where(place > 0, bucket, 0)
        known = []
        for number, layer in enumerate(self.layers, start=1):
            assert isinstance(layer, PointwiseLayer)
            gate, value, query, key = layer.project(state)
            known.append((key, value))
            # Nobody asks for what the behaviors themselves make of the last layer.
            if number < len(self.layers):
                pooled = layer.pooled(query, key, value, layer.bias(place, bucket), seen)
                state = layer.updated(state, gate, pooled)
        return known
