"""What table vectors and their gradients are rounded to while they travel between ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import QuantizedCommCodecs

# The largest number of fp16.
HALF_MAX = 65504.0
# Gradients of a mean over thousands of candidates lie below 6e-5, where fp16 loses bits and soon everything.
# A power of two changes no bits; values up to 15.99 stay within fp16.
_LARGEST_SCALE = 2.0**12


# Everything but the exponent of a float64.
_EXPONENT = 0x7FF << 52


@dataclass
class GradientScale:
    """What gradients are multiplied with while they travel in fp16; all ranks must have the same.

    Attributes:
        value: a power of two, scalar; a tensor on the device of the gradients once it has been fitted.
    """

    value: float | Tensor = _LARGEST_SCALE

    def fit(self, largest: Tensor) -> None:
        """Take the largest power of two that clips no gradient; nothing waits for the device.

        Args:
            largest: scalar, the largest gradient of the step over all ranks, by size; finite.
        """
        room = (HALF_MAX / largest.double()).clamp(max=_LARGEST_SCALE)
        # Without its other bits a float is the power of two at or below it.
        self.value = (room.view(torch.int64) & _EXPONENT).view(torch.float64).to(largest.dtype)


@dataclass(frozen=True)
class Comms:
    """`fp32` (as they are), `fp16` or `bf16`, for vectors (forward) and their gradients (backward).

    `scale`: of gradients in fp16.
    """

    forward: str = "fp32"
    backward: str = "fp32"
    scale: GradientScale = field(default_factory=GradientScale, compare=False, repr=False)

    @property
    def wire(self) -> tuple[int, int]:
        """Bytes of a float that travels forward and backward."""
        return 4 if self.forward == "fp32" else 2, 4 if self.backward == "fp32" else 2


AS_THEY_ARE = Comms()


class ScaledHalf(QuantizedCommCodec):  # type: ignore[misc]
    """fp16 of scaled gradients. FBGEMM's own `loss_scale` divides before it leaves fp16, which undoes it."""

    def __init__(self, scale: GradientScale) -> None:
        super().__init__(SparseType.FP16, is_fwd=False)
        self._scale = scale

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        sent: Tensor = super().encode(input_tensor * self._scale.value, ctx)
        return sent

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        received: Tensor = super().decode(input_tensor, ctx)
        return received / self._scale.value


def codecs_of(comms: Comms) -> dict[str, QuantizedCommCodecs] | None:
    """TorchRec's codecs of every kind of exchange; None where nothing is rounded."""
    precision = QCommsConfig(CommType(comms.forward), CommType(comms.backward))
    # The device only decides whether bf16 silently becomes fp16: gloo once had no bf16, but it has now.
    codecs: dict[str, QuantizedCommCodecs] | None = get_qcomm_codecs_registry(
        precision, device=torch.device("cuda")
    )
    for codec in codecs.values() if codecs and comms.backward == "fp16" else ():
        codec.backward = ScaledHalf(comms.scale)
    return codecs
