"""Text becomes a place: `runs/demo` a local path, `s3://bucket/demo` a place in a store.

A local path stays a plain `pathlib.Path`, with all that a file system of this machine promises. Every other
place is a `upath.UPath`. It is no `Path`, so that whatever would need a local file under it (`os.fspath`,
memory maps) fails at once instead of making a folder called `s3:`.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

from embeddings.errors import ConfigError
from trainer.storage.addresses import LOCAL, S3, Address, address_of

if TYPE_CHECKING:
    # What is annotated so uses only the methods that both have.
    Place = Path
else:
    Place = Any

_INSTALL = {
    **dict.fromkeys(S3, "`make install-s3`, or `pip install --no-deps -r requirements/s3.txt`"),
    **dict.fromkeys(("gcs", "gs"), "`pip install gcsfs universal-pathlib`"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "`pip install adlfs universal-pathlib`"),
}


def place(given: str | Path) -> Path:
    """The place that a text names.

    Raises:
        ConfigError: the address holds credentials, nothing knows its kind, or a package is missing.
    """
    if not isinstance(given, str | PurePath):
        return given
    address = address_of(str(given))
    if address is None:
        return Path(given)
    if address.protocol in LOCAL:
        return Path(address.rest)
    return _remote(address)


def _remote(address: Address) -> Path:
    protocol, host, rest = address
    shown = f"{protocol}://{host}{rest}"
    try:
        from upath import UPath

        if protocol in S3:
            from trainer.storage.s3 import register

            register()
        found = UPath(shown.rstrip("/"))
        assert found.fs is not None
    except ImportError as error:
        # fsspec says a sentence of its own instead of the name where it knows the package.
        missing = (
            f"{error.name} is not installed" if error.name else f"a package for {protocol}:// is missing"
        )
        how = f"the package of fsspec for {protocol}://, and `pip install universal-pathlib`"
        raise ConfigError(f"{shown}: {missing}: {_INSTALL.get(protocol, how)}") from None
    except (ValueError, OSError) as error:
        problem = f"is no place that can be read or written ({str(error).partition(chr(10))[0]})"
        # Of packages that are there, it says itself what they want.
        how = "a store of S3 is s3://BUCKET/FOLDER"
        if protocol in _INSTALL:
            how = _INSTALL[protocol] if "not known" in str(error) else "see the documentation of its package"
        raise ConfigError(f"{shown}: {problem}; {how}") from None
    if host not in str(found):
        # Some packages take it for an option of their own, and a config or a manifest would lose it.
        raise ConfigError(
            f"{shown}: the package for {protocol}:// keeps no more of it than {found}; write that, and give "
            "the rest as the package wants it: by fsspec's configuration (~/.config/fsspec), or by its own "
            "variables, such as AZURE_STORAGE_ACCOUNT_NAME"
        )
    return cast(Path, found)


def is_remote(path: Path) -> bool:
    """Whether a place lies in a store, and not in a file system of this machine."""
    return not isinstance(path, PurePath)


def store_of(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote place, and how that calls it."""
    remote = cast(Any, path)
    return remote.fs, remote.path
