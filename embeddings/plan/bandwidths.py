"""How fast a rank reads memory and talks to others: what TorchRec's planner weighs sharding types by.

TorchRec 1.8 assumes 963 GB/s of device memory, which is a V100, and 644 GB/s between GPUs of a node
(`torchrec/distributed/planner/constants.py`). Here a running rank asks its device, and a plan for a cluster
that nobody has booked yet may name the GPU. On a CPU nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from torchrec.distributed.planner.constants import (
    CROSS_NODE_BANDWIDTH,
    HBM_MEM_BW,
    HBM_TO_DDR_MEM_BW,
    INTRA_NODE_BANDWIDTH,
)

# TorchRec counts bytes a millisecond.
_GB_PER_S = 1e6


@dataclass(frozen=True)
class Bandwidths:
    """In GB/s (10**9 bytes), one way, for one rank; None = TorchRec's default.

    Attributes:
        hbm: of device memory; host: between device and host memory.
        intra: to the other ranks of a node; inter: to other nodes.
    """

    hbm: float | None = None
    host: float | None = None
    intra: float | None = None
    inter: float | None = None

    def over(self, below: Bandwidths) -> Bandwidths:
        """These, and those of `below` where these are None."""
        return replace(below, **{name: value for name, value in self.items().items() if value is not None})

    def items(self) -> dict[str, float | None]:
        """Name -> GB/s."""
        return asdict(self)

    def for_torchrec(self) -> dict[str, float | None]:
        """The arguments of TorchRec's HardwareConfig, in bytes a millisecond."""
        names = {
            "hbm": "hbm_mem_bw", "host": "hbm_to_ddr_mem_bw", "intra": "intra_host_bw",
            "inter": "inter_host_bw",
        }  # fmt: skip
        return {names[name]: value and value * _GB_PER_S for name, value in self.items().items()}


UNKNOWN = Bandwidths()
TORCHREC = Bandwidths(
    HBM_MEM_BW / _GB_PER_S,
    HBM_TO_DDR_MEM_BW / _GB_PER_S,
    INTRA_NODE_BANDWIDTH / _GB_PER_S,
    CROSS_NODE_BANDWIDTH / _GB_PER_S,
)

# The SXM forms, from NVIDIA's data sheets: memory; PCIe of 16 lanes, fourth generation (A100) or fifth; half
# of what the sheets give for NVLink, since they add both ways up (600, 900, 1,800 GB/s).
KNOWN: Mapping[str, Bandwidths] = MappingProxyType(
    {
        "A100": Bandwidths(2039, 32, 300),
        "H100": Bandwidths(3350, 64, 450),
        "H200": Bandwidths(4800, 64, 450),
        "B200": Bandwidths(8000, 64, 900),
    }
)
# Forms that sit in PCIe slots: at best pairs of them are linked otherwise.
_SLOTTED = ("PCIE", "NVL")


def of_device(name: str, bus_bits: int, clock_khz: int) -> Bandwidths:
    """What is known of a GPU.

    Args:
        name: as the driver gives it, such as `NVIDIA H100 80GB HBM3`.
        bus_bits, clock_khz: width and clock of its memory, which sends twice a clock; 0 = not known.
    """
    known = next((KNOWN[key] for key in KNOWN if key in name), UNKNOWN)
    if any(word in name.upper() for word in _SLOTTED):
        known = replace(known, intra=known.host)
    # Forms of one GPU differ in their memory, so the device's own figure goes first.
    own = 2 * clock_khz * 1e3 * bus_bits / 8 / 1e9 if bus_bits > 0 and clock_khz > 0 else None
    return Bandwidths(hbm=own).over(known)
