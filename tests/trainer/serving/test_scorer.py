"""A request becomes the batch that the reader would have made of it, and scores like it, for every preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from embeddings.errors import ConfigError
from tests.helpers.logs import Row, Shape, enrich, random_rows, write_log
from tests.helpers.models import GROUPS, MARK_ROWS, draw, drawing, drawn_vectors, drawn_windows, preset
from tests.helpers.presets import PRESETS
from tests.helpers.serving import bodies, model_body, reference, rows_of, snapshot_of, stream
from trainer.data.reader import SequenceLogReader
from trainer.log.clusters import ClusterInfo, cluster_history
from trainer.log.schema import FeatureInfo, read_manifest
from trainer.log.writer import write_manifest
from trainer.model.retrieve.dot import DotSearch, SoftSearch
from trainer.model.retrieve.hard import HardSearch
from trainer.model.retrieve.score import DotScorer, MlpScorer, Scorer
from trainer.model.retrieve.search import Query, Search
from trainer.model.retrieve.simhash import HammingSearch
from trainer.model.time import TimeBias, TimeEncoding
from trainer.run_config import Config
from trainer.serving.arrow_body import read_arrow, write_arrow
from trainer.serving.checks import cut_history
from trainer.serving.json_body import JsonForm
from trainer.serving.request import Limits, Request
from trainer.serving.scorer import Scorer as Serving
from trainer.serving.window_search import per_window

TAXONOMY = {"department_id": 3, "type_id": 9}


def taxonomy_rows(users: int = 10) -> list[Row]:
    rows = enrich(random_rows(4, Shape(users=users)), 5)
    for row in rows:
        for feature, divisor in (("department_id", 3), ("type_id", 1)):
            row[f"history_{feature}"] = [i // divisor for i in row["history_category_id"]]
            row[f"candidate_{feature}"] = [
                [i // divisor for i in ids] for ids in row["candidate_category_id"]
            ]
    return rows


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything a log may have, with the taxonomy of the demo log."""
    path = tmp_path_factory.mktemp("serving") / "log"
    return write_log(path, {"train": taxonomy_rows()}, rich=True, more=TAXONOMY)


def asked(serving: Serving, config: Config, rows: list[Row]) -> Iterator[tuple[tuple[int, int], Request]]:
    for name, body in bodies(read_manifest(config.data.log), rows):
        yield name, JsonForm(model_body(body), serving.needs, None, "requests[0]").request({}, Limits())


def compare(config: Config, rows: list[Row], chunk: int = 0) -> None:
    """Scores of the reader's batches, of all requests in one call, and of each alone.

    A request is scored as it came or cut to what the model reads: together both, alone in turn.
    """
    snapshot = snapshot_of(config)
    expected = reference(snapshot)
    serving = Serving(snapshot, chunk)
    named = dict(asked(serving, config, rows))
    whole = list(named.values())
    cut = [cut_history(request, serving.needs) for request in whole]
    assert len(named) == len(expected) > 20 and named.keys() == expected.keys()
    alone = [serving.score([(whole, cut)[n % 2][n]])[0][0] for n in range(len(named))]
    for answers in (serving.score(whole)[0], serving.score(cut)[0], alone):
        for (name, scores), found in zip(((name, expected[name]) for name in named), answers, strict=True):
            assert found.probabilities.shape == scores.shape
            assert np.abs(found.probabilities - scores).max() <= 1e-6, name
    assert np.std(np.concatenate(list(expected.values()))) > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_scores_as_in_evaluation(name: str, log: Path) -> None:
    compare(preset(name, log), taxonomy_rows())


def test_an_ingestion_delay_hides_the_newest_behaviors(log: Path) -> None:
    config = preset("dare", log, "data.ingestion_delay=9")
    compare(config, taxonomy_rows())


def test_clusters_of_a_clustered_log(tmp_path: Path) -> None:
    """TWIN-V2: clusters travel with the history; without their chunk the snapshot is refused at the start."""
    rows = random_rows(6, Shape(users=8, behaviors=90))
    rng = np.random.default_rng(1)
    for row in rows:
        n, times = row["num_behaviors"], np.array(row["history_timestamp"])
        info = ClusterInfo(chunk=9, cap=3)
        found = cluster_history(rng.normal(size=(n, 4)).astype(np.float32), np.zeros(n), times, info)
        row |= {"cluster_size": found.size.tolist(), "cluster_time": found.time.tolist()}
    path = clustered(tmp_path / "log", rows)
    config = preset("twin_v2", path, "data.recent=4", "model.branches.recent.k=4")
    compare(config, rows, chunk=9)
    with pytest.raises(ConfigError, match="its model searches clusters, which are made offline; give --hist"):
        Serving(snapshot_of(config))


def clustered(path: Path, rows: list[Row]) -> Path:
    import pyarrow as pa

    from trainer.log.schema import schema_of
    from trainer.log.writer import write_split

    write_log(path, {"train": rows})
    manifest = read_manifest(path).model_copy(update={"clusters": ClusterInfo(chunk=9, cap=3)})
    schema = schema_of(manifest)
    batches = pa.Table.from_pylist(rows, schema=schema).to_batches()
    (path / "train").rename(path / "old")
    info = write_split(batches, path, "train", schema, (3, 6))
    write_manifest(path, manifest.model_copy(update={"splits": {"train": info}}))
    return path


def test_arrow_and_json_are_the_same_request(log: Path) -> None:
    import pyarrow as pa

    snapshot = snapshot_of(preset("dare", log))
    serving = Serving(snapshot)
    named = list(asked(serving, snapshot.manifest.config, taxonomy_rows()))[:9]
    manifest = read_manifest(log)
    sent = [body for _, body in bodies(manifest, taxonomy_rows())[:9]]
    columns = {
        "user_id": [body["user_id"] for body in sent],
        "request_timestamp": [body["time"] for body in sent],
        "history_timestamp": pa.array([body["history"]["timestamp"] for body in sent], pa.list_(pa.int64())),
    }
    for side, parts in (
        ("history", [body["history"]["features"] for body in sent]),
        ("candidate", [body["candidates"] for body in sent]),
        ("context", [body["context"] for body in sent]),
        ("numeric", [body["numeric"] for body in sent]),
    ):
        for name in parts[0]:
            columns[f"{side}_{name}"] = arrow_column(side, name, [part[name] for part in parts])
    read, _ = read_arrow(stream(pa.table(columns), rows=4), {}, serving.needs, Limits())
    (expected, _), (found, _) = serving.score([request for _, request in named]), serving.score(read)
    answer = pa.ipc.open_stream(write_arrow(found, serving.tasks, "v00000003")).read_all()
    assert answer.schema.metadata == {b"version": b"v00000003"} and len(found) == 9
    for r, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert np.array_equal(one.probabilities, other.probabilities)
        for t, task in enumerate(serving.tasks):
            assert answer.column(f"score_{task}")[r].as_py() == one.probabilities[:, t].tolist()


def arrow_column(side: str, name: str, values: list[object]) -> object:
    import pyarrow as pa

    multi = name in ("tags", "segments")
    kind = pa.float32() if side == "numeric" else pa.int64()
    depth = {"context": 0}.get(side, 1) + multi
    for _ in range(depth):
        kind = pa.list_(kind)
    return pa.array(values, kind)


@pytest.mark.parametrize(
    ("name", "sets"),
    [("dare", 1), ("dare", 3), ("dare_search", 1), ("sim_hard", 1), ("twin_hard", 1), ("eta", 1), ("din", 1)],
)
def test_explained_behaviors_are_those_kept_with_their_weights(name: str, sets: int, log: Path) -> None:
    """Places lead back to the history, whatever the data path left out: ids there are the kept ids."""
    config = preset(name, log, *([f"groups.representation.sets={sets}"] if sets > 1 else []))
    rows = taxonomy_rows()
    plain, serving = snapshot_of(config), Serving(snapshot_of(config))
    named = list(asked(serving, config, rows))
    scored, _ = serving.score([request for _, request in named], explain=True)
    batch = serving.batch([request for _, request in named])
    items = batch.features["item_id"].values()
    found = plain.model.search(batch)["main"]
    c, seen = 0, 0
    for (_, request), part in zip(named, scored, strict=True):
        for kept in part.explanations["main"]:
            history = request.history.features["item_id"].values[kept.behaviors]
            expected = items[found.index[c][found.mask[c]]]
            assert sorted(history.tolist()) == sorted(expected.tolist())
            assert kept.weights == sorted(kept.weights, reverse=True)
            assert sum(kept.weights) == pytest.approx(1 if kept.behaviors else 0, abs=1e-5)
            assert len(set(kept.behaviors)) == len(kept.behaviors)
            c, seen = c + 1, seen + len(kept.behaviors)
    assert c == batch.candidates and seen > 50


def scorer_of(kind: str, rng: torch.Generator) -> tuple[Scorer, int]:
    width = 8
    made: Scorer
    if kind == "mlp":
        made = MlpScorer(width, 5, TimeBias(MARK_ROWS))
    elif kind == "encoding":
        made = DotScorer(None, None, 1, None, TimeEncoding(MARK_ROWS, width))
    elif kind == "heads":
        query, key = (nn.Linear(width, 8, bias=False) for _ in range(2))
        made = DotScorer(query, key, 2, TimeBias(MARK_ROWS), None)
    else:
        form = "shared" if kind == "dot" else kind
        made = DotScorer(None, None, 1, TimeBias(MARK_ROWS, form, GROUPS, 3), None)  # type: ignore[arg-type]
    draw(made, rng)
    return made, width


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["dot", "target", "joint", "encoding", "heads", "mlp"]),
    search=st.sampled_from(["dot", "hamming", "soft", "hard"]),
    sized=st.booleans(),
    cells=st.sampled_from([64, 1 << 20]),
    k=st.sampled_from([1, 3, 40]),
)
def test_window_by_window_is_the_same_search(
    seed: int, kind: str, search: str, sized: bool, cells: int, k: int
) -> None:
    rng = drawing(seed)
    scorer, width = scorer_of(kind, rng)
    windows = drawn_windows(rng, 3, 24, 11, sized=sized)
    vectors = drawn_vectors(rng, width, 11)
    query = Query(
        scorer,
        scorer.encode(vectors),
        vectors,
        windows,
        torch.randint(0, 3, (11,), generator=rng),
        torch.randint(0, 3, (vectors.key_ND.shape[0],), generator=rng),
    )
    made: Search = {
        "dot": lambda: DotSearch(k),
        "hamming": lambda: HammingSearch(k, width, 16, 1),
        "soft": lambda: draw(SoftSearch(k, width, 4), rng),
        "hard": lambda: HardSearch(k),
    }[search]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.serving.window_search._CELLS", cells)
        patch.setattr("trainer.model.retrieve.window_search_cpu._CELLS", cells)
        patch.setattr("trainer.model.ops.top_products._ROWS", 2)
        found = per_window(made)(query)
    expected = made(query)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.index, expected.index)
    for name in MARK_ROWS:
        assert torch.equal(getattr(found.marks, name), getattr(expected.marks, name))


def test_a_long_history_goes_through_the_kernel(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,003 behaviors, many panels, a last one that is not full: the kept ones are those without it."""
    config = preset("dare", log, "data.history_length=5000", "model.k=20")
    serving = Serving(snapshot_of(config))
    rng = np.random.default_rng(0)
    (_, request), *_ = asked(serving, config, taxonomy_rows())
    n = 4003
    rows = rows_of(config)
    history = replace(
        request.history,
        time=np.sort(rng.integers(0, 10**6, n)),
        features={
            name: replace(bags, values=rng.integers(0, rows[name], n), offsets=None)
            for name, bags in request.history.features.items()
        },
    )
    request = replace(request, history=history, time=10**6 + 5)
    batch = serving.batch([request])
    assert batch.behaviors == n
    found = serving.snapshot.model.search(batch)["main"]
    monkeypatch.setattr("trainer.model.retrieve.window_search_cpu.kernel", lambda: None)
    expected = snapshot_of(config).model.search(batch)["main"]
    assert torch.equal(found.index, expected.index) and bool(found.mask.all())


def test_columns_without_a_table_are_delivered_too(log: Path) -> None:
    """A level of the hard search that no group has a table of."""
    config = preset("dare_search", log, "groups.attention.features=['item_id']")
    assert "type_id" in rows_of(config)
    reader = SequenceLogReader(config.data, "train", rows_of(config))
    assert set(config.data.search.levels) <= set(reader.columns.features)
    assert isinstance(reader.columns.features["type_id"], FeatureInfo)
