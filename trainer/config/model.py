"""Settings of the two-stage models: roles, branches, the head."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.config.toml import Settings

# Most buckets of one window: a number for each bucket and each of 500 behaviors takes 131 MB.
_BUCKETS = 65_536
Width = Annotated[int, Field(ge=1, le=65_536)]


class RolesConfig(Settings):
    """Which table group serves each of the four roles (DARE, section 3; TWIN names one group four times).

    Attributes:
        attention_target: the group whose vectors of candidates are scored.
        attention_behavior: the group whose vectors of behaviors are scored.
        representation_target: the group whose vectors of candidates go to the head.
        representation_behavior: the group whose vectors of behaviors are pooled.
        cross: a group over features of behaviors alone whose vectors become one additive score each (TWIN's
            cross features); empty = none.
        context: one over the log's context features, whose vectors go to the head; empty = none.
    """

    attention_target: str = "attention"
    attention_behavior: str = "attention"
    representation_target: str = "representation"
    representation_behavior: str = "representation"
    cross: str = ""
    context: str = ""

    def used(self) -> set[str]:
        """The groups named."""
        return {name for name in self.model_dump().values() if name}


class BranchConfig(Settings):
    """One way through the history: search, weights, sequence model.

    Attributes:
        k: K, behaviors the search keeps for stage two.
        search: `dot` by the score of stage two (TWIN, DARE); `all`, none (DIN, TIN; after `data.search`, all
            that it retrieved); `recent`, the newest K; `hard`, same `match` id first, then the newest others;
            `simhash`, fewest differing bits of `hash_bits` (ETA); `soft`, an inner product of width
            `head_dim` that only the auxiliary loss `index` trains (SIM).
        clusters: search the log's clusters (`tandemrec cluster`) instead of single behaviors, with ln of
            their size added to every score in both stages (TWIN-V2).
        match: feature that `hard` compares; of several ids, one in common is enough.
        score: of stage two: `dot`, or `mlp` with one hidden layer of `score_hidden` (DIN).
        score_hidden: width of that layer.
        weights: over the kept behaviors: `softmax`, or unnormalised `sigmoid`.
        sequence: `attention`; `stacked` (Stacked TIN, `layers` orders); `collision` (SDIM, `hashes`
            signatures of `hash_bits`; no search); `sasrec` (target-decoupled SASRec of
            `layers` blocks; no search).
        target_aware: feed the product of target and pooled representation to the head (TIN, DARE).
        position: use a behavior's rank, counted back from the request.
        age: use the time from a behavior to the request, in logarithmic buckets.
        level: use the level at which a hard search while reading matched.
        time: how position, age and level enter scores: as an additive `bias`, or as `encoding` of both
            vectors (TIN).
        time_in: stages that use them. Values always use encodings.
        time_target: `shared`, or decoupled by the candidate's `time_group` feature: `target` (TdPE, of rank
            `time_dim` in scores) or `joint` (dPE).
        time_group: feature of candidates that groups them in time, see `time_target` and `sasrec`.
        time_dim: width of a time's own vector in scores, see `time_target`.
        attend: features whose vectors are scored, in order; left out = all of the group, empty = none.
        projection: of the vectors: `none`; `feature`, one linear map a feature and role; `heads`, to `heads`
            times `head_dim` for query and key (TWIN).
        heads: attention heads; head_dim: the width of one, or of the vectors that `soft` searches by.
        layers: orders of `stacked`, blocks of `sasrec`.
        hashes: signatures of `collision`; hash_bits: bits of a signature, or of all that `simhash` compares.
        roles: which table group serves what.
    """

    k: int = Field(20, ge=1, le=10_000)
    search: Literal["dot", "all", "recent", "hard", "simhash", "soft"] = "dot"
    clusters: bool = False
    match: str = ""
    score: Literal["dot", "mlp"] = "dot"
    score_hidden: Width = 36
    weights: Literal["softmax", "sigmoid"] = "softmax"
    sequence: Literal["attention", "stacked", "collision", "sasrec"] = "attention"
    target_aware: bool = True
    position: bool = True
    age: bool = True
    level: bool = False
    time: Literal["bias", "encoding"] = "bias"
    time_in: tuple[Literal["scores", "values"], ...] = ("scores", "values")
    time_target: Literal["shared", "target", "joint"] = "shared"
    time_group: str = ""
    time_dim: Width = 16
    attend: tuple[str, ...] | None = None
    projection: Literal["none", "feature", "heads"] = "none"
    heads: int = Field(1, ge=1, le=1024)
    head_dim: Width = 16
    layers: int = Field(2, ge=1, le=128)
    hashes: int = Field(16, ge=1, le=512)
    hash_bits: int = Field(3, ge=1, le=4096)
    roles: RolesConfig = RolesConfig()

    @property
    def newest(self) -> int:
        """How many of the newest behaviors it looks at; 0 = the whole window."""
        return self.k if self.search == "recent" else 0

    @model_validator(mode="after")
    def _consistent(self) -> BranchConfig:
        buckets = self.hashes << self.hash_bits
        problems = {
            'search = "hard" needs match, the feature to compare': self.search == "hard" and not self.match,
            'clusters goes with search = "dot" or "all"': self.clusters and self.search not in ("dot", "all"),
            'match is only used by search = "hard"': self.search != "hard" and bool(self.match),
            f'time_target = "{self.time_target}" needs time_group, a feature of candidates': (
                self.time_target != "shared" and not self.time_group
            ),
            'sequence = "sasrec" needs time_group, the feature that groups candidates': (
                self.sequence == "sasrec" and not self.time_group
            ),
            'heads > 1 needs projection = "heads"': (
                self.heads > 1 and self.projection != "heads" and self.sequence != "sasrec"
            ),
            'time = "encoding" does not go with a projection or score = "mlp"; use time = "bias"': (
                self.time == "encoding" and (self.projection != "none" or self.score == "mlp")
            ),
            'projection does not go with score = "mlp"': self.projection != "none" and self.score == "mlp",
            'sequence = "stacked" takes one head': self.sequence == "stacked" and self.heads > 1,
            'attend = [] leaves time alone to score: it goes with score = "dot" and neither a projection nor '
            "hashed or indexed vectors": (
                self.attend == ()
                and (self.score == "mlp" or self.projection != "none" or self._needs_vectors)
            ),
            'sequence = "collision" keeps hash_bits at 12 at most (its buckets are 2 ** hash_bits)': (
                self.sequence == "collision" and self.hash_bits > 12
            ),
            f'sequence = "collision": hashes = {self.hashes} of hash_bits = {self.hash_bits} are {buckets:,} '
            f"buckets, {buckets * 4 / 1e6:,.1f} MB for every behavior of every request; keep hashes * 2 ** "
            f"hash_bits at {_BUCKETS:,} at most": (
                self.sequence == "collision" and self.hash_bits <= 12 and buckets > _BUCKETS
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        return self

    @property
    def _needs_vectors(self) -> bool:
        return self.search in ("simhash", "soft") or self.sequence == "collision"


class ModelConfig(BranchConfig):
    """The two-stage model: its main branch is described by the section itself.

    Attributes:
        branches: further branches by name, whose outputs go to the same head. They take from [model] whatever
            they do not set. A recent window module is a branch with `search = "recent"`; DSI-TIN is two
            branches that attend to different features.
        lookup: `selected` looks up representation rows of kept behaviors and candidates only, `full` of all.
        head: `mlp`, or `dot` of user and item (with `sequence = "sasrec"`).
        norm: of the head's input: `layer`, or `batch` (DARE's code).
        hidden: widths of the head's layers.
        auxiliary: a second loss, of a head on the main branch's whole window: `softmax` over it (DARE's code)
            or the raw scores of the `index` that `search = "soft"` uses (SIM).
        auxiliary_weight: of that loss; auxiliary_hidden: widths of its head's layers.
        dense_init: `default`, or `normal`: all dense weights but biases from N(0, 0.01) (DARE's code).
    """

    branches: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], BranchConfig] = Field(
        default_factory=dict
    )
    lookup: Literal["selected", "full"] = "selected"
    head: Literal["mlp", "dot"] = "mlp"
    norm: Literal["layer", "batch"] = "layer"
    hidden: tuple[Width, ...] = (200, 80)
    auxiliary: Literal["none", "softmax", "index"] = "none"
    auxiliary_weight: float = Field(1.0, gt=0)
    auxiliary_hidden: tuple[Width, ...] = (200,)
    dense_init: Literal["default", "normal"] = "default"

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, given: Any) -> Any:
        """Give each branch what [model] sets and the branch does not, so that a dumped config stays whole."""
        if not isinstance(given, dict) or not isinstance(given.get("branches"), dict):
            return given
        own = {key: value for key, value in given.items() if key in BranchConfig.model_fields}
        branches = {}
        for name, branch in given["branches"].items():
            roles = {**_tree(own.get("roles")), **_tree(_tree(branch).get("roles"))}
            # A branch with a search of its own does not want what another search matched.
            mine = {k: v for k, v in own.items() if k != "match" or "search" not in _tree(branch)}
            whole = {**mine, **_tree(branch), **({"roles": roles} if roles else {})}
            branches[name] = whole if isinstance(branch, dict) else branch
        return {**given, "branches": branches}

    @model_validator(mode="after")
    def _whole(self) -> ModelConfig:
        problems = {
            'branches.main: the section [model] is the branch "main" itself': "main" in self.branches,
            'auxiliary needs lookup = "full": it reads every behavior of the window': (
                self.auxiliary != "none" and self.lookup != "full"
            ),
            'auxiliary = "index" goes with search = "soft", and search = "soft" with it': (
                (self.auxiliary == "index") != (self.search == "soft")
            ),
            'search = "soft" goes with sequence = "attention" or "stacked": the others search nothing': (
                self.search == "soft" and self.sequence not in ("attention", "stacked")
            ),
            'auxiliary = "softmax" needs sequence = "attention" with one head': (
                self.auxiliary == "softmax" and (self.sequence != "attention" or self.heads > 1)
            ),
            'head = "dot" goes with sequence = "sasrec" and no further branches': (
                self.head == "dot" and (self.sequence != "sasrec" or bool(self.branches))
            ),
            'branches: search = "soft" is only trained in the main branch': any(
                branch.search == "soft" for branch in self.branches.values()
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        return self

    def all_branches(self) -> dict[str, BranchConfig]:
        """The main branch and the others."""
        own = {name: getattr(self, name) for name in BranchConfig.model_fields}
        return {"main": BranchConfig(**own), **self.branches}


def section_of(branch: str) -> str:
    """Where a branch is configured, by its name in `all_branches`."""
    return "model" if branch == "main" else f"model.branches.{branch}"


def _tree(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
