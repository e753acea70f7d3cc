"""Matrices of versions: written and compared in blocks, read mapped or from front to back; their digests."""

from __future__ import annotations

import hashlib
import re
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import trainer.snapshot.rows as rows_module
from embeddings.errors import SnapshotError
from embeddings.lookup.stored import Dtype, PatchedRows, RowStore, StoredTable, sum_bags, to_stored
from tests.helpers.models import drawing
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.snapshot import matrix_file
from trainer.snapshot.checking import check_files
from trainer.snapshot.manifest import ListedFile, SnapshotFile
from trainer.snapshot.matrix_file import LayeredReader, map_one
from trainer.snapshot.rows import RowSource, Written, read_rows, write_changes, write_rows, write_touched

STEM, NAME = "tables/a.0", "a__x"
Version = tuple[Path, Written]


def source_of(table: Tensor, band: int) -> RowSource:
    return lambda: ((first, table[first : first + band]) for first in range(0, len(table), band))


def layers(versions: list[Version]) -> LayeredReader:
    """What a chain reads: down to the newest version that is whole."""
    whole = whole_of(versions)
    listed: list[tuple[Path, dict[str, ListedFile]]] = [
        (path, {entry.path: entry for entry in written.files}) for path, written in versions[whole:]
    ]
    stored = [written.stored for _, written in versions[whole:]]
    return LayeredReader([(*one, each) for one, each in zip(listed, stored, strict=True)], STEM, NAME)


def mapped(versions: list[Version]) -> StoredTable:
    parts = [(path, written.stored) for path, written in versions[whole_of(versions) :]]
    return read_rows(parts, STEM, NAME)


def whole_of(versions: list[Version]) -> int:
    return max(at for at, (_, written) in enumerate(versions) if written.stored.changed is None)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.sampled_from(["fp32", "fp16", "int8"]), st.integers(1, 9), st.integers(1, 9))
def test_deltas_laid_over_are_the_tables_they_were_made_of(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: Dtype, band: int, block: int
) -> None:
    """Tables that change in some rows, grow and shrink; looked up mapped, and read from front to back."""
    rng, folder = drawing(seed), tmp_path_factory.mktemp("versions")
    dim = int(torch.randint(1, 6, (1,), generator=rng))
    table, versions = torch.randn(int(torch.randint(1, 30, (1,), generator=rng)), dim, generator=rng), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_BLOCK", block)
        patch.setattr(matrix_file, "_SOME_IDS", 3)
        for number in range(int(torch.randint(1, 6, (1,), generator=rng))):
            if number:
                count = int(torch.randint(1, 40, (1,), generator=rng))
                more = torch.randn(max(count - len(table), 0), dim, generator=rng)
                table = torch.cat([table, more])[:count].clone()
                chosen = torch.rand(count, generator=rng) < 0.2
                table[chosen] = torch.randn(int(chosen.sum()), dim, generator=rng)
            path = folder / str(number)
            (path / "tables").mkdir(parents=True)
            given_ = (path, STEM, NAME, (len(table), dim), dtype, source_of(table, band))
            if number:
                with closing(layers(versions)) as base:
                    versions.append((path, write_changes(*given_, base)))
            else:
                versions.append((path, write_rows(*given_)))
            wanted = to_stored(table, dtype)
            stored, every = mapped(versions), torch.arange(len(table))
            rows = stored.index_select(every) if isinstance(stored, RowStore) else stored
            assert torch.equal(rows, wanted) and stored.shape == wanted.shape
            with closing(layers(versions)) as reader:
                read = torch.cat([reader.take(min(4, len(table) - at)) for at in range(0, len(table), 4)])
                assert torch.equal(read, wanted)
                reader.finish()
            for path_, written in versions:
                check_files([(path_, entry) for entry in written.files])
            ids = torch.randint(0, len(table), (12,), generator=rng)
            offsets = torch.tensor([0, 5, 5, 12])
            assert torch.equal(sum_bags(stored, ids, offsets), sum_bags(wanted, ids, offsets))
            with pytest.raises((RuntimeError, IndexError)):
                sum_bags(stored, torch.tensor([len(table)]), torch.tensor([0, 1]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.sampled_from(["fp32", "fp16", "int8"]), st.integers(1, 9))
def test_a_delta_of_touched_rows_is_that_of_comparing_all(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: Dtype, at_once: int
) -> None:
    """Among the touched ones are rows that are what they were; where all have changed, all are written."""
    rng, folder = drawing(seed), tmp_path_factory.mktemp("versions")
    table = torch.randn(60, 3, generator=rng)
    for name in "123":
        (folder / name / "tables").mkdir(parents=True)
    base: Version = folder / "1", write_rows(folder / "1", STEM, NAME, (60, 3), dtype, source_of(table, 7))
    touched = torch.nonzero(torch.rand(60, generator=rng) < float(torch.rand(1, generator=rng))).squeeze(1)
    changed = touched[torch.rand(len(touched), generator=rng) < 0.7]
    table[changed] += torch.randn(len(changed), 3, generator=rng)
    rows = ((ids, table[ids]) for ids in touched.split(at_once) if len(ids))
    found = write_touched(folder / "2", STEM, NAME, (60, 3), dtype, rows, mapped([base]))
    with closing(layers([base])) as reader:
        wanted = write_changes(folder / "3", STEM, NAME, (60, 3), dtype, source_of(table, 7), reader)
    if found is None:
        assert wanted.stored.changed is None and not list((folder / "2" / "tables").iterdir())
    else:
        assert found == wanted
        for entry in found.files:
            assert (folder / "2" / entry.path).read_bytes() == (folder / "3" / entry.path).read_bytes()


def written_pair(folder: Path) -> list[Version]:
    table = torch.arange(40.0).view(20, 2)
    first, second = folder / "1", folder / "2"
    for path in (first, second):
        (path / "tables").mkdir(parents=True)
    versions = [(first, write_rows(first, STEM, NAME, (20, 2), "fp32", source_of(table, 6)))]
    table[[3, 9]] += 1
    with closing(layers(versions)) as base:
        changes = write_changes(second, STEM, NAME, (20, 2), "fp32", source_of(table, 6), base)
    return [*versions, (second, changes)]


@pytest.mark.parametrize("place", [-1, -30])
def test_a_base_that_is_read_for_a_delta_is_checked(tmp_path: Path, place: int) -> None:
    """By the digest of what was compared; a table that is written whole needs no base."""
    versions = written_pair(tmp_path)
    file = versions[0][0] / f"{STEM}.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    (tmp_path / "3" / "tables").mkdir(parents=True)
    with (
        closing(layers(versions)) as base,
        pytest.raises(SnapshotError, match="does not match the manifest, so it is corrupt"),
    ):
        table = torch.arange(40.0).view(20, 2)
        write_changes(tmp_path / "3", STEM, NAME, (20, 2), "fp32", source_of(table, 6), base)
    with closing(layers(versions)) as base:
        other = source_of(torch.zeros(20, 2), 6)
        written = write_changes(tmp_path / "3", STEM, NAME, (20, 2), "fp32", other, base)
    assert written.stored.changed is None and [file.path for file in written.files] == [f"{STEM}.safetensors"]
    assert not (tmp_path / "3" / f"{STEM}.ids.safetensors").exists()


def test_a_table_larger_than_the_machine_is_mapped(tmp_path: Path) -> None:
    """A file of 4 TB with nothing on the disk: a mapping that could be written was refused."""
    rows, file = 1 << 40, tmp_path / "x.safetensors"
    with TensorStream(file, {NAME: (torch.uint8, (4,))}, rows) as stream:
        stream.append(NAME, torch.ones(1, 4, dtype=torch.uint8))
    begin = file.stat().st_size - 4
    with file.open("r+b") as raw:
        raw.truncate(begin + 4 * rows)
    found = map_one(file, NAME, torch.uint8, (rows, 4))
    assert found[torch.tensor([0, rows - 1])].tolist() == [[1] * 4, [0] * 4]
    # The system reads no more of it than was asked for (rr of VmFlags, proc(5)).
    *_, about = Path("/proc/self/smaps").read_text().partition(str(file))
    assert "rr" in re.search(r"VmFlags:(.*)", about)[1].split()


@pytest.mark.parametrize("grown", [False, True])
def test_a_delta_over_a_mapped_table_copies_nothing(tmp_path: Path, grown: bool) -> None:
    """Neither one changed row nor one more row takes private memory for the table that it is laid over."""
    rows, dim = 200_000, 16
    files = [tmp_path / "whole.safetensors", tmp_path / "delta.safetensors", tmp_path / "ids.safetensors"]
    with TensorStream(files[0], {NAME: (torch.float32, (dim,))}, rows) as stream:
        stream.append(NAME, torch.ones(rows, dim))
    with TensorStream(files[1], {NAME: (torch.float32, (dim,))}, 1) as stream:
        stream.append(NAME, torch.full((1, dim), 2.0))
    with TensorStream(files[2], {"ids": (torch.int64, ())}, 1) as stream:
        stream.append("ids", torch.tensor([rows if grown else 7]))
    whole = map_one(files[0], NAME, torch.float32, (rows, dim))
    patch = (map_one(files[2], "ids", torch.int64, (1,)), map_one(files[1], NAME, torch.float32, (1, dim)))
    before = own_kb()
    table = PatchedRows(rows + grown, whole, [patch])
    ids = torch.arange(0, rows + grown, 100).repeat(3)
    found = sum_bags(table, torch.cat([ids, patch[0]]), torch.arange(ids.numel() + 2))
    assert torch.equal(found[-1], torch.full((dim,), 2.0)) and torch.equal(found[1], torch.ones(dim))
    assert own_kb() - before < whole.nbytes / 1024 / 4
    *_, about = Path("/proc/self/smaps").read_text().partition(str(files[0]))
    # Pages that are no longer the file's, but a copy of this process alone (proc(5)).
    assert re.search(r"Anonymous:\s+(\d+) kB", about)[1] == "0"  # type: ignore[index]


def own_kb() -> int:
    """Memory of this process that is no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def test_what_was_written_has_the_digest_it_says(tmp_path: Path) -> None:
    """Counted while writing, whether the number of rows was known before or not."""
    for name, rows in (("known", 5), ("unknown", None)):
        with TensorStream(tmp_path / name, {NAME: (torch.float16, (3,))}, rows) as stream:
            for count in (2, 3):
                stream.append(NAME, torch.rand(count, 3).half())
        content = (tmp_path / name).read_bytes()
        assert stream.entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_checks_say_how_far_they_are_and_leave_out_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries: list[tuple[Path, ListedFile]] = []
    for number in range(3):
        content = bytes([number]) * (5 << 20)
        (tmp_path / f"f{number}.safetensors").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append((tmp_path, SnapshotFile(path=f"f{number}.safetensors", bytes=5 << 20, sha256=digest)))
    check_files(entries)
    assert capsys.readouterr().err == ""
    check_files(entries, every=0.0)
    assert "checking the snapshot's files: 0.0 of 0.0 GB" in capsys.readouterr().err
    (tmp_path / "f1.safetensors").write_bytes(b"x" * (5 << 20))
    with pytest.raises(SnapshotError, match=r"f1\.safetensors: does not match the manifest"):
        check_files(entries)
    check_files(entries, known={tmp_path / "f1.safetensors"})
    (tmp_path / "f2.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"f2\.safetensors: missing"):
        check_files(entries)


def test_nothing_is_kept_of_a_small_file_that_was_read(tmp_path: Path) -> None:
    """A server reads those of every new version: nothing may stay of each tensor, however little."""
    tensors = {f"layer.{place}": torch.full((300, 3), float(place)) for place in range(20)}
    save_file(tensors, tmp_path / "small")
    for times in (10, 50):
        blocks = sys.getallocatedblocks()
        for _ in range(times):
            found = rows_module.read_tensors(tmp_path, "small")
    assert sys.getallocatedblocks() - blocks < 10 * len(tensors)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_larger_file_is_mapped(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1 << 18)}, tmp_path / "large")
    found = rows_module.read_tensors(tmp_path, "large")
    assert str(tmp_path / "large") in Path("/proc/self/maps").read_text()
    assert torch.equal(found["a"], torch.arange(1 << 18))
