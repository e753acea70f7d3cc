"""A traced scorer as an ONNX model, with its tables inside or in files beside it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from trainer.model.ops.traced import ranked_by_standard
from trainer.portable.building import Portable
from trainer.portable.tracing import traced
from trainer.snapshot.chain import read_chain

MODEL = "model.onnx"
# Of tables whose bytes are no file of the snapshot: codes of int8, and rows of a delta.
OWN_TABLES = "tables/own.bin"
_ALIGNED = 4096


def write_onnx(folder: Path, portable: Portable, inside: int) -> None:
    """Write `model.onnx`, and the files of tables that it names.

    Args:
        inside: bytes of tables that the model file may hold itself; where there are more of them, all tables
            are beside it.
    """
    with ranked_by_standard():
        graph = traced(portable.scorer, portable.signature)
    model = converted(graph, portable.signature.names, [each.name for each in portable.signature.outputs])
    for value, described in zip(model.graph.inputs, portable.signature.inputs, strict=True):
        value.shape = ir.Shape([axis.least if axis.fixed else axis.name for axis in described.axes])
    if sum(_bytes(model, name) for name in _buffers(portable)) > inside:
        _move_out(model, portable, folder)
    ir.save(model, folder / MODEL)


def converted(graph: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """An exported program in ONNX's operators."""
    with _quiet():
        program = torch.onnx.export(
            graph,
            (),
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def _buffers(portable: Portable) -> list[str]:
    tables = portable.scorer.tables
    own = dict(tables.named_buffers())
    return [f"tables.{name}" for name in own]


def _bytes(model: ir.Model, name: str) -> int:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.nbytes


def _move_out(model: ir.Model, portable: Portable, folder: Path) -> None:
    """Have the model name files instead of holding its tables."""
    (folder / "tables").mkdir()
    places = dict(_stored(portable))
    buffers = {f"tables.{buffer}": name for name, buffer in portable.scorer.tables.parts()}
    rest = []
    for name in _buffers(portable):
        if (stored := places.get(buffers.get(name, ""))) is None:
            rest.append(name)
            continue
        file, offset = stored
        location = f"tables/{file.name}"
        shared(file, folder / location)
        _refer(model, name, location, offset)
    if rest:
        with (folder / OWN_TABLES).open("wb") as out:
            for name in rest:
                out.seek(-(-out.tell() // _ALIGNED) * _ALIGNED)
                begin, tensor = out.tell(), model.graph.initializers[name].const_value
                assert tensor is not None
                out.write(tensor.tobytes())
                _refer(model, name, OWN_TABLES, begin)


def _refer(model: ir.Model, name: str, location: str, offset: int) -> None:
    value = model.graph.initializers[name]
    before: Any = value.const_value
    value.const_value = ir.ExternalTensor(
        location, offset, before.nbytes, before.dtype, shape=before.shape, name=name
    )


def _stored(portable: Portable) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Tables that are one tensor of one file of the snapshot, and where in it that begins."""
    snapshot = portable.snapshot
    for stem, name, stored in read_chain(snapshot.path).manifest.matrices():
        if stem.startswith("tables/") and stored.base_rows is None and stored.dtype != "int8":
            file = snapshot.path / f"{stem}.safetensors"
            with file.open("rb") as content:
                size = int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(size))
            yield name, (file, 8 + size + header[name]["data_offsets"][0])


def shared(file: Path, to: Path) -> None:
    """The same bytes under another name, or where the disk is another one, a copy."""
    with suppress(OSError):
        os.link(file, to)
        return
    try:
        shutil.copyfile(file, to)
    except OSError as error:
        # Its own message names the file that was read, also where there is no room for the other.
        raise OSError(error.errno, f"a copy of {file}: {error.strerror}", str(to)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it lacks, and on its own parts that will change."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
