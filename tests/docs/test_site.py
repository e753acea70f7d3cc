"""The site builds without a warning, and without the network."""

from __future__ import annotations

import ast
import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT

pytest.importorskip("mkdocs", reason="`make install-dev` installs it")
# Theme and plugins may name their authors' pages, which a reader opens; nothing may be fetched from them.
_FETCHED = re.compile(r"""(?:src|<link[^>]*href)=["']?(https?:)?//""")


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    variables["https_proxy"] = variables["http_proxy"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    pages = {str(page.relative_to(tmp_path)): page.read_text("utf-8") for page in tmp_path.rglob("*.html")}
    # Guides and pages of docs/ that no navigation names, the readme, measurements, rooms, and linked files.
    sources = [page.stem for page in (ROOT / "docs").glob("*.md")]
    assert {f"{name}.html" for name in sources} <= set(pages)
    assert {"start.html", "benchmarks/step.html", "api/trainer/loop.html", "api/embeddings.html"} <= set(
        pages
    )
    assert 'href="configs/complete_journey.toml.html"' in pages["ingest.html"]
    assert (
        'href="../images/' not in pages["serving.html"] and 'src="images/serve.png"' in pages["serving.html"]
    )
    assert 'href="checkpoints.html"' in pages["start.html"]
    loop = pages["api/trainer/loop.html"]
    module = ast.parse((ROOT / "trainer/loop/interrupts.py").read_text(encoding="utf-8"))
    first_words = " ".join((ast.get_docstring(module) or "").split()[:4])
    assert first_words and html.escape(first_words, quote=False) in loop and "Source code in" in loop
    private = re.compile(r'id="[\w.]+\._[a-z]')
    assert not [name for name, page in pages.items() if private.search(page)]
    assert "&lt;query, key&gt; / sqrt(D)" in pages["api/trainer/model/retrieve.html"]
    assert "The objectives, by their names" in pages["api/trainer/objectives.html"]
    # What a browser would take for a tag that there is not, and signs that were escaped twice.
    unknown = re.compile(r"<(?:name|query|user|part)\b|&amp;lt;")
    assert not [name for name, page in pages.items() if unknown.search(page)]
    assert not [name for name, page in pages.items() if _FETCHED.search(page)]
