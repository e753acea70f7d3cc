"""The encoders by their kinds: a new one is a file beside this one and a name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.mnse import Mnse
from trainer.log.encoders.number import RawNumber

AnyEncoder = Annotated[Mnse | Buckets | RawNumber, Field(discriminator="kind")]
