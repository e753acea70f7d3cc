"""Versions take each other's place: nothing of an old one stays, and nothing that goes wrong is unseen."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import embeddings.lookup.hot_rows as hot_rows_module
import pipelines.serve.updates as updates_module
from embeddings.errors import SnapshotError, TandemError, UnavailableError
from pipelines.serve.metrics import Metrics
from pipelines.serve.service import Service
from pipelines.serve.settings import ServeSettings
from tests.helpers.models import preset, small_log
from tests.helpers.serving import bodies, published, serving
from tests.helpers.snapshots import publish_copy
from trainer.log.bags import Bags
from trainer.log.schema import read_manifest as read_log
from trainer.serving.latest import Sealed
from trainer.serving.request import History, Request
from trainer.serving.scorer import Scorer
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.user_state.state import Stretch, UserState
from trainer.serving.versions import Versions
from trainer.snapshot.manifest import LATEST, SEAL
from trainer.snapshot.reading import read_manifest

_FIRST, _SECOND = "v00000001", "v00000002"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    published(preset("dare", small_log(folder / "log")), folder / "snapshot")
    return folder / "snapshot"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """Two versions, of which the second is the newest."""
    shutil.copytree(made, tmp_path / "snapshot")
    publish_copy(tmp_path / "snapshot", made / _FIRST)
    return tmp_path / "snapshot"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of so small products would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone must do: a large table cannot wait for the collector."""
    gc.disable()
    yield
    gc.enable()


def mapped(root: Path) -> list[str]:
    """Files below a folder that this process has mapped, also those that are deleted."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(root) in line]


def own_mb() -> float:
    """Memory of this process that is no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def asked(scorer: Scorer) -> Request:
    """A request of every feature that the model reads, with id 1 for everything."""
    names = scorer.needs.rows
    ones = {name: Bags(np.ones(4, dtype=np.int64)) for name in names}
    three = {name: Bags(np.ones(3, dtype=np.int64)) for name in names}
    numeric = {name: np.zeros(3, dtype=np.float32) for name in scorer.needs.numeric.known}
    context = {name: Bags(np.ones(1, dtype=np.int64)) for name in scorer.needs.context.known}
    return Request(0, History(np.arange(4), ones), 9, three, 3, context, numeric)


@pytest.mark.usefixtures("no_collector")
def test_nothing_of_forty_old_versions_stays(root: Path) -> None:
    """Neither mappings nor memory, as soon as nobody scores with them; every one of them has scored."""
    versions = Versions(root)
    files, known, before, objects = len(mapped(root)), root / _SECOND, 0.0, 0
    assert files > 3
    for switch in range(40):
        versions.scorer.score([asked(versions.scorer)], explain=True)
        old = weakref.ref(versions.scorer)
        publish_copy(root, known, keep=2)
        assert versions.reload() and old() is None
        known = versions.scorer.snapshot.path
        if switch == 9:
            before, objects = own_mb(), len(gc.get_objects())
    names = mapped(root)
    assert len(names) == files and not any("(deleted)" in name for name in names)
    assert own_mb() < before + 8
    # Less than one object for each of the versions.
    assert len(gc.get_objects()) < objects + 30
    assert versions.looks == {} and versions.latest_problem is None


def test_a_service_lets_go_of_what_it_served(made: Path, tmp_path: Path) -> None:
    """Nothing that decodes, waits, scores or answers holds a scorer once its bodies are answered."""
    root = tmp_path / "snapshot"
    shutil.copytree(made, root)
    rows = pq.read_table(next((made.parent / "log" / "train").glob("*.parquet"))).to_pylist()
    body = bodies(read_log(made.parent / "log"), rows)[0][1]
    service = Service(Versions(root), Metrics(), ServeSettings())

    async def run() -> None:
        async with serving(service) as client:
            files = len(mapped(root))
            gc.collect()
            gc.disable()
            for number in range(3):
                old = weakref.ref(service.versions.scorer)
                assert (await client.score(body))["version"] == service.versions.scorer.version
                publish_copy(root, root / f"v{number + 1:08d}", keep=2)
                assert await service.updates.reload()
                # What scored the last body may wait for the next one.
                await client.score(body)
                assert old() is None and len(mapped(root)) == files

    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_memory_is_returned_once_nobody_scores_with_the_old_version(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[Scorer | None] = []
    monkeypatch.setattr(updates_module, "_LAST_BODIES", 0.01)
    monkeypatch.setattr(updates_module, "return_freed_memory", lambda: returned.append(old()))
    service = Service(Versions(root), Metrics(), ServeSettings())
    old = weakref.ref(service.versions.scorer)

    async def run() -> None:
        scoring = service.versions.scorer
        assert not await service.updates.reload()
        publish_copy(root, root / _SECOND)
        assert await service.updates.reload()
        await asyncio.sleep(0.05)
        assert scoring is old() and not returned
        del scoring
        async with asyncio.timeout(20):
            while not returned:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert returned == [None]


@pytest.mark.usefixtures("no_collector")
def test_whoever_scores_keeps_its_version_and_a_refused_one_goes(root: Path) -> None:
    versions = Versions(root)
    files, old = len(mapped(root)), versions.scorer
    expected = old.score([asked(old)])[0][0].probabilities
    publish_copy(root, root / _SECOND)
    assert versions.reload() and len(mapped(root)) == 2 * files
    assert np.array_equal(old.score([asked(old)])[0][0].probabilities, expected)
    del old
    assert len(mapped(root)) == files
    bad = publish_copy(root, root / _SECOND)
    manifest = read_manifest(bad)
    SEAL.write(bad, manifest.model_copy(update={"score_bound": 0.0, "mean_bound": 0.0}).model_dump_json())
    content = bytearray((bad / "recorded.safetensors").read_bytes())
    content[-3] ^= 1
    (bad / "recorded.safetensors").write_bytes(content)
    for _ in range(3):
        with pytest.raises(SnapshotError):
            versions.reload()
    assert len(mapped(root)) == files and versions.scorer.version == "v00000003"


def missing(root: Path) -> None:
    (root / LATEST).unlink()


def no_name(root: Path) -> None:
    (root / LATEST).write_text("../elsewhere\n")


def older(root: Path) -> None:
    (root / LATEST).write_text(f"{_FIRST}\n")


def replaced(root: Path) -> None:
    """Whoever deletes the folder and exports anew begins with the same numbers."""
    manifest = read_manifest(root / _SECOND)
    shutil.rmtree(root / _SECOND)
    shutil.copytree(root / _FIRST, root / _SECOND)
    SEAL.write(root / _SECOND, manifest.model_copy(update={"step": 77}).model_dump_json())


def overwritten(root: Path) -> None:
    file = root / _SECOND / "tables" / "attention.0.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # the last number becomes NaN
    with file.open("r+b") as opened:
        opened.write(content)


def away(root: Path) -> None:
    (root / LATEST).unlink()
    (root / LATEST).mkdir()


FAULTS: list[tuple[Callable[[Path], None], str, str, bool]] = [
    (missing, "broken", "neither manifest.json nor LATEST", False),
    (no_name, "broken", "names '../elsewhere', which is no version", False),
    (away, "broken", "neither manifest.json nor LATEST", False),
    (older, "older", r"names v00000001, which is older than the v00000002 that is served", True),
    (replaced, "replaced", "another version than the v00000002 that is served", True),
    (overwritten, "overwritten", r"attention\.0\.safetensors was written over since it was loaded", False),
]


@pytest.mark.parametrize(("damage", "outcome", "words", "taken"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_what_is_wrong_with_the_newest_version_is_seen_and_the_served_one_stays(
    root: Path, damage: Callable[[Path], None], outcome: str, words: str, taken: bool
) -> None:
    """A look names it again and again; only who asks for it gets an older or another version."""
    versions = Versions(root)
    served = versions.scorer
    assert versions.newer() is None and versions.looks == {"served": 1}
    damage(root)
    for look in (1, 2):
        with pytest.raises(SnapshotError, match=words):
            versions.newer()
        with pytest.raises(SnapshotError, match=words):
            versions.reload(retry=False)
        assert versions.looks == {"served": 1, outcome: 2 * look}
    assert versions.scorer is served and versions.refused is None
    assert versions.latest_problem is not None and re.search(words, versions.latest_problem)
    if taken:
        assert versions.reload() and versions.scorer is not served
        assert versions.newer() is None and versions.latest_problem is None
        return
    with pytest.raises(TandemError):
        versions.reload()
    assert versions.scorer is served
    # The next good version mends everything.
    if (root / LATEST).is_dir():
        (root / LATEST).rmdir()
    publish_copy(root, root / _FIRST)
    assert versions.newer() == root / "v00000003" and versions.reload(retry=False)
    assert versions.looks["newer"] == 1
    assert versions.newer() is None and versions.latest_problem is None and versions.refused is None


def test_a_version_that_comes_late_is_tried_again(root: Path) -> None:
    """LATEST was copied before the folder that it names."""
    versions = Versions(root)
    (root / LATEST).write_text("v00000007\n")
    with pytest.raises(SnapshotError):
        versions.reload(retry=False)
    assert versions.newer() is None and versions.refused is not None and versions.latest_problem
    assert versions.looks == {"refused": 1}
    shutil.copytree(root / _FIRST, root / "v00000007")
    assert versions.reload(retry=False) and versions.scorer.version == "v00000007"
    assert versions.refused is None


def test_a_disk_that_does_not_answer_is_no_fault_of_a_version(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Versions(root)

    def fail(path: Path) -> Sealed:
        raise UnavailableError(path, "cannot be read: input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Sealed, "at", fail)
        with pytest.raises(UnavailableError):
            versions.newer()
    assert versions.looks == {"unreachable": 1} and "input/output" in str(versions.latest_problem)
    assert versions.newer() is None and versions.latest_problem is None


def test_a_file_that_is_written_again_with_the_same_content_is_fine(root: Path) -> None:
    """So is one that another file replaces, or that is deleted: what is mapped stays."""
    versions = Versions(root)
    file = versions.scorer.snapshot.path / "tables" / "attention.0.safetensors"
    with file.open("r+b") as opened:
        opened.write(file.read_bytes())
    os.utime(file, ns=(1, 1))
    assert versions.scorer.snapshot.overwritten() == ""
    other = file.with_suffix(".new")
    other.write_bytes(b"other")
    other.replace(file)
    assert versions.scorer.snapshot.overwritten() == ""
    file.unlink()
    assert versions.scorer.snapshot.overwritten() == "" and versions.newer() is None


@pytest.mark.parametrize("seen", ["by its answers", "by a look", "by both"])
def test_files_that_are_mended_where_they_lie_are_taken_anew(root: Path, seen: str) -> None:
    """Once, with nothing of what was kept while they were wrong; whoever asks need not wait for a look."""
    versions = Versions(root)
    file = root / _SECOND / "tables" / "attention.0.safetensors"
    good = file.read_bytes()
    for asked_for in (False, True):
        spoiled = versions.scorer
        overwritten(root)
        if seen != "by a look":
            versions.doubt(spoiled)
        if seen != "by its answers":
            with pytest.raises(SnapshotError, match="written over"):
                versions.newer()
        with pytest.raises(SnapshotError, match="corrupt"):
            versions.reload()
        assert versions.scorer is spoiled and versions.refused is not None
        with file.open("r+b") as opened:
            opened.write(good)
        if not asked_for:
            assert versions.newer() == root / _SECOND and versions.looks["mended"] == 1
        assert versions.reload(retry=asked_for) and versions.scorer is not spoiled
        assert versions.refused is None and versions.latest_problem is None
        assert versions.newer() is None and not versions.reload()


def test_no_store_is_given_states_of_a_version_whose_file_was_overwritten(root: Path) -> None:
    """They would be found by the key of the sound version."""
    store = SecondLevel(_Nothing())
    states = Versions(root, user_states=UserStateSettings(), store=store).scorer.states
    assert states is not None
    file = root / _SECOND / "tables" / "attention.0.safetensors"
    good, made = file.read_bytes(), UserState(b"user", Stretch(0, np.arange(3), {}), 0, {})
    for content, writes in ((good, 1), (good[:-4] + b"\x00\x00\x00\x00", 1), (good, 2)):
        with file.open("r+b") as opened:
            opened.write(content)
        store.put(made, states._is_of_the_version)
        assert store.flush(10) and store.statistics().writes["written"] == writes
    assert store.statistics().writes["dropped"] == 1
    store.close()


class _Nothing:
    """A store that keeps nothing."""

    def get(self, key: bytes) -> bytes | None:
        return None

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None: ...

    def close(self) -> None: ...


def test_the_age_of_a_version_is_that_of_its_export(root: Path) -> None:
    """Where a manifest does not say it, when it was written."""
    versions = Versions(root)
    assert versions.exported_at is not None
    assert abs(versions.exported_at - time.time()) < 60 and abs(versions.served_since - time.time()) < 60
    manifest = read_manifest(root / _SECOND)
    assert manifest.exported_at == int(versions.exported_at)
    SEAL.write(root / _SECOND, manifest.model_copy(update={"exported_at": None}).model_dump_json())
    assert "exported_at" not in (root / _SECOND / "manifest.json").read_text()
    os.utime(root / _SECOND / "manifest.json", (5, 5))
    assert Versions(root).exported_at == 5


def test_hot_rows_change_no_bit_and_go_on_with_the_next_version(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked of one version is hot in the next from its first request on."""
    plain = Versions(root).scorer
    request = asked(plain)
    expected = plain.score([request])[0][0].probabilities
    assert Versions(root, hot_rows=1 << 20).hot_counts == (0, 0, 0)  # these tables are small
    monkeypatch.setattr(hot_rows_module, "SMALL", 0)
    versions = Versions(root, hot_rows=1 << 15)
    assert np.array_equal(versions.scorer.score([request])[0][0].probabilities, expected)
    publish_copy(root, root / _SECOND)
    assert versions.reload()
    before = versions.hot_counts
    assert before.kept > 0
    assert np.array_equal(versions.scorer.score([request])[0][0].probabilities, expected)
    now = versions.hot_counts
    assert now.hot - before.hot == now.looked_up - before.looked_up > 0
    assert now.kept == before.kept
