"""The domain of each candidate: the id of one feature, of the candidate itself or of its request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embeddings.errors import ConfigError, hint_of
from trainer.data.row_group import FeatureIds
from trainer.log.bags import Ints
from trainer.log.schema import LogManifest


@dataclass(frozen=True)
class DomainColumn:
    """Where the domain of a candidate stands.

    Attributes:
        feature: its name; of_requests: whether a request has it, for all of its candidates.
        rows: ids stay below.
    """

    feature: str
    of_requests: bool
    rows: int

    @staticmethod
    def of(manifest: LogManifest, feature: str) -> DomainColumn:
        """The column of `data.domain` in a log.

        Raises:
            ConfigError: there is no such feature, or a candidate has not exactly one id of it.
        """
        info = manifest.features.get(feature) or manifest.context.get(feature)
        if info is None:
            known = [name for name, each in manifest.features.items() if each.of_candidates]
            known += manifest.context
            wanted = "set data.domain to the one of candidates or of requests that says where a candidate was"
            hint = hint_of(feature, known, f"{wanted} shown: they have {', '.join(known)}")
            raise ConfigError(f"data.domain = {feature!r}: the log has no such feature; {hint}")
        if not info.of_candidates:
            raise ConfigError(
                f"data.domain = {feature!r}: only behaviors have this feature; name one of candidates or of "
                "requests"
            )
        if info.encoder is not None:
            raise ConfigError(
                f"data.domain = {feature!r}: it holds numbers, and a domain is an id; ingest the column "
                "without an encoder for that"
            )
        if info.multi:
            raise ConfigError(
                f"data.domain = {feature!r}: a candidate has any number of its ids, but is from one domain; "
                "name a feature with one id"
            )
        return DomainColumn(feature, feature not in manifest.features, info.rows)

    @property
    def name(self) -> str:
        """The log's column."""
        return f"{'context' if self.of_requests else 'candidate'}_{self.feature}"

    def of_candidates(self, candidates: FeatureIds, context: FeatureIds, counts: Ints) -> Ints:
        """The domain of each candidate, [candidates].

        Args:
            candidates, context: ids, the feature among those that the column belongs to.
            counts: [requests], candidates of each.
        """
        if self.of_requests:
            return np.repeat(context[self.feature].values, counts).astype(np.int64, copy=False)
        return candidates[self.feature].values.astype(np.int64, copy=False)
