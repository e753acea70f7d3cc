"""A setting that is a place: a path, or an address such as `s3://bucket/log`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

from trainer.storage import is_remote, place


def _place(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    found = place(value) if isinstance(value, str) else value
    return found if hasattr(found, "fs") and is_remote(found) else handler(found)


PlaceSetting = Annotated[Path, WrapValidator(_place), PlainSerializer(str, return_type=str)]
