"""What the site makes of docstrings before it reads them: one name an item, and `<name>` is text.

A docstring may say `a: this; b: that` or `a, b: both` under `Args:` or `Attributes:`, which people read well
and the parser takes for one name. mkdocs.yml names this file as an extension of griffe, which collects them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

from docs.tools.links import escaped

_SECTIONS = ("Args:", "Attributes:")
_NAMES = r"\*{0,2}\w+(?:, \*{0,2}\w+)*"
_ITEM = re.compile(rf"(?P<names>{_NAMES}): (?P<text>.*)", re.DOTALL)
_NEXT = re.compile(rf"; (?={_NAMES}: )")


class SeparateNames(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _escaped(separate_names(obj.docstring.value))


def _escaped(docstring: str) -> str:
    """`escaped`, but for paragraphs that are indented as a whole, which are code."""
    parts = re.split(r"(\n\s*?\n)", docstring)
    return "".join(part if re.fullmatch(r"( {4}.*\n?)+", part) else escaped(part) for part in parts)


def separate_names(docstring: str) -> str:
    """The docstring with one line for each name that `Args:` and `Attributes:` describe."""
    lines: list[str] = []
    items: list[str] = []
    inside = False
    for line in [*docstring.split("\n"), "end"]:
        indent = len(line) - len(line.lstrip())
        if inside and line.strip() and indent:
            # A line that is indented further goes on with the item above it.
            if indent > 4 and items:
                items[-1] += " " + line.strip()
            else:
                items.append(line.strip())
            continue
        if inside and items:
            lines += [f"    {each}" for item in items for each in _one_name_each(item)]
        items, inside = [], line in _SECTIONS
        lines.append(line)
    return "\n".join(lines[:-1])


def _one_name_each(item: str) -> list[str]:
    each = []
    for part in _NEXT.split(item):
        match = _ITEM.fullmatch(part)
        if match is None:
            return [item]
        each += [f"{name}: {match['text']}" for name in match["names"].split(", ")]
    return each
