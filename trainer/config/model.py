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


# Roles that no group need serve, and those of them that groups over features of requests serve.
OPTIONAL_ROLES = ("cross", "context", "prior", "prior_context")
CONTEXT_ROLES = ("context", "prior_context")


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
    """A group over features of behaviors alone (TWIN's cross features). Its vectors become one additive
    score each, or a part of the values, see `cross_in`. Empty means none."""
    context: str = ""
    """A group over the log's context features. Its vectors go to the head. Empty means none."""
    prior: str = ""
    """A group over features of candidates that only gates of the head `experts` read. Empty means none."""
    prior_context: str = ""
    """The same over the log's context features."""

    def used(self) -> set[str]:
        """The groups named."""
        return {name for name in self.model_dump().values() if name}


class BranchKeys(Settings):
    """What all branches may set, whatever their search and their sequence model are."""

    k: int = Field(20, ge=1, le=10_000)
    """K, the number of behaviors that the search keeps for stage two."""
    search: str = "dot"
    clusters: bool = False
    """Whether the log's clusters (`tandemrec cluster`) are searched instead of single behaviors. The
    logarithm of a cluster's size is then added to its score in both stages (TWIN-V2)."""
    score: Literal["dot", "mlp"] = "dot"
    """The score of stage two: a `dot` product, or an `mlp` with one hidden layer of width `score_hidden`
    (DIN)."""
    score_hidden: Width = 36
    """The width of the hidden layer of `score = "mlp"`."""
    temperature: float = Field(1.0, gt=0)
    """What the products of `score = "dot"` are divided by, besides the root of a head's width. What time and
    cross features add is not divided."""
    weights: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights of the kept behaviors: by `softmax`, or by `sigmoid` without
    normalisation."""
    sequence: str = "attention"
    target_aware: bool = True
    """Whether the product of target and pooled representation goes to the head (TIN, DARE)."""
    position: bool = True
    """Whether the rank of a behavior, counted back from the request, is used."""
    age: bool = True
    """Whether the time from a behavior to the request, in logarithmic buckets, is used."""
    level: bool = False
    """Whether the level is used at which a hard search while reading matched."""
    time: Literal["bias", "encoding", "concat"] = "bias"
    """How position, age and level enter scores: as an additive `bias`, or as an `encoding` that is added to
    both vectors (TIN). Values then use encodings. `concat` gives vectors of `time_dim` to each of them, which
    stand beside those of the features in scores and in values (DARE's code)."""
    time_in: tuple[Literal["scores", "values"], ...] = ("scores", "values")
    """The stages that use position, age and level."""
    time_tables: Literal["stage", "group"] = "stage"
    """Who has tables of position, age and level. With `stage` scores have some and values have others. With
    `group` what one table group serves has the same: where one group serves all four roles, scores and
    values read one table (TIN); with `concat` each group has its own (DARE's code)."""
    time_target: Literal["shared", "target", "joint"] = "shared"
    """Whether time is `shared` by all candidates, or decoupled by the candidate's `time_group` feature:
    `target` (TdPE, of rank `time_dim` in scores) or `joint` (dPE)."""
    time_group: str = ""
    """The feature of candidates that groups them in time, see `time_target` and `sasrec`."""
    time_dim: Width = 16
    """The width of a time's own vector, in scores (see `time_target`) or with `time = "concat"`."""
    attend: tuple[str, ...] | None = None
    """The features whose vectors are scored, in order. Not set means all features of the group, empty means
    none."""
    projection: Literal["none", "feature", "heads"] = "none"
    """The projection of the scored vectors. `feature` is one linear map for each feature and role. `heads`
    projects query and key to `heads` times `head_dim` (TWIN). `none` is none."""
    heads: int = Field(1, ge=1, le=1024)
    """The number of attention heads."""
    head_dim: Width = 16
    """The width of an attention head, or of the vectors that `soft` searches by."""
    layers: int = Field(2, ge=1, le=128)
    """The orders of `stacked`, the blocks of `sasrec`, or the layers of `stca` and `longer`."""
    expansion: int = Field(2, ge=1, le=64)
    """The hidden width of the feed-forward networks of `stca` and `longer`, in multiples of their width."""
    hash_bits: int = Field(3, ge=1, le=4096)
    """The bits of one signature of `collision`, or all bits that `simhash` compares."""
    attention_owner: str = ""
    """The task whose loss alone trains the attention weights of the kept behaviors, and so the attention's
    tables. The other tasks read the weights without gradient. Empty means that all tasks train them."""
    cross_in: tuple[Literal["scores", "values"], ...] = ("scores",)
    """The stages that use the cross features of `roles.cross`. In values their vectors stand beside those of
    the representation and pass the maps of the heads with them (TWIN, section 4.3)."""
    roles: RolesConfig = RolesConfig()
    """The table groups that serve the model, see [model.roles]."""


class ModelKeys(Settings):
    """What surrounds the branches of a model."""

    lookup: Literal["selected", "full"] = "selected"
    """`selected` looks up representation rows of kept behaviors and candidates only. `full` looks up those of
    all behaviors."""
    head: str = "mlp"
    norm: Literal["layer", "batch"] = "layer"
    """The norm of the head's input: `layer`, or `batch` (DARE's code)."""
    auxiliary: str = "none"
    auxiliary_weight: float = Field(1.0, gt=0)
    """The weight of the auxiliary loss."""
    auxiliary_hidden: tuple[Width, ...] = (200,)
    """The widths of the layers of the auxiliary loss's head."""
    dense_init: Literal["default", "normal"] = "default"
    """The first dense weights. `normal` draws all of them but biases from N(0, 0.01) (DARE's code). `default`
    leaves each layer its own distribution."""


def section_of(branch: str) -> str:
    """Where a branch is configured, by its name in `ModelConfig.all_branches`."""
    return "model" if branch == "main" else f"model.branches.{branch}"
