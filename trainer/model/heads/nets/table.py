"""The nets of experts: a new one is a file beside this one and a line here."""

from __future__ import annotations

from trainer.model.heads.nets.cin import CinNet
from trainer.model.heads.nets.cross import CrossNet
from trainer.model.heads.nets.fm import FmNet
from trainer.model.heads.nets.mlp import MlpNet
from trainer.model.heads.nets.net import Net

EXPERTS: dict[str, type[Net]] = {
    "mlp": MlpNet,
    "cross": CrossNet,
    "cin": CinNet,
    "fm": FmNet,
}
"""The nets, by their names in `model.experts.net`."""
