"""Reading the manifest of a snapshot's version without trusting it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from embeddings.errors import SnapshotError
from embeddings.ids.rules import part_name
from embeddings.lookup.stored import row_bytes
from trainer.config.mistakes import problems_of, with_unique_keys, words_of
from trainer.config.similarity import USER
from trainer.data.similarity.encoding import similarity_features
from trainer.data.similarity.similarity import keys_of, vectors_used
from trainer.sealed_folder import DIGEST, MANIFEST, raise_of_store
from trainer.snapshot.manifest import (
    DENSE,
    RECORDED,
    SEAL,
    UNCERTAINTY,
    CodeFile,
    SnapshotManifest,
    VocabularyFile,
    table_stem,
)
from trainer.snapshot.vector_entries import own_paths, problem_of_vectors

_LARGEST_MANIFEST = 16 << 20


def read_manifest(path: Path) -> SnapshotManifest:
    """Read and check a version's manifest, nothing else.

    Raises:
        SnapshotError: it is damaged, malformed, or contradicts itself. OSError: the store cannot be read now.
    """
    file = path / MANIFEST
    try:
        for name, limit in ((MANIFEST, _LARGEST_MANIFEST), (DIGEST, 128)):
            if (path / name).is_symlink() or (path / name).stat().st_size > limit:
                raise SnapshotError(path / name, f"larger than {limit:,} bytes, or no plain file")
        text = SEAL.read(path).decode()
        tree = json.loads(text, object_pairs_hook=with_unique_keys, parse_constant=_no_constant)
        manifest = SnapshotManifest.model_validate(tree)
    except ValidationError:
        first = problems_of(SnapshotManifest, tree)[0]
        place = ".".join(map(str, first["loc"]))
        advice = "; export the run again with this software" if place == "version" else ""
        raise SnapshotError(file, f"{place}: {words_of(first)}{advice}") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise_of_store(file, error)
        raise SnapshotError(file, f"unreadable: {error}") from None
    problem = _problem(manifest)
    if problem:
        raise SnapshotError(file, problem)
    return manifest


def _problem(manifest: SnapshotManifest) -> str:
    """What parts of a manifest say that others contradict; empty if nothing does."""
    base, branches = manifest.base, manifest.config.model.all_branches()
    used = {group for branch in branches.values() for group in branch.roles.used()}
    described = [entry.feature for entry in manifest.vocabulary_files]
    inputs = manifest.table_inputs
    of_requests = {name for name, given in inputs.items() if given.side == "context"}
    problems = {
        "its groups are not those of its config": set(manifest.groups) != used,
        "its features are not those of its tables": _has_other_rows(manifest),
        "its inputs are not those of its recorded requests": (
            sorted(manifest.recorded_features) != sorted(inputs.keys() - of_requests)
            or sorted(manifest.recorded_context) != sorted(of_requests)
        ),
        "its tables are not those of its encoders": _has_other_parts(manifest),
        "it builds on a version that is not older": base is not None and base.number >= manifest.number,
        "its uncertainty is not that of its tasks": (
            manifest.uncertainty is not None and tuple(manifest.uncertainty.tasks) != manifest.tasks
        ),
        "its vocabularies are not those of its features": (
            len(set(described)) < len(described) or not all(map(manifest.vocabularies.get, described))
        ),
    }
    first = next((problem for problem, there in problems.items() if there), "")
    first = (
        first or _problem_of_ids(manifest) or _problem_of_search(manifest) or _problem_of_vectors(manifest)
    )
    return first or _problem_of_files(manifest)


def _problem_of_vectors(manifest: SnapshotManifest) -> str:
    """Vectors must be those that its config compares, of what its requests have."""
    data = manifest.config.data
    if other := set(keys_of(data)) - {*manifest.inputs, USER}:
        return f"its vectors are of {other.pop()}, which its requests do not have"
    sizes = {each.path: each.bytes for each in manifest.files}
    return problem_of_vectors(manifest.vectors, vectors_used(data), sizes, manifest.base is not None)


def _has_other_rows(manifest: SnapshotManifest) -> bool:
    """Whether tables have other rows than their features, or than the maps of their ids."""
    rows: dict[str, set[int]] = {}
    rules = manifest.config.id_rules
    for group, tables in manifest.groups.items():
        for table in tables:
            own = rules.get(part_name(table.feature, group)) or rules.get(table.feature)
            if own is not None and table.rows != own.rows:
                return True
            of_feature = table.rows if own is None else rules[table.feature].rows
            rows.setdefault(table.feature, set()).add(of_feature)
    return rows != {name: {count} for name, count in manifest.features.items()}


def _has_other_parts(manifest: SnapshotManifest) -> bool:
    """Whether the table of an encoded number or of a similarity has other rows than the encoder has ids."""
    rows = {part: info.rows for part, info in similarity_features(manifest.config.data).items()}
    for name, given in manifest.inputs.items():
        rows |= {} if given.encoder is None else given.encoder.parts(name)
    return any(manifest.features.get(part, count) != count for part, count in rows.items())


def _problem_of_ids(manifest: SnapshotManifest) -> str:
    """Maps must be those of the config, and have its rules."""
    rules = manifest.config.id_rules
    if rules.keys() != manifest.ids.keys():
        return "its maps of ids are not those of its config"
    for name, entry in manifest.ids.items():
        if (entry.capacity, entry.shared_rows) != (rules[name].capacity, rules[name].shared_rows):
            return f"its map of {name} has another capacity than its config"
    return ""


def _problem_of_search(manifest: SnapshotManifest) -> str:
    """A part that is a table's rows must be as that table is."""
    tables = {table_stem(g, p): t for g, ts in manifest.groups.items() for p, t in enumerate(ts)}
    for branch, part in manifest.search.items():
        for entry in part.tables:
            mine = (entry.feature, entry.rows, entry.dim, entry.dtype, entry.changed)
            table = tables.get(entry.table)
            if entry.table and (
                table is None or mine != (table.feature, table.rows, table.dim, table.dtype, None)
            ):
                return f"the search of {branch} names {entry.table}, which is another table or none"
    return ""


def _problem_of_files(manifest: SnapshotManifest) -> str:
    """Files must be those of the matrices, no more and no fewer, and large enough."""
    listed = manifest.listed()
    apart: tuple[CodeFile | VocabularyFile, ...] = (*manifest.code, *manifest.vocabulary_files)
    if len(listed) != len(manifest.files) + len(apart):
        return "lists a file twice"
    wanted = {DENSE, RECORDED, *(entry.path for entry in apart)}
    wanted |= {UNCERTAINTY} if manifest.uncertainty else set()
    for stem, _, stored in manifest.matrices():
        wanted.add(f"{stem}.safetensors")
        if stored.changed is not None:
            wanted.add(f"{stem}.ids.safetensors")
            if manifest.base is None:
                return f"{stem} is a delta, but there is no base"
        entry = listed.get(f"{stem}.safetensors")
        if entry is not None and entry.bytes < stored.held * row_bytes(stored.dim, stored.dtype):
            return f"{stem} has more rows than its file has room for"
    for path, name, ids in manifest.id_maps():
        wanted.add(path)
        if ids.base_live is not None and manifest.base is None:
            return f"its map of {name} is a delta, but there is no base"
        if path in listed and listed[path].bytes < ids.size:
            return f"{path} has more ids than its file has room for"
    wanted |= own_paths(manifest.vectors)
    different = sorted(wanted ^ listed.keys())
    return f"{different[0]} is not listed, or should not be there" if different else ""


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
