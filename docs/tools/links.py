"""Links and headings of Markdown files, as the repository view and the site understand them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from posixpath import normpath

# Code shows brackets that are no links: fenced blocks and spans are passed over.
_CODE = r"^(?P<fence>```+|~~~+).*?^(?P=fence)[^\n]*$|(?P<ticks>`+)[^`].*?(?P=ticks)"
_START = r"""(?P<start>\]\(|\b(?:src|srcset|href)=")"""
_LINK = re.compile(rf"{_CODE}|{_START}(?P<target>[^)\s\"]+)", re.MULTILINE | re.DOTALL)
_TAG = re.compile(r"(?P<ticks>`+)[^`].*?(?P=ticks)|<(?=[a-zA-Z/!?])", re.DOTALL)
_HEADING = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[^\n]*$|^#+ (?P<text>[^\n]*)$", re.MULTILINE | re.DOTALL
)


def targets(text: str) -> Iterator[str]:
    """The targets of all links and images, but those of other sites."""
    for match in _LINK.finditer(text):
        if match["target"] and "://" not in match["target"]:
            yield match["target"]


def replace_targets(text: str, replace: Callable[[str], str]) -> str:
    """The same text with another target for each of `targets`."""

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        return match[0] if not target or "://" in target else match["start"] + replace(target)

    return _LINK.sub(replaced, text)


def resolve(page: str, target: str) -> tuple[str, str]:
    """The file, by its path in the repository, and the anchor that a link of `page` leads to."""
    path, _, anchor = target.partition("#")
    return (normpath(str(PurePosixPath(page).parent / path)) if path else page), anchor


def escaped(text: str) -> str:
    """The same Markdown, in which `<name>` outside of code is text: both views would take it for HTML."""
    return _TAG.sub(lambda match: match[0] if match["ticks"] else "&lt;", text)


def anchors(text: str) -> set[str]:
    """The anchors of a file's headings; `#` of a code block starts no heading."""
    return {anchor(match["text"]) for match in _HEADING.finditer(text) if match["text"]}


def anchor(heading: str, separator: str = "-") -> str:
    """What a heading is linked by: lower case, no punctuation, and `-` for every space.

    The site's table of contents is given this function, so that both views have the same anchors.
    """
    words = re.sub(r"\]\([^)]*\)", "", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", separator)
