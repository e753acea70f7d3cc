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
    """the group whose vectors of candidates are scored"""
    attention_behavior: str = "attention"
    """the group whose vectors of behaviors are scored"""
    representation_target: str = "representation"
    """the group whose vectors of candidates go to the head"""
    representation_behavior: str = "representation"
    """the group whose vectors of behaviors are pooled"""
    cross: str = ""
    """a group over features of behaviors alone, whose vectors become one additive score each (TWIN's cross
    features); empty = none"""
    context: str = ""
    """a group over the log's context features, whose vectors go to the head; empty = none"""

    def used(self) -> set[str]:
        """The groups named."""
        return {name for name in self.model_dump().values() if name}


class BranchKeys(Settings):
    """What all branches may set, whatever their search and their sequence model are."""

    k: int = Field(20, ge=1, le=10_000)
    """K, behaviors the search keeps for stage two"""
    search: str = "dot"
    clusters: bool = False
    """search the log's clusters (`tandemrec cluster`) instead of single behaviors, with ln of their size
    added to every score in both stages (TWIN-V2)"""
    score: Literal["dot", "mlp"] = "dot"
    """score of stage two: `dot`, or `mlp` with one hidden layer of `score_hidden` (DIN)"""
    score_hidden: Width = 36
    """width of the hidden layer of `score = "mlp"`"""
    weights: Literal["softmax", "sigmoid"] = "softmax"
    """weights of the kept behaviors: `softmax`, or unnormalised `sigmoid`"""
    sequence: str = "attention"
    target_aware: bool = True
    """feed the product of target and pooled representation to the head (TIN, DARE)"""
    position: bool = True
    """use a behavior's rank, counted back from the request"""
    age: bool = True
    """use the time from a behavior to the request, in logarithmic buckets"""
    level: bool = False
    """use the level at which a hard search while reading matched"""
    time: Literal["bias", "encoding"] = "bias"
    """how position, age and level enter scores: as an additive `bias`, or as `encoding` of both vectors
    (TIN)"""
    time_in: tuple[Literal["scores", "values"], ...] = ("scores", "values")
    """stages that use position, age and level; values always use encodings"""
    time_target: Literal["shared", "target", "joint"] = "shared"
    """`shared`, or decoupled by the candidate's `time_group` feature: `target` (TdPE, of rank `time_dim` in
    scores) or `joint` (dPE)"""
    time_group: str = ""
    """feature of candidates that groups them in time, see `time_target` and `sasrec`"""
    time_dim: Width = 16
    """width of a time's own vector in scores, see `time_target`"""
    attend: tuple[str, ...] | None = None
    """features whose vectors are scored, in order; left out = all of the group, empty = none"""
    projection: Literal["none", "feature", "heads"] = "none"
    """projection of the scored vectors: `none`; `feature`, one linear map a feature and role; `heads`, to
    `heads` times `head_dim` for query and key (TWIN)"""
    heads: int = Field(1, ge=1, le=1024)
    """attention heads"""
    head_dim: Width = 16
    """width of an attention head, or of the vectors that `soft` searches by"""
    layers: int = Field(2, ge=1, le=128)
    """orders of `stacked`, blocks of `sasrec`"""
    hash_bits: int = Field(3, ge=1, le=4096)
    """bits of a signature of `collision`, or of all that `simhash` compares"""
    roles: RolesConfig = RolesConfig()
    """which table group serves what"""


class ModelKeys(Settings):
    """What surrounds the branches of a model."""

    lookup: Literal["selected", "full"] = "selected"
    """`selected` looks up representation rows of kept behaviors and candidates only, `full` of all"""
    head: str = "mlp"
    norm: Literal["layer", "batch"] = "layer"
    """norm of the head's input: `layer`, or `batch` (DARE's code)"""
    auxiliary: str = "none"
    auxiliary_weight: float = Field(1.0, gt=0)
    """weight of the auxiliary loss"""
    auxiliary_hidden: tuple[Width, ...] = (200,)
    """widths of the layers of the auxiliary loss's head"""
    dense_init: Literal["default", "normal"] = "default"
    """`default`, or `normal`: all dense weights but biases from N(0, 0.01) (DARE's code)"""


def section_of(branch: str) -> str:
    """Where a branch is configured, by its name in `ModelConfig.all_branches`."""
    return "model" if branch == "main" else f"model.branches.{branch}"
