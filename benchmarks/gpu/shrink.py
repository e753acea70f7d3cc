"""Pack a CUDA wheel for a machine that takes few bytes: code for one GPU architecture, well compressed.

    python -m benchmarks.gpu.shrink WHEEL FOLDER [--arch 90] [--without LIBRARY...]

A shared library of a wheel holds fat binaries: a header, then one entry for each architecture. Entries for
other architectures are taken out and the rest of the fat binary's place is filled with zeros, so that no
offset in the library changes and the zeros compress to nothing. FOLDER gets archives `NAME.tar.xz`, which are
unpacked side by side.

Libraries named with --without keep none of their device code. They still have to load, since the package
registers their operators at its import, but those operators cannot be called.
"""

from __future__ import annotations

import argparse
import lzma
import mmap
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Layout as in CUDA 12 and 13: magic, version, header's size, payload's size; an entry has its own header.
_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ")
_ARCH_AT = 28
_PTX, _MACHINE_CODE = 1, 2
_LARGEST_ENTRY_HEADER = 4096
# What a trainer with fused optimizers never calls, of fbgemm_gpu.
UNUSED = (
    "fbgemm_gpu_tbe_inference",
    "fbgemm_gpu_tbe_training_backward_gwd",
    "fbgemm_gpu_tbe_training_backward_vbe",
)
# The largest libraries are archives of their own, so that cores pack and unpack them at the same time.
_APART_BYTES = 150 << 20


def fat_binaries(data: mmap.mmap | bytes) -> Iterator[tuple[int, int, int]]:
    """-> (start, first entry, end) of each fat binary."""
    at = data.find(_MAGIC)
    while at != -1 and at + _HEADER.size <= len(data):
        _, _, header, size = _HEADER.unpack_from(data, at)
        end = at + header + size
        if header == _HEADER.size and end <= len(data):
            yield at, at + header, end
            at = data.find(_MAGIC, end)
        else:
            # The same four bytes by chance.
            at = data.find(_MAGIC, at + 4)


def entries(data: mmap.mmap | bytes, first: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """-> (kind, architecture, bytes) of each entry.

    Raises:
        ValueError: the bytes are no entries.
    """
    while first < end:
        kind, _, header, payload = _ENTRY.unpack_from(data, first)
        size = header + payload
        if kind not in (_PTX, _MACHINE_CODE) or header > _LARGEST_ENTRY_HEADER or first + size > end:
            raise ValueError(f"no entry of a fat binary at byte {first}")
        yield kind, struct.unpack_from("<I", data, first + _ARCH_AT)[0], bytes(data[first : first + size])
        first += size


def keep_one(library: Path, arch: int | None) -> tuple[int, int]:
    """Leave a library the machine code of one architecture (none: of no one); -> entries kept, bytes
    freed.
    """
    kept = freed = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for start, first, end in list(fat_binaries(data)):
            wanted = [
                code for kind, of, code in entries(data, first, end) if (kind, of) == (_MACHINE_CODE, arch)
            ]
            packed = b"".join(wanted)
            data[first:end] = packed.ljust(end - first, b"\0")
            # The header says how much of it counts.
            struct.pack_into("<Q", data, start + 8, len(packed))
            kept, freed = kept + len(wanted), freed + end - first - len(packed)
    return kept, freed


def pack(tree: Path, files: Sequence[Path], archive: Path) -> None:
    # Kernels are much alike over a long distance; calls in x86 code are alike as absolute addresses.
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 96 << 20}]
    part = archive.with_suffix(".part")
    with (
        lzma.open(part, "wb", check=lzma.CHECK_SHA256, filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for path in files:
            tar.add(path, str(path.relative_to(tree)), recursive=False)
    part.replace(archive)


def shrink(wheel: Path, folder: Path, arch: int, without: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        zipfile.ZipFile(wheel).extractall(tree)
        apart: dict[str, list[Path]] = {}
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            if path.suffix == ".so":
                kept, freed = keep_one(path, None if path.stem in without else arch)
                print(
                    f"{path.name}: {kept} entries for sm_{arch} kept, {freed / 2**20:.0f} MiB freed",
                    flush=True,
                )
            large = path.stat().st_size > _APART_BYTES
            apart.setdefault(path.stem if large else "rest", []).append(path)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: pack(tree, apart[name], folder / f"{name}.tar.xz"), apart))
    sizes = [path.stat().st_size for path in folder.glob("*.tar.xz")]
    print(f"{len(sizes)} archives, together {sum(sizes) / 2**20:.1f} MiB")


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="90 for sm_90")
    parser.add_argument("--without", nargs="*", default=UNUSED, metavar="LIBRARY")
    given = parser.parse_args(words)
    shrink(given.wheel, given.folder, given.arch, given.without)


if __name__ == "__main__":
    main(sys.argv[1:])
