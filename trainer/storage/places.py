"""Text becomes a place: `runs/demo` a local path, `s3://bucket/demo` a place in a store.

A local path stays a plain `pathlib.Path`, with all that a file system of this machine promises. Every other
place is a `upath.UPath`. It is no `Path`, so that whatever would need a local file under it (`os.fspath`,
memory maps) fails at once instead of making a folder called `s3:`.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

from embeddings.errors import ConfigError

if TYPE_CHECKING:
    # What is annotated so uses only the methods that both have.
    Place = Path
else:
    Place = Any

_STORES = ("s3", "s3a")
# `s3:/bucket` and `s3:bucket` would be local folders, made in silence: nobody means them.
_SLIP = re.compile(r"^(s3a?|gs|gcs|az|abfss?):(?!//)/?", re.IGNORECASE)
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)$", re.DOTALL)
# `user:password@` of any address, whatever stands before an @ of a bucket, and signed addresses.
_SECRET = re.compile(
    r"(?<=://)[^/@\s:]*:[^/@\s]*(?:/[^@\s/]*)*@"
    r"|(?<=s3://)[^@\s/]+@|(?<=s3a://)[^@\s/]+@"
    r"|(?<=[?&])[^\s=&]*(?:signature|credential|secret|token|password|accesskey)[^\s=&]*=[^\s&'\"]+",
    re.IGNORECASE,
)
_INSTALL = {
    "s3": "`make install-s3`, or `pip install --no-deps -r requirements/s3.txt`",
    "gcs": "`pip install gcsfs`",
    "gs": "`pip install gcsfs`",
    "az": "`pip install adlfs`",
    "abfs": "`pip install adlfs`",
}


def place(given: str | Path) -> Path:
    """The place that a text names.

    Raises:
        ConfigError: the address holds credentials, nothing knows its kind, or a package is missing.
    """
    match = _URL.match(given) if isinstance(given, str) else None
    if match is None:
        slip = _SLIP.match(str(given))
        if slip:
            address = f"{slip[1].lower()}://{str(given)[slip.end() :]}"
            raise ConfigError(
                f"{given}: an address has two slashes: {address}; a local folder of that name is ./{given}"
            )
        return Path(given) if isinstance(given, str) else given
    protocol, host, rest = match[1].lower(), match[2], match[3]
    refuse_secrets(cast(str, given))
    if protocol == "file":
        return Path(host + rest)
    if protocol in _STORES and not host:
        raise ConfigError(f"{given}: names no bucket; write it as s3://BUCKET/FOLDER")
    return _remote(f"{protocol}://{host}{rest}", protocol)


def _remote(address: str, protocol: str) -> Path:
    kind = "s3" if protocol in _STORES else protocol
    try:
        from upath import UPath

        if kind == "s3":
            from trainer.storage.s3 import register

            register()
        found = UPath(address.rstrip("/"))
        assert found.fs is not None
    except ImportError as error:
        how = _INSTALL.get(
            kind, f"the package of fsspec for {protocol}://, and `pip install universal-pathlib`"
        )
        # fsspec says a sentence of its own instead of the name where it knows the package.
        missing = f"{error.name} is not installed" if error.name else f"a package for {kind}:// is missing"
        raise ConfigError(f"{address}: {missing}: {how}") from None
    except ValueError as error:
        raise ConfigError(
            f"{address}: is no place that can be read or written ({error}); a store of S3 is s3://BUCKET/FOLDER"
        ) from None
    return cast(Path, found)


def refuse_secrets(text: str) -> None:
    """Raises ConfigError where an address in a text has credentials in it."""
    if "://" in text and _SECRET.search(text):
        raise ConfigError(
            f"{without_secrets(text)}: credentials in an address would end up in logs and configs; leave "
            "them out, and give them by AWS_PROFILE, the other variables of AWS, or ~/.aws (see "
            "docs/object_storage.md)"
        )


def is_remote(path: Path) -> bool:
    """Whether a place lies in a store, and not in a file system of this machine."""
    return not isinstance(path, PurePath)


def store_of(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote place, and how that calls it."""
    remote = cast(Any, path)
    return remote.fs, remote.path


def without_secrets(text: str) -> str:
    """A text with the credentials of every address in it blotted out."""
    return _SECRET.sub("***@", text) if "://" in text else text
