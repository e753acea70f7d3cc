"""Hooks of MkDocs: what the site has besides the pages of docs/.

* README.md and the pages of benchmarks/ become pages. So does every other file of the repository that a page
  links to. A link such as `../configs/dare.toml` therefore works in the repository's own view and on the
  site, and the site needs no other server.
* Each room of the packages gets a page made from the docstrings of its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.tools.links import replace_targets, resolve, targets

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "embeddings", "pipelines")
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh", "Makefile": "make", "Dockerfile": "dockerfile"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: pages that it does not name, measurements, and the API."""
    nav: list[Any] = config.nav or []
    config.nav = nav
    named = str(nav)
    (guides,) = (entry["Guides"] for entry in nav if "Guides" in entry)
    guides += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    nav.append({"Measurements": [page for page in _repository_pages() if page.startswith("benchmarks/")]})
    for package in PACKAGES:
        rooms = [{room.replace("/", "."): f"api/{room}.md"} for room in _rooms(package)]
        nav.append({f"API: {package}": rooms})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + _repository_pages()
    linked = {
        resolve(page, target)[0]
        for page in pages
        for target in targets((ROOT / page).read_text(encoding="utf-8"))
    }
    for path in sorted(linked | set(pages)):
        if not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(_file(path, config))
    for package in PACKAGES:
        for room in _rooms(package):
            files.append(File.generated(config, f"api/{room}.md", content=_api_page(room)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links, which are written for the repository, into links between the site's pages."""
    if page.file.abs_src_path is None:
        return markdown  # it is made here, not from a file
    source = str(Path(page.file.abs_src_path).relative_to(ROOT))
    folder = str(Path(page.file.src_uri).parent)

    def on_site(target: str) -> str:
        path, anchor = resolve(source, target)
        if not (ROOT / path).is_file():
            return target  # MkDocs warns of it
        link = relpath(_site_path(path), folder)
        return f"{link}#{anchor}" if anchor else link

    return replace_targets(markdown, on_site)


def _repository_pages() -> list[str]:
    """The Markdown pages outside of docs/: README.md and the measurements."""
    pages = sorted((ROOT / "benchmarks").rglob("*.md"))
    return ["README.md", *(str(page.relative_to(ROOT)) for page in pages)]


def _site_path(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path == "README.md":
        return "start.md"  # README.md would be the home page, which index.md is
    if path.startswith("docs/") or path.endswith((".md", ".png", ".svg")):
        return path.removeprefix("docs/")
    return f"{path}.md"


def _file(path: str, config: MkDocsConfig) -> File:
    """A file of the repository as one of the site: text that is no page becomes one that shows it."""
    site_path = _site_path(path)
    if site_path in (path, "start.md"):
        return File.generated(config, site_path, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    name = Path(path).name
    language = _LANGUAGES.get(name) or _LANGUAGES.get(Path(path).suffix, "text")
    content = f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language}\n{text}\n````\n"
    return File.generated(config, site_path, content=content)


def _rooms(package: str) -> Iterator[str]:
    """Every folder of a package that has public modules, the package first."""
    for folder in sorted({module.parent for module in (ROOT / package).rglob("*.py")}):
        room = str(folder.relative_to(ROOT))
        if _modules(room):
            yield room


def _modules(room: str) -> list[str]:
    names = sorted(path.stem for path in (ROOT / room).glob("*.py"))
    return [name for name in names if not name.startswith("_")]


def _api_page(room: str) -> str:
    """The page of one folder: a heading and the docstrings for each of its modules."""
    dotted = room.replace("/", ".")
    parts = [f"# {dotted}\n"]
    for module in _modules(room):
        parts.append(f"## {dotted}.{module}\n\n::: {dotted}.{module}\n")
    return "\n".join(parts)
