"""A setting that is a place: a path, or an address such as `s3://bucket/log`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

from embeddings.errors import ConfigError
from trainer.storage import is_remote, place
from trainer.storage.addresses import address_of


def _place(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        found = place(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return found if hasattr(found, "fs") and is_remote(found) else handler(found)


def _text(value: str) -> str:
    try:
        address_of(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


def place_of(setting: str, text: str) -> Path:
    """The place that a setting names, for whoever is about to go there.

    Raises:
        ConfigError: naming the setting; a package is missing, or there can be no such place.
    """
    try:
        return place(text)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None


def _local(value: str) -> str:
    if address_of(_text(value)) is not None:
        raise ValueError(f"{value}: must be a folder of this machine, since files in it are mapped")
    return value


PlaceSetting = Annotated[Path, WrapValidator(_place), PlainSerializer(str, return_type=str)]
PlaceText = Annotated[str, AfterValidator(_text)]
"""The same as it was written, where nothing may be needed to read it: it may be empty, or a pattern."""
LocalText = Annotated[str, AfterValidator(_local)]
"""A path of this machine, where an address would make a folder of that name."""
