"""How sure the model is of the candidates of a request, and scores that explore what it is unsure of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from trainer.config.mistakes import words_of
from trainer.data.row_group import Floats
from trainer.serving.request import Request, RequestError
from trainer.snapshot import Snapshot
from trainer.snapshot.uncertainty import LACKING, Judgement

Kind = Literal["none", "ucb", "thompson"]
# Bytes of a value in an Arrow body's metadata.
_LONGEST = 40


@dataclass(frozen=True)
class Exploration:
    """What an answer says besides of how sure the model is.

    Attributes:
        kind: of the scores that explore: `ucb`, mean + `factor` deviation; `thompson`, logits by one draw of
            the weights a request, which follows from the request and from `seed`.
    """

    kind: Kind = "none"
    factor: float = 1.0
    seed: int = 0


class ExplorationFields(BaseModel):
    """What a body says of it.

    Attributes:
        uncertainty: tell of every candidate how sure the model is.
        explore: the same, and scores that explore: `ucb` or `thompson`.
        explore_factor: of `ucb`, deviations above the mean; explore_seed: of `thompson`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    uncertainty: Annotated[bool, Field(strict=True)] = False
    explore: Kind = "none"
    explore_factor: Annotated[float, Field(strict=True, ge=-1e6, le=1e6, allow_inf_nan=False)] = 1.0
    explore_seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] = 0

    @property
    def asked(self) -> Exploration | None:
        """None: nothing is."""
        if not self.uncertainty and self.explore == "none":
            return None
        return Exploration(self.explore, self.explore_factor, self.explore_seed)


@dataclass(frozen=True)
class Sureness:
    """Of c candidates and T tasks, float32 [c, T] each.

    Attributes:
        mean, deviation: of the logit; probability: with the deviation in it.
        explore: logits to rank by; None where nobody asked for them.
    """

    mean: Floats
    deviation: Floats
    probability: Floats
    explore: Floats | None = None

    def by_name(self) -> dict[str, Floats]:
        """What there is, by the names of answers."""
        named = {name: getattr(self, name) for name in ("mean", "deviation", "probability", "explore")}
        return {name: values for name, values in named.items() if values is not None}


def sureness(judged: Judgement, own: slice, request: Request, exploration: Exploration) -> Sureness:
    """Of the candidates `own` of a model call, which are those of the request."""
    explore = None
    if exploration.kind == "ucb":
        explore = judged.bounds(exploration.factor)[own].numpy()
    elif exploration.kind == "thompson":
        explore = judged.drawn(own, _generator(request, exploration.seed)).numpy()
    mean, deviation, likely = (
        each[own].numpy() for each in (judged.mean, judged.deviation, judged.probability)
    )
    return Sureness(mean, deviation, likely, explore)


def _generator(request: Request, seed: int) -> np.random.Generator:
    """Of a user at a time: all candidates of a request are scored by one draw, however they are sent."""
    content = hashlib.sha256(f"{seed} {request.user_id} {request.time} ".encode())
    # Users that are not known all have the number 0.
    content.update(np.ascontiguousarray(request.history.time, dtype="<i8").tobytes())
    return np.random.default_rng(int.from_bytes(content.digest(), "little"))


def check_exploration(snapshot: Snapshot) -> None:
    """Raises RequestError where a version has no posteriors."""
    if not snapshot.posteriors:
        raise RequestError(422, f"uncertainty: the version {snapshot.path.name} {LACKING}")


def exploration_of(metadata: Mapping[bytes, bytes]) -> Exploration | None:
    """What the metadata of an Arrow body's schema asks for; None: nothing. Values are spelled as in JSON.

    Raises:
        RequestError: 422, naming the key.
    """
    given: dict[str, Any] = {}
    for key in ExplorationFields.model_fields:
        if (value := metadata.get(key.encode())) is not None:
            given[key] = value[:_LONGEST].decode(errors="replace")
            with suppress(ValueError):
                given[key] = from_json(given[key])
    try:
        return ExplorationFields.model_validate(given).asked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        problem = f"the schema's metadata: {first['loc'][0]}: {words_of(dict(first), json=True)}"
        raise RequestError(422, problem) from None
