"""Every link between the repository's pages leads to a file, and to a heading where it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.tools.links import anchors, replace_targets, resolve, targets

ROOT = Path(__file__).resolve().parents[2]
NAMED = ("launch", "pipelines", "trainer", "embeddings", "benchmarks", "tests")
PAGES = sorted(
    str(page.relative_to(ROOT)) for folder in ("docs", "benchmarks") for page in (ROOT / folder).rglob("*.md")
)


def _broken(root: Path, page: str) -> list[str]:
    broken = []
    for target in targets((root / page).read_text(encoding="utf-8")):
        path, anchor = resolve(page, target)
        there = (root / path).exists() and not path.startswith("..")
        if not there or (anchor and anchor not in anchors((root / path).read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    assert not _broken(ROOT, page)


def test_broken_links_are_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (tmp_path / "outside.md").touch()
    (root / "README.md").write_text("# Two commands\n[a](docs/b.md#types) [b](docs) [c](docs/c.md)\n")
    (root / "docs/b.md").write_text(
        "# Types\n[a](../README.md#two-commands) [b](#types) [c](#kinds) [d](b.md#kinds)\n"
        "`[e](code.md)` and ``[f](`code.md)`` ![g](none.png) [h](https://example.org/none.md)\n"
        "```\n[i](code.md)\n# Kinds\n```\n[j](../../outside.md)"
    )
    assert _broken(root, "README.md") == ["docs/c.md"]
    assert _broken(root, "docs/b.md") == ["#kinds", "b.md#kinds", "none.png", "../../outside.md"]


def test_anchors_are_those_of_the_repository_view() -> None:
    text = "# Two commands\n## What it is, and why: `a.b` (now)\n```sh\n# no heading\n```\n"
    text += "### See [here](x.md) - or `[groups.<name>]`\n"
    assert anchors(text) == {"two-commands", "what-it-is-and-why-ab-now", "see-here---or-groupsname"}


def test_targets_are_replaced_in_text_alone() -> None:
    text = "[a](x.md) `[b](x.md)` [c](https://example.org)\n```\n[d](x.md)\n```\n"
    text += '![e](y.png "It")<img src="z.svg">'
    replaced = text.replace("[a](x.md)", "[a](X.MD)").replace("y.png", "Y.PNG").replace("z.svg", "Z.SVG")
    assert replace_targets(text, str.upper) == replaced


def test_files_and_tests_that_pages_name_are_there() -> None:
    """Names are no links: `test_reader.py::test_x`, `trainer/loop/loop.py`, `trainer.loop.loop.Trainer`."""
    files = [path for folder in NAMED for path in (ROOT / folder).rglob("*.py")]
    paths = {str(path.relative_to(ROOT)) for path in files}
    tests = {
        name
        for path in files
        if path.name.startswith("test_")
        for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    missing = []
    for page in ["README.md", *PAGES]:
        text = (ROOT / page).read_text(encoding="utf-8")
        # Files that a worked example writes; the tests of these examples write them, too.
        written = set(re.findall(r"^# ([\w/]+\.py)|the whole\s+file, `([\w/]+\.py)`", text, re.M))
        there_then = paths | {path for pair in written for path in pair if path}
        for path in re.findall(rf"\b((?:{'|'.join(NAMED)})/[\w/]+\.py|test_\w+\.py)", text):
            missing += [] if any(f"/{each}".endswith(f"/{path}") for each in there_then) else [(page, path)]
        for dotted in re.findall(r"\b(?:launch|pipelines|trainer|embeddings)(?:\.\w+)+", text):
            parts = dotted.split(".")
            names = ["/".join(parts[:length]) for length in range(2, len(parts) + 1)]
            there = any(f"{name}.py" in there_then for name in names) or (ROOT / names[-1]).exists()
            missing += [] if there else [(page, dotted)]
        for name, cut in re.findall(r"::(test_\w+)(\.\.\.)?", text):
            there = any(each.startswith(name) for each in tests) if cut else name in tests
            missing += [] if there else [(page, name)]
    assert not missing
