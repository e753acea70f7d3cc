"""What all verbs share on the console."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An aligned plain-text table: first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    dashes = ["-" * width for width in (first, *others)]
    return [line.format(*row).rstrip() for row in (head, dashes, *rows)]


def quiet_third_parties() -> None:
    """Keep the libraries' start-up notices out of a job's own lines; errors still show."""
    warnings.filterwarnings(
        "ignore", module=r"torchrec|fbgemm_gpu|torch\.distributed|torch\.utils\.tensorboard"
    )
    # TorchRec hands sharded tables out as ShardedTensor, which torch means to replace.
    warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
    for name in ("torchrec", "fbgemm_gpu", "torch.distributed", "torch.fx", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
