"""What the site makes of docstrings."""

from __future__ import annotations

import pytest

pytest.importorskip("griffe", reason="`make install-dev` installs it")

from docs.tools.docstrings import _escaped, separate_names


def test_each_name_of_a_section_has_a_line() -> None:
    text = """First: a, b; c: d.

Attributes:
    scorer, vectors: of stage two, encoded; raw: the vectors
        before that; *args: the rest.
    other: one; two.

Args: none
    x, y: text"""
    assert (
        separate_names(text)
        == """First: a, b; c: d.

Attributes:
    scorer: of stage two, encoded
    vectors: of stage two, encoded
    raw: the vectors before that
    *args: the rest.
    other: one; two.

Args: none
    x, y: text"""
    )


def test_code_in_a_docstring_is_not_escaped() -> None:
    text = "<a, b> in words\n\n    run <name>\n    and <other>\n\n`<c>`\n\nArgs:\n    a: <d> / 2"
    expected = text.replace("<a, b>", "&lt;a, b>").replace("<d>", "&lt;d>")
    assert _escaped(text) == expected
