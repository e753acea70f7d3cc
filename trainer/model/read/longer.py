"""LONGER: neighbors merged into tokens, which candidate and newest tokens read once and then refine."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.model import BranchKeys
from trainer.model.ops.bags import rows_at
from trainer.model.read.multi_head import heads_problem, join_heads, split_heads, start_sharp, start_silent
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeEncoding


class LongerKeys(BranchKeys):
    """What a branch may set besides, for the sequence model `longer`."""

    merge: int = Field(4, ge=1, le=256)
    """The number of neighbors that `longer` merges into one token."""
    recent: int = Field(25, ge=1, le=10_000)
    """The number of newest merged tokens that are queries in `longer`, beside the global ones."""
    token_width: int = Field(0, ge=0, le=65_536)
    """The width of the tokens of `longer`. 0 means `merge` times the width of the representation, as in the
    paper. Else one linear map makes each merged token so wide."""
    inner: bool = True
    """Whether neighbors attend to each other before `longer` merges them (InnerTrans)."""


class Block(nn.Module):
    """A pre-norm transformer block whose queries may be others than its keys and values.

    Args:
        width: of the tokens, d; heads: divide it; hidden: of the feed-forward network.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.forward_network = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        start_silent(cast(nn.Linear, self.forward_network[-1]))

    @torch.no_grad()
    def start_as_attention(self, gain: float) -> None:
        """Have it begin by adding to tokens what is like them, unchanged; `gain` is that of `start_sharp`."""
        start_sharp(self.key, gain)
        self.query.weight.copy_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        self.out.weight.copy_(self.value.weight.T)

    def asked(self, token_BQd: Tensor) -> Tensor:
        """Queries of the heads, [B, heads, Q, d / heads]."""
        return split_heads(self.query(self.norm(token_BQd)), self.heads)

    def remembered(self, token_BYd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the heads, [B, heads, Y, d / heads] each."""
        normed_BYd = self.norm(token_BYd)
        return split_heads(self.key(normed_BYd), self.heads), split_heads(self.value(normed_BYd), self.heads)

    def refined(self, token_BQd: Tensor, read: Tensor) -> Tensor:
        """Tokens with what their heads read, and then the feed-forward network: [B, Q, d]."""
        token_BQd = token_BQd + self.out(join_heads(read))
        refined_BQd: Tensor = token_BQd + self.forward_network(self.norm_forward(token_BQd))
        return refined_BQd


class MergedTokens(TargetPooling):
    """LONGER (Chai et al., arXiv 2505.04421, sections 3.3 to 3.6).

    Tokens stand in the order candidate, CLS, history from the newest on; each sees itself and what stands
    behind it. So no token but the candidate's own knows the candidate, and all layers of the others are
    computed once a window. docs/specs/longer.md has the equations, and what of them is ours.

    Args:
        width: D; settings: of the branch, with `LongerKeys`; time: encodings of the behaviors' input.
    """

    keys = LongerKeys
    uses = frozenset({"layers", "heads", "expansion"})
    on_windows = True

    @classmethod
    def problem(cls, settings: Any) -> str:
        if settings.clusters:
            return 'sequence = "longer" reads single behaviors: leave clusters out'
        if settings.token_width % settings.heads:
            return f"heads = {settings.heads} does not divide token_width = {settings.token_width}"
        return "" if settings.time_target == "shared" else 'sequence = "longer" has time_target = "shared"'

    @classmethod
    def width_problem(cls, settings: Any, width: int) -> str:
        if settings.inner:
            return heads_problem(settings.heads, width)
        token = settings.token_width or settings.merge * width
        return heads_problem(settings.heads, token, "merged token")

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> MergedTokens:
        width = sizes.representation.width
        return cls(width, settings, TimeEncoding(sizes.mark_rows("values"), width))

    def __init__(self, width: int, settings: Any, time: TimeEncoding) -> None:
        super().__init__(width, settings.target_aware)
        self.merge, self.recent, self.time = settings.merge, settings.recent, time
        merged = self.merge * width
        token, heads = settings.token_width or merged, settings.heads
        # Linear, GELU, Linear of [v ; a] + p: the first map is taken apart, since v knows no request.
        self.enter, self.after = (_without_bias_at_first(width, width, 2.0) for _ in range(2))
        self.inner = Block(width, heads, width) if settings.inner else None
        self.narrow = _without_bias_at_first(merged, token) if settings.token_width else None
        self.target = nn.Sequential(
            deepcopy(self.enter), nn.GELU(), deepcopy(self.after), _without_bias_at_first(width, token)
        )
        self.cls = nn.Parameter(torch.randn(token) * 0.02)
        self.blocks = nn.ModuleList(
            Block(token, heads, settings.expansion * token) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(token)
        self.leave_target, self.leave_cls = (nn.Linear(token, width) for _ in range(2))
        self._start_alike(width)

    @torch.no_grad()
    def _start_alike(self, width: int) -> None:
        """Have the candidate's token start as that of a history of the candidate alone, m times.

        All neighbors of a group start with one map, without a word about each other, and so do keys and
        queries of each layer. So a token that holds a behavior of the candidate's own item has the largest
        score from the first step on.
        """
        leave = self.target[-1]
        assert isinstance(leave, nn.Linear)
        each = leave.weight
        if self.narrow is None:
            each.copy_(torch.eye(width).repeat(self.merge, 1))
        else:
            self.narrow.weight.copy_(each.repeat(1, self.merge))
        for block in self.blocks:
            assert isinstance(block, Block)
            # One of m neighbors is 1 / sqrt(m) of a token's length.
            block.start_as_attention((2 * self.merge**0.5) ** 0.5)
        if self.inner is not None:
            start_silent(self.inner.out)

    @property
    def output_width(self) -> int:
        return super().output_width + self.width

    def tokens(self, behaviors: Behaviors) -> tuple[Tensor, Tensor]:
        """Merged tokens of the windows, newest first, and which of them hold a behavior.

        Groups are counted back from the newest behavior of each window, so that none holds anything later
        than its request.

        Returns:
            [W, Y, d] and bool [W, Y]; Y = ceil(X / merge).
        """
        marks = behaviors.windows.marks
        entered_WXD = rows_at(self.enter(behaviors.value_SD), behaviors.place)
        entered_WXD = entered_WXD + self.time.behaviors(marks, behaviors.group_C)
        vector_WXD = self.after(F.gelu(entered_WXD))
        missing = -vector_WXD.shape[1] % self.merge
        mask_WYm = F.pad(behaviors.windows.mask, (0, missing)).unflatten(1, (-1, self.merge))
        vector_WYmD = F.pad(vector_WXD, (0, 0, 0, missing)).unflatten(1, (-1, self.merge))
        windows, groups = mask_WYm.shape[:2]
        vector_BmD, mask_Bm = vector_WYmD.flatten(0, 1), mask_WYm.flatten(0, 1)
        if self.inner is not None:
            vector_BmD = _read_within(self.inner, vector_BmD, mask_Bm)
        merged_WYM = (vector_BmD * mask_Bm.unsqueeze(2)).flatten(1).unflatten(0, (windows, groups))
        token_WYd = merged_WYM if self.narrow is None else self.narrow(merged_WYM)
        # A group holds something if its newest place does.
        return token_WYd, mask_WYm[:, :, 0]

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        """-> the candidate, its token, with `target_aware` their product, and the token CLS."""
        target_CD, slots = behaviors.target_CD, behaviors.windows.slots
        history_WYd, there_WY = self.tokens(behaviors)
        cls_W1d = self.cls.expand(history_WYd.shape[0], 1, -1)
        known_WYd = torch.cat([cls_W1d, history_WYd], dim=1)
        seen_WY = F.pad(there_WY, (1, 0), value=True)
        target_WTd = slots.spread(self.target(target_CD))
        for place, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            key, value = block.remembered(known_WYd)
            target_WTd = _read_by_candidates(block, target_WTd, key, value, seen_WY)
            # Of the last layer's tokens CLS alone is read.
            asking = 1 + (self.recent if place < len(self.blocks) else 0)
            asking_WQd = known_WYd[:, :asking]
            seen = older_or_equal(seen_WY, asking_WQd.shape[1])
            read = F.scaled_dot_product_attention(block.asked(asking_WQd), key, value, attn_mask=seen)
            # From the second layer on, the tokens that asked are all that is read.
            known_WYd, seen_WY = block.refined(asking_WQd, read), seen_WY[:, :asking]
        pooled_CD = self.leave_target(self.norm(slots.collect(target_WTd)))
        cls_WD = self.leave_cls(self.norm(known_WYd[:, 0]))
        return [*self.parts(target_CD, pooled_CD), rows_at(cls_WD, behaviors.windows.of_candidate)]


def _without_bias_at_first(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """An orthogonal map of small vectors.

    torch's own first maps shrink them to less than its first biases, so that behind a layer norm all tokens
    would look the same. A GELU halves what is small, for which a gain of 2 makes up.
    """
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def older_or_equal(seen_WY: Tensor, queries: int) -> Tensor:
    """Which token sees which, bool [W, 1, queries, Y]: what stands behind it and is there, and itself."""
    place = torch.arange(seen_WY.shape[1], device=seen_WY.device)
    asking = place[:queries, None]
    # Padding sees itself: a softmax over nothing is no number.
    return ((place >= asking) & seen_WY[:, None] | (place == asking)).unsqueeze(1)


def _read_within(block: Block, vector_BmD: Tensor, mask_Bm: Tensor) -> Tensor:
    """A block within each group of neighbors, who all see each other."""
    itself = torch.eye(mask_Bm.shape[1], dtype=torch.bool, device=mask_Bm.device)
    seen = (mask_Bm[:, None] | itself).unsqueeze(1)
    key, value = block.remembered(vector_BmD)
    read = F.scaled_dot_product_attention(block.asked(vector_BmD), key, value, attn_mask=seen)
    return block.refined(vector_BmD, read)


def _read_by_candidates(
    block: Block, target_WTd: Tensor, key: Tensor, value: Tensor, seen_WY: Tensor
) -> Tensor:
    """A block for the candidates' own tokens: each sees itself and all that its window has.

    Their own keys are not beside the window's, so that nothing has a number for two candidates.
    """
    query = block.asked(target_WTd)
    own_key, own_value = block.remembered(target_WTd)
    scale = query.shape[3] ** -0.5
    shared = (query @ key.transpose(2, 3)).masked_fill(~seen_WY[:, None, None], -torch.inf)
    own = (query * own_key).sum(3, keepdim=True)
    weight = (torch.cat([own, shared], dim=3) * scale).softmax(3)
    read = weight[..., :1] * own_value + weight[..., 1:] @ value
    return block.refined(target_WTd, read)
