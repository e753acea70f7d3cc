"""The order of the rooms: a module imports from its own room and from rooms below it, never from one above.

A room is a file or a folder directly in one of the folders named here. `docs/architecture.md` lists the same
rooms in the same order, with a line each.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/architecture.md"
# Top to bottom, in reading order. A new room gets its line here and on the page.
ROOMS: dict[str, tuple[str, ...]] = {
    ".": ("launch", "pipelines", "trainer", "embeddings"),
    "pipelines": (
        *("tune", "analyze", "online", "train", "profile"),
        *("evaluate", "quality_report"),
        *("export_portable", "export", "export_version"),
        *("export_uncertainty", "export_parity", "export_source"),
        *("vectors", "score", "serve", "unshard"),
        *("plan", "cluster", "windows", "ingest", "synth", "fetch", "doctor"),
        *("start", "task_lines", "console"),
    ),
    "trainer": (
        *("analysis", "serving", "portable", "snapshot"),
        *("loop", "checkpoint", "assemble", "update"),
        *("quality", "objectives"),
        *("needs", "step_size", "run_folder", "run_config"),
        *("model", "data", "log"),
        *("config", "ranks", "sealed_folder", "storage"),
    ),
    "trainer/model": (
        *("frame", "union", "branch", "settings"),
        *("heads", "read", "retrieve"),
        *("windows", "sizes", "time_vectors", "time", "ops", "border", "known"),
    ),
    "embeddings": (
        *("plan", "ids", "lookup", "groups", "optimizers", "first_rows", "agreement", "private"),
        *("disk", "errors"),
    ),
}
MOST_ROOMS = {"trainer": 21}
# Arrows that still run up. None may be added; one that is gone is deleted here, or a test fails.
EXCEPTIONS: set[tuple[str, str, str]] = set()


def rooms_in(folder: Path) -> set[str]:
    """The names of the rooms that are there: modules, and folders with a module somewhere in them."""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return modules | {path.name for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))}


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that a module of `package` imports, functions' own and typing's imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(tree: ast.AST, package: str, folder: str, rooms: Iterable[str]) -> set[str]:
    """The rooms of `folder` that a module of `package` imports from."""
    prefix = "" if folder == "." else folder.replace("/", ".") + "."
    names = (name.removeprefix(prefix) for name in imported(tree, package) if name.startswith(prefix))
    return {name.split(".")[0] for name in names} & set(rooms)


def upward(room: str, targets: Iterable[str], order: Sequence[str]) -> list[str]:
    """Those of `targets` that stand above `room`."""
    return sorted(target for target in targets if order.index(target) < order.index(room))


def all_upward(folder: str) -> dict[tuple[str, str, str], list[str]]:
    """Every arrow that runs up in a folder, as (folder, room, room above), with the files that draw it."""
    order, base = ROOMS[folder], ROOT / folder
    against: dict[tuple[str, str, str], list[str]] = {}
    for room in order:
        for path in [base / f"{room}.py", *sorted((base / room).rglob("*.py"))]:
            if path.is_file():
                package = ".".join(path.relative_to(ROOT).parent.parts)
                targets = arrows(ast.parse(path.read_text(encoding="utf-8")), package, folder, order)
                for target in upward(room, targets, order):
                    against.setdefault((folder, room, target), []).append(str(path.relative_to(ROOT)))
    return against


def listed(page: str, folder: str) -> list[str]:
    """The rooms of the table below the page's heading for a folder."""
    section = re.search(rf"^### `{re.escape(folder)}/`$(.*?)(?=^##|\Z)", page, flags=re.M | re.S)
    assert section, f"{PAGE} has no heading '### `{folder}/`'"
    return re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", section.group(1), flags=re.M)


@pytest.mark.parametrize("folder", [folder for folder in ROOMS if folder != "."])
def test_every_room_has_its_place(folder: str) -> None:
    there, order = rooms_in(ROOT / folder), ROOMS[folder]
    assert len(order) == len(set(order))
    new, gone = sorted(there - set(order)), sorted(set(order) - there)
    assert not new, (
        f"{folder}/ has new rooms: {new}. If they belong to what stands there, move them into that room; else"
        f" put each into ROOMS in tests/test_rooms.py, above all that it imports, and into {PAGE}"
    )
    assert not gone, (
        f"{folder}/ has no longer {gone}: take them out of ROOMS in tests/test_rooms.py and {PAGE}"
    )
    assert len(order) <= MOST_ROOMS.get(folder, len(order)), (
        f"{folder}/ is a hall again: join rooms of one topic"
    )


@pytest.mark.parametrize("folder", ROOMS)
def test_no_arrow_runs_up(folder: str) -> None:
    against = all_upward(folder)
    new = {arrow: files for arrow, files in against.items() if arrow not in EXCEPTIONS}
    text = "\n".join(
        f"  {', '.join(files)}: {room} imports {target}, which stands above it"
        for (_, room, target), files in new.items()
    )
    assert not new, (
        f"imports against the order of the rooms in {folder}/:\n{text}\nHand the value in as an argument, or"
        " move what is needed into the lower room or one below both. ROOMS has the order, tests/test_rooms.py"
    )
    unused = sorted(arrow for arrow in EXCEPTIONS if arrow[0] == folder and arrow not in against)
    assert not unused, f"no longer needed, delete from EXCEPTIONS in tests/test_rooms.py: {unused}"


@pytest.mark.parametrize("folder", [folder for folder in ROOMS if folder != "."])
def test_the_page_lists_the_same_rooms(folder: str) -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert listed(page, folder) == list(ROOMS[folder]), (
        f"the table of {folder}/ in {PAGE} and ROOMS in tests/test_rooms.py differ: a row a room, same order"
    )


@pytest.mark.parametrize("package", ["launch", *(folder for folder in ROOMS if folder != ".")])
def test_the_tests_have_the_shape_of_the_packages(package: str) -> None:
    folders = {path.name for path in (ROOT / "tests" / package).iterdir() if any(path.glob("test_*.py"))}
    strange = sorted(folders - rooms_in(ROOT / package))
    assert not strange, (
        f"tests/{package}/ has folders {strange}, which {package}/ has not: move the tests after it"
    )


def test_the_page_names_files_that_exist() -> None:
    """Above its worked examples, whose files are made for the reader only."""
    page = (ROOT / PAGE).read_text(encoding="utf-8").partition("\n## Adding")[0]
    named = set(
        re.findall(r"`((?:launch|pipelines|trainer|embeddings|tests|configs|benchmarks)/[\w./]*)`", page)
    )
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert len(named) > 40
    assert not missing, f"{PAGE} names what is no longer there: {missing}"


@pytest.mark.parametrize(
    ("package", "code", "folder", "rooms"),
    [
        ("trainer.data", "from trainer.loop.loop import run", "trainer", {"loop"}),
        ("trainer.data", "from trainer import loop, log", "trainer", {"loop", "log"}),
        ("trainer.data", "import trainer.loop.loop as loop", "trainer", {"loop"}),
        ("trainer.data", "def f():\n    import trainer.assemble", "trainer", {"assemble"}),
        ("trainer.data", "from ..loop import loop", "trainer", {"loop"}),
        ("trainer.data", "from .rows import Row", "trainer", {"data"}),
        ("trainer", "from . import assemble", "trainer", {"assemble"}),
        ("trainer.model.ops", "from ..branch import Branch", "trainer/model", {"branch"}),
        ("trainer.model", "from trainer.model import frame", "trainer/model", {"frame"}),
        ("trainer.data", "import torch.utils.data\nfrom embeddings.groups import x", "trainer", set()),
        ("embeddings", "from trainer import data", ".", {"trainer"}),
    ],
)
def test_arrows_are_seen(package: str, code: str, folder: str, rooms: set[str]) -> None:
    assert arrows(ast.parse(code), package, folder, ROOMS[folder]) == rooms


def test_upward_is_against_the_order() -> None:
    assert upward("b", {"a", "b", "c"}, ("a", "b", "c")) == ["a"]
