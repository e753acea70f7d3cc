"""Whose vectors a file has: raw values of a feature become ids of the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embeddings.errors import ConfigError, DataError, hint_of
from trainer.config.similarity import USER
from trainer.log.arrow import is_text
from trainer.log.hashed_ids import hash_text
from trainer.log.known_values import known_values
from trainer.log.schema import VOCABULARIES, FeatureInfo, LogManifest
from trainer.storage.fetched import shared_cache

Ints = npt.NDArray[np.int64]
# Raw values without nulls -> ids of the log, and whether the log has such a value.
Translation = Callable[[pa.Array], tuple[Ints, npt.NDArray[np.bool_]]]
Side = Literal["items", "requests", "users"]
_NO_VOCABULARY: Final = "the log has no vocabulary of it, so these must be its ids: integers"


@dataclass(frozen=True)
class Key:
    """What has vectors, in a log.

    Attributes:
        name: of the feature, or `user_id`; side: who carries it: behaviors and candidates, requests, or the
            users themselves.
        info: of the feature; None for users. stem: of its vocabulary's file.
    """

    name: str
    side: Side
    info: FeatureInfo | None
    stem: str = ""

    @staticmethod
    def of(manifest: LogManifest, section: str, name: str) -> Key:
        """The key that a section of [data.vectors] names.

        Raises:
            ConfigError: the log has no such feature, or one that has no single id.
        """
        where = f"data.vectors.{section}.key = {name!r}"
        if (found := manifest.features.get(name)) is not None:
            key = Key(name, "items", found, name)
        elif (found := manifest.context.get(name)) is not None:
            key = Key(name, "requests", found, f"context_{name}")
        elif name != USER:
            known = [*manifest.features, *manifest.context, USER]
            hint = hint_of(name, known, f"it has {', '.join(known)}")
            raise ConfigError(f"{where}: the log has no such feature; {hint}")
        elif USER in manifest.named:
            # A service is not told the log's number of such a user.
            raise ConfigError(
                f"{where}: the log's users have text for names; ingest the user as a context feature, too, "
                "and name that one"
            )
        else:
            return Key(name, "users", None)
        if found.multi:
            raise ConfigError(
                f"{where}: it has any number of ids, but a vector is of one; name another feature"
            )
        if found.encoder is not None:
            raise ConfigError(f"{where}: it is a number, and vectors are of ids; name another feature")
        return key

    @property
    def counted(self) -> int:
        """How many ids the log has of it; 0: nobody knows."""
        return 0 if self.info is None or self.info.raw else self.info.rows - 1

    def translation(self, log: Path, kind: pa.DataType, file: Path, column: str) -> Translation:
        """How values of a file's column become ids.

        Raises:
            DataError: they are of another type than the log's values.
        """
        text = is_text(kind)
        if not text and not pa.types.is_integer(kind):
            raise DataError(f"holds {kind}; ids are integers or text", file=file, column=column)
        if self.info is not None and self.info.vocabulary:
            return self._by_vocabulary(log, text, file, column)
        if self.info is not None and self.info.hashed and text:
            return lambda values: (hash_text(values), np.ones(len(values), dtype=np.bool_))
        if text:
            why = "the log's are integers" if self.info is None or self.info.raw else _NO_VOCABULARY
            raise DataError(f"holds text, and {self.name} has none: {why}", file=file, column=column)
        return self._by_id

    def _by_id(self, values: pa.Array) -> tuple[Ints, npt.NDArray[np.bool_]]:
        ids = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if self.info is None or self.info.raw:
            return ids, np.ones(ids.size, dtype=np.bool_)
        # The id 0 is that of no value.
        return ids, (ids > 0) & (ids < self.info.rows)

    def _by_vocabulary(self, log: Path, text: bool, file: Path, column: str) -> Translation:
        assert self.info is not None
        source = log / VOCABULARIES / f"{self.stem}.parquet"
        known = known_values(source, self.info.vocabulary, shared_cache, of_log=True)
        if text != known.text:
            mine, theirs = ("text", "integers") if text else ("integers", "text")
            problem = f"holds {mine}, and the raw values of {self.name} in the log are {theirs}"
            raise DataError(f"{problem}; write them alike", file=file, column=column)

        def translated(values: pa.Array) -> tuple[Ints, npt.NDArray[np.bool_]]:
            ids = known.ids(values.cast(pa.large_string() if text else pa.int64()))
            return ids, ids > 0

        return translated
