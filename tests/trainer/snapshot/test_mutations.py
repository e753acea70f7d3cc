"""Two thousand broken snapshots: each ends in a SnapshotError, soon, and none in a model."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from embeddings.errors import SnapshotError
from tests.helpers.models import small_log
from tests.helpers.snapshots import exported, save_run
from trainer.snapshot import load_snapshot
from trainer.snapshot.loading import OWN_EXCEPTIONS
from trainer.snapshot.manifest import OWN

FLIPS, CUTS, SWAPS, HEADERS, MANIFESTS = 900, 200, 100, 400, 400
Rng = np.random.Generator
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    run = save_run(folder / "run", small_log(folder / "log"), "dare", "model.hidden=[8]")
    return exported(run, folder / "out", "int8", "fp16")


@pytest.fixture
def path(version: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(version, tmp_path / version.name))


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def refused(path: Path, what: object) -> None:
    with pytest.raises(SnapshotError):
        load_snapshot(path).self_check()
        pytest.fail(f"loaded: {what}")


def renew(path: Path) -> None:
    """Sizes and digests by somebody who wants the snapshot to be loaded."""
    manifest = json.loads((path / "manifest.json").read_text())
    for entry in manifest["files"]:
        content = (path / entry["path"]).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    write(path, json.dumps(manifest))


def write(path: Path, manifest: str) -> None:
    (path / "manifest.json").write_text(manifest)
    (path / "manifest.sha256").write_text(hashlib.sha256(manifest.encode()).hexdigest())


def restoring(path: Path, trial: Callable[[Rng, int], object], count: int) -> None:
    """Run trials that each damage the snapshot; put everything back after each."""
    rng = np.random.default_rng(1)
    whole = {file: file.read_bytes() for file in files(path)}
    for number in range(count):
        what = trial(rng, number)
        refused(path, what)
        for file, content in whole.items():
            same = not file.is_symlink() and file.is_file() and file.stat().st_size == len(content)
            if not same or file.read_bytes() != content:
                file.unlink(missing_ok=True)
                file.write_bytes(content)
    assert load_snapshot(path).self_check() < 0.2


def test_flipped_bits(path: Path) -> None:
    every = files(path)

    def flip(rng: Rng, number: int) -> object:
        file = every[number % len(every)]
        content = bytearray(file.read_bytes())
        place = int(rng.integers(len(content)))
        content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        return file, place

    restoring(path, flip, FLIPS)


def test_cut_and_lengthened_files(path: Path) -> None:
    every = files(path)

    def cut(rng: Rng, number: int) -> object:
        file = every[number % len(every)]
        content = file.read_bytes()
        longer = number % 4 == 0
        kept = int(rng.integers(len(content)))
        file.write_bytes(content + b" " if longer else content[:kept])
        return file, kept, longer

    # A digest with a space behind it is still that digest.
    every.remove(path / "manifest.sha256")
    restoring(path, cut, CUTS)


def test_swapped_and_linked_files(path: Path, tmp_path: Path) -> None:
    every = [file for file in files(path) if file.suffix == ".safetensors"]

    def swap(rng: Rng, number: int) -> object:
        one, other = (every[i] for i in rng.choice(len(every), 2, replace=False))
        if number % 3 == 0:
            shutil.copy(one, tmp_path / "elsewhere")
            one.unlink()
            one.symlink_to(tmp_path / "elsewhere")
        elif number % 3 == 1:
            one.unlink()
        else:
            first, second = one.read_bytes(), other.read_bytes()
            if first == second:
                second += b" "
            one.write_bytes(second)
            other.write_bytes(first)
            if number % 2 and set(first) != set(second):
                renew(path)
        return one, other, number

    restoring(path, swap, SWAPS)


def test_headers_of_tensor_files(path: Path) -> None:
    """With every digest renewed: what the tensors claim to be must still be what the config makes them."""
    every = [file for file in files(path) if file.suffix == ".safetensors" and file.parent.name != "search"]
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    many = json.dumps({f"t{i}": empty for i in range(100_000)}).encode()
    edits: list[Callable[[Tree, str, Rng], object]] = [
        lambda t, n, r: t[n].update(dtype=str(r.choice(["F64", "BF16", "BOOL", "I8", "X", ""]))),
        lambda t, n, r: t[n].update(shape=[2**60, 2**60]),
        lambda t, n, r: t[n].update(shape=t[n]["shape"] + [1]),
        lambda t, n, r: t[n].update(shape=[-1]),
        lambda t, n, r: t[n].update(data_offsets=[0, 2**63]),
        lambda t, n, r: t[n].update(data_offsets=[1, t[n]["data_offsets"][1]]),
        lambda t, n, r: t.update({f"{n}x": t.pop(n)}),
        lambda t, n, r: t.update({"__metadata__": {"a": 1}}),
        lambda t, n, r: t.update({f"t{i}": t[n] for i in range(1000)}),
        lambda t, n, r: t.clear(),
    ]

    def edit(rng: Rng, number: int) -> object:
        file = every[number % len(every)]
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        tree = json.loads(content[8 : 8 + size])
        change = number // len(every) % (len(edits) + 3)
        body = content[8 + size :]
        if change < len(edits):
            name = sorted(tree)[int(rng.integers(len(tree)))]
            edits[change](tree, name, rng)
            header = json.dumps(tree).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header + body)
        elif change == len(edits):
            file.write_bytes((2**62).to_bytes(8, "little") + content[8:])
        elif change == len(edits) + 1:
            file.write_bytes(len(many).to_bytes(8, "little") + many)
        else:
            file.write_bytes(content[:8] + b"\xff" * size + body)
        renew(path)
        return file, change

    restoring(path, edit, HEADERS)


def change_table(tensors: dict[str, Any]) -> None:
    """One step of every int8 code's scale: far below what the type itself costs."""
    (name,) = tensors
    tensors[name][:, 0] ^= 1


def drop_own(tensors: dict[str, Any]) -> None:
    del tensors[OWN]


def move_own(tensors: dict[str, Any]) -> None:
    tensors[OWN] += 2e-5


@pytest.mark.parametrize(
    ("file", "edit", "why"),
    [
        ("tables/representation.0.safetensors", change_table, "score otherwise than when it was exported"),
        ("recorded.safetensors", drop_own, "lacks the snapshot's own scores"),
        ("recorded.safetensors", move_own, "score otherwise than when it was exported"),
    ],
)
def test_edits_within_the_bounds_of_a_narrow_type_are_noticed(
    path: Path, file: str, edit: Callable[[dict[str, Any]], None], why: str
) -> None:
    """With every digest renewed: tables in int8 may be 0.005 from the trainer's scores, on average."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
    edit(tensors)
    save_file(tensors, path / file)
    renew(path)
    with pytest.raises(SnapshotError, match=why):
        load_snapshot(path).self_check()


def test_what_carries_a_feature_is_held_against_the_recorded_requests(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["inputs"]["item_id"] == {"side": "both", "multi": False}
    for side, why in (("history", "not what its inputs say"), ("context", "not those of its recorded")):
        manifest["inputs"]["item_id"]["side"] = side
        write(path, json.dumps(manifest))
        with pytest.raises(SnapshotError, match=why):
            load_snapshot(path)


def leaves(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of everything in a JSON tree."""
    found = [place] if place else []
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        found += leaves(value, (*place, key))
    return found


# Descriptions that change nothing of what is scored, or that have more than one true value.
FREE = {"versions", "step", "vocabularies", "train", "checkpoint", "log", "number"}
EVIL: list[Any] = [
    2**40, 2**70, -1, 1e308, True, None, "", "x", "../x", "/etc/passwd", "a\\b.safetensors",
    "tables/../../x.safetensors", "x.pkl", [], {}, [[]], "\0", "v" * 10_000,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_hostile_manifests(path: Path) -> None:
    """With the digest renewed. A changed setting may load only if the model stays what it was.

    Parity with the trainer leaves room in narrow types; the snapshot's own scores leave none in any.
    """
    text = (path / "manifest.json").read_text()
    whole = json.loads(text)
    known = load_snapshot(path)
    expected = known.score(known.recorded.batch)
    places = [p for p in leaves(whole) if not FREE & set(p)]
    rng = np.random.default_rng(2)
    refusals = 0
    for number in range(MANIFESTS):
        tree = json.loads(text)
        place = places[int(rng.integers(len(places)))]
        *way, last = place
        part = tree
        for key in way:
            part = part[key]
        if number % 5:
            part[last] = EVIL[int(rng.integers(len(EVIL)))]
        else:
            del part[last]
        write(path, json.dumps(tree))
        try:
            found = load_snapshot(path)
            found.self_check()
        except SnapshotError:
            refusals += 1
            continue
        # Whatever is accepted scores as before, but for rounding: the change was of no consequence.
        difference = (found.score(found.recorded.batch) - expected).abs().amax(1)
        assert difference.quantile(1 - OWN_EXCEPTIONS) <= 1e-6, (place, part)
    assert refusals > 0.7 * MANIFESTS


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        ("a key twice", lambda t: t.replace('"step":', '"step": 1, "step":', 1)),
        ("NaN", lambda t: t.replace('"score_bound":', '"mean_bound": NaN, "x":', 1)),
        ("infinity", lambda t: t.replace('"learning_rate":', '"eps": Infinity, "x":', 1)),
        ("deep", lambda t: "[" * 100_000),
        ("a huge number", lambda t: t.replace('"step":', '"step": 1' + "0" * 5000 + ', "x":', 1)),
        ("large", lambda t: t + " " * (17 << 20)),
        ("not UTF-8", lambda t: t.replace("dare", "\udcff", 1).replace("{", "\udcff", 1)),
        ("an older format", lambda t: t.replace('"version": 3', '"version": 2', 1)),
    ],
)
def test_manifests_that_are_no_plain_json(path: Path, what: str, edit: Callable[[str], str]) -> None:
    changed = edit((path / "manifest.json").read_text()).encode("utf-8", "surrogateescape")
    (path / "manifest.json").write_bytes(changed)
    (path / "manifest.sha256").write_text(hashlib.sha256(changed).hexdigest())
    refused(path, what)


def test_all_of_it_stays_in_little_memory(path: Path) -> None:
    """Runs last: the peak of this process so far, far below what hostile sizes asked for."""
    assert load_snapshot(path).self_check() < 0.2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # kilobytes
    assert FLIPS + CUTS + SWAPS + HEADERS + MANIFESTS >= 2000
