"""Exports of every kind: what is stored, what the search part computes, and how much memory it takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import TORCH_DTYPES, sum_bags, to_stored
from embeddings.plan.memory import gigabytes
from pipelines.export import export
from tests.helpers.checkpoints import newest
from tests.helpers.launching import launched, tandemrec
from tests.helpers.models import preset as a_preset
from tests.helpers.models import small_log, stage_one
from tests.helpers.serving import snapshot_of
from tests.helpers.snapshots import exported, save_run
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.tensors import TensorReader
from trainer.ranks.process_group import process_group
from trainer.snapshot import load_search, load_snapshot
from trainer.snapshot.code import _is_one_branch, _ranked, _Ranking


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("log") / "log")


@pytest.mark.parametrize("kinds", [("fp32", "fp16"), ("int8", "int8"), ("fp16", "int8")])
def test_tables_are_the_trainers_rows_in_the_chosen_type(
    log: Path, tmp_path: Path, kinds: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", log)
    version = export(run, tmp_path / "out", *kinds, parity_requests=20)  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "of 20 train requests" in shown and "AUC 0." in shown and "of the search's top K kept" in shown
    snapshot = load_snapshot(version)
    reader = TensorReader(newest(run / "checkpoints")[0])  # type: ignore[arg-type]
    for group, dtype in zip(("representation", "attention"), kinds, strict=True):
        for feature in ("item_id", "category_id"):
            name = f"{group}__{feature}"
            found = getattr(snapshot.model.collections[group], name)
            assert found.dtype == TORCH_DTYPES[dtype]  # type: ignore[index]
            whole = reader.whole(reader.table(group, name))
            assert torch.equal(found, to_stored(whole, dtype))  # type: ignore[arg-type]
    assert 0 < snapshot.self_check() < 0.2


def test_tables_that_were_mapped_in_training_need_no_folder(log: Path, tmp_path: Path) -> None:
    """The few rows that are compared lie in memory: whoever exports may be another machine."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = save_run(tmp_path / "run", log, "dare", f"plan.mapped_folder={disk}")
    disk.rmdir()
    assert load_snapshot(exported(run, tmp_path / "out", parity_requests=5)).manifest.number == 1


def test_tables_that_int8_makes_no_smaller_are_named(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", log, "dare", "groups.attention.dim=4", "groups.representation.dim=12")
    version = exported(run, tmp_path / "out", "int8", "int8", parity_requests=5)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: int8")]
    # Of the narrow group alone: 4 codes and 8 bytes of scale a row, twice 4 in fp16.
    rows = sum(table.rows for table in load_snapshot(version).manifest.groups["attention"])
    names = "attention__item_id, attention__category_id"
    assert line.endswith(f": {names} take {gigabytes(12 * rows)}, and {gigabytes(8 * rows)} in fp16")
    exported(run, tmp_path / "other", "int8", "fp16", parity_requests=5)
    assert "warning: int8" not in capsys.readouterr().out


def test_a_group_of_both_roles_gets_the_wider_type(log: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", log, "twin_paper_dare")
    for kinds, wider in ((("int8", "fp16"), "fp16"), (("fp16", "fp32"), "fp32")):
        manifest = load_snapshot(exported(run, tmp_path / "out", *kinds)).manifest
        assert {table.dtype for table in manifest.groups["shared"]} == {wider}


def test_numbers_that_a_type_cannot_hold_end_the_export(log: Path, tmp_path: Path) -> None:
    def large(weights: dict[str, Tensor]) -> None:
        weights["representation__item_id"][5, 3] = 1e5

    run = save_run(tmp_path / "run", log, change=large)
    with pytest.raises(SnapshotError, match=r"representation__item_id, rows 0 to 59: .* too large for fp16"):
        exported(run, tmp_path / "out", "fp16", "fp16")
    assert not (tmp_path / "out").exists()


def vectors(
    rows: dict[tuple[str, str], Tensor], side: str, combine: str, features: KeyedJaggedTensor
) -> Tensor:
    """The vectors of all bags by docs/snapshots.md, query parts falling back to key parts."""
    side = side if any(s == side for s, _ in rows) else "key"
    parts = [
        sum_bags(table, features[f].values(), features[f].offsets().long())
        for (s, f), table in rows.items()
        if s == side
    ]
    return torch.cat(parts, dim=1) if combine == "concat" else torch.stack(parts).sum(0)


@pytest.mark.parametrize(
    ("preset", "attention"),
    [("dare", "fp32"), ("dare", "fp16"), ("twin_paper_dare", "fp32"), ("twin", "fp32"), ("twin_proj", "fp32"),
     ("twin_4e", "fp32"), ("sim_soft", "fp32")],
)  # fmt: skip
def test_stage_one_scores_follow_from_the_search_part(
    log: Path, tmp_path: Path, preset: str, attention: str
) -> None:
    def part_ways(weights: dict[str, Tensor]) -> None:
        # Projections of query and key begin as one.
        for name, weight in weights.items():
            if ".key." in name:
                weight.copy_(weight.flip(0) * 0.7)

    run = save_run(tmp_path / "run", log, preset, change=part_ways)
    version = exported(run, tmp_path / "out", "fp32", attention, search="vectors")
    snapshot, (part, rows) = load_snapshot(version), load_search(version)
    batch = snapshot.recorded.batch
    branch = snapshot.model.branches["main"]
    found = stage_one(snapshot.model, batch)["main"]
    n, windows = batch.behaviors, found.windows
    key = vectors(rows, "key", part.combine, batch.features)[:n].unflatten(1, (part.heads, -1))
    query = vectors(rows, "query", part.combine, batch.features)[n:].unflatten(1, (part.heads, -1))
    everything = windows.of_candidates()
    dots = torch.einsum("chd,cxhd->chx", query, key[everything.index]) * part.scale
    if snapshot.manifest.config.model.search == "soft":
        scorer, raw = branch.search.index, found.raw
        wanted = scorer.over_windows(scorer.encode(raw), windows)
    else:
        scorer = branch.scorer
        dots = dots + scorer._kept_bias(found.vectors, everything)[:, None]
        wanted = scorer.over_windows(found.vectors, windows)
    mask = everything.mask[:, None].expand_as(wanted)
    assert mask.sum() > 500
    # The part is stored in halves unless attention is in fp32; a model in fp32 agrees to rounding.
    assert torch.allclose(dots[mask], wanted[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "why"),
    [("eta", "simhash"), ("din", "keeps everything"), ("sdim", "collision"), ("tin", "keeps everything")],
)
def test_models_without_such_a_search_say_why(
    log: Path, tmp_path: Path, preset: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    version = exported(save_run(tmp_path / "run", log, preset), tmp_path / "out")
    part = load_snapshot(version).manifest.search["main"]
    assert f"no search part for main: {part.reason}\n" in capsys.readouterr().out
    assert why in part.reason and not part.tables and not (version / "search").exists()
    with pytest.raises(SnapshotError, match="has no search part"):
        load_search(version)


def test_rows_that_are_vectors_as_they_are_are_not_written_again(log: Path, tmp_path: Path) -> None:
    """Whatever is asked for a retrieval service, which finds them in the tables, in their type."""
    run = save_run(tmp_path / "run", log, "dare")
    for search in ("none", "vectors"):
        version = exported(run, tmp_path / "out", "fp32", "int8", search=search)
        part, rows = load_search(version)
        assert not (version / "search").exists() and part.reason == ""
        assert [entry.table for entry in part.tables] == ["tables/attention.0", "tables/attention.1"]
        snapshot = load_snapshot(version)
        for (side, feature), stored in rows.items():
            table = getattr(snapshot.model.collections["attention"], f"attention__{feature}")
            assert side == "key" and stored.dtype == torch.uint8 and torch.equal(stored, table)


@pytest.mark.parametrize("preset", ["twin", "twin_proj", "sim_soft"])
def test_projected_vectors_are_written_where_they_are_asked_for(
    log: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What serves does not read them: its scores are the trainer's, bit for bit, either way."""
    run = save_run(tmp_path / "run", log, preset)
    bare, whole = (exported(run, tmp_path / "out", search=search) for search in ("none", "vectors"))
    said = capsys.readouterr().out
    assert "no search part for main: its vectors are projected rows, which export writes with" in said
    assert "search 0.0" in said and "search part for main: key of item_id fp32, " in said
    with pytest.raises(SnapshotError, match=r"has no search part: .* with --search vectors"):
        load_search(bare)
    assert not (bare / "search").exists() and load_search(whole)[1]
    one, other = load_snapshot(bare), load_snapshot(whole)
    # They are not even read when a server starts, which a damaged one would else refuse to.
    file = next((whole / "search").glob("*.safetensors"))
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    load_snapshot(whole)
    with pytest.raises(SnapshotError, match="does not match the manifest"):
        load_search(whole)
    assert torch.equal(one.recorded.own, one.recorded.trained)
    assert torch.equal(other.score(one.recorded.batch), one.recorded.own)
    # What nobody reads who scores is not checked, nor has to be there; who reads it is told.
    (whole / "search" / "main.0.safetensors").write_bytes(b"x")
    load_snapshot(whole).self_check()
    with pytest.raises(SnapshotError, match=r"main\.0\.safetensors: does not match the manifest"):
        load_search(whole)


def test_vectors_follow_the_type_of_their_tables_and_keep_most_of_the_best(log: Path, tmp_path: Path) -> None:
    """Int8 moves a score by no more than half a step of each side's rows, see docs/snapshots.md."""
    run = save_run(tmp_path / "run", log, "twin")
    found = {}
    for dtype in ("fp32", "int8"):
        version = exported(run, tmp_path / dtype, dtype, dtype, search="vectors")
        part, rows = load_search(version)
        assert {entry.dtype for entry in part.tables if not entry.table} == {dtype}
        features = load_snapshot(version).recorded.batch.features
        found[dtype] = [vectors(rows, side, part.combine, features) for side in ("query", "key")]
        steps = [
            sum(
                (table[:, -8:-4].contiguous().view(torch.float32).max() if dtype == "int8" else 0.0)
                for (s, _), table in rows.items()
                if s == side
            )
            for side in ("query", "key")
        ]
    (query, key), (query8, key8) = found["fp32"], found["int8"]
    exact, narrow = query @ key.T, query8 @ key8.T
    width = query.shape[1]
    sums = query.abs().sum(1)[:, None] * steps[1] / 2 + key8.abs().sum(1)[None] * steps[0] / 2
    assert ((exact - narrow).abs() <= sums + 1e-5 * width).all()
    k = 5
    kept = [scores.topk(k, dim=1).indices for scores in (exact, narrow)]
    shared = sum(len(set(a) & set(b)) for a, b in zip(*(x.tolist() for x in kept), strict=True))
    assert shared > 0.9 * k * len(exact)


def test_nothing_in_a_snapshot_is_code_or_pickle(log: Path, tmp_path: Path) -> None:
    version = exported(save_run(tmp_path / "run", log), tmp_path / "out", "int8", "fp16")
    for file in (path for path in version.rglob("*") if path.is_file()):
        content = file.read_bytes()
        # Zip archives (what torch.save writes), pickles of protocol 2 and up, ELF objects.
        assert not content.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x7fELF"))
        assert b"PK\x03\x04" not in content and b"torch._utils" not in content
        assert file.suffix in (".json", ".sha256", ".safetensors")
        # A server may run as another user than the training.
        assert file.stat().st_mode == (version / "manifest.json").stat().st_mode


def write_shards(path: Path, rows: int, dim: int, shards: int, changed: slice = slice(0)) -> Tensor:
    """A checkpoint of one table in row-wise shards; -> its last rows. Some of the first are others."""
    each = rows // shards
    parts = [
        Shard.from_tensor_and_offsets(torch.full((each, dim), float(i)), [i * each, 0], 0)
        for i in range(shards)
    ]
    parts[0].tensor[changed] += torch.arange(dim)
    with process_group():
        table = init_from_local_shards(parts, rows, dim)
        name = "collections.attention.embedding_bags.attention__item_id.weight"
        checkpoint.save(path, 1, {"model": {name: table}}, {"step": 1}, 1)
    return parts[-1].tensor


def test_memory_is_that_of_blocks_not_of_a_table_or_shard(tmp_path: Path) -> None:
    """A table of 179 MB in one shard, vectors projected from it, and a delta of it."""
    rows, dim, dtype = 700_000, 64, "int8"
    path = tmp_path / "checkpoints" / "step-00000001"
    last = write_shards(tmp_path / "checkpoints", rows, dim, 1)
    (tmp_path / "next").mkdir()
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "later", rows, dim, 1, changed=slice(0, rows, 9))
    later = tmp_path / "later" / "step-00000001"
    words = [str(path), str(tmp_path / "out"), dtype, str(rows), str(dim)]
    again = [str(later), str(tmp_path / "next"), *words[2:], words[1]]
    for one in (words, again):
        done = launched("tests.programs.stream_tables", *one)
        assert done.returncode == 0, done.stderr
        grown, whole = int(done.stdout) * 1024, rows * dim * 4
        # Some 90 MB, as the allocator has it, however many rows there are. The vectors are twice the table.
        assert grown < whole, f"{grown:,} bytes"
    from trainer.snapshot.manifest import StoredRows
    from trainer.snapshot.rows import read_rows

    whole_, some = StoredRows(rows=rows, dim=dim, dtype=dtype), torch.arange(0, rows, 1001)
    found = read_rows([(tmp_path / "out", whole_)], "tables/attention.0", "attention__item_id")
    assert torch.equal(found.index_select(0, some), to_stored(last[some], dtype))  # type: ignore[call-arg, arg-type]


def test_column_wise_shards_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(40.0).view(10, 4)
    parts = [Shard.from_tensor_and_offsets(whole[:, c : c + 2].contiguous(), [0, c], 0) for c in (0, 2)]
    name = "collections.attention.embedding_bags.attention__item_id.weight"
    with process_group():
        state = {"model": {name: init_from_local_shards(parts, 10, 4), "other": torch.ones(3)}}
        path = checkpoint.save(tmp_path, 1, state, {"step": 1}, 1)
    reader = TensorReader(path)
    assert reader.table("attention", "attention__item_id") == name and reader.shape(name) == (10, 4)
    ((first, band),) = reader.bands(name)
    assert first == 0 and torch.equal(band, whole) and torch.equal(reader.whole("other"), torch.ones(3))


@pytest.mark.parametrize(
    ("preset", "alone"),
    [("dare", True), ("twin", False), ("twin_paper_dare", True), ("twin_proj", True), ("eta", True),
     ("sim_soft", True), ("din", False), ("sdim", False), ("tdpe", False)],
)  # fmt: skip
def test_stage_two_is_a_function_of_what_was_kept(log: Path, preset: str, alone: bool) -> None:
    """What is compiled for C++ computes the model's probabilities, for any number of candidates."""
    snapshot = snapshot_of(a_preset(preset, log))
    assert _is_one_branch(snapshot.model) == alone
    if alone:
        with torch.no_grad():
            given, expected = _ranked(snapshot)
            found = _Ranking(snapshot.model)(*given.values())
            few = _Ranking(snapshot.model)(*(part[:3] for part in given.values()))
        # Projections of fewer rows may round otherwise.
        assert torch.allclose(found, expected, rtol=0, atol=1e-6) and expected.std() > 1e-3
        assert torch.allclose(few, expected[:3], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_machine_code_computes_what_the_model_does(log: Path, tmp_path: Path) -> None:
    """Compiled in a process of its own: the compiler's warnings are not ours to judge."""
    run = save_run(tmp_path / "run", log, "dare", "model.hidden=[8]")
    words = ["export", "--run", str(run), "--out", str(tmp_path / "out"), "--aoti", "--parity-requests", "0"]
    done = tandemrec(*words, timeout=800)
    assert done.returncode == 0, done.stderr
    _check_code(
        tmp_path / "out", "code/ranking.pt2", "float32 [candidates, 4, 16], position int64 [candidates, 4]"
    )


def _check_code(out: Path, path: str, describes: str) -> None:
    """The snapshot has one file of machine code, described so, which is not loaded once it was changed."""
    snapshot = load_snapshot(out)
    (code,) = snapshot.manifest.code
    assert code.path == path and describes in code.describes
    file = snapshot.path / code.path
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"pt2: does not match"):
        load_snapshot(out)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is traced is run as it is; compiling takes ten seconds, and one model is compiled above."""
    traced: list[Any] = []

    def save(program: Any, file: str) -> Any:
        traced.append(program)
        torch.export.save(program, file)
        return program.module()

    monkeypatch.setattr("trainer.snapshot.code.compile_package", save)
    monkeypatch.setattr(shutil, "which", lambda _: "g++")
    return traced


def test_where_only_the_head_is_a_function_it_is_compiled_alone(
    log: Path, tmp_path: Path, uncompiled: list[Any]
) -> None:
    run = save_run(tmp_path / "run", log, "din", "model.hidden=[8]")
    export(run, tmp_path / "out", aoti=True, parity_requests=0)
    assert len(uncompiled) == 1
    _check_code(tmp_path / "out", "code/head.pt2", "float32 [candidates, 32]")


def test_code_that_computes_something_else_is_refused(
    log: Path, tmp_path: Path, uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del uncompiled
    run = save_run(tmp_path / "run", log, "din", "model.hidden=[8]")
    monkeypatch.setattr("trainer.snapshot.code.compile_package", lambda *_: lambda parts: parts[:, :1])
    monkeypatch.setattr("trainer.snapshot.code.entry_of", lambda _: pytest.fail("it was taken"))
    with pytest.raises(SnapshotError, match="the compiled model differs by"):
        export(run, tmp_path / "out", aoti=True, parity_requests=0)


def test_what_cannot_be_compiled_is_said_before_tables_are_written(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that reads a prior is no function of what a search kept, and experts are several networks."""
    words = ["model.head=experts", 'model.mixer={kind = "softmax", gate = "prior"}', "groups.near.dim=4"]
    run = save_run(tmp_path / "run", log, "dare", *words, "model.roles.prior=near")
    monkeypatch.setattr(shutil, "which", lambda _: "g++")
    monkeypatch.setattr("pipelines.export_version._write", lambda *_: pytest.fail("tables were written"))
    with pytest.raises(SnapshotError, match='head = "experts" needs its sets one by one') as error:
        export(run, tmp_path / "out", aoti=True)
    assert str(error.value).startswith(f"{tmp_path / 'out'}: ")
    assert not list(tmp_path.glob("out/*"))
