"""`make bench`: pages get what their commands print, and keep what they had where a command fails."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.refresh import refresh

PAGE = """# Title

Prose.

<!-- measured by: python -c "print('a' + 'b'); open(r'{json}', 'w').write('kept')" -->
```text
old
```
<!-- drawn by: python -c "open(r'OUT', 'w').write(open(r'{json}').read())" -->

<!-- measured by: python -c "print('half'); raise SystemExit(3)" -->
```text
stays
```

<!-- measured by: python -c "print(r'read {log}')" -->
```text
```
"""


def test_places_are_renewed_one_by_one(tmp_path: Path) -> None:
    page, drawn = tmp_path / "page.md", tmp_path / "drawn"
    page.write_text(PAGE.replace("OUT", str(drawn)))
    log, results = tmp_path / "log", tmp_path / "results"
    assert refresh(page, log, results) == 1
    expected = PAGE.replace("OUT", str(drawn)).replace("```text\nold", "```text\nab")
    expected = expected.replace("```text\n```\n", "```text\nread LOG\n```\n")
    assert page.read_text() == expected
    assert drawn.read_text() == (results / "page.json").read_text() == "kept"


def test_a_plot_that_fails_leaves_its_figures_too(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("open(r'OUT', 'w').write", "int"))
    assert refresh(page, tmp_path, tmp_path) == 2
    assert "```text\nold" in page.read_text()
