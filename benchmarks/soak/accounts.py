"""Every request of a soak is accounted for: what it was answered, and whether the answer is right."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.http_client import HttpAnswer
from benchmarks.soak.bodies import Body

# Statuses by which a server that is full or late turns a request away, as its page says.
REFUSALS = (429, 503, 504)
# One body may share its model call with others, which rounds its sums otherwise.
_SAME = 1e-6


@dataclass
class Accounts:
    """What became of the requests of each kind.

    Attributes:
        outcomes: by (kind, outcome). lost: what happened to requests without a right answer, the first ones.
        versions: answers of each version, in the order in which they were seen first.
        contents: what each version holds: versions of one content score alike.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    contents: dict[str, int] = field(default_factory=dict)
    _expected: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def note(self, kind: str, outcome: str) -> None:
        """Count a request."""
        self.outcomes[kind, outcome] += 1

    def lose(self, kind: str, problem: str) -> None:
        """Count a request that has no right answer."""
        self.note(kind, "lost")
        if len(self.lost) < 50:
            self.lost.append(f"{kind}: {problem}")

    def scored(self, kind: str, body: Body, answer: HttpAnswer) -> None:
        """Judge the answer to a body that must be scored, or turned away."""
        if answer.status in REFUSALS:
            self.note(kind, f"refused {answer.status}")
            return
        problem = self._problem(body, answer)
        if problem is None:
            self.note(kind, "answered")
        else:
            self.lose(kind, problem)

    def refused(self, kind: str, answer: HttpAnswer) -> None:
        """Judge the answer to a body that must not be scored."""
        if 400 <= answer.status < 500:
            self.note(kind, f"refused {answer.status}")
        else:
            self.lose(kind, f"answered {answer.status}: {answer.content[:200]!r}")

    def count(self, outcome: str) -> int:
        """Of all kinds."""
        return sum(count for (_, each), count in self.outcomes.items() if each == outcome)

    def _problem(self, body: Body, answer: HttpAnswer) -> str | None:
        """What is wrong with an answer; None: nothing."""
        if answer.status != 200:
            return f"answered {answer.status}: {answer.content[:200]!r}"
        tree: dict[str, Any] = json.loads(answer.content)
        scores = [score for result in tree["results"] for score in result["scores"]["click"]]
        self.versions[tree["version"]] += 1
        if len(scores) != body.answers * body.candidates:
            return f"{len(scores)} scores for {body.answers} x {body.candidates} candidates"
        if not all(0 <= score <= 1 and math.isfinite(score) for score in scores):
            return "a score is no probability"
        return self._other(body, tree["version"], scores)

    def _other(self, body: Body, version: str, scores: list[float]) -> str | None:
        """Whether a version with this content has scored the same body otherwise."""
        if version not in self.contents:
            return f"version {version} was never published"
        if body.name is None:
            return None
        expected = self._expected.setdefault((body.name, self.contents[version]), scores)
        far = max(abs(a - b) for a, b in zip(scores, expected, strict=True))
        return None if far <= _SAME else f"{body.name}: {version} scores otherwise by {far:.2g}"

    def contents_differ(self) -> bool:
        """Whether scores tell the contents apart, wherever a body was scored by two of them."""
        bodies = {name for name, _ in self._expected}
        pairs = [[scores for (name, _), scores in self._expected.items() if name == body] for body in bodies]
        return all(each[0] != each[1] for each in pairs if len(each) > 1)
