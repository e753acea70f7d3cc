"""Ids that come and go, and models that are trained while their log grows: what both do to quality

    tandemrec bench online capacity --log LOG --config configs/dare.toml --out runs/online/capacity
    tandemrec bench online december --events EVENTS --config configs/dare.toml --out runs/online/december
    tandemrec bench online freshness --config configs/dare.toml --out runs/online/freshness

`tandemrec bench online PART --help` says more of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from embeddings.errors import ConfigError

PARTS = ("capacity", "december", "freshness")


def main(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    part, *rest = words
    if part not in PARTS:
        raise ConfigError(f"bench online {part}: is none of {', '.join(PARTS)}")
    importlib.import_module(f"benchmarks.online.{part}").main(rest)
