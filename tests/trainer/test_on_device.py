"""All presets on a device that is not the CPU, as far as Python goes: see `tests.helpers.stand_in`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.fused import EmptyFusedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import DataError
from tests.helpers.launching import ROOT
from tests.helpers.logs import enrich, random_rows, write_log
from tests.helpers.models import batch_of, model_of
from tests.helpers.presets import PRESETS
from tests.helpers.stand_in import CUDA, MixedDevices, OnDevice, StandIn, moved
from tests.programs.preset_steps import SMALL, small_config
from tests.trainer.test_presets import preset_log
from trainer.config.sections import DataConfig
from trainer.data.batch import Clusters, RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.loop.pipeline import Pipeline
from trainer.model.union import most_kept
from trainer.objectives.table import RANKINGS
from trainer.quality.evaluate import _rows
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config, load_config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, run_optimizer

# Host waits of an evaluation: it ranks close scores exactly, and so asks how many of them there are.
RANKED_EXACTLY = {
    "trainer/model/retrieve/exact.py": 5,
    "trainer/model/ops/top.py": 2,
    "trainer/model/ops/whole.py": 2,
    "trainer/model/retrieve/search.py": 1,
}
# Kernels that forward pass, loss and backward pass start, look-ups in plain tables among them.
LAUNCHES = {
    "adatask": 252,
    "ame": 309,
    "best": 343,
    "crocodile": 426,
    "d_train": 282,
    "d_train_joint": 282,
    "d_train_pooled": 282,
    "dare": 223,
    "dare_paper": 293,
    "dare_pointwise": 223,
    "dare_search": 200,
    "din": 163,
    "dpe": 224,
    "dsi_tin": 359,
    "esmm": 291,
    "hstu": 332,
    "eta": 237,
    "longer": 665,
    "mmoe": 252,
    "multi_embedding": 287,
    "multi_embedding_twin": 751,
    "muse": 373,
    "pepnet": 293,
    "ple": 348,
    "sdim": 158,
    "shared_bottom": 240,
    "sim_hard": 238,
    "sim_soft": 325,
    "stca": 282,
    "stacked_tin": 283,
    "stem": 303,
    "stem_twin": 685,
    "td_sasrec": 233,
    "tdpe": 254,
    "tin": 190,
    "twin": 538,
    "twin_3e": 235,
    "twin_4e": 247,
    "twin_hard": 188,
    "twin_no_tr": 189,
    "twin_paper_dare": 194,
    "twin_proj": 250,
    "twin_v2": 564,
    "vista": 413,
}
ADVICE = "If that is meant, say in the commit why it is worth it, and set LAUNCHES in test_on_device.py to"


class Unsharded(nn.Module):
    """A model in place of a sharded one, whose tables are weights like all others."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.fused_optimizer = module, EmptyFusedOptimizer()
        self.plan = ShardingPlan({})

    def forward(self, batch: RequestBatch) -> Any:
        return self.module(batch)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preset_log(tmp_path_factory.mktemp("device") / "log")


def made(config: Config, device: torch.device) -> tuple[TrainStep, Unsharded, RequestBatch]:
    """A training step, its model, and a batch that is still on the host."""
    # Reading clusters would need a log that has some.
    data = config.data.model_copy(update={"clusters": False, "recent": 0})
    batch = batch_of(config.model_copy(update={"data": data}))
    batch = with_clusters(batch) if config.data.clusters else batch
    return *steps_of(config, model_of(config), device), batch


def steps_of(config: Config, model: nn.Module, device: torch.device) -> tuple[TrainStep, Unsharded]:
    stands_in = device.type == "cuda" and StandIn.current is not None
    whole = Unsharded(moved(model) if stands_in else model.to(device)).train()
    optimizer = run_optimizer(whole, config)  # type: ignore[arg-type]
    guard = Guard(Ranks(0, 1, 1, device), Path())
    return TrainStep(config, whole, optimizer, 1, guard), whole  # type: ignore[arg-type]


def with_clusters(batch: RequestBatch) -> RequestBatch:
    """Every other behavior stands for a cluster whose chunk ends with it."""
    place = torch.arange(batch.behaviors)
    clusters = Clusters(place % 2 * 3, batch.behavior_time, place + 1, batch.window_end)
    return replace(batch, clusters=clusters, sizes=None)


def on_device(batch: RequestBatch) -> RequestBatch:
    """The batch as TorchRec's pipelines move it, its sizes known."""
    assert batch.host_sizes
    return batch.pin_memory().to(CUDA, non_blocking=True)


def trained(step: TrainStep, batch: RequestBatch) -> Tensor:
    """One training step -> its loss."""
    step.zero_grad()
    loss, _ = step.forward(Step(batch, counted=True, after=Cursor()))
    loss.backward()
    return loss.detach()


def by_file(waits: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for line, times in waits.items():
        found[line.partition(":")[0]] += times
    return found


def too_many(
    waits: Counter[str], allowed: Mapping[str, int] = MappingProxyType({}), steps: int = 1
) -> list[str]:
    """Lines in files that have more waits than they may have."""
    files = {name for name, times in by_file(waits).items() if times > steps * allowed.get(name, 0)}
    return sorted(line for line in waits if line.partition(":")[0] in files)


def plain(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


def both(config: Config) -> tuple[list[int], StandIn, RequestBatch]:
    """A step on the CPU and one on the device, alike -> of the latter: strides of look-ups, counts, batch."""
    step, cpu, batch = made(config, torch.device("cpu"))
    expected = trained(step, batch)
    step.step()
    strides: list[int] = []
    with StandIn() as device:
        step, whole, batch = made(config, CUDA)
        for collection in whole.module.collections.values():  # type: ignore[union-attr,operator]
            collection.register_forward_pre_hook(lambda _, given: note(given[0], strides))
        batch = on_device(batch)
        device.reset()
        loss = trained(step, batch)
        device.forward_and_backward = device.launches.total()
        step.step()
    assert torch.allclose(plain(loss), expected, atol=1e-6)
    for (name, mine), theirs in zip(whole.named_parameters(), cpu.parameters(), strict=True):
        assert torch.allclose(plain(mine), theirs, atol=1e-4), name
    return strides, device, batch


def note(bags: KeyedJaggedTensor, strides: list[int]) -> None:
    # Else TorchRec would ask the device for it.
    assert bags.length_per_key_or_none() is not None
    strides.append(bags.stride())


@pytest.mark.parametrize("preset", [*PRESETS, "twin_v2"])
def test_a_step_mixes_no_devices_waits_for_nothing_and_is_that_of_the_cpu(preset: str, log: Path) -> None:
    strides, device, _ = both(small_config(preset, log))
    assert strides and not too_many(device.waits), device.waits
    found, limit = device.forward_and_backward, LAUNCHES[preset]
    assert found <= limit, f"{preset} starts {found} kernels, {limit} before. {ADVICE} {found}"


def test_a_step_moves_as_a_whole(log: Path) -> None:
    """As TorchRec's pipelines carry it, which read the ids of a later step from it."""
    with StandIn() as device:
        _, _, batch = made(small_config("dare", log), CUDA)
        step = Step(batch, counted=False, after=Cursor(0, 2, 7), last=True)
        device.reset()
        moved = step.pin_memory().to(CUDA, non_blocking=True)
        assert not device.waits and moved.batch.labels.device == CUDA
        assert moved.features is moved.batch.features and moved.context is moved.batch.context
        assert (moved.counted, moved.after, moved.last) == (False, Cursor(0, 2, 7), True)
        assert moved.batch.sizes == batch.sizes


def test_few_behaviors_are_looked_up_again_without_a_wait(log: Path) -> None:
    """Where candidates keep less than their windows: as many for each batch of these sizes, not all."""
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *SMALL, "model.k=1"])
    (first, second), device, batch = both(config)
    assert not too_many(device.waits), device.waits
    assert first == batch.behaviors + batch.candidates
    assert second == most_kept(batch.host_sizes, [(0, 1)]) + batch.candidates < first


def test_bags_of_several_ids_cost_one_wait(tmp_path: Path) -> None:
    """Of what is looked up second, the host cannot know how many ids there are."""
    log = write_log(tmp_path / "log", {"train": enrich(random_rows(3), 3)}, rich=True)
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *SMALL, "model.k=1"])
    strides, device, batch = both(config)
    assert not batch.host_sizes.one_id and strides[1] < strides[0]
    assert by_file(device.waits)["embeddings/lookup/jagged.py"] == 1
    del device.waits[next(line for line in device.waits if line.startswith("embeddings/lookup/jagged.py"))]
    assert not too_many(device.waits), device.waits


@pytest.mark.parametrize("rank", RANKINGS)
@pytest.mark.parametrize("pairs", ["step", "request", "domain"])
def test_losses_of_several_tasks_wait_for_nothing(rank: str, pairs: str, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": enrich(random_rows(3), 3)}, rich=True)
    tasks = [f"tasks.click.rank={rank}", f"tasks.click.pairs={pairs}", "tasks.buy.loss=focal"]
    few = ['groups.attention.features=["item_id"]', 'groups.representation.features=["item_id"]']
    # Sharper scores pass gradients of almost 0 to some weights, whose first step Adam takes by their sign.
    few.append("groups.attention.init=uniform")
    if pairs == "domain":
        few[1:] = ['groups.representation.features=["item_id", "category_id"]', "data.domain=category_id"]
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *SMALL, *tasks, *few])
    _, device, _ = both(config)
    assert not too_many(device.waits), device.waits


@pytest.mark.parametrize("preset", ["dare", "din", "td_sasrec", "twin_v2"])
def test_scores_of_an_evaluation_leave_the_device_by_one_wait_each(preset: str, log: Path) -> None:
    config = small_config(preset, log)
    (_, cpu, batch), found = made(config, torch.device("cpu")), []
    with torch.no_grad():
        expected = _rows(batch, cpu.eval()(batch).logits, weighted=False)
        with StandIn() as device:
            _, whole, batch = made(config, CUDA)
            batch = on_device(batch)
            device.reset()
            found = [part.cpu() for part in _rows(batch, whole.eval()(batch).logits, weighted=False)]
    assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.equal(found[1], expected[1])
    device.waits.subtract({line: 2 for line in device.waits if line.startswith("elsewhere")})
    assert not too_many(+device.waits, RANKED_EXACTLY), device.waits


def test_the_stand_in_finds_what_it_is_for() -> None:
    with StandIn() as device:
        part = torch.arange(4).pin_memory().to(CUDA, non_blocking=True)
        assert part.device == CUDA and part.is_cuda and isinstance(part + 1, OnDevice)
        assert not device.waits and device.launches.total() == 2
        waiting: list[Callable[[], Any]] = [
            lambda: int(part.sum()),
            part.tolist,
            part.cpu,
            lambda: part[part > 1],
            lambda: part[torch.tensor([1, 0])],
            lambda: torch.nonzero(part),
            lambda: torch.bincount(part),
            lambda: torch.repeat_interleave(part),
            lambda: torch.tensor([1, 2], device=CUDA),
            lambda: torch.arange(4).to(CUDA, non_blocking=True),
            lambda: torch.arange(4).pin_memory().to(CUDA),
        ]
        for number, wait in enumerate(waiting):
            wait()
            assert device.waits.total() == number + 1
        number = device.waits.total()
        # Nor does it go on where the host's memory is not pinned.
        torch.empty(4).copy_(part, non_blocking=True)
        assert device.waits.total() == number + 1
        host = torch.empty(4, pin_memory=True)
        host.copy_(part, non_blocking=True)
        other = part.to("cpu", non_blocking=True)
        early, event = torch.cuda.Event(), torch.cuda.Event()
        assert device.waits.total() == number + 1 and host.isnan().all() and other.tolist() == [1, 1, 1, 1]
        early.synchronize()
        assert host.isnan().all()
        event.record()
        assert host.isnan().all()
        event.synchronize()
        assert host.tolist() == other.tolist() == [0, 1, 2, 3] and device.waits.total() == number + 3
        with pytest.raises(MixedDevices, match=r"add at elsewhere: \[\(4,\)\]"):
            part + torch.arange(4)
        assert (part + torch.tensor(1)).tolist() == [1, 2, 3, 4]


def test_the_plain_loop_trains_on_the_device_as_on_the_cpu(log: Path) -> None:
    """Batches come pinned from the reader, are moved without a wait, and trained in their order."""
    config = small_config("dare", log)
    batches = [batch_of(config.model_copy(update={"data": part})) for part in _parts(config)]
    found = []
    for device in (torch.device("cpu"), CUDA):
        with StandIn() as counted:
            step, whole, _ = made(config, device)
            loop = Pipeline("none", whole, step, device)  # type: ignore[arg-type]
            read = (Step(batch.pin_memory(), counted=True, after=Cursor()) for batch in batches)
            losses = [plain(tally.total) for _, tally in loop.train(read)]
        found.append((losses, [plain(weight).detach() for weight in whole.parameters()]))
        # The guard reads the answer of a step in the next one, and of the last step at the end.
        late = {"trainer/ranks/host_copy.py": len(batches)}
        assert not too_many(counted.waits, late), counted.waits
    for one, other in zip(*(losses + weights for losses, weights in found), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def _parts(config: Config) -> list[DataConfig]:
    """Reading that starts with batches of other sizes."""
    return [config.data.model_copy(update={"batch_candidates": count}) for count in (48, 24, 12)]


def test_a_step_that_is_not_finite_changes_no_weight_on_the_device(log: Path, tmp_path: Path) -> None:
    config = small_config("dare", log)
    with StandIn():
        step, whole, batch = made(config, CUDA)
        step._guard = Guard(Ranks(0, 1, 1, CUDA), tmp_path)
        before = [plain(weight).clone() for weight in whole.parameters()]
        bad = replace(batch, weight=batch.weight * torch.nan)
        with pytest.raises(DataError, match=r"not finite on rank 0: the loss \(nan\)"):
            # The guard may look a step late.
            for each in (bad, bad):
                trained(step, on_device(each))
                step.step()
        for weight, old in zip(whole.parameters(), before, strict=True):
            assert torch.equal(plain(weight), old)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", [*PRESETS, "twin_v2"])
def test_a_step_on_a_gpu_is_that_of_the_cpu_and_torch_sees_no_wait(preset: str, log: Path) -> None:
    """What the stand-in says of waits, by torch's own word for them."""
    config, device = small_config(preset, log), torch.device("cuda", 0)
    step, cpu, batch = made(config, torch.device("cpu"))
    expected = trained(step, batch)
    step, whole, batch = made(config, device)
    there = batch.pin_memory().to(device, non_blocking=True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss = trained(step, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(loss.cpu(), expected, atol=1e-4)
    for (name, mine), theirs in zip(whole.named_parameters(), cpu.parameters(), strict=True):
        # Tables have none before the second backward pass.
        if theirs.grad is not None:
            assert mine.grad is not None
            assert torch.allclose(mine.grad.cpu(), theirs.grad, rtol=1e-3, atol=1e-4), name
    waits = [f"{each.filename}:{each.lineno}" for each in told if "synchronizing" in str(each.message)]
    assert not waits
