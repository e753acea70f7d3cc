"""The tables of what a model may be made of, and the section [model] that is put together from them.

To add a search, a sequence model, a head or an auxiliary loss, write its file and add one line to a table
here. Its class says how it is built, which settings it adds to [model] (`keys`), and what else the project
must know of it; no other module knows it by name.

A kind's settings stand beside its module, in the same file, so that adding one touches no second file. The
section [model] therefore belongs to this package, and `trainer.run_config` stands above it. `trainer.config`
holds only what knows no kind. The section stays flat: all kinds' settings are keys of one table, as in every
config, checkpoint and snapshot so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from trainer.config.mistakes import NAME
from trainer.config.model import BranchKeys, ModelKeys
from trainer.model.heads.auxiliary import Auxiliary, IndexLoss, SoftmaxLoss
from trainer.model.heads.experts import ExpertsHead
from trainer.model.heads.head import DotHead, Head, MlpHead
from trainer.model.heads.retrieval import RetrievalHead
from trainer.model.read.collision import HashCollision
from trainer.model.read.hstu import Hstu
from trainer.model.read.longer import MergedTokens
from trainer.model.read.muse import Muse
from trainer.model.read.sasrec import TargetDecoupledSasrec
from trainer.model.read.sequence import SequenceModel
from trainer.model.read.stacked import StackedTin
from trainer.model.read.stca import TargetToHistory
from trainer.model.read.target_attention import TargetAttention
from trainer.model.read.vista import Vista
from trainer.model.retrieve.all import AllSearch, RecentSearch
from trainer.model.retrieve.dot import DotSearch, SoftSearch
from trainer.model.retrieve.hard import HardSearch
from trainer.model.retrieve.search import Search
from trainer.model.retrieve.simhash import HammingSearch

SEARCHES: dict[str, type[Search]] = {
    "dot": DotSearch,
    "all": AllSearch,
    "recent": RecentSearch,
    "hard": HardSearch,
    "simhash": HammingSearch,
    "soft": SoftSearch,
}
"""The searches, by their names in `model.search`."""
SEQUENCES: dict[str, type[SequenceModel]] = {
    "attention": TargetAttention,
    "stacked": StackedTin,
    "collision": HashCollision,
    "sasrec": TargetDecoupledSasrec,
    "stca": TargetToHistory,
    "longer": MergedTokens,
    "hstu": Hstu,
    "vista": Vista,
    "muse": Muse,
}
"""The sequence models, by their names in `model.sequence`."""
HEADS: dict[str, type[Head]] = {
    "mlp": MlpHead,
    "dot": DotHead,
    "experts": ExpertsHead,
}
"""The heads, by their names in `model.head`."""
AUXILIARIES: dict[str, type[Auxiliary] | None] = {
    "none": None,
    "softmax": SoftmaxLoss,
    "index": IndexLoss,
    "retrieval": RetrievalHead,
}
"""The auxiliary losses, by their names in `model.auxiliary`."""

if TYPE_CHECKING:
    from trainer.config.model import BranchKeys as _BranchKeys
    from trainer.config.model import ModelKeys as _ModelKeys

    _Search: TypeAlias = str
    _Sequence: TypeAlias = str
    _Head: TypeAlias = str
    _Auxiliary: TypeAlias = str
else:

    def _bases(kinds, base):
        """The settings classes of all kinds, but those that another one extends."""
        keys = dict.fromkeys([*(kind.keys for kind in kinds), base])
        return tuple(each for each in keys if all(each is k or not issubclass(k, each) for k in keys))

    class _BranchKeys(*_bases([*SEARCHES.values(), *SEQUENCES.values()], BranchKeys)):
        """The keys of all searches and sequence models."""

    class _ModelKeys(*_bases([*HEADS.values(), *filter(None, AUXILIARIES.values())], ModelKeys)):
        """The keys of all heads and auxiliary losses."""

    _Search, _Sequence = Literal[*SEARCHES], Literal[*SEQUENCES]
    _Head, _Auxiliary = Literal[*HEADS], Literal[*AUXILIARIES]


class BranchConfig(_BranchKeys):
    """One way through the history: search, weights, sequence model."""

    search: _Search = "dot"
    """How the search chooses K behaviors. `dot` takes those of the best score of stage two (TWIN, DARE).
    `all` searches nothing (DIN, TIN) and, after `data.search`, keeps all that it retrieved. `recent` takes
    the newest K. `hard` takes behaviors of the same `match` id first, then the newest others. `simhash` takes
    those with the fewest differing bits of `hash_bits` (ETA). `soft` takes those of the best inner product of
    width `head_dim`, which only the auxiliary loss `index` trains (SIM)."""
    sequence: _Sequence = "attention"
    """The sequence model of stage two. `attention` sums the kept behaviors by their weights. `stacked` is
    Stacked TIN with `layers` orders. `collision` is SDIM with `hashes` signatures of `hash_bits`, and has no
    search. `sasrec` is a target-decoupled SASRec of `layers` blocks, and has no search. `stca` has the
    candidate attend to its whole window in `layers` layers, without attention among behaviors. `longer`
    merges each `merge` neighbors into a token; candidate and newest tokens attend to all tokens. Neither of
    the two searches. `hstu` is gated pointwise attention of `layers` layers among behaviors and of the
    candidate to them, with `heads` of `head_dim`; its cost is quadratic in the behaviors, so
    `search = "recent"` lets it look at the newest `k`.
    `vista` summarises the window in `seeds` tokens by `layers` layers of quasi-linear attention, whoever the
    candidates are, and a candidate attends to these tokens alone. `muse` mixes the score of ids with the
    cosine of pre-trained contents and gives the head a histogram of these cosines."""

    @property
    def search_kind(self) -> type[Search]:
        """The class that its search is made of."""
        return SEARCHES[self.search]

    @property
    def sequence_kind(self) -> type[SequenceModel]:
        """The class that its sequence model is made of."""
        return SEQUENCES[self.sequence]

    @property
    def searches(self) -> bool:
        """Whether there is a stage one at all."""
        return not self.sequence_kind.on_windows

    @property
    def scored_groups(self) -> set[str]:
        """The groups whose vectors are scored; none where time alone is."""
        roles = self.roles
        scored = set() if self.attend == () else {roles.attention_target, roles.attention_behavior}
        if self.sequence_kind.scores_values:
            scored |= {roles.representation_target, roles.representation_behavior}
        return scored

    @property
    def newest(self) -> int:
        """How many of the newest behaviors it looks at; 0 = the whole window."""
        return self.search_kind.newest(self)

    @property
    def ids_feature(self) -> str:
        """The feature whose ids its search compares, empty where it compares none."""
        return str(getattr(self, self.search_kind.ids_key, ""))

    def compared_features(self) -> dict[str, tuple[str, str]]:
        """Key -> the feature that it names, and who must have that feature in the log."""
        features = {
            self.search_kind.ids_key: (self.ids_feature, "behaviors and candidates"),
            "time_group": (self.time_group, "candidates"),
        }
        return {key: pair for key, pair in features.items() if pair[0]}

    @property
    def _shares_tables(self) -> bool:
        """Whether there are stages, or roles, that could have tables of time together."""
        roles, both = self.roles, {"scores", "values"} <= set(self.time_in)
        scored = {roles.attention_target, roles.attention_behavior}
        pooled = {roles.representation_target, roles.representation_behavior}
        return self.searches and (self.time == "concat" or (both and len(scored | pooled) == 1))

    def keys_with_effect(self) -> set[str]:
        """Those of `CONDITIONAL_KEYS` that make a difference to this branch."""
        marks = self.position or self.age or self.level
        uses = {
            "score_hidden": self.score == "mlp",
            "temperature": self.searches and self.score == "dot" and self.attend != (),
            "heads": self.projection == "heads",
            "head_dim": self.projection == "heads",
            "time_dim": marks
            and (self.time == "concat" or (self.time_target == "target" and self.time == "bias")),
            "time_tables": marks and self._shares_tables,
            "time_group": self.time_target != "shared",
            # Whoever reads whole windows has neither scores of this kind nor weights.
            **dict.fromkeys(("time", "score", "weights", "projection", "attention_owner"), self.searches),
        }
        search = _keys_of(self.search_kind) if self.searches or self.newest else set()
        return {key for key, used in uses.items() if used} | search | _keys_of(self.sequence_kind)

    @model_validator(mode="after")
    def _consistent(self) -> BranchConfig:
        vectors = self.search_kind.needs_vectors or self.sequence_kind.needs_vectors
        problems = {
            f"clusters goes with search = {_names(SEARCHES, 'takes_clusters', True)}": (
                self.clusters and not self.search_kind.takes_clusters
            ),
            self.search_kind.problem(self): True,
            **{
                f'{kind.ids_key} is only used by search = "{name}"': bool(getattr(self, kind.ids_key))
                for name, kind in SEARCHES.items()
                if kind.ids_key and name != self.search
            },
            self.sequence_kind.problem(self): True,
            f'time_target = "{self.time_target}" needs time_group, a feature of candidates': (
                self.time_target != "shared" and not self.time_group
            ),
            **self._time_problems(),
            'cross_in with "values" needs sequence = "attention" with several heads, whose maps they pass': (
                bool(self.roles.cross)
                and "values" in self.cross_in
                and (not self.sequence_kind.takes_cross or self.heads == 1)
            ),
            "cross_in = [] leaves roles.cross to nobody: name scores or values, or leave roles.cross out": (
                bool(self.roles.cross) and not self.cross_in
            ),
            'heads > 1 needs projection = "heads"': (
                self.heads > 1 and self.projection != "heads" and "heads" not in self.sequence_kind.uses
            ),
            'time = "encoding" does not go with a projection or score = "mlp"; use time = "bias"': (
                self.time == "encoding" and (self.projection != "none" or self.score == "mlp")
            ),
            'projection does not go with score = "mlp"': self.projection != "none" and self.score == "mlp",
            'attend = [] leaves time alone to score: it goes with score = "dot" and neither a projection nor '
            "hashed or indexed vectors": (
                self.attend == () and (self.score == "mlp" or self.projection != "none" or vectors)
            ),
        }
        _refuse(problems)
        return self

    def _time_problems(self) -> dict[str, bool]:
        """What is wrong with how time is encoded."""
        kinds = _names(SEQUENCES, "takes_columns", True)
        return {
            f'time = "concat" goes with sequence = {kinds}: the others add encodings': (
                self.time == "concat" and not self.sequence_kind.takes_columns
            ),
            'time = "concat" takes time_target = "shared"': (
                self.time == "concat" and self.time_target != "shared"
            ),
            'time_tables = "group" with time = "encoding" scores whole vectors: leave out attend': (
                self.time == "encoding"
                and self.time_tables == "group"
                and set(self.time_in) == {"scores", "values"}
                and self.attend is not None
            ),
        }


class ModelConfig(BranchConfig, _ModelKeys):
    """The two-stage model: its main branch is described by the section itself."""

    head: _Head = "mlp"
    """The head: an `mlp`, the `dot` product of user and item (with `sequence = "sasrec"`), or `experts` over
    sets of the representation, with a mixer and a tower for each task (see [model.experts])."""
    auxiliary: _Auxiliary = "none"
    """A second loss, of a head on the main branch's whole window. `softmax` takes the softmax of scores over
    the window (DARE's code). `index` takes the raw scores of the index that `search = "soft"` uses (SIM).
    `retrieval` has the mean of the window's attention vectors find the positive among the step's candidates,
    by a margin metric softmax (see [model.retrieval])."""
    branches: dict[Annotated[str, Field(pattern=NAME)], BranchConfig] = Field(default_factory=dict)
    """Further branches by name, whose outputs go to the same head. They take from [model] whatever they do
    not set. A recent window module is a branch with `search = "recent"`. DSI-TIN is two branches that attend
    to different features."""

    @property
    def head_kind(self) -> type[Head]:
        """The class that the head is made of."""
        return HEADS[self.head]

    @property
    def auxiliary_kind(self) -> type[Auxiliary] | None:
        """The class that the auxiliary loss is made of, if there is one."""
        return AUXILIARIES[self.auxiliary]

    @property
    def auxiliary_reads(self) -> bool:
        """Whether an auxiliary loss reads the representation of whole windows."""
        return self.auxiliary_kind is not None and self.auxiliary_kind.reads_representation

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, given: Any) -> Any:
        """Give each branch what [model] sets and the branch does not, so that a dumped config stays whole."""
        if not isinstance(given, dict) or not isinstance(given.get("branches"), dict):
            return given
        own = {key: value for key, value in given.items() if key in BranchConfig.model_fields}
        of_searches = {key for kind in SEARCHES.values() for key in _own_keys(kind.keys)}
        branches = {}
        for name, branch in given["branches"].items():
            roles = {**_tree(own.get("roles")), **_tree(_tree(branch).get("roles"))}
            # A branch with a search of its own does not want the keys of another search.
            mine = {k: v for k, v in own.items() if k not in of_searches or "search" not in _tree(branch)}
            whole = {**mine, **_tree(branch), **({"roles": roles} if roles else {})}
            branches[name] = whole if isinstance(branch, dict) else branch
        return {**given, "branches": branches}

    @model_validator(mode="after")
    def _whole(self) -> ModelConfig:
        search, needed = self.search, self.search_kind.auxiliary
        sequences = _names(SEQUENCES, "on_windows", False)
        others = [branch.search for branch in self.branches.values() if branch.search_kind.auxiliary]
        other = min(others, default="")
        priors = [(self.roles.prior, self.roles.prior_context)]
        priors += [(branch.roles.prior, branch.roles.prior_context) for branch in self.branches.values()]
        problems = {
            'branches.main: the section [model] is the branch "main" itself': "main" in self.branches,
            'auxiliary needs lookup = "full": it reads every behavior of the window': (
                self.auxiliary_reads and self.lookup != "full"
            ),
            f'auxiliary = "{needed}" goes with search = "{search}", and search = "{search}" with it': (
                bool(needed) and self.auxiliary != needed
            ),
            f'search = "{search}" goes with sequence = {sequences}: the others search nothing': (
                bool(needed) and not self.searches
            ),
            self.auxiliary_kind.problem(self) if self.auxiliary_kind is not None else "": True,
            self.head_kind.problem(self): True,
            "roles.prior and roles.prior_context are read by no gate; gates of the prior come with head = "
            '"experts" and mixer.gate = "prior", towers.gated or towers.gate_inputs': (
                bool(self.roles.prior or self.roles.prior_context) and not self.head_kind.reads_prior(self)
            ),
            'attention_owner runs the head twice, so that running statistics of norm = "batch" would count '
            'twice: use norm = "layer"': (
                self.norm == "batch"
                and any(branch.attention_owner for branch in self.all_branches().values())
            ),
            "branches: the prior goes to the head, so model.roles alone names prior and prior_context": (
                len(set(priors)) > 1
            ),
            f'branches: search = "{other}" is only trained in the main branch': bool(other),
        }
        _refuse(problems)
        return self

    def all_branches(self) -> dict[str, BranchConfig]:
        """The main branch and the others."""
        own = {name: getattr(self, name) for name in BranchConfig.model_fields}
        return {"main": BranchConfig(**own), **self.branches}


def _own_keys(keys: type[BranchKeys]) -> set[str]:
    """What a kind adds to the keys that all branches have."""
    return set(keys.model_fields) - set(BranchKeys.model_fields)


def _keys_of(kind: type[Search] | type[SequenceModel]) -> set[str]:
    return set(kind.uses) | _own_keys(kind.keys)


# Keys that only some auxiliary losses, or only some heads have.
AUXILIARY_KEYS = [
    key
    for key in _ModelKeys.model_fields
    if key not in ModelKeys.model_fields
    and any(kind is not None and key in kind.keys.model_fields for kind in AUXILIARIES.values())
]
HEAD_KEYS = [
    key for key in _ModelKeys.model_fields if key not in ModelKeys.model_fields and key not in AUXILIARY_KEYS
]
# Keys of a branch that only some kinds look at.
_KINDS: list[type[Search] | type[SequenceModel]] = [*SEARCHES.values(), *SEQUENCES.values()]
CONDITIONAL_KEYS = set[str]().union(*(_keys_of(kind) for kind in _KINDS))
CONDITIONAL_KEYS |= {"score_hidden", "temperature", "heads", "head_dim", "attention_owner"}
CONDITIONAL_KEYS |= {"time", "time_dim", "time_group", "time_tables", "score", "weights", "projection"}


def _names(table: Mapping[str, Any], fact: str, value: bool) -> str:
    """`"a", "b" or "c"`: the kinds of a table of which a fact is true or false."""
    names = [f'"{name}"' for name, kind in table.items() if getattr(kind, fact) is value]
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _refuse(problems: Mapping[str, bool]) -> None:
    """Raise for the first problem that there is; an empty one is none."""
    for problem, there in problems.items():
        if problem and there:
            raise ValueError(problem)


def _tree(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
