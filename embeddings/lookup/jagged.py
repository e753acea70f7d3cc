"""Selecting bags from a KeyedJaggedTensor whose keys all have the same number of bags."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.streamable import Pipelineable


class OneIdColumn(NamedTuple):
    """One key of `OneIdBags`: ids [B], and offsets [B + 1]."""

    ids: Tensor
    starts: Tensor

    def values(self) -> Tensor:
        return self.ids

    def offsets(self) -> Tensor:
        return self.starts

    def lengths(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.int32)


@dataclass(frozen=True)
class OneIdBags(Pipelineable):  # type: ignore[misc]
    """What a KeyedJaggedTensor tells those that only read it, where every bag of every key holds one id.

    A server makes one for each call, where a KeyedJaggedTensor and what it counts would cost more than the
    look-ups themselves. Sharded collections take none.

    Attributes:
        names: the keys; ids_FB: int64 [features, bags].
    """

    names: list[str]
    ids_FB: Tensor

    def __getitem__(self, key: str) -> OneIdColumn:
        return OneIdColumn(self.ids_FB[self.names.index(key)], self._starts)

    def keys(self) -> list[str]:
        return self.names

    def stride(self) -> int:
        return self.ids_FB.shape[1]

    def values(self) -> Tensor:
        return self.ids_FB.reshape(-1)

    def lengths(self) -> Tensor:
        return torch.ones(self.ids_FB.numel(), dtype=torch.int32, device=self.ids_FB.device)

    def offsets(self) -> Tensor:
        return torch.arange(self.ids_FB.numel() + 1, device=self.ids_FB.device)

    def length_per_key(self) -> list[int]:
        return [self.stride()] * len(self.names)

    def select(self, bags_S: Tensor) -> OneIdBags:
        """The bags `bags_S` of every key, in that order."""
        return OneIdBags(self.names, self.ids_FB.index_select(1, bags_S))

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return replace(self, ids_FB=self.ids_FB.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.ids_FB.record_stream(stream)

    def pin_memory(self) -> Self:
        return replace(self, ids_FB=self.ids_FB.pin_memory())

    @cached_property
    def _starts(self) -> Tensor:
        return torch.arange(self.stride() + 1, device=self.ids_FB.device)


def one_id_bags(keys: list[str], ids_FB: Tensor) -> KeyedJaggedTensor:
    """A KJT in which every bag holds exactly one id. Shape of `ids_FB`: [features, bags]."""
    lengths = torch.ones(ids_FB.numel(), dtype=torch.int32, device=ids_FB.device)
    features, bags = ids_FB.shape
    return KeyedJaggedTensor(
        keys=keys,
        values=ids_FB.reshape(-1),
        lengths=lengths,
        stride=bags,
        # Else collections would ask the device for it.
        length_per_key=[bags] * features,
    )


def select_bags(kjt: KeyedJaggedTensor, bags_S: Tensor, one_id: bool | None = None) -> KeyedJaggedTensor:
    """The bags `bags_S` (int64 [S], repeats allowed) of every key, in that order; stride S.

    Where every bag holds one id this is a plain index_select. Otherwise whole bags are copied, and the host
    waits once for the device to say how many ids they hold.

    Args:
        one_id: whether every bag of every key holds exactly one id; None: the host waits to find out.
    """
    if isinstance(kjt, OneIdBags):
        return kjt.select(bags_S)
    keys, bags = kjt.keys(), kjt.stride()
    values = kjt.values()
    if one_id is None:
        one_id = values.numel() == len(keys) * bags and bool((kjt.lengths() == 1).all())
    if one_id:
        return one_id_bags(keys, values.view(len(keys), bags).index_select(1, bags_S))
    key_start = torch.arange(len(keys), device=bags_S.device) * bags
    flat = (key_start[:, None] + bags_S[None, :]).reshape(-1)
    lengths = kjt.lengths().index_select(0, flat)
    start = kjt.offsets().to(torch.int64).index_select(0, flat)
    held = lengths.view(len(keys), -1).sum(1).tolist()
    total = sum(held)
    bag = torch.repeat_interleave(torch.arange(flat.numel(), device=flat.device), lengths, output_size=total)
    first = torch.cumsum(lengths, 0) - lengths
    within = torch.arange(total, device=flat.device) - first.index_select(0, bag)
    values = kjt.values().index_select(0, start.index_select(0, bag) + within)
    return KeyedJaggedTensor(
        keys=keys, values=values, lengths=lengths, stride=bags_S.numel(), length_per_key=held
    )


def vectors_in_order(pooled: KeyedTensor, keys: list[str]) -> Tensor:
    """The vectors of `keys`, concatenated in that order: [B, sum of their widths].

    A collection whose tables lie on several ranks returns its keys in the order of the ranks, so that the
    same model would see its inputs permuted on another number of them.
    """
    if pooled.keys() == keys:
        values: Tensor = pooled.values()
        return values
    return torch.cat([pooled[key] for key in keys], dim=1)
