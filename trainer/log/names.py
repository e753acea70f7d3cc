"""Names that become files: a manifest may come from anywhere, and must not lead anybody out of its folder."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

_LONGEST = 200  # bytes; with what is put around it, a file name may have 255


def name_problem(name: str) -> str:
    """Why a name cannot be that of one file or folder; empty if it can."""
    if name in ("", ".", ".."):
        return "is no name of a file"
    odd = next((sign for sign in name if sign in "/\\" or not sign.isprintable()), "")
    if odd:
        return f"holds {odd!r}, so it is no name of a file"
    return f"is longer than {_LONGEST} bytes" if len(name.encode(errors="replace")) > _LONGEST else ""


def path_problem(path: str, folder: str = "its folder") -> str:
    """Why a relative path is refused; empty if it stays inside of the `folder` that it is relative to."""
    if path.startswith("/") or "\\" in path or ".." in path.split("/"):
        return f"leaves {folder}"
    return next((problem for part in path.split("/") if (problem := name_problem(part))), "")


def _checked_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"{name!r} {problem}")
    return name


def _checked_path(path: str) -> str:
    if problem := path_problem(path):
        raise ValueError(f"path {path!r} {problem}")
    return path


FileName = Annotated[str, AfterValidator(_checked_name)]
InnerPath = Annotated[str, AfterValidator(_checked_path)]
