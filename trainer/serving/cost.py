"""How much work a request is, in one number that is known before it is scored."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.serving.checks import visible_behaviors
from trainer.serving.request import Limits, Needs, Request, RequestError
from trainer.serving.scheduler import Size

# The unit is a pair: the comparison of a candidate with a behavior. What else takes time was measured in
# pairs, on one core (K = 50, vectors of width 16 and 64, a representation of width 128: 2 to 4 ns a pair).
# Of each candidate: its vectors, the behaviors that were kept for it, and the layers behind them.
PAIRS_OF_CANDIDATE = 2_500
# Of each request: its history.
PAIRS_OF_REQUEST = 100_000
# Of each model call, whatever it scores: 2 to 3 ms, in pairs of a cheap model. With fewer, the time of
# small calls would count as time of their few pairs, and large bodies would be refused for it.
PAIRS_OF_CALL = 3_000_000


def cost_of(request: Request, needs: Needs) -> int:
    """Pairs of a candidate and a behavior that are compared, and what the candidates cost besides."""
    return request.count * (visible_behaviors(request, needs) + PAIRS_OF_CANDIDATE)


def sizes_of(requests: Sequence[Request], needs: Needs, limits: Limits) -> list[Size]:
    """What each request of a body takes of a model call.

    Raises:
        RequestError: 413 where the body costs more than the server takes of one.
    """
    sizes = [Size(1, int(r.history.time.size), r.count, cost_of(r, needs)) for r in requests]
    cost = sum(size.cost for size in sizes)
    if cost > limits.cost:
        pairs = f"candidates x (behaviors that the model reads + {PAIRS_OF_CANDIDATE:,})"
        problem = f"the body costs {cost:,} pairs ({pairs}), the server takes {limits.cost:,} (limits.cost)"
        raise RequestError(413, f"{problem}; send fewer requests at once")
    return sizes


def work_of(calls: int, requests: int, cost: int) -> int:
    """All that takes time in some model calls, in pairs; `cost`: of all their requests."""
    return calls * PAIRS_OF_CALL + requests * PAIRS_OF_REQUEST + cost
