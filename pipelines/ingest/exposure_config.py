"""The section `[impressions.exposure]`: what the n-th showing of a thing to a user weighs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.toml import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_DAY = 86_400


class ExposureConfig(Settings):
    """The weight of a negative candidate whose item, or whatever `feature` says, the user was shown before.

    n is how many impressions of the user had the same value of `feature` before the second of the request.
    Only candidates with a negative label (below 0.5) are weighted, each label by itself: the factor
    multiplies the label's own weight. Candidates of one request do not count each other.
    """

    feature: str = "item_id"
    """The feature of candidates whose values are counted: the item, or the creative or advertiser it belongs
    to. The impressions table or the item table must have it. A candidate without a value has n = 0."""
    window_days: int = Field(default=0, ge=0, le=36_500)
    """How long an impression counts, in days of 86,400 seconds, the last second included; 0 = for ever."""
    rule: Literal["hyperbolic", "table"] = "hyperbolic"
    """`hyperbolic`: the weight is 1 / (1 + `rate` n); `table`: it is number n of `weights`, from 0 on."""
    rate: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 1.0
    """How fast the weight of the rule `hyperbolic` falls: a in 1 / (1 + a n)."""
    weights: tuple[Weight, ...] = ()
    """The weights of the rule `table`, by n; the last one is for all larger n, too."""

    @property
    def window(self) -> int:
        """Seconds that an impression counts, 0 = for ever."""
        return self.window_days * _DAY

    def factor(self, exposures: int) -> float:
        """The weight of a negative candidate with so many exposures before it."""
        if self.rule == "table":
            return self.weights[min(exposures, len(self.weights) - 1)]
        return 1.0 / (1.0 + self.rate * exposures)

    @model_validator(mode="after")
    def _rule_has_its_numbers(self) -> Self:
        if self.rule == "table" and not self.weights:
            raise ValueError('rule = "table" needs weights = [1.0, ...], one for each n from 0 on')
        unread = {"hyperbolic": "weights", "table": "rate"}[self.rule]
        if unread in self.model_fields_set:
            raise ValueError(f'rule = "{self.rule}" does not read {unread}: leave it out')
        return self
