"""Planted logs: reproducible, readable, and labelled by draws from the truth they carry."""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.planted.recall import worth
from embeddings.errors import DataError
from launch.cli import main
from pipelines.synth import fields, orders, relevance, temporal
from pipelines.synth.kinds import KINDS
from pipelines.synth.log import Ints, PlantedLog
from pipelines.synth.synth import TRUTH, synth
from trainer.analysis.search.kept import kept_places, measure
from trainer.config.sections import DataConfig, SearchConfig
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.model.time import age_bucket
from trainer.quality.metrics import logloss
from trainer.quality.ranking import auc

USERS = {
    "relevance": 60,
    "xor": 300,
    "profiles": 300,
    "interference": 200,
    "decoupled": 200,
    "far": 100,
    "pair": 300,
    "opposite": 300,
    "agree": 150,
    "domains": 150,
    "signs": 150,
    "funnel": 150,
    "helper": 150,
    "sparse_25": 150,
    "sparse_5": 150,
    "sparse_1": 300,
    "collapse": 150,
    "flip": 150,
    "digits": 150,
    "digits_number": 150,
    "similar": 150,
    "uncertain": 300,
}
# Where the oracle of a draw of this size may lie: the value of a large draw, give or take three deviations.
ORACLE = {
    "relevance": (0.95, 0.99),
    "xor": (0.78, 0.86),
    "profiles": (0.83, 0.92),
    "interference": (0.79, 0.89),
    "decoupled": (0.78, 0.90),
    "far": (0.78, 0.90),
    "pair": (0.87, 0.95),
    "opposite": (0.82, 0.93),
    "agree": (0.81, 0.92),
    "domains": (0.81, 0.92),
    "signs": (0.81, 0.92),
    "funnel": (0.80, 0.93),
    "helper": (0.81, 0.92),
    "sparse_25": (0.80, 0.93),
    "sparse_5": (0.81, 0.96),
    "sparse_1": (0.78, 0.99),
    "collapse": (0.84, 0.94),
    "flip": (0.71, 0.85),
    "digits": (0.87, 0.95),
    "digits_number": (0.87, 0.95),
    "similar": (0.79, 0.89),
    "uncertain": (0.77, 0.88),
}
# Of what the kinds of one task were when others came: a seed must go on giving the same log.
DIGESTS = {
    "relevance": "1f7523c73b4f686a",
    "xor": "3842bb53aef3c9cb",
    "profiles": "bc60fd9f45ca1f9b",
    "interference": "f6f16ff32b428606",
    "decoupled": "75b02bbea2b2dd8a",
    "far": "135cfac9373a66a8",
    "pair": "f91b6e342ecf8cb1",
    "opposite": "d3a94f8f7687c400",
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("planted")
    for kind, users in USERS.items():
        synth(root / kind, kind, 3, users)
    return {kind: root / kind for kind in USERS}


def reader(log: Path, split: str = "train", length: int = 500) -> SequenceLogReader:
    return SequenceLogReader(DataConfig(log=log, history_length=length, prefetch=0, workers=0), split, None)


def truth_by_key(log: Path, split: str, column: str = "probability") -> dict[tuple[int, int, int], float]:
    rows = [row for row in pq.read_table(log / TRUTH).to_pylist() if row["split"] == split]
    return {(row["user_id"], row["request_id"], row["candidate"]): row[column] for row in rows}


def test_every_kind_is_tested() -> None:
    assert set(USERS) == set(KINDS) == set(ORACLE)


def digest(log: PlantedLog) -> str:
    """Of every number of the log and its truth, whatever the files look like."""
    hashed = hashlib.sha256()
    for split, part in log.splits.items():
        for table in (pa.Table.from_batches([part.rows()]), part.truth(split)):
            for name, chunks in zip(table.column_names, table.columns, strict=True):
                column = chunks.combine_chunks()
                while pa.types.is_list(column.type):
                    column = column.flatten()
                values = column.to_numpy(zero_copy_only=False)
                hashed.update(name.encode())
                hashed.update("".join(values).encode() if values.dtype == object else values.tobytes())
    return hashed.hexdigest()[:16]


@pytest.mark.parametrize("kind", DIGESTS)
def test_a_seed_gives_the_log_that_it_always_gave(kind: str) -> None:
    assert digest(KINDS[kind].generate(3, 12)) == DIGESTS[kind]


@pytest.mark.parametrize("kind", ["relevance", "decoupled", "funnel"])
def test_a_seed_decides_every_byte(tmp_path: Path, kind: str) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synth(tmp_path / name, kind, seed, 8)
        found = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        files.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in found})
    same, again, other = files
    assert same == again and len(same) == 6 + len(read_manifest(tmp_path / "a").features)
    assert same.keys() == other.keys()
    assert [name for name in same if same[name] == other[name]] == []


@pytest.mark.parametrize("kind", USERS)
def test_the_log_passes_the_readers_checks_and_labels_are_draws_of_the_truth(
    logs: dict[str, Path], kind: str
) -> None:
    """Every candidate has one truth; within each fifth of probability, labels occur as often as it says."""
    log, manifest = logs[kind], read_manifest(logs[kind])
    several = len(manifest.tasks) > 1
    for (split, info), (t, task) in product(manifest.splits.items(), enumerate(manifest.tasks)):
        truth = truth_by_key(log, split, f"probability_{task}" if several else "probability")
        assert len(truth) == info.candidates > 0
        labels, probability = [], []
        for step in reader(log, split).steps():
            batch, place = step.batch, 0
            for c, request in enumerate(batch.candidate_request.tolist()):
                place = place + 1 if c and request == int(batch.candidate_request[c - 1]) else 0
                key = (int(batch.user_id[request]), int(batch.request_id[request]), place)
                probability.append(truth.pop(key))
                labels.append(float(batch.labels[c, t]))
        assert not truth
        seen = ~np.isnan(labels)
        assert seen.all() == (task not in manifest.partial)
        y, p = np.array(labels)[seen], np.array(probability)[seen]
        for part in np.array_split(np.argsort(p), 5):
            deviation = np.sqrt((p[part] * (1 - p[part])).sum())
            assert abs(y[part].sum() - p[part].sum()) < 4 * deviation
        reported = [manifest.report["oracles"][split][task]] if several else []
        for oracle in [*reported, *([manifest.report["oracle"][split]] if t == 0 else [])]:
            assert oracle["logloss"] == pytest.approx(logloss(p, y))
            assert oracle["auc"] == pytest.approx(auc(p, y))


@pytest.mark.parametrize("kind", USERS)
def test_the_oracle_is_where_it_should_be_and_beats_a_permuted_one(logs: dict[str, Path], kind: str) -> None:
    low, high = ORACLE[kind]
    oracle = read_manifest(logs[kind]).report["oracle"]["train"]
    assert low < oracle["auc"] < high
    part = KINDS[kind].generate(3, USERS[kind]).splits["train"]
    p, y = part.probability.reshape(-1), part.labels["click"].reshape(-1).astype(np.float64)
    assert auc(p, y) == pytest.approx(oracle["auc"])
    permuted = np.random.default_rng(0).permutation(p)
    assert abs(auc(permuted, y) - 0.5) < 0.1
    assert logloss(permuted, y) > 1.2 * logloss(p, y)


def test_truth_is_what_the_equation_of_relevance_says() -> None:
    """z by plain loops over the definition, up to the constant b, for a few candidates of every split."""
    log, shared = relevance.generate(5, 3), relevance.world(5)
    biases = []
    for part in log.splits.values():
        for user, request, place in ((0, 0, 0), (1, 0, 2), (2, part.history_end.shape[1] - 1, 1)):
            item = part.candidates["item_id"][user, request, place]
            z = shared.quality[item]
            wanted = shared.category[item]
            end = part.history_end[user, request]
            for rank, held in enumerate(part.history["category_id"][user, end - 200 : end][::-1], start=1):
                weight = 1.0 if held == wanted else 0.5 if held == shared.partner[wanted] else 0.0
                z += 3 * weight * np.exp(-(rank - 1) / 25)
            p = part.probability[user, request, place]
            biases.append(np.log(p / (1 - p)) - z)
    assert np.ptp(biases) < 1e-6
    assert np.mean([part.probability.mean() for part in log.splits.values()]) == pytest.approx(1 / 3, abs=0.1)


def test_relevance_has_the_layout_of_the_published_log() -> None:
    log = relevance.generate(5, 40)
    assert dict(log.features) == {"item_id": 50_001, "category_id": 501}
    ends = {split: part.history_end[0].tolist() for split, part in log.splits.items()}
    length = 293  # events of a user
    assert ends["train"] == [length - distance for distance in range(93, 2, -5)]
    assert (ends["validation"], ends["test"]) == ([length - 2], [length - 1])
    assert log.splits["train"].probability.shape == (40, 19, 3)
    shared = relevance.world(5)
    assert sorted(shared.partner[1:]) == list(range(1, 501))
    for part in log.splits.values():
        assert (part.history["category_id"] == shared.category[part.history["item_id"]]).all()


def bucket(age: Ints) -> Ints:
    return np.asarray(age_bucket(torch.from_numpy(age)).numpy())


def ages(log: PlantedLog, split: str = "train") -> Ints:
    part = log.splits[split]
    return part.request_time - part.history_time


def test_gap_buckets_are_the_models_age_buckets() -> None:
    age = ages(temporal.xor(4, 300))
    assert (bucket(age) - temporal.FIRST_BUCKET == temporal.gap_of(age)).all()
    assert np.bincount(temporal.gap_of(age).reshape(-1)).min() > 0.8 * age.size / 12
    buckets = np.arange(10, 60)  # the first ones hold less than one whole second
    edges = temporal.bucket_start(buckets)
    assert (bucket(edges) == buckets).all()
    assert (bucket(edges - 1) == buckets - 1).all()


def test_no_age_bucket_holds_both_sides_of_far() -> None:
    age = ages(temporal.far(4, 30))
    old = age > 14 * 86_400
    assert (old.sum(axis=1) == temporal.OLD).all()
    assert not set(bucket(age[old])) & set(bucket(age[~old]))


def test_interference_depends_on_the_category_alone() -> None:
    part = fields.interference(4, 300).splits["train"]
    same = part.history["category_id"][:, None, None, :] == part.candidates["category_id"][..., None]
    count = same.sum(axis=-1)
    for n in range(5):
        assert np.ptp(part.probability[count == n]) == 0
    assert np.ptp(part.probability) > 0.5


def test_in_decoupled_the_category_selects_and_the_brand_speaks() -> None:
    part, classes = fields.decoupled(4, 400).splits["train"], fields.brand_classes(4)
    assert classes[1:].sum() == 0
    held, wanted = part.history, {name: ids[..., None] for name, ids in part.candidates.items()}
    relevant = held["category_id"][:, None, None] == wanted["category_id"]
    said = (relevant * classes[held["brand_id"]][:, None, None]).sum(axis=-1)
    p = part.probability
    assert p[said < 0].max() < p[said == 0].min() == p[said == 0].max() < p[said > 0].min()
    # The candidate's brand is one that the user has elsewhere, and its class says nothing of the label.
    like = held["brand_id"][:, None, None] == wanted["brand_id"]
    assert like[relevant].mean() < 0.5 * like[~relevant].mean()
    own = classes[part.candidates["brand_id"]]
    assert abs(p[own > 0].mean() - p[own < 0].mean()) < 4 * p.std() / np.sqrt(p.size / 2)


def test_a_pair_says_what_neither_of_its_behaviors_says() -> None:
    """Labels follow the product of two signs; either sign alone, and the category, leaves them even."""
    part = orders.pair(4, 600).splits["train"]
    held, p = part.history, part.probability[:, 0]
    found = np.zeros((*p.shape, 2))
    for user, place in np.ndindex(p.shape):
        for side in (0, 1):
            kinds = held["kind_id"][user][
                (held["category_id"][user] == part.candidates["category_id"][user, 0, place])
                & np.isin(held["kind_id"][user], (1 + 2 * side, 2 + 2 * side))
            ]
            assert len(set(kinds.tolist())) <= 1
            found[user, place, side] = 0 if kinds.size == 0 else (-1, 1)[int(kinds[0]) - 1 - 2 * side]
    x, y = found[..., 0], found[..., 1]
    assert p == pytest.approx(1 / (1 + np.exp(-2.5 * x * y)))
    assert set(part.candidates["kind_id"].reshape(-1).tolist()) == {orders.NO_KIND}
    for alone in (x, y):
        assert abs(p[alone > 0].mean() - p[alone < 0].mean()) < 4 * p.std() / np.sqrt(p.size / 4)


def test_opposite_goals_prefer_opposite_ends_of_the_history() -> None:
    part = orders.opposite(4, 300).splits["train"]
    held, wanted = part.history["category_id"], part.candidates["category_id"][:, 0]
    goal, p = part.candidates["goal_id"][:, 0], part.probability[:, 0]
    same = held[:, None] == wanted[..., None]
    newer = np.arange(orders.OPPOSITE_BEHAVIORS)[::-1]
    between = np.where(goal[..., None] == 1, newer, newer[::-1])
    x = (same * np.exp(-between / 10)).sum(axis=2)
    assert p == pytest.approx(1 / (1 + np.exp(2.5 - 5 * (1 - np.exp(-x)))))
    newest, oldest = same[..., -10:].sum(axis=2) > 1, same[..., :10].sum(axis=2) > 1
    assert p[newest & ~oldest & (goal == 1)].mean() > 0.3 + p[newest & ~oldest & (goal == 2)].mean()
    assert p[oldest & ~newest & (goal == 2)].mean() > 0.3 + p[oldest & ~newest & (goal == 1)].mean()
    assert (part.history["whole_id"] == 1).all() and (part.candidates["whole_id"] == 1).all()


def test_recall_counts_what_a_search_keeps(logs: dict[str, Path]) -> None:
    """A search that knows the truth keeps everything, the newest K what the table says, nothing nothing."""
    step = next(iter(reader(logs["relevance"], "test", 200).steps()))
    batch, kind, k = step.batch, KINDS["relevance"], 20
    weight = np.abs(worth(batch, kind, 3))
    end = batch.window_end[batch.candidate_request].numpy()[:, None]
    some = np.ones((batch.candidates, k), dtype=bool)

    def found(places: Ints) -> tuple[float, float, float]:
        kept = kept_places(batch, end - 1 - places, some, weight.shape)
        result = measure([(weight, kept)])
        return result.share, result.share_newest, result.recall

    best, newest, recall = found(np.argsort(-weight, axis=1)[:, :k])
    assert best > 0.97 and recall == 1.0
    first = found(np.broadcast_to(np.arange(k), some.shape))
    assert first[0] == pytest.approx(newest) == pytest.approx(first[1])
    assert 0.3 < newest < 0.6
    worst = found(np.argsort(weight, axis=1, kind="stable")[:, :k])
    assert worst[0] == 0.0


def test_worth_of_a_batch_is_that_of_the_generator(logs: dict[str, Path]) -> None:
    """From the batch's jagged windows back to the probabilities of the log."""
    truth = truth_by_key(logs["xor"], "test")
    for step in reader(logs["xor"], "test", 60).steps():
        x = worth(step.batch, KINDS["xor"], 3).sum(axis=1)
        p = 1 / (1 + np.exp(-(1.2 * x - 0.5)))
        users = step.batch.user_id[step.batch.candidate_request].tolist()
        expected = [truth[user, 1, c % temporal.CANDIDATES] for c, user in enumerate(users)]
        assert p == pytest.approx(expected)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synth", "--out", str(tmp_path / "log"), "--kind", "xor", "--users", "12"]
    assert main(words) == 0
    assert "oracle on" in capsys.readouterr().out
    assert main(words) == 2
    assert "already" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--seed", "9"]) == 0
    assert read_manifest(tmp_path / "log").ingest["synth"]["seed"] == 9
    capsys.readouterr()
    assert main(["synth", "--out", str(tmp_path / "other"), "--kind", "relevence"]) == 2
    assert "did you mean 'relevance'?" in capsys.readouterr().err


def test_a_folder_that_is_no_log_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not a sequence log"):
        synth(tmp_path, "xor", 1, 5, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_recall_behind_a_hard_search_counts_the_whole_window(logs: dict[str, Path]) -> None:
    """Places come from the search's ranks: what it keeps of a category are that category's newest."""
    log, budget = logs["xor"], 2
    search = SearchConfig(levels=("category_id",), budget=budget)
    config = DataConfig(log=log, history_length=60, prefetch=0, workers=0, search=search)
    searched = next(iter(SequenceLogReader(config, "test", None).steps())).batch
    complete = next(iter(reader(log, "test", 60).steps())).batch
    assert searched.retrieval is not None
    index, same = searched.retrieval.index.numpy(), np.zeros((searched.candidates, 60), dtype=bool)
    request = complete.candidate_request
    ids = complete.features["category_id"].values()
    for c in range(complete.candidates):
        window = ids[complete.window_start[request[c]] : complete.window_end[request[c]]].flip(0)
        same[c] = (window == ids[complete.behaviors + c]).numpy()
    expected = same & (same.cumsum(axis=1) <= budget)
    assert (kept_places(searched, index, index >= 0, same.shape) == expected).all()
    assert 0 < expected.sum() < same.sum()
