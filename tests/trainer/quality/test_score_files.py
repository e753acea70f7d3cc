"""Scores in files, of any order and in any number, are measured as those in memory are."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.quality.runs as runs_module
import trainer.quality.score_files as module
import trainer.quality.streamed as streamed_module
from embeddings.errors import DataError
from trainer.quality.compare import compare_scores
from trainer.quality.domains import measure_split
from trainer.quality.runs import Merged, Runs
from trainer.quality.score_files import ScoreFiles
from trainer.quality.scored import Scored, columns_of, read_scores, write_scores


def drawn(seed: int, tasks: int = 2, users: int = 40) -> Scored:
    """Candidates in any order, some without labels, some domains and histories small."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 160))
    user = rng.integers(-5, users, count)
    request = rng.integers(0, 3, count)
    score = rng.uniform(size=(count, tasks)).astype(np.float32).round(2)
    label = (rng.uniform(size=(count, tasks)) < score).astype(np.float32)
    label[rng.uniform(size=label.shape) < 0.1] = np.nan
    label[:, -1] = np.where(user % 4 == 0, np.nan, label[:, -1])
    history = rng.choice([0, 3, 30, 6000], count, p=[0.6, 0.2, 0.1, 0.1])
    names = tuple(f"t{task}" for task in range(tasks))
    domain = np.sort(rng.integers(0, 4, count))
    weight = rng.integers(0, 3, score.shape).astype(np.float32) if seed % 2 else None
    return Scored(score, label, user, request, np.arange(count), user, history, names, domain, weight)


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        same(found[key], value)
        if isinstance(value, dict)
        else (math.isnan(found[key]) if isinstance(value, float) and math.isnan(value) else True)
        or found[key] == pytest.approx(value, rel=1e-12, abs=1e-12)
        for key, value in expected.items()
    )


def spilled(scored: Scored, folder: Path, ranks: int, size: int, seed: int) -> list[Path]:
    """The candidates as each of some ranks writes its own, in any order."""
    folder.mkdir()
    files = []
    rank = np.random.default_rng(seed).integers(0, ranks, scored.size)
    for number in range(ranks):
        runs = Runs(folder, f"rank-{number}", size)
        mine = np.nonzero(rank == number)[0]
        for part in np.array_split(mine, max(1, mine.size // 7)):
            runs.add(columns_of(scored.part(part)))
        runs.flush()
        files += runs.files
    return files


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(1, 3),
    run=st.sampled_from([20, 100, 1000]),
    group=st.sampled_from([5, 50]),
    piece=st.sampled_from([1, 40, 1000]),
    in_memory=st.sampled_from([1, 60, 1000]),
)
def test_files_of_several_ranks_measure_like_one_table(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    ranks: int,
    run: int,
    group: int,
    piece: int,
    in_memory: int,
) -> None:
    scored, folder = drawn(seed), tmp_path_factory.mktemp("scores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "_GROUP", group)
        patch.setattr(module, "IN_MEMORY", in_memory)
        patch.setattr(streamed_module, "_BUCKET", 16)
        files = ScoreFiles(spilled(scored, folder / "runs", ranks, run, seed), folder)
        files._merged._size = piece
        expected = scored.in_order()
        chunks = list(files.chunks())
        assert files.size == expected.size and files.counts() == (expected.requests, expected.users)
        for name in ("score", "label", "user_id", "request_id", "candidate", "history", "domain"):
            together = np.concatenate([getattr(chunk, name) for chunk in chunks])
            np.testing.assert_array_equal(together, getattr(expected, name))
        # Whole users, and no more pieces than rows ask for.
        ends = [(chunk.user_id[0], chunk.user_id[-1]) for chunk in chunks]
        assert all(before[1] < after[0] for before, after in pairwise(ends))
        assert len(chunks) <= expected.size // piece + 1
        whole = measure_split(files, folder / "nowhere", "")
        assert same(whole.entry(), measure_split(expected, folder / "nowhere", "").entry())
        domains = files.metrics_by(lambda part: part.domain, [0, 1])  # type: ignore[arg-type,return-value]
        of_memory = expected.metrics_by(lambda part: part.domain, [0, 1])  # type: ignore[arg-type,return-value]
        assert list(domains) == list(of_memory)
        for number, own in of_memory.items():
            for task, metrics in own.items():
                assert same(domains[number][task].as_dict(), metrics.as_dict())
        for task in (0, 1):
            slices, of_slices = files.by_history(task=task), expected.by_history(task=task)
            assert list(slices) == list(of_slices)
            assert all(same(slices[k].as_dict(), of_slices[k].as_dict()) for k in slices)
        assert files.sizes_by(lambda part: part.user_id % 3) == expected.sizes_by(lambda p: p.user_id % 3)
    assert {path.name for path in folder.iterdir()} == {"runs"}


def test_many_domains_are_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for every few of them that memory holds, it was."""
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    scored = drawn(4, users=60)
    scored = replace(scored, domain=scored.user_id % 60)
    files, reads = ScoreFiles(spilled(scored, tmp_path / "runs", 2, 50, 1), tmp_path), []
    chunks = files.chunks
    monkeypatch.setattr(files, "chunks", lambda: (reads.append(1), chunks())[1])
    found = files.metrics_by(lambda part: part.domain, [1])  # type: ignore[arg-type,return-value]
    assert len(found) > 40 and len(reads) == 2
    for number, own in scored.in_order().metrics_by(lambda part: part.domain, [1]).items():  # type: ignore[arg-type,return-value]
        assert same(found[number]["t1"].as_dict(), own["t1"].as_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("seed", range(6))
def test_files_are_compared_as_candidates_in_memory_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Some requests in any order, as `score --limit` writes them, against all of them in order."""
    monkeypatch.setattr(runs_module, "_PIECE", 20)
    every, rng = drawn(seed), np.random.default_rng(seed)
    some = every.part(rng.permutation(every.size)[: max(1, every.size // 2)])
    score = some.score.copy()
    score[rng.uniform(size=some.size) < 0.3] += np.float32(0.25)
    some = replace(some, score=score)
    write_scores(some, tmp_path / "some.parquet")
    files = spilled(every, tmp_path / "every", 2, 50, seed)
    found = compare_scores(ScoreFiles([tmp_path / "some.parquet"], tmp_path), ScoreFiles(files, tmp_path))
    assert found == compare_scores(some, every)
    by_name = {key: row for key, row in zip(zip(*names(every), strict=True), every.score, strict=True)}
    known = np.stack([by_name[key] for key in zip(*names(some), strict=True)])
    assert found[0] == np.abs(some.score - known).max()
    assert found[1] == pytest.approx((some.score == known).all(axis=1).mean())
    write_scores(replace(some, candidate=some.candidate + 1000), tmp_path / "other.parquet")
    other = ScoreFiles([tmp_path / "other.parquet"], tmp_path)
    assert compare_scores(other, ScoreFiles(files, tmp_path)) == (math.inf, 0.0)
    # A score that is no number is no small difference, in whichever piece it stands.
    for place in (0, every.size - 1):
        broken = every.score.copy()
        broken[place, 0] = math.nan
        assert math.isnan(compare_scores(every, replace(every, score=broken))[0])
        assert math.isnan(compare_scores(ScoreFiles(files, tmp_path), replace(every, score=broken))[0])


def names(scored: Scored) -> list[list[int]]:
    return [scored.user_id.tolist(), scored.request_id.tolist(), scored.candidate.tolist()]


def test_a_sorted_file_is_read_once_and_a_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "_GROUP", 10)
    scored = drawn(4, users=60)
    runs = Runs(tmp_path, "run", 10**6)
    runs.add(columns_of(scored))
    runs.flush()
    merged, read = Merged(runs.files, 30), []
    real = Merged._read
    monkeypatch.setattr(
        Merged, "_read", lambda self, piece, *more: (read.append(piece), real(self, piece, *more))[1]
    )
    assert sum(columns["user_id"].size for columns in merged()) == scored.size
    # Where a user goes on in the next row group, that one is read for both pieces.
    assert len(set(read)) == -(-scored.size // 10) and len(read) <= 2 * len(set(read))


def test_what_is_no_file_of_scores_is_named(tmp_path: Path) -> None:
    scored = drawn(1).in_order()
    write_scores(
        [scored.part(np.arange(0, 9)), scored.part(np.arange(9, scored.size))], tmp_path / "a.parquet"
    )
    assert read_scores(tmp_path / "a.parquet").score.tolist() == scored.score.tolist()
    with pytest.raises(DataError, match=r"missing\.parquet.*no such file"):
        ScoreFiles([tmp_path / "missing.parquet"], tmp_path)
    runs = Runs(tmp_path, "run")
    columns = columns_of(replace(scored, domain=None))
    runs.add({name: values for name, values in columns.items() if not name.startswith("score_")})
    runs.flush()
    with pytest.raises(DataError, match="holds no scores of `tandemrec evaluate`"):
        ScoreFiles(runs.files, tmp_path)
