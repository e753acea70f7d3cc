"""Signs of the inner products of vectors and planes: the bits of SimHash codes and of signatures.

A product in single precision rounds equal vectors differently, depending on where in the matrix they lie;
near a plane that decides on which side they are. `sign_bits` chooses between two forms that give the same
bits (property test), as long as no product leaves the range of float32:

    plain, device   `whole_sign_bits`   one product of whole numbers, exact in any order. It costs double
                    precision for all pairs, of which a GPU for servers has plenty, and nobody waits.
    CPU             `close_sign_bits`   one product in single precision; only the few pairs closer to 0 than
                    its error are computed exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.model.ops.precision import in_single_precision
from trainer.model.ops.traced import is_traced
from trainer.model.ops.whole import ROUNDING, Rows, needed_places, whole_rows

# Products of a device that are held at once, in double precision: 512 MiB.
_PRODUCTS = 1 << 26


@torch.no_grad()
def sign_bits(vector_ND: Tensor, planes: Tensor) -> Tensor:
    """-> bool [N, bits]; P(two bits differ) = angle / pi. Equal vectors have equal bits in any company.

    Args:
        vector_ND: float32; planes: float32 [D, bits].
    """
    with in_single_precision(vector_ND.device):
        if is_traced():
            return whole_rows(vector_ND.double())[0] @ whole_rows(planes.T.double())[0].T > 0
        if vector_ND.device.type == "cpu":
            return close_sign_bits(vector_ND.float(), planes)
        return whole_sign_bits(vector_ND.float(), planes)


def whole_sign_bits(vector_ND: Tensor, planes: Tensor) -> Tensor:
    """The plain form, and that of devices."""
    # The powers of two that whole numbers are multiplied with change no sign.
    plane_BD, _ = whole_rows(planes.T.double())
    parts = [
        whole_rows(some.double())[0] @ plane_BD.T > 0
        for some in vector_ND.split(max(1, _PRODUCTS // max(1, *planes.shape)))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def close_sign_bits(vector_ND: Tensor, planes: Tensor) -> Tensor:
    """The CPU's form."""
    product = vector_ND @ planes
    bits = product > 0
    # Bound of how far a rounded product of a vector with any plane may be from the exact one.
    terms = (planes.shape[0] + 16) * ROUNDING
    error_N = (
        terms * torch.linalg.vector_norm(planes.T, dim=1).amax() * torch.linalg.vector_norm(vector_ND, dim=1)
    )
    rows = torch.nonzero(product.abs_().amin(1) < error_N).squeeze(1)
    row, bit = torch.nonzero(product[rows] < error_N[rows, None], as_tuple=True)
    if row.numel():
        needed, place_M = needed_places(rows[row], vector_ND.shape[0])
        mine = Rows.of(vector_ND[needed].double(), place_M)
        bits[rows[row], bit] = mine.times(Rows.of(planes.T.double(), bit)) > 0
    return bits


def random_planes(width: int, bits: int, seed: int) -> Tensor:
    """Gaussian projection [D, bits], the same for the same seed."""
    return torch.randn(width, bits, generator=torch.Generator().manual_seed(seed))
