"""The posterior of a last linear map: Laplace's approximation (Spiegelhalter and Lauritzen 1990).

With phi known, this is Bayesian logistic regression (Bishop, Pattern Recognition and Machine Learning,
section 4.5): around the trained w the posterior is Gaussian with the precision
alpha I + sum of v p (1 - p) phi phi^T over the candidates of training, v their weights in the loss. The
evidence chooses alpha (MacKay 1992): alpha |w|^2 = sum of lambda / (lambda + alpha), over the eigenvalues of
that sum.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import expit

from trainer.snapshot.uncertainty import Posterior

Doubles = npt.NDArray[np.float64]
# Between which precisions of the prior the evidence chooses.
LEAST_PRIOR, LARGEST_PRIOR = 1e-6, 1e6


def curvature(phi_CD: npt.ArrayLike, logit_C: npt.ArrayLike, weight_C: npt.ArrayLike) -> Doubles:
    """sum of v p (1 - p) phi phi^T, [D, D] in double precision: what some candidates say of the weights."""
    phi = np.asarray(phi_CD, dtype=np.float64)
    logit = np.asarray(logit_C, dtype=np.float64)
    # p (1 - p), without a difference of nearly equal numbers where p is close to 1.
    scale = np.asarray(weight_C, dtype=np.float64) * expit(logit) * expit(-logit)
    total: Doubles = (phi * scale[:, None]).T @ phi
    return total


def evidence(curvature_DD: Doubles, weights_D: npt.ArrayLike) -> float:
    """The precision of the prior that the evidence chooses, within `LEAST_PRIOR` and `LARGEST_PRIOR`.

    The left side of MacKay's equation grows with alpha and the right side falls, so that there is one root.
    """
    values = np.linalg.eigvalsh(curvature_DD).clip(min=0)
    norm = float(np.square(np.asarray(weights_D, dtype=np.float64)).sum())

    def excess(log_alpha: float) -> float:
        alpha = math.exp(log_alpha)
        return alpha * norm - float((values / (values + alpha)).sum())

    low, high = math.log(LEAST_PRIOR), math.log(LARGEST_PRIOR)
    if excess(low) >= 0:
        return LEAST_PRIOR
    return LARGEST_PRIOR if excess(high) <= 0 else math.exp(float(brentq(excess, low, high, xtol=1e-12)))


def posterior(curvature_DD: Doubles, prior: float) -> Posterior:
    """Gaussian, with the precision `curvature` + `prior` I.

    By eigenvalues and a QR decomposition: to invert the precision first would lose the small ones.
    """
    values, vectors = np.linalg.eigh(curvature_DD)
    scaled = vectors / np.sqrt(values.clip(min=0) + prior)
    _, upper = np.linalg.qr(scaled.T)
    lower = (upper * np.where(np.diag(upper) < 0, -1.0, 1.0)[:, None]).T
    return Posterior(torch.from_numpy(np.ascontiguousarray(lower, dtype=np.float32)))
