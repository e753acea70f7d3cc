"""Kinds of groups, what their tables may be, and what is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import ConfigError
from embeddings.first_rows import FirstWeights
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection, weight_name
from embeddings.lookup.jagged import one_id_bags
from embeddings.lookup.rounding import Comms, codecs_of
from embeddings.lookup.sharded import with_empty_bags
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.optimizers import ROW_OPTIMIZERS, FusedOptimizer
from embeddings.plan.planner import make_plan
from embeddings.plan.request import PlanRequest
from tests.helpers.launching import tandemrec, train
from tests.helpers.logs import FEATURES, Shape, enrich, random_rows, small_log, write_log
from tests.helpers.tables import whole_tensor
from trainer.assemble import cluster_of, resolve_groups
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
ROWS = {"item": 9, "shop": 4}
EMPTY = KeyedJaggedTensor(["a", "b"], torch.tensor([5, 6, 7]), lengths=torch.tensor([2, 0, 0, 1]), stride=2)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


class Lookup(nn.Module):
    def __init__(self, group: TableGroup) -> None:
        super().__init__()
        collection = make_collection(group, torch.device("meta"))
        attach_optimizer(collection, group.optimizer)
        self.collections = nn.ModuleDict({group.name: collection})

    def forward(self, bags: KeyedJaggedTensor) -> Tensor:
        (collection,) = self.collections.values()
        vectors: Tensor = collection(bags).values()
        return vectors


def sharded(group: TableGroup, ranks: Ranks) -> DistributedModelParallel:
    model = Lookup(group)
    plan = make_plan(PlanRequest(model, (group,), cluster_of(ranks))).plan
    return shard(model, {group.name: group}, plan, ranks.device, seed=3)


def group_of(kind: str, optimizer: str = "rowwise_adagrad") -> TableGroup:
    tables = tuple(TableSpec(feature, rows, 8) for feature, rows in ROWS.items())
    # With a small eps a gradient that cancels out but for rounding would still make a whole step.
    fused = FusedOptimizer(optimizer, 0.1, eps=0.1)
    return TableGroup("g", tables, fused, FirstWeights(scale=1.0), kind=kind)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.tuples(*(st.integers(0, rows - 1) for rows in ROWS.values())), min_size=1, max_size=30),
    optimizer=st.sampled_from([*ROW_OPTIMIZERS]),
    seed=st.integers(0, 99),
)
def test_bags_and_sequences_are_one_on_single_ids(
    ranks: Ranks, ids: list[tuple[int, ...]], optimizer: str, seed: int
) -> None:
    """Same vectors to the bit; same rows after an update but for the order in which repeated ids add up."""
    bags = one_id_bags(list(ROWS), torch.tensor(ids).T.contiguous())
    weigh = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(seed))
    found = {}
    for kind in ("bag", "sequence"):
        group = group_of(kind, optimizer)
        model = sharded(group, ranks)
        vectors = model(bags)
        (vectors * weigh).sum().backward()
        state = model.state_dict()
        rows = [whole_tensor(state[f"collections.g.{weight_name(group, table)}"]) for table in group.tables]
        found[kind] = (vectors.detach(), *rows)
    assert torch.equal(found["bag"][0], found["sequence"][0])
    for bag, sequence in zip(found["bag"][1:], found["sequence"][1:], strict=True):
        assert torch.allclose(bag, sequence, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, sharding", [("bag", "row_wise"), ("bag", "data_parallel"), ("sequence", "row_wise")]
)
@pytest.mark.parametrize("optimizer", [*ROW_OPTIMIZERS])
def test_a_gradient_of_zero_leaves_a_row_as_it_is(
    ranks: Ranks, kind: str, optimizer: str, sharding: str
) -> None:
    """Whatever fills up a look-up trains nothing, from the first step on and with state from earlier ones."""
    group = replace(group_of(kind, optimizer), sharding=(sharding,))
    models = [sharded(group, ranks) for _ in range(2)]
    weigh = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor([[1, 7, 2, 3, 1], [0, 1, 0, 1, 2]])
    others = torch.tensor([[4, 5, 7], [3, 2, 1]])
    for bags in (wanted[:, :2], wanted, wanted[:, 2:]):
        count = bags.shape[1]
        (models[0](one_id_bags(list(ROWS), bags)) * weigh[:count]).sum().backward()
        filled = models[1](one_id_bags(list(ROWS), torch.cat([bags, others], 1)))
        (filled[:count] * weigh[:count]).sum().backward()
        for model in models:
            model.fused_optimizer.step()
    one, other = (model.state_dict() for model in models)
    for name, weight in one.items():
        assert torch.equal(whole_tensor(weight), whole_tensor(other[name])), name


@pytest.mark.filterwarnings("ignore:Please use DTensor")
@pytest.mark.parametrize("optimizer", [*ROW_OPTIMIZERS])
def test_state_of_data_parallel_tables_fits_sharded_ones(
    ranks: Ranks, tmp_path: Path, optimizer: str
) -> None:
    """A checkpoint of the one continues as the other: names, sizes, and the rows that a step then gives."""
    bags = one_id_bags(list(ROWS), torch.tensor([[1, 8, 1], [0, 3, 2]]))
    group = replace(group_of("bag", optimizer), sharding=("data_parallel",))
    whole = sharded(group, ranks)
    other = sharded(replace(group, sharding=("row_wise",)), ranks)
    # Nothing is left to Adam of the dense weights, which would train such a table a second time.
    assert not dict(in_backward_optimizer_filter(whole.named_parameters()))
    step(whole, bags)
    dcp.save(state_of(whole), checkpoint_id=tmp_path)
    state = state_of(other)
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["model"])
    other.fused_optimizer.load_state_dict(state["optim"])
    for model in (whole, other):
        step(model, bags)
    expected = other.state_dict()
    for name, rows in whole.state_dict().items():
        assert torch.allclose(rows, whole_tensor(expected[name]), rtol=0, atol=1e-6)
    rule = ROW_OPTIMIZERS[optimizer]
    assert rule.state_reshards("data_parallel", "row_wise")
    assert rule.state_reshards("row_wise", "column_wise") == (optimizer != "rowwise_adagrad")


def step(model: DistributedModelParallel, bags: KeyedJaggedTensor) -> None:
    model(bags).square().sum().backward()
    model.fused_optimizer.step()


def state_of(model: DistributedModelParallel) -> dict[str, dict[str, object]]:
    return {"model": model.state_dict(), "optim": model.fused_optimizer.state_dict()}


def test_unsharded_collections_give_float32_for_either_kind_and_dtype() -> None:
    bags = one_id_bags(list(ROWS), torch.tensor([[1, 8, 1], [0, 3, 2]]))
    for kind in ("bag", "sequence"):
        for dtype in ("fp32", "fp16"):
            found = make_collection(replace(group_of(kind), dtype=dtype), torch.device("cpu"))(bags)
            assert found.keys() == list(ROWS) and found.values().dtype == torch.float32
            assert found.values().shape == (3, 16)


def test_empty_bags_follow_those_that_are_there() -> None:
    longer = with_empty_bags(EMPTY, 4)
    assert longer.stride() == 4 and longer.lengths().tolist() == [2, 0, 0, 0, 0, 1, 0, 0]
    assert longer.values() is EMPTY.values() and with_empty_bags(EMPTY, 2) is EMPTY


@pytest.mark.parametrize(("kind", "bits"), [("fp16", 11), ("bf16", 8)])
def test_small_gradients_keep_their_bits_while_they_travel(kind: str, bits: int) -> None:
    """Of a mean over 10,000 candidates, say; plain fp16 has nothing left of them."""
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)).sign() * torch.logspace(
        -7, 0, 1000
    )
    codecs = codecs_of(Comms("fp32", kind))
    assert codecs is not None and codecs_of(Comms()) is None
    for codec in codecs.values():
        travelled = codec.backward.encode(gradient)
        assert travelled.element_size() == 2
        error = (codec.backward.decode(travelled) - gradient).abs() / gradient.abs()
        assert 0 < float(error.max()) <= 2.0**-bits


def test_two_ranks_equal_one_row_wise_and_their_run_exports(tmp_path: Path) -> None:
    """fp16 sequences and bags with a selected second lookup, ragged; a large eps against rounding."""
    log, run = small_log(tmp_path / "log", seed=2, users=30), tmp_path / "two"
    settings = {
        "train__max_steps": 8,
        "model__lookup": "selected",
        "groups__attention__kind": "sequence",
        "groups__attention__dtype": "fp16",
        "groups__attention__eps": 1e-2,
        "groups__representation__eps": 1e-2,
    }
    spread = {f"groups__{group}__sharding": ["row_wise"] for group in ("attention", "representation")}
    one = train(log, tmp_path / "one", **settings)
    two = train(log, run, ranks=2, **settings, **spread)
    assert len(one) == 8 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    done = tandemrec("export", "--run", str(run), "--out", str(tmp_path / "snapshot"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads(next((tmp_path / "snapshot").glob("v*/manifest.json")).read_text())
    assert manifest["config"]["groups"]["attention"]["dtype"] == "fp16"
    assert {table["dtype"] for table in manifest["groups"]["representation"]} == {"fp32"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["groups.attention.weight_decay=0.1"], "weight_decay is no option of a table: the CPU kernels"),
        (["groups.attention.momentum=0.9"], "momentum is no option of a table"),
        (["groups.attention.dtype=bf16"], 'dtype = "bf16" has no lookup kernel on CPU'),
        (
            ["groups.attention.kind=sequence", 'groups.attention.sharding=["grid_shard"]'],
            'sharding "grid_shard" is for kind = "bag"',
        ),
        (
            ["groups.attention.kind=sequence", 'groups.attention.sharding=["data_parallel"]'],
            "the dense kernel mixes up features",
        ),
        (
            ["groups.attention.kind=sequence", "groups.attention.dim={item_id = 8, category_id = 4}"],
            'kind = "sequence" needs one dim',
        ),
        (
            ["groups.attention.max_gradient=1", 'groups.attention.sharding=["data_parallel"]'],
            "max_gradient bounds the gradient of each bag",
        ),
        (["comms.forward=int8"], "comms.forward"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "dare.toml", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("feature", "reason"), [("tags", "any number of ids"), ("action", "none on one side")]
)
def test_sequences_refuse_bags_that_need_not_hold_one_id(tmp_path: Path, feature: str, reason: str) -> None:
    rows = enrich(random_rows(5, Shape(users=4)), seed=1)
    log = write_log(tmp_path / "log", {"train": rows}, rich=True)
    wanted = [*FEATURES, feature]
    words = [f"data.log={log}", "groups.attention.kind=sequence", f"groups.attention.features={wanted}"]
    config = load_config(CONFIGS / "dare.toml", words)
    with pytest.raises(ConfigError, match=f"feature '{feature}' has {reason}"):
        resolve_groups(config, read_manifest(log))
    fine = load_config(CONFIGS / "dare.toml", [*words, f"groups.attention.features={list(FEATURES)}"])
    assert isinstance(fine, Config)
    assert resolve_groups(fine, read_manifest(log))["attention"].kind == "sequence"
