"""Raw values of clients as the ids of training, by the vocabularies of a snapshot or of a log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.log.arrow import is_text
from trainer.log.bags import Ints
from trainer.log.known_values import KnownValues, known_values
from trainer.serving.request import RequestError
from trainer.snapshot import Snapshot
from trainer.snapshot.vocabularies import vocabulary_paths

# Most bytes of the raw values in one column of a request.
_MOST_TEXT = 64 << 20


def vocabularies_of(
    snapshot: Snapshot, log: Path | None, cache: Path | None = None
) -> dict[str, KnownValues]:
    """Feature -> vocabulary: those that a snapshot has with it, or else those of a log.

    Args:
        cache: see `known_values`.

    Raises:
        DataError: one is missing or damaged, or not the one that the model was trained with.
    """
    manifest = snapshot.manifest
    files = {entry.feature: snapshot.path / entry.path for entry in manifest.vocabulary_files}
    if not files and log is not None:
        files = vocabulary_paths(log, manifest.inputs, manifest.vocabularies)
    digests = manifest.vocabularies
    return {name: known_values(file, digests[name], cache) for name, file in files.items()}


class Translation:
    """Turns the raw values of one request into ids, and counts by place those that no vocabulary holds.

    Args:
        users: names of the users of the stored histories, where their log has names.
    """

    def __init__(self, vocabularies: Mapping[str, KnownValues], users: KnownValues | None = None) -> None:
        self.vocabularies, self.users = vocabularies, users
        self.unknown: dict[str, int] = {}

    def ids(self, feature: str, raw: pa.Array, part: str, place: str) -> Ints:
        """Ids of the raw values of a feature.

        Args:
            part: under which unknown ones are counted; place: of the values in the body, for messages.

        Raises:
            RequestError: 422 where the feature has no vocabulary or one of another type.
        """
        known = self.vocabularies.get(feature)
        if known is None:
            problem = (
                "the server has no vocabulary of this feature, so it reads no raw values of it; without "
                '"ids" a request holds ids'
            )
            raise RequestError(422, f"{place}: {problem}")
        places: Ints | None = None
        if pa.types.is_dictionary(raw.type):
            # Each value that is referred to is looked up once.
            used, places = np.unique(raw.indices.to_numpy(zero_copy_only=False), return_inverse=True)
            values = raw.dictionary
            check_text(values, place)
            raw = (values.cast(pa.large_string()) if is_text(values.type) else values).take(pa.array(used))
        if pa.types.is_null(raw.type) and not len(raw):
            return np.zeros(0, dtype=np.int64)
        text = is_text(raw.type)
        if text != known.text or not (text or pa.types.is_integer(raw.type)):
            raise RequestError(422, f"{place}: {_other_type(raw, known)}")
        ids = ids_of(known, raw, place)
        if places is not None:
            ids = ids[places]
        missing = int((ids == 0).sum())
        if missing:
            self.unknown[part] = self.unknown.get(part, 0) + missing
        return ids


def _other_type(raw: pa.Array, known: KnownValues) -> str:
    """What to send instead of values of a type that a vocabulary does not have."""
    sent = raw[0].as_py() if len(raw) else None
    if known.text and isinstance(sent, int) and not isinstance(sent, bool):
        return f'its values are text: send "{sent}", not {sent}'
    if not known.text and isinstance(sent, str) and sent.lstrip("-").isdigit():
        return f'its values are integers: send {int(sent)}, not "{sent[:80]}"'
    return f"holds {raw.type}, and its values are {known.kind}"


def ids_of(known: KnownValues, raw: pa.Array, place: str) -> Ints:
    """Ids of raw values of the vocabulary's kind; 0 for those that it does not hold.

    Raises:
        RequestError: 422 for an integer beyond 64 bits, 413 for too much text.
    """
    if not known.text:
        try:
            return known.ids(raw.cast(pa.int64()))
        except pa.ArrowInvalid:
            raise RequestError(422, f"{place}: holds an integer beyond 64 bits with a sign") from None
    check_text(raw, place)
    text = raw.cast(pa.large_string())
    # A text that is longer than every value is unknown without a look-up.
    fits = pc.binary_length(text).to_numpy(zero_copy_only=False) <= known.longest
    ids: Ints = np.zeros(len(text), dtype=np.int64)
    ids[fits] = known.ids(text.filter(pa.array(fits)))
    return ids


def check_text(values: pa.Array, place: str) -> None:
    """Refuses text that is far longer than what it lies in: views may refer to one text a million times."""
    if not pa.types.is_string_view(values.type) or not len(values):
        return
    # A view is its length and 12 other bytes.
    views = np.frombuffer(values.buffers()[1], dtype=np.uint32).reshape(-1, 4)
    size = int(views[values.offset : values.offset + len(values), 0].sum(dtype=np.int64))
    if size > _MOST_TEXT:
        raise RequestError(413, f"{place}: more than {_MOST_TEXT:,} bytes of text")
