"""What becomes of the cosines of a candidate with several behaviors.

Cosines are integers in float64, in parts of `UNITS`, so that sums of them are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from trainer.config.similarity import SimilarityConfig
from trainer.data.similarity.directions import UNITS, Reals

Ints = npt.NDArray[np.int64]
# (cosines [c, n] in parts of UNITS, n > 0; settings) -> [c], in [-1, 1].
Statistic = Callable[[Reals, SimilarityConfig], Reals]


def greatest(cosine_CN: Reals, settings: SimilarityConfig) -> Reals:
    del settings
    return np.asarray(cosine_CN.max(axis=1) / UNITS)


def mean(cosine_CN: Reals, settings: SimilarityConfig) -> Reals:
    del settings
    return np.asarray(cosine_CN.sum(axis=1) / (cosine_CN.shape[1] * UNITS))


def mean_of_top(cosine_CN: Reals, settings: SimilarityConfig) -> Reals:
    top = settings.top
    if top < cosine_CN.shape[1]:
        cosine_CN = np.partition(cosine_CN, -top, axis=1)[:, -top:]
    return mean(cosine_CN, settings)


STATISTICS: Final[dict[str, Statistic]] = {"max": greatest, "mean": mean, "top": mean_of_top}


def counts_of_tiers(cosine_CN: Reals, tiers: int) -> Ints:
    """How many cosines lie in each of so many equal parts of [-1, 1]: [c, tiers]; 1 is in the last one."""
    tier = ((cosine_CN + UNITS) * tiers // (2 * UNITS)).astype(np.int64).clip(max=tiers - 1)
    place = tier + tiers * np.arange(tier.shape[0])[:, None]
    return np.bincount(place.ravel(), minlength=tier.shape[0] * tiers).reshape(-1, tiers)
