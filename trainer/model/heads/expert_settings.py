"""The settings of the head `experts`: sections [model.experts], [model.mixer] and [model.towers]."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field

from trainer.config.model import Width
from trainer.config.toml import Settings
from trainer.model.heads.head import MlpKeys
from trainer.model.heads.nets.table import EXPERTS

if TYPE_CHECKING:
    _Net: TypeAlias = str
else:
    _Net = Literal[*EXPERTS]


class ExpertsConfig(Settings):
    """The experts: networks that each read one set of the representation, and what else is known of a
    candidate."""

    net: _Net = "mlp"
    """What an expert makes of its set before its layers. `mlp` makes nothing of it. `cross` is a cross
    network (DCNv2). `fm` adds the inner products of all pairs of fields (PNN). `cin` adds the maps of a
    compressed interaction network (xDeepFM). The experts of later `layers` are always `mlp`."""
    hidden: tuple[Width, ...] = (64,)
    """The widths of an expert's layers, each a linear map and `activation`. The last one is d, the width of
    what every expert gives. Empty means that the experts pass on what they read, so that all sets must have
    one width."""
    norm: Literal["layer", "none"] = "layer"
    """The norm of what an expert reads, and of what a gate reads from sets."""
    activation: Literal["relu", "none"] = "relu"
    """What follows each linear map. With `none`, experts of `net = "mlp"` are linear, and their mean is a
    single embedding of the same total width: it is meant for controls."""
    shared: int = Field(1, ge=1, le=64)
    """The number of experts that each shared set has, and each set of a domain."""
    own: int = Field(0, ge=0, le=64)
    """The number of experts that each task has for itself: on the sets that it owns, or else on each shared
    set."""
    layers: int = Field(1, ge=1, le=16)
    """The number of stacked layers of experts. The experts of a later layer read the mixtures of the layer
    before: those of a task read the task's mixture, the shared ones read a shared mixture of all experts."""
    foreign: Literal["open", "stopped", "hidden"] = "open"
    """What a task sees of the experts of other tasks. `open` is all of it. `stopped` is their value without
    its gradient, so that no task trains what another task owns (STEM). `hidden` is nothing (PLE). With
    `stopped`, the shared mixture of stacked layers reads the experts of tasks without gradients as well."""
    covariance: float = Field(0.0, ge=0, allow_inf_nan=False)
    """The weight of the covariance loss, which makes the shared experts of the first layer differ
    (Crocodile). 0 means none."""
    covariance_over: Literal["rank", "step"] = "rank"
    """Where covariances are taken: over the candidates of each `rank`, or over those of the whole `step`, at
    the cost of an exchange."""
    covariance_rows: int = Field(0, ge=0)
    """The most candidates of a rank that take part in the covariance loss, which are its first ones. 0 means
    all."""
    field: Width = 16
    """The width of a field, for `net = "fm"` and `"cin"`. What the branches give of a set is cut into fields.
    With the width of a table as the width of a field, a field is the vector of one feature of the target, of
    the pooled behaviors, or of their product."""
    crosses: int = Field(2, ge=1, le=16)
    """The number of cross layers of `net = "cross"`."""
    maps: tuple[Width, ...] = Field((16, 16), min_length=1)
    """The number of feature maps of each layer of `net = "cin"`."""


class MixerConfig(Settings):
    """How a task's experts become one vector."""

    kind: Literal["mean", "sum", "softmax"] = "mean"
    """How the experts that a task sees are added up: by their `mean` (Multi-Embedding), their `sum`, or by
    the weights of a gate, which are a `softmax` over the experts."""
    axis: Literal["expert", "element"] = "expert"
    """With `softmax`, whether a gate has one weight for each `expert`, or one for each expert and `element`
    of its vector (Crocodile)."""
    gate: Literal["sets", "prior"] = "sets"
    """With `softmax`, what a gate reads. `sets` are the shared sets and those that the task owns: their sum
    where they have one width (STEM), side by side where they have not, and what else is known of a candidate.
    `prior` are the groups model.roles.prior and model.roles.prior_context."""
    hidden: tuple[Width, ...] = ()
    """With `softmax`, the widths of the layers of a gate. Empty means one linear map."""
    per: Literal["task", "domain"] = "task"
    """With `softmax`, whether there is one gate for each `task`, or one for each task and `domain`."""


class TowersConfig(Settings):
    """The towers, which map what the experts of a task give to its logit. model.hidden has the widths of
    their layers, and tasks.<name>.tower those of one task's."""

    per: Literal["task", "domain"] = "task"
    """Whether there is one tower for each `task`, or one for each task and `domain`."""
    gated: bool = False
    """Whether the input of each layer of a tower is scaled element by element, by a gate that reads the prior
    (PPNet)."""
    gate_inputs: bool = False
    """Whether each set is scaled element by element, by a gate that reads the prior (EPNet)."""
    gate_hidden: Width = 64
    """The width of the hidden layer of these gates."""


class ExpertsKeys(MlpKeys):
    """What a model may set besides, for the head `experts`. Its `hidden` are the widths of the towers."""

    hidden: tuple[Width, ...] = (200, 80)
    """The widths of the layers of the head `mlp`, or of each tower of the head `experts`."""
    experts: ExpertsConfig = ExpertsConfig()
    """The experts of the head `experts`, see [model.experts]."""
    mixer: MixerConfig = MixerConfig()
    """How they are mixed, see [model.mixer]."""
    towers: TowersConfig = TowersConfig()
    """The towers of the head `experts`, see [model.towers]."""


def reads_prior(model: Any) -> bool:
    """Whether any gate reads the prior."""
    of_mixer = model.mixer.kind == "softmax" and model.mixer.gate == "prior"
    return bool(of_mixer or model.towers.gated or model.towers.gate_inputs)


def _why_unread(model: Any, owners: Collection[str]) -> dict[str, str]:
    """Keys that not every net or kind reads, `section.key` -> why this model does not; empty where it does.

    A net says itself which keys it reads, see `Net.reads`.
    """
    experts, mixer, towers = model.experts, model.mixer, model.towers
    of_nets = {key for net in EXPERTS.values() for key in net.reads} - EXPERTS[experts.net].reads
    net, kind = f'model.experts.net is "{experts.net}"', f'model.mixer.kind is "{mixer.kind}"'
    shares = any(not owner.startswith("task:") for owner in owners)
    gates = towers.gated or towers.gate_inputs
    return {
        **{f"experts.{key}": net for key in of_nets},
        "experts.activation": "" if experts.hidden else "model.experts.hidden is empty",
        "experts.shared": "" if shares else "tasks own all sets",
        "experts.foreign": "" if experts.own else "model.experts.own is 0",
        **{
            f"experts.{key}": "" if experts.covariance else "model.experts.covariance is 0"
            for key in ("covariance_over", "covariance_rows")
        },
        **{
            f"mixer.{key}": "" if mixer.kind == "softmax" else kind
            for key in ("axis", "gate", "hidden", "per")
        },
        "towers.gate_hidden": "" if gates else "model.towers has no gates",
    }


def unread_keys(model: Any, owners: Collection[str]) -> Iterator[str]:
    """Keys of the three sections that were given and that nothing reads, each with its value and the reason.

    Values that contradict each other are refused before that, see `problems_of`. Where a section has every
    key, as in the config of a run folder, they were not all given by somebody: then those count that differ
    from their default.
    """
    for key, why in _why_unread(model, owners).items():
        name, _, field = key.partition(".")
        section, fields = getattr(model, name), type(getattr(model, name)).model_fields
        whole = section.model_fields_set == set(fields)
        value = getattr(section, field)
        if why and field in section.model_fields_set and not (whole and value == fields[field].default):
            shown = json.dumps(value)
            yield f"model.{key} = {shown} ({why})"


def problems_of(model: Any) -> Iterator[str]:
    """What contradicts itself in the settings of a model with the head `experts`."""
    experts, mixer, towers = model.experts, model.mixer, model.towers
    if model.norm != "layer":
        yield f'norm = "{model.norm}" goes with head = "mlp"; head = "experts" has experts.norm'
    if not experts.hidden and (experts.net != "mlp" or experts.layers > 1):
        yield (
            "experts.hidden = [] passes on what an expert reads: it goes with one layer of experts.net = "
            '"mlp"'
        )
    if experts.foreign != "open" and not experts.own:
        yield f'experts.foreign = "{experts.foreign}" is about experts of tasks: set experts.own as well'
    if not experts.covariance:
        for key in ("covariance_over", "covariance_rows"):
            if getattr(experts, key) != ExpertsConfig.model_fields[key].default:
                yield f"experts.{key} is only used by the covariance loss: set experts.covariance as well"
    if mixer.kind != "softmax":
        for key in ("axis", "gate", "hidden", "per"):
            if getattr(mixer, key) != MixerConfig.model_fields[key].default:
                yield f'mixer.{key} is about gates, and mixer.kind = "{mixer.kind}" has none; set "softmax"'
    if not (model.roles.prior or model.roles.prior_context):
        reader = 'mixer.gate = "prior"' if mixer.gate == "prior" else ""
        reader = reader or ("towers.gated = true" if towers.gated else "towers.gate_inputs = true")
        if reads_prior(model):
            yield f"{reader} needs a group that is the prior: set roles.prior or roles.prior_context"
