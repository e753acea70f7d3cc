"""Names in manifests that become paths: none leads out of its folder, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from embeddings.errors import CheckpointError, DataError
from tests.helpers.logs import small_log
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint.unsharded import PlainManifest
from trainer.log.names import name_problem, path_problem
from trainer.log.schema import read_manifest

BAD = ["../../x", "/x", "", ".", "..", "a\\b", "a\0b", "a\nb", "a/b", "x" * 300]
Tree = dict[str, Any]


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_told_from_good_ones(name: str) -> None:
    assert name_problem(name) and not name_problem("Part of a.b:c-ä_1")
    assert bool(path_problem(name)) == (name != "a/b")
    assert path_problem(f"x/{name}" if name != "a/b" else "a//b")


def write(log: Path, tree: Tree) -> None:
    text = json.dumps(tree)
    (log / "manifest.json").write_text(text, encoding="utf-8")
    (log / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest(), encoding="utf-8")


def rename_split(tree: Tree, name: str) -> None:
    tree["splits"][name] = tree["splits"].pop("test")


def rename_feature(tree: Tree, name: str) -> None:
    tree["features"][name] = tree["features"].pop("item_id")


def add_context(tree: Tree, name: str) -> None:
    tree["context"][name] = {"rows": 2}


def rename_file(tree: Tree, name: str) -> None:
    tree["splits"]["test"]["files"][0]["path"] = f"test/{name}" if name != "a/b" else "../a"


@pytest.mark.parametrize("change", [rename_split, rename_feature, add_context, rename_file])
@pytest.mark.parametrize("name", BAD)
def test_a_log_that_names_files_elsewhere_is_refused(
    name: str, change: Callable[[Tree, str], None], log: Path
) -> None:
    tree = json.loads((log / "manifest.json").read_text(encoding="utf-8"))
    change(tree, name)
    changed = log.with_name("changed")
    changed.mkdir(exist_ok=True)
    write(changed, tree)
    with pytest.raises(DataError, match=r"(?s)changed/manifest\.json: .*(file|folder|longer)"):
        read_manifest(changed)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("names") / "log")


def test_no_split_is_called_as_something_else_in_a_log(log: Path, tmp_path: Path) -> None:
    tree = json.loads((log / "manifest.json").read_text(encoding="utf-8"))
    rename_split(tree, "vocab")
    write(tmp_path, tree)
    with pytest.raises(DataError, match="a split is called 'vocab'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a\0"])
def test_plain_tables_and_checkpoints_name_their_own_files_only(name: str, tmp_path: Path) -> None:
    table = {"feature": "f", "group": "g", "rows": 1, "dim": 1}
    tree: Tree = {
        "step": 0,
        "tables": {"g__f": table},
        "dense": {},
        "vocabularies": {},
        "rows": {},
        "config": {},
    }
    entry = {"bytes": 0, "sha256": "0" * 64}
    PlainManifest.model_validate({**tree, "files": {"tables/g__f.safetensors": entry}})
    for bad in (
        {**tree, "files": {name: entry}},
        {**tree, "files": {}, "tables": {name: table}},
        {**tree, "files": {}, "tables": {"t": {**table, "feature": name}}},
        {**tree, "files": {}, "vocabularies": {name: ""}},
    ):
        with pytest.raises(ValidationError):
            PlainManifest.model_validate(bad)
    for files in ({name: entry}, {"a": 7}, {"a": {"bytes": "1", "sha256": ""}}):
        text = json.dumps({"files": files})
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        (tmp_path / "manifest.sha256").write_text(f"{digest}  manifest.json\n", encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"manifest\.json: (names a file|holds no file list)"):
            checkpoint_files.read_manifest(tmp_path)
