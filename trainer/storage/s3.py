"""S3 by s3fs: bounded retries, and errors as those of a file system, which say what to do.

Credentials, endpoint and region come from where all tools of AWS look for them: environment variables
(AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION and so on), ~/.aws, the role of the machine.
Nothing here has settings of its own for them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import botocore.session
import fsspec
import s3fs
from botocore import exceptions as boto
from s3fs.core import S3File, set_custom_error_handler
from upath.implementations.cloud import S3Path
from upath.registry import get_upath_class, register_implementation

from trainer.storage.addresses import without_secrets

# Of one request, with random waits of up to 1, 2, 4, 8 and 16 s between them. AWS_MAX_ATTEMPTS, or
# max_attempts of the profile, says otherwise. Of botocore's modes this is "legacy": "standard" has a quota of
# retries for all requests of a process, which a store that asks to slow down uses up at once.
ATTEMPTS = 6
_TRANSIENT = (
    *(ConnectionError, TimeoutError, aiohttp.ClientError),
    *(boto.IncompleteReadError, boto.HTTPClientError),
)
_MODE = "legacy"
_DENIED = "the credentials in use must be allowed to list, read, write and delete here"
_NO_BUCKET = "no such bucket; make it first, or look at AWS_ENDPOINT_URL and AWS_REGION"
# Code of the store -> number of the system's error, and what to do.
_CODES: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"),
        (errno.EACCES, "the credentials have expired; renew them and run the same command again"),
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"),
        (errno.EACCES, "the store does not know these credentials; look at AWS_PROFILE and ~/.aws"),
    ),
    "AccessDenied": (errno.EACCES, f"access denied; {_DENIED}"),
    "AllAccessDisabled": (errno.EACCES, f"access denied; {_DENIED}"),
    # To a request without an answer's body the store says no more than this.
    "403": (
        errno.EACCES,
        "refused (403): the credentials are wrong or expired, or have no rights, or the clock of this "
        f"machine is wrong; {_DENIED}",
    ),
    "400": (errno.EACCES, "refused (400): the credentials have expired, or the bucket is in another region"),
    **dict.fromkeys(
        (
            *("301", "307", "PermanentRedirect", "TemporaryRedirect"),
            *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        ),
        (errno.EREMCHG, "the bucket is in another region; set AWS_REGION to that one"),
    ),
    "InvalidObjectState": (errno.EACCES, "the object is archived; restore it, or move it to another class"),
    # Not "no such object", as somebody else has deleted it, and not what is looked for.
    "NoSuchUpload": (
        errno.EIO,
        "the upload in parts was ended by somebody else; see the bucket's lifecycle rules, and try again",
    ),
    # Not "no such file": that would be taken for a run or a log that is not there yet.
    "NoSuchBucket": (errno.ENXIO, _NO_BUCKET),
    "NoSuchKey": (errno.ENOENT, "no such object"),
    "404": (errno.ENOENT, "no such object"),
    "RequestTimeTooSkewed": (errno.EACCES, "the clock of this machine is wrong; set it"),
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "503", "RequestLimitExceeded", "Throttling"),
        (errno.EBUSY, "the store asks to slow down, again after all retries; try later"),
    ),
    **dict.fromkeys(
        ("InternalError", "500", "502", "504"),
        (errno.EIO, "the store failed, again after all retries; try later"),
    ),
}
# The same for what is no answer of the store.
_KINDS: tuple[tuple[tuple[type[BaseException], ...], int, str], ...] = (
    (
        (boto.NoCredentialsError, boto.PartialCredentialsError),
        errno.EACCES,
        "no credentials found; set AWS_PROFILE, or the other variables of AWS, see docs/object_storage.md",
    ),
    (
        (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ConnectionError),
        errno.EHOSTUNREACH,
        "the store cannot be reached, after all retries ({}); see AWS_ENDPOINT_URL",
    ),
    (_TRANSIENT, errno.EIO, "the connection broke, again after all retries ({})"),
    ((FileNotFoundError,), errno.ENOENT, "no such object"),
    ((FileExistsError,), errno.EEXIST, "is there already"),
    ((PermissionError,), errno.EACCES, f"{{}}; {_DENIED}"),
)


class _File(S3File):  # type: ignore[misc]
    """A file whose errors are told plainly."""

    def _fetch_range(self, start: int, end: int) -> Any:
        with plainly(self.path):
            return super()._fetch_range(start, end)


class ObjectStore(s3fs.S3FileSystem):  # type: ignore[misc]
    """s3fs without a cache of listings, which would hide what other machines write."""

    retries = 3
    connect_timeout = 10
    read_timeout = 30

    def __init__(self, *args: Any, **options: Any) -> None:
        retries: dict[str, Any] = {"mode": _MODE}
        if not botocore.session.get_session().get_config_variable("max_attempts"):
            retries["total_max_attempts"] = ATTEMPTS
        options.setdefault("config_kwargs", {"retries": retries})
        super().__init__(*args, **{"use_listings_cache": False, **options})

    async def _call_s3(self, method: str, *args: Any, **options: Any) -> Any:
        key = options.get("Key") or options.get("Prefix") or ""
        with plainly(f"{options.get('Bucket', '')}/{key}"):
            return await super()._call_s3(method, *args, **options)

    async def _info(self, path: str, *args: Any, **options: Any) -> Any:
        with plainly(path):
            try:
                return await super()._info(path, *args, **options)
            except FileNotFoundError:
                bucket, key, _ = self.split_path(path)
                if bucket and not key:
                    raise OSError(errno.ENXIO, _NO_BUCKET, f"s3://{bucket}") from None
                raise

    async def _cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        with plainly(path):
            return await super()._cat_file(path, *args, **options)

    async def _get_file(self, rpath: str, lpath: str, *args: Any, **options: Any) -> Any:
        with plainly(rpath):
            return await super()._get_file(rpath, lpath, *args, **options)

    async def _mkdir(self, path: str, *args: Any, **options: Any) -> None:
        """A store has no folders, and buckets are not made on the way."""

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As `_mkdir`."""

    async def _rmdir(self, path: str) -> None:
        """As `_mkdir`."""

    async def _bulk_delete(self, pathlist: list[str], **options: Any) -> list[str]:
        """Delete up to 1,000 objects; s3fs's own does not look at those that the store could not delete."""
        if pathlist:
            bucket, parts = self.split_path(pathlist[0])[0], map(self.split_path, pathlist)
            what = {"Objects": [{"Key": key} for _, key, _ in parts], "Quiet": True}
            answer = await self._call_s3("delete_objects", options, Bucket=bucket, Delete=what)
            for problem in answer.get("Errors", ()):
                # Once more, with all attempts of a request, and with its error.
                await self._call_s3("delete_object", Bucket=bucket, Key=problem["Key"])
        return []

    # fsspec's own take whatever goes wrong for "no".
    async def _isfile(self, path: str) -> bool:
        return await self._kind(path) == "file"

    async def _isdir(self, path: str) -> bool:
        return await self._kind(path) == "directory"

    async def _exists(self, path: str) -> bool:
        return bool(await self._kind(path))

    async def _kind(self, path: str) -> str:
        try:
            return str((await self._info(path))["type"])
        except FileNotFoundError:
            return ""

    call_s3 = fsspec.asyn.sync_wrapper(_call_s3)
    isfile = fsspec.asyn.sync_wrapper(_isfile)
    isdir = fsspec.asyn.sync_wrapper(_isdir)
    exists = fsspec.asyn.sync_wrapper(_exists)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        bucket, key, _ = self.split_path(path)
        if not key:
            raise IsADirectoryError(errno.EISDIR, "is a bucket, not an object in one", f"s3://{bucket}")
        size = block_size or self.default_block_size
        if "r" not in mode:
            size = max(size, S3File.part_min)
        options.pop("requester_pays", None)
        kind = options.pop("cache_type", None) or self.default_cache_type
        return _File(self, path, mode, block_size=size, cache_type=kind, **options)


class StorePath(S3Path):
    """A place in S3."""

    def rmdir(self, recursive: bool = False) -> None:
        """As of pathlib, which deletes empty folders only: there are none in a store. UPath's deletes all."""
        raise OSError(errno.ENOTEMPTY, "a store has no empty folders", str(self))


def register() -> None:
    """Have `s3://` mean `ObjectStore` in this process."""
    for protocol in ("s3", "s3a"):
        fsspec.register_implementation(protocol, ObjectStore, clobber=True)
        if get_upath_class(protocol) is not StorePath:
            register_implementation(protocol, StorePath, clobber=True)
    set_custom_error_handler(lambda error: isinstance(error, _TRANSIENT))


@contextmanager
def plainly(path: str) -> Iterator[None]:
    """Errors of the store as those of a file system: what, where, what to do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.strerror:
            raise
        raise _plain(error, path) from None
    except (boto.BotoCoreError, aiohttp.ClientError, TimeoutError) as error:
        raise _plain(error, path) from None


def _plain(error: BaseException, path: str) -> OSError:
    # Chained by s3fs: what the store has answered.
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    where = "s3://" + path.removeprefix("s3://").strip("/")
    if code in _CODES:
        number, text = _CODES[code]
        named = "" if code.isdecimal() or code in text else f" ({code})"
        return OSError(number, text + named, where)
    for kinds, number, text in _KINDS:
        if isinstance(error, kinds):
            return OSError(number, text.format(_line(error)), where)
    number, line = error.errno if isinstance(error, OSError) and error.errno else errno.EIO, _line(error)
    return OSError(number, line if not code or code in line else f"{line} ({code})", where)


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return without_secrets(" ".join(text.split()))[:300] or type(error).__name__
