"""Run under torchrun: steps of small models, in several ways, in one process group; findings go to a file.

torchrun --nproc-per-node N -m tests.programs.step_cases LOG OUT.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.errors import DataError
from pipelines.console import quiet_third_parties
from pipelines.start import open_split
from tests.helpers.launching import ROOT
from trainer.assemble import ShardedModel, build_sharded, feature_rows
from trainer.data.batch_file import unpack
from trainer.data.reader import SequenceLogReader, Step
from trainer.log.schema import read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.quality.evaluate import score_split
from trainer.ranks.process_group import Ranks, gather_rows, process_group, sum_over_ranks
from trainer.run_config import Config, load_config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

SMALL = [
    "data.history_length=12", "data.batch_candidates=6", "data.requests_per_block=2", "data.prefetch=0",
    "model.k=4", "model.hidden=[8]", "train.seed=5", "train.learning_rate=0.01",
    "groups.attention.dim=8", "groups.representation.dim=8", "groups.representation.init_scale=0.7",
    "groups.attention.init=uniform",
]  # fmt: skip
CONTEXT = ['groups.user.features=["city","segments"]', "groups.user.dim=4", 'model.roles.context="user"']
# The head and the one of the auxiliary loss run twice; one task is the product of two others.
SETS = [
    "groups.representation.sets=3", "model.attention_owner=given", "model.lookup=full",
    "model.auxiliary=softmax", 'tasks.click.label="click"', 'tasks.given.label="buy"',
    'tasks.given.loss="none"', 'tasks.buy.product=["click","given"]',
]  # fmt: skip
# Gates that read a prior of candidates and of requests, over sets of which a task owns one.
PRIOR = [
    'groups.representation.sets="tasks"', 'groups.known.features=["item_id","band"]', "groups.known.dim=4",
    'groups.user.features=["city"]', "groups.user.dim=4", 'model.roles.prior="known"',
    'model.roles.prior_context="user"', "model.head=experts", "model.experts.hidden=[8]",
    "model.experts.own=1", "model.experts.foreign=stopped", "model.mixer.kind=softmax",
    "model.mixer.gate=prior",
]  # fmt: skip
# The first of two lookups needs only some of the log's features.
FEW = ['groups.attention.features=["category_id","tags"]', 'model.attend=["tags"]']
MODELS = {
    "selected": [],
    "full": ["model.lookup=full"],
    "context, few features": [*CONTEXT, *FEW, "model.auxiliary=retrieval"],
    "sets, attention of one task, product": SETS,
    "sets of tasks, prior": PRIOR,
    "auxiliary, batch norm": [
        "model.lookup=full",
        "model.auxiliary=softmax",
        "model.norm=batch",
        "data.batch_candidates=24",
    ],
}
WAYS = {"bare": ("none", False), "none": ("none", True), "sparse_dist": ("sparse_dist", True)}
NAN, LARGE = float("nan"), 1e30


@dataclass
class Job:
    """A model and what trains it."""

    config: Config
    sharded: ShardedModel
    optimizer: Any
    step: TrainStep
    pipeline: Pipeline
    reader: SequenceLogReader
    ranks: Ranks

    def train(self, steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
        """Each step and the sum of its loss over ranks."""
        for step, tally in self.pipeline.train(steps):
            yield step, float(sum_over_ranks(tally.total))

    def digests(self) -> list[str]:
        """Of all weights, buffers and optimizer states that lie on each rank."""
        sha = hashlib.sha256()
        for name, tensor in local_tensors([self.sharded.model.state_dict(), self.optimizer.state_dict()]):
            sha.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        mine = torch.tensor(list(sha.digest()), dtype=torch.uint8)[None]
        return [bytes(row.tolist()).hex() for row in gather_rows(mine)]


def local_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, ShardedTensor):
        tree = [shard.tensor for shard in tree.local_shards()]
    if isinstance(tree, dict):
        tree = sorted(tree.items(), key=lambda item: str(item[0]))
        for key, value in tree:
            yield from local_tensors(value, f"{name}.{key}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from local_tensors(value, f"{name}.{number}")
    elif isinstance(tree, Tensor):
        yield name, tree


def job(
    ranks: Ranks, log: Path, folder: Path, way: str = "none", *overrides: str, late: bool | None = None
) -> Job:
    """`late`: how the guard reads its answer, with the fused optimizer for it; None: as usual."""
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *SMALL, *overrides])
    kind, guarded = WAYS[way]
    sharded = build_sharded(config, read_manifest(log), ranks)
    optimizer = make_optimizer(sharded.model, config.train, None if late is None else True)
    guard = Guard(ranks, folder, late) if guarded else None
    step = TrainStep(config, sharded.model, optimizer, ranks.world_size, guard)
    pipeline = Pipeline(kind, sharded.model, step, ranks.device)
    reader = open_split(config, "train", feature_rows(sharded.groups), ranks, seed=3)
    return Job(config, sharded, optimizer, step, pipeline, reader, ranks)


def two_epochs(made: Job) -> dict[str, Any]:
    """Losses of an epoch and the first steps of another, an evaluation inside each, and what came of it."""
    losses, uncounted, scores, modules = [], 0, [], []
    validation = open_split(made.config, "validation", feature_rows(made.sharded.groups), made.ranks)
    for most in (None, 5):
        for number, (step, loss) in enumerate(made.train(islice(made.reader.steps(), most))):
            losses.append(loss)
            uncounted += not step.counted
            if number == 2:
                if made.pipeline.kind != "none":
                    modules = [module.forward.name for module in made.pipeline._inner._pipelined_modules]
                with made.pipeline.paused():
                    scored = score_split(made.sharded.model, validation, made.ranks.device)
                scores += scored.score.tolist()
    missing = int(sum_over_ranks(torch.tensor(uncounted)))
    return {
        "losses": losses, "scores": scores, "modules": modules,
        "uncounted": missing, "digests": made.digests(),
    }  # fmt: skip


def stopped_and_continued(made: Job) -> dict[str, Any]:
    """Stop while the pipeline has read ahead in an epoch; go on from the trained step's cursor."""
    training = made.train(made.reader.steps())
    begun = [next(training) for _ in range(3)]
    training.close()
    losses = [loss for _, loss in [*begun, *made.train(made.reader.steps(begun[-1][0].after))]]
    return {"losses": losses, "digests": made.digests()}


def nan_weight(step: Step) -> Step:
    weight = step.batch.weight.clone()
    weight[-1] = NAN
    return replace(step, batch=replace(step.batch, weight=weight))


def spoil_vectors(made: Job, by: float) -> None:
    """From now on, gradients of the late lookup on the last rank are multiplied."""
    if made.ranks.rank == made.ranks.world_size - 1:

        def spoil(_: object, __: object, vectors: dict[str, Tensor]) -> None:
            if "representation" in vectors and vectors["representation"].requires_grad:
                vectors["representation"].register_hook(lambda gradient: gradient * by)

        made.sharded.model.module.lookups.register_forward_hook(spoil)


def spoil_dense(made: Job, by: float) -> None:
    for name, weight in made.sharded.model.named_parameters():
        if name.endswith("main.sequence.time.tables.position"):
            weight.register_hook(lambda gradient: gradient * by)


def bad_step(made: Job, kind: str) -> dict[str, Any]:
    """The fourth step is not finite: what is said, and what has changed."""
    last = made.ranks.rank == made.ranks.world_size - 1
    made.step._guard.folder.mkdir(parents=True, exist_ok=True)
    steps = list(islice(made.reader.steps(), 6))
    assert all(step.counted for step in steps[:4])
    if kind == "loss" and last:
        steps[3] = nan_weight(steps[3])
    done, said, before = 0, "", []
    training = made.train(iter(steps))
    with suppress(StopIteration):
        try:
            for _ in range(3):
                next(training)
                done += 1
            before = made.digests()
            {"loss": lambda *_: None, "vectors": spoil_vectors, "dense": spoil_dense}[kind](made, NAN)
            next(training)
        except DataError as error:
            said = str(error)
    messages: list[Any] = [None] * made.ranks.world_size
    dist.all_gather_object(messages, said)
    kept = {}
    for path in sorted(made.step._guard.folder.glob("nonfinite-*")):
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        tensors["scores"] = torch.zeros(0, 1)
        batch, _ = unpack(path, tensors, (facts["features"], facts["context"]))
        kept[path.name] = {**facts, "same": same_batch(batch, steps[3].batch)}
    dist.barrier()
    return {
        "done": done, "messages": messages, "kept": kept, "before": before, "after": made.digests(),
        "sources": [[str(place.file), place.row_group] for place in steps[3].sources],
    }  # fmt: skip


def same_batch(found: Any, expected: Any) -> bool:
    pairs = [(found.features.values(), expected.features.values()), (found.labels, expected.labels)]
    pairs += [(found.weight.nan_to_num(-1), expected.weight.nan_to_num(-1))]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def gradients_of_one_step(made: Job, scale: float = 1.0) -> dict[str, Any]:
    """Dense gradients as the optimizer was given them, and the tables after it."""
    spoil_dense(made, scale)
    for step, _ in made.train(islice(made.reader.steps(), 1)):
        assert step.counted
    gradients = {
        name.split("module.")[-1]: weight.grad.double().flatten().tolist()
        for name, weight in made.sharded.model.named_parameters()
        if weight.grad is not None and "collections" not in name
    }
    tables = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in local_tensors(made.sharded.model.state_dict())
        if "collections" in name
    }
    return {"gradients": gradients, "tables": tables}


def precision(made: Job) -> dict[str, Any]:
    """Losses, and the types of what the lookups give and of the weights' gradients."""
    types: set[str] = set()
    lookups = made.sharded.model.module.lookups
    lookups.register_forward_hook(lambda _, __, found: types.update(str(v.dtype) for v in found.values()))
    losses = [loss for _, loss in made.train(made.reader.steps())]
    weights = {str(p.grad.dtype) for p in made.sharded.model.parameters() if p.grad is not None}
    return {"losses": losses, "lookups": sorted(types), "gradients": sorted(weights)}


def main() -> None:
    log, out = Path(sys.argv[1]), Path(sys.argv[2])
    quiet_third_parties()
    found: dict[str, Any] = {"ways": {}, "bad": {}}
    with process_group(60) as ranks:

        def made(name: str, *overrides: str, way: str = "none") -> Job:
            return job(ranks, log, out.parent / name, way, *overrides)

        for model, overrides in MODELS.items():
            found["ways"][model] = {way: two_epochs(made("no", *overrides, way=way)) for way in WAYS}
        found["stopped"] = {
            way: stopped_and_continued(made("no", way=way)) for way in ("none", "sparse_dist")
        }
        for kind in ("loss", "vectors", "dense"):
            for way in ("none", "sparse_dist"):
                name = f"bad-{kind}-{way}-{ranks.world_size}"
                changes = ["data.batch_candidates=24", *(["model.norm=batch"] if kind == "loss" else [])]
                found["bad"][f"{kind} {way}"] = bad_step(made(name, *changes, way=way), kind)
        even, limit = "data.batch_candidates=24", "train.max_gradient_norm=0.01"
        found["clip"] = {
            "free": gradients_of_one_step(made("no", even)),
            "clipped": gradients_of_one_step(made("no", even, limit)),
            "large": gradients_of_one_step(made("no", even, limit), LARGE),
        }
        found["precision"] = {
            kind: precision(made("no", f"train.precision={kind}")) for kind in ("fp32", "bf16")
        }
        if ranks.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
