"""What an address may look like, and credentials in one, which are refused and never repeated."""

from __future__ import annotations

import re
from typing import NamedTuple

from embeddings.errors import ConfigError

S3, LOCAL = ("s3", "s3a"), ("file", "local")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
# `s3:/bucket` and `s3:bucket` would be local folders, made in silence: nobody means them.
_SLIP = re.compile(r"(s3a?|gs|gcs|az|abfss?|hdfs|https?|memory|file):(?!//)/?", re.IGNORECASE)
# `user:password@` of any address, whatever stands before an @ of a bucket or a web address, however many
# slashes it has, and what signs a request. A port is no password.
_USER = re.compile(
    r"((?:://)|(?<![a-z0-9+.-])(?:s3a?|gs|gcs):/{0,3}(?!/))[^/@\s:'\",]*:(?!\d{2,5}/)[^@\s'\",]*@"
    r"|((?<![a-z0-9+.-])(?:(?:s3a?|gs|gcs):/{0,3}|https?://))[^/@\s'\",]+@",
    re.IGNORECASE,
)
_SIGNED = re.compile(
    r"(?<=[?&])((?:[^\s=&]*(?:signature|credential|secret|token|passw|access.?key|api.?key)[^\s=&]*|sig)=)"
    r"[^\s&'\"]+",
    re.IGNORECASE,
)


# Addresses of SQLAlchemy, as `postgresql+psycopg://host/db`.
_DATABASE = re.compile(r"(postgres|postgresql|mysql|mariadb|oracle|mssql|sqlite)(\+\w+)?://", re.IGNORECASE)


class Address(NamedTuple):
    """`protocol://host` and `rest`, which begins with a slash or is empty; the protocol in small letters."""

    protocol: str
    host: str
    rest: str


def address_of(text: str) -> Address | None:
    """The parts of an address; None where a text is a path of this machine.

    Raises:
        ConfigError: it holds credentials, or is neither.
    """
    refuse_secrets(text)
    match = _URL.fullmatch(text)
    if match is None:
        if slip := _SLIP.match(text):
            right = f"{slip[1].lower()}://{'/' * (slip[1].lower() == 'file')}{text[slip.end() :]}"
            raise ConfigError(
                f"{text}: an address has two slashes: {right}; a local folder of that name is ./{text}"
            )
        if "::" in text and "://" in text:
            raise ConfigError(f"{text}: addresses inside addresses are not read; write PROTOCOL://PLACE")
        return None
    found = Address(match[1].lower(), match[2], match[3])
    if found.protocol in S3 and not found.host:
        raise ConfigError(f"{text}: names no bucket; write it as s3://BUCKET/FOLDER")
    if not found.host and not found.rest.strip("/") and found.protocol not in LOCAL:
        raise ConfigError(f"{text}: names no place; write it as {found.protocol}://PLACE/FOLDER")
    if found.protocol in S3 and ":" in found.host and not found.host.startswith("arn:"):
        # Which may be a key and its secret, so it is not repeated.
        raise ConfigError(
            f"{found.protocol}://...: a bucket's name has no colon; an endpoint is given by "
            "AWS_ENDPOINT_URL, and credentials by AWS_PROFILE, see docs/object_storage.md"
        )
    if found.protocol in LOCAL and found.host not in ("", "localhost"):
        raise ConfigError(
            f"{text}: names a machine called {found.host!r}; a path of this one is file:///FOLDER or FOLDER"
        )
    return found


def refuse_secrets(text: str) -> None:
    """Raises ConfigError where an address in a text has credentials in it."""
    if without_secrets(text) != text:
        by = "by AWS_PROFILE, the other variables of AWS, or ~/.aws (see docs/object_storage.md)"
        if _DATABASE.search(text):
            by = "to the database's driver, in ~/.pgpass or ~/.my.cnf (see docs/tuning.md)"
        raise ConfigError(
            f"{without_secrets(text)}: credentials in an address would end up in logs and configs; leave "
            f"them out, and give them {by}"
        )


def without_secrets(text: str) -> str:
    """A text with the credentials of every address in it blotted out."""
    if ":" not in text:
        return text
    text = _USER.sub(lambda found: f"{found[1] or found[2]}***@", text)
    return _SIGNED.sub(r"\1***", text) if "://" in text else text
