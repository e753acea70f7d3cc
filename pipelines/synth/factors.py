"""Planted signals of low rank: `agree`, `domains`, `signs`, `funnel`, `helper` and `sparse_*`.

Items 1 to 200 are in histories, items 201 to 300 are shown. A history is 20 items, each drawn uniformly; ages
are uniform over 90 days and say nothing. Item j of a history has a vector a_j ~ N(0, I) and a shown item c a
vector b_c, uniform on the unit sphere, both of rank 4 (the mean of a over either half of the items is 0). A
user's vector is u = sum_j a_j / sqrt(20), and the affinity x = <u, b_c> is close to N(0, 1).

    agree      click ~ Bernoulli(sigmoid(-1 + 2 <u, b_c>)), like ~ Bernoulli(sigmoid(-1 + 2 <u', b_c>)). Half
               of the users have read items 1 to 100 only, and both tasks want one vector of them: u' = u. The
               others have read the rest, and the tasks want orthogonal vectors: u' is u after a quarter turn
               (STEM's case).
    domains    click, of two domains that listen to either half of the rank; see `listened`.
    signs      click, of two domains in which one feature of items says the opposite; see `turned_sign`.
    funnel     click and, where there was one, conversion; `ctcvr` is their product, observed of all (ESMM);
               see `_funnel_logits`.
    helper     click ~ Bernoulli(sigmoid(-1 + 2 x)), help ~ the same once more, so that it tells the same of
               a user and an item, and noise ~ Bernoulli(1/2), which tells nothing (ForkMerge's case).
    sparse_*   click ~ Bernoulli(sigmoid(b + 2 x)), with b such that 25, 5 or 1 % of the candidates have one
               (ranking losses beside binary cross entropy, arXiv 2403.14144).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from pipelines.synth.log import Behaviors, Draws, Floats, Ints, OneRequestEach, Worth, ages, sigmoid

READ, SHOWN, RANK = 200, 100, 4
BEHAVIORS, CANDIDATES = 20, 8
FEATURES: Final = {"item_id": READ + SHOWN + 1}
HEAD, TAIL, TAIL_SHARE = 1, 2, 1 / 13
# domain -> how much it listens to either half of the rank.
LISTENS: Final = {HEAD: (1.0, 0.3), TAIL: (0.3, 1.0)}
# Of `signs`, whose tail has one request of 51: domain -> weight of band 2; band 1 has its negative.
SIGNS: Final = {HEAD: 0.6, TAIL: -0.6}
FEW_SHARE = 1 / 51
STRENGTH: Final = 2.0


def vectors(seed: int) -> Floats:
    """[READ + SHOWN + 1, RANK]: a of the items in histories, b of those that are shown; row 0 is zero."""
    rng = np.random.default_rng([seed, 0])
    a, b = rng.normal(size=(2, READ // 2, RANK)), rng.normal(size=(SHOWN, RANK))
    a = (a - a.mean(axis=1, keepdims=True)) / a.std(axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    return np.concatenate([np.zeros((1, RANK)), *a, b])


def affinity(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """<a_j, b_c> / sqrt(20); x is the sum of it over the behaviors."""
    return np.asarray(_products(seed, target, seen).sum(axis=-1))


def _products(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """[..., N, RANK], which sum to the affinity."""
    of_item = vectors(seed)
    product = of_item[seen.ids["item_id"]] * of_item[target["item_id"]]
    return np.asarray(product * BEHAVIORS**-0.5)


def disputed(item: Ints) -> Ints:
    """1 for items of histories that the tasks of `agree` read differently, those above 100; else 0."""
    return (item > READ // 2).astype(np.int64)


def turned(vector: Floats) -> Floats:
    """A quarter turn in each plane of two columns, (x, y) -> (-y, x), of [..., RANK]: it is orthogonal."""
    x, y = vector[..., ::2], vector[..., 1::2]
    return np.stack([-y, x], axis=-1).reshape(vector.shape)


def _liked(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """`affinity` with the vectors of disputed items turned."""
    item, of_item = seen.ids["item_id"], vectors(seed)
    read = np.where(disputed(item)[..., None] == 1, turned(of_item)[item], of_item[item])
    return np.asarray((read * of_item[target["item_id"]]).sum(axis=-1) * BEHAVIORS**-0.5)


def _part(half: int) -> Worth:
    """The affinity of the first (0) or second (1) half of the rank, scaled to a variance near 1."""

    def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
        columns = slice(half * RANK // 2, (half + 1) * RANK // 2)
        return np.asarray(_products(seed, target, seen)[..., columns].sum(axis=-1) * 2**0.5)

    return worth


def listened(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """sum_h weight_{d, h} (affinity of half h of the rank), d the candidate's domain.

    With x = sum_j worth_j: label ~ Bernoulli(sigmoid(-1 + 2 x)). Two factors of a user, of which the head
    listens to the first and the tail, which has one request of 13, to the second; see `LISTENS`. What a
    domain's own tables must learn from its own requests, shared tables learn from all (Crocodile's case).
    """
    weights = np.zeros((max(LISTENS) + 1, 2))
    for domain, values in LISTENS.items():
        weights[domain] = values
    weight = weights[target["domain_id"]]
    first, second = (_part(half)(seed, target, seen) for half in (0, 1))
    return np.asarray(weight[..., 0] * first + weight[..., 1] * second)


def turned_sign(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """0.8 (affinity) + 0.6 s_d (band), spread over the behaviors; the band of a shown item is -1 or +1.

    With x = sum_j worth_j: label ~ Bernoulli(sigmoid(-1 + 2 x)). The head domain likes one band, the tail,
    which has one request of 51, the other: s_d is 1 and -1. One head for all domains has the tail's sign
    wrong. A head of the tail's own must learn it from few requests, and has the affinity from all, if it
    begins as a clone (D-Train's case).
    """
    weights = np.zeros(max(SIGNS) + 1)
    for domain, value in SIGNS.items():
        weights[domain] = value
    said = weights[target["domain_id"]] * (2 * target["band"] - 3)
    return np.asarray(0.8 * affinity(seed, target, seen) + said / BEHAVIORS)


def rate_bias(rate: float) -> float:
    """b such that E sigmoid(b + STRENGTH x) = rate for x ~ N(0, 1), by bisection."""
    node, weight = np.polynomial.hermite_e.hermegauss(64)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = float((sigmoid(middle + STRENGTH * node) * weight).sum() / weight.sum())
        low, high = (low, middle) if mean > rate else (middle, high)
    return low


def _items(rng: np.random.Generator, users: int) -> tuple[dict[str, Ints], dict[str, Ints], Ints]:
    history = rng.integers(1, READ + 1, (users, BEHAVIORS))
    shown = rng.integers(READ + 1, READ + SHOWN + 1, (users, CANDIDATES))
    return {"item_id": history}, {"item_id": shown}, ages(rng, history.shape)


def _plain(rng: np.random.Generator, seed: int, users: int) -> Draws:
    del seed
    return _items(rng, users)


def _halves(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """Half of the users have read items that nobody disputes, the others only disputed ones."""
    del seed
    history, shown, age = _items(rng, users)
    other = rng.integers(0, 2, (users, 1))
    within = (history["item_id"] - 1) % (READ // 2) + 1
    return {"item_id": within + other * (READ // 2)}, shown, age


def _domains(tail: float) -> Callable[[np.random.Generator, int, int], Draws]:
    """A request, with all of its candidates, is of one domain: of the tail with this probability."""

    def draw(rng: np.random.Generator, seed: int, users: int) -> Draws:
        del seed
        history, shown, age = _items(rng, users)
        domain = np.where(rng.random((users, 1)) < tail, TAIL, HEAD)
        return history, shown | {"domain_id": np.broadcast_to(domain, shown["item_id"].shape)}, age

    return draw


def _banded(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """As `domains`, with few requests of the tail, and a band, 1 or 2, of each shown item."""
    history, shown, age = _domains(FEW_SHARE)(rng, seed, users)
    return history, {**shown, "band": rng.integers(1, 3, shown["item_id"].shape)}, age


def _funnel_logits(total: Callable[[Worth], Floats]) -> dict[str, Floats]:
    """P(click) = sigmoid(-2.5 + 2 x1), P(conversion | click) = sigmoid(-1.5 + 2 (0.8 x1 + 0.6 x2)).

    x1 and x2 are the affinities of either half of the rank. What is clicked converts more often than what is
    not would: whoever learns from clicks alone sees a selection.
    """
    x, y = total(_part(0)), total(_part(1))
    return {"click": -2.5 + STRENGTH * x, "conversion": -1.5 + STRENGTH * (0.8 * x + 0.6 * y)}


def _sparse(rate: float) -> OneRequestEach:
    """label ~ Bernoulli(sigmoid(b + 2 x)); b makes the given share of the candidates positive."""
    bias = rate_bias(rate)
    return OneRequestEach(FEATURES, _plain, lambda total: bias + STRENGTH * total(affinity), taxonomy=())


agree = OneRequestEach(
    FEATURES,
    _halves,
    lambda total: {"click": -1 + STRENGTH * total(affinity), "like": -1 + STRENGTH * total(_liked)},
    taxonomy=(),
    segment=lambda history: disputed(history["item_id"][:, 0]),
)
domains = OneRequestEach(
    FEATURES | {"domain_id": max(LISTENS) + 1},
    _domains(TAIL_SHARE),
    lambda total: -1 + STRENGTH * total(listened),
    taxonomy=(),
)
signs = OneRequestEach(
    FEATURES | {"domain_id": max(SIGNS) + 1, "band": 3},
    _banded,
    lambda total: -1 + STRENGTH * total(turned_sign),
    taxonomy=(),
)
funnel = OneRequestEach(FEATURES, _plain, _funnel_logits, taxonomy=(), funnel=True)
helper = OneRequestEach(
    FEATURES,
    _plain,
    lambda total: {
        "click": -1 + STRENGTH * total(affinity),
        "help": -1 + STRENGTH * total(affinity),
        "noise": 0 * total(affinity),
    },
    taxonomy=(),
)
sparse_25, sparse_5, sparse_1 = (_sparse(rate) for rate in (0.25, 0.05, 0.01))
