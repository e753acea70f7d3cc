"""Numbers of Arrow bodies have the codes of the same numbers in text, which are those of ingest."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from trainer.log.encoders.buckets import Buckets
from trainer.serving.numbers import codes_of_array, codes_of_values


@pytest.mark.parametrize(("scale", "step"), [(3, 0.01), (2, 0.1), (1, 0.01), (4, 0.001)])
def test_decimals_are_rounded_like_their_text(scale: int, step: float) -> None:
    """Half steps above all: there the last bit of a float decides."""
    rng = np.random.default_rng(scale)
    whole = [*range(-500, 500), *rng.integers(-(10**7), 10**7, 500).tolist(), 890054381165783]
    values: list[Decimal | None] = [Decimal(each).scaleb(-scale) for each in whole]
    encoder = Buckets(kind="buckets", edges=(0,), step=step)
    of_text = codes_of_values([str(each) for each in values], encoder, "price")
    found = codes_of_array(pa.array([*values, None], pa.decimal128(18, scale)), encoder, "price")
    assert found.tolist() == [*of_text.tolist(), 0]
