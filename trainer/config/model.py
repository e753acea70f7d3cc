"""Settings that every branch of a model has, and those of the model around its branches.

A search, a sequence model, a head and an auxiliary loss declare the settings that are theirs alone in their
own files. `trainer.model.settings` puts all of them together into the flat section [model]. A setting that
several kinds look at is declared here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.toml import Settings

Width = Annotated[int, Field(ge=1, le=65_536)]


class RolesConfig(Settings):
    """Which table group serves each of the roles (DARE, section 3; TWIN names one group four times)."""

    attention_target: str = "attention"
    """The group whose vectors of candidates are scored."""
    attention_behavior: str = "attention"
    """The group whose vectors of behaviors are scored."""
    representation_target: str = "representation"
    """The group whose vectors of candidates go to the head."""
    representation_behavior: str = "representation"
    """The group whose vectors of behaviors are pooled."""
    cross: str = ""
    """A group over features that only behaviors have. Each of its vectors becomes one additive score (TWIN's
    cross features). Empty means none."""
    context: str = ""
    """A group over the log's context features. Its vectors go to the head. Empty means none."""

    def used(self) -> set[str]:
        """The groups named."""
        return {name for name in self.model_dump().values() if name}


class BranchKeys(Settings):
    """What all branches may set, whatever their search and their sequence model are."""

    k: int = Field(20, ge=1, le=10_000)
    """K: how many behaviors the search keeps for stage two."""
    search: str = "dot"
    clusters: bool = False
    """Whether the log's clusters (`tandemrec cluster`) are searched instead of single behaviors. The
    logarithm of a cluster's size is added to its score in both stages (TWIN-V2)."""
    score: Literal["dot", "mlp"] = "dot"
    """The score of stage two: `dot` is an inner product, `mlp` has one hidden layer of width `score_hidden`
    (DIN)."""
    score_hidden: Width = 36
    """The width of the hidden layer of `score = "mlp"`."""
    weights: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights of the kept behaviors: `softmax`, or `sigmoid` without normalisation."""
    sequence: str = "attention"
    target_aware: bool = True
    """Whether the head is also given the product of the target and the pooled representation (TIN, DARE)."""
    position: bool = True
    """Whether a behavior's rank is used, counted back from the request."""
    age: bool = True
    """Whether the time from a behavior to the request is used, in logarithmic buckets."""
    level: bool = False
    """Whether the level is used at which the hard search while reading matched."""
    time: Literal["bias", "encoding"] = "bias"
    """How position, age and level enter scores: as an additive `bias`, or as an `encoding` of both vectors
    (TIN)."""
    time_in: tuple[Literal["scores", "values"], ...] = ("scores", "values")
    """The stages that use position, age and level. Values always use encodings."""
    time_target: Literal["shared", "target", "joint"] = "shared"
    """`shared` treats the time of all targets alike. `target` and `joint` decouple it by the candidate's
    feature `time_group`: `target` is TdPE, of rank `time_dim` in scores, and `joint` is dPE."""
    time_group: str = ""
    """The feature of candidates by which `time_target` and `sasrec` group them."""
    time_dim: Width = 16
    """The width of a time's own vector in scores, with `time_target = "target"`."""
    attend: tuple[str, ...] | None = None
    """The features whose vectors are scored, in order. Left out, all features of the group are. An empty list
    means none."""
    projection: Literal["none", "feature", "heads"] = "none"
    """What maps the scored vectors: `none` leaves them as they are, `feature` has one linear map for each
    feature and role, `heads` has one map of all features to `heads` times `head_dim`, for queries and for
    keys (TWIN)."""
    heads: int = Field(1, ge=1, le=1024)
    """The number of attention heads."""
    head_dim: Width = 16
    """The width of an attention head, or of the vectors that `soft` searches by."""
    layers: int = Field(2, ge=1, le=128)
    """The number of orders of `stacked`, or of blocks of `sasrec`."""
    hash_bits: int = Field(3, ge=1, le=4096)
    """The number of bits of one signature of `collision`, or of the whole code of `simhash`."""
    roles: RolesConfig = RolesConfig()
    """Which table group serves which role."""


class ModelKeys(Settings):
    """What surrounds the branches of a model."""

    lookup: Literal["selected", "full"] = "selected"
    """`selected` looks up the representation of kept behaviors and of candidates only. `full` looks up that
    of all behaviors."""
    head: str = "mlp"
    norm: Literal["layer", "batch"] = "layer"
    """The normalisation of the head's input: `layer`, or `batch` (DARE's code)."""
    auxiliary: str = "none"
    auxiliary_weight: float = Field(1.0, gt=0)
    """The weight of the auxiliary loss."""
    auxiliary_hidden: tuple[Width, ...] = (200,)
    """The widths of the layers of the auxiliary loss's head."""
    dense_init: Literal["default", "normal"] = "default"
    """The first dense weights. `normal` draws all but the biases from N(0, 0.01) (DARE's code)."""


def section_of(branch: str) -> str:
    """Where a branch is configured, by its name in `ModelConfig.all_branches`."""
    return "model" if branch == "main" else f"model.branches.{branch}"
