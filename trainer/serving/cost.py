"""How much work a request is, in one number that is known before it is scored."""

from __future__ import annotations

from trainer.serving.checks import visible_behaviors
from trainer.serving.request import Needs, Request

# The work of a candidate that does not grow with the history, in pairs: its own vectors, the behaviors that
# were kept for it, and the layers behind them.
PAIRS_OF_CANDIDATE = 500


def cost_of(request: Request, needs: Needs) -> int:
    """Pairs of a candidate and a behavior that are compared, and what a candidate costs besides."""
    return request.count * (visible_behaviors(request, needs) + PAIRS_OF_CANDIDATE)
