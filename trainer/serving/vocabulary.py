"""Raw values of clients as the ids of training: the log's vocabularies in memory, as sorted arrays.

A vocabulary takes its values and 16 bytes each. Values of text are found by a hash, and each that is found is
compared, so that answers are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.row_group import Ints
from trainer.log.arrow import is_text
from trainer.log.vocabulary import read_values, text_of
from trainer.serving.request import RequestError
from trainer.snapshot import Snapshot
from trainer.snapshot.vocabularies import vocabulary_paths

Hashes = npt.NDArray[np.uint64]
# Odd, so that no byte of a text is lost; and what spreads a sum over all bits.
_BASE, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_CHUNK_BYTES, _CHUNK_ROWS = 1 << 20, 1 << 16
# Most bytes of the raw values in one column of a request.
_MOST_TEXT = 64 << 20


class Vocabulary:
    """Value -> id: the first value's id is 1, and 0 is what no value has.

    Args:
        values: no null among them and none twice; int64 or large_string.
    """

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self.text = not pa.types.is_integer(values.type)
        self.longest = pc.max(pc.binary_length(values)).as_py() or 0 if self.text else 8
        keys = _hashes(values) if self.text else values.to_numpy()
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        # Values that share a hash, of which there is hardly ever one, are looked up in a dictionary.
        twins = self._keys[1:][self._keys[1:] == self._keys[:-1]] if self.text else self._keys[:0]
        places = self._order[np.isin(self._keys, twins)].tolist()
        self._twins = {values[at].as_py(): at + 1 for at in places}

    def __len__(self) -> int:
        return len(self.values)

    @property
    def kind(self) -> str:
        return "text" if self.text else "integers"

    def ids(self, raw: pa.Array) -> Ints:
        """Ids of values without nulls, of the vocabulary's type; 0 for those that it does not hold."""
        if not len(self) or not len(raw):
            return np.zeros(len(raw), dtype=np.int64)
        keys = _hashes(raw) if self.text else raw.to_numpy()
        at = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        same = self._keys[at] == keys
        places = self._order[at]
        ids: Ints = np.zeros(len(raw), dtype=np.int64)
        ids[same] = places[same] + 1
        if self.text:
            hits = np.flatnonzero(same)
            equal = pc.equal(raw.take(pa.array(hits)), self.values.take(pa.array(places[hits])))
            for hit in hits[~equal.to_numpy(zero_copy_only=False)].tolist():
                ids[hit] = self._twins.get(raw[hit].as_py(), 0)
        return ids


def vocabularies_of(snapshot: Snapshot, log: Path | None) -> dict[str, Vocabulary]:
    """Feature -> vocabulary: those that a snapshot has with it, or else those of a log.

    Raises:
        DataError: one is missing or damaged, or not the one that the model was trained with.
    """
    manifest = snapshot.manifest
    files = {entry.feature: snapshot.path / entry.path for entry in manifest.vocabulary_files}
    if not files and log is not None:
        files = vocabulary_paths(log, manifest.inputs, manifest.vocabularies)
    digests = manifest.vocabularies
    return {name: Vocabulary(read_values(file, digests[name])) for name, file in files.items()}


class Translation:
    """Turns the raw values of one request into ids, and counts by place those that no vocabulary holds.

    Args:
        users: names of the users of the stored histories, where their log has names.
    """

    def __init__(self, vocabularies: Mapping[str, Vocabulary], users: Vocabulary | None = None) -> None:
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
            problem = "the server has no vocabulary of this feature, so it reads no raw values of it"
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


def _other_type(raw: pa.Array, known: Vocabulary) -> str:
    """What to send instead of values of a type that a vocabulary does not have."""
    sent = raw[0].as_py() if len(raw) else None
    if known.text and isinstance(sent, int) and not isinstance(sent, bool):
        return f'its values are text: send "{sent}", not {sent}'
    if not known.text and isinstance(sent, str) and sent.lstrip("-").isdigit():
        return f'its values are integers: send {int(sent)}, not "{sent[:80]}"'
    return f"holds {raw.type}, and its values are {known.kind}"


def ids_of(known: Vocabulary, raw: pa.Array, place: str) -> Ints:
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


def _hashes(values: pa.Array) -> Hashes:
    """A hash of 64 bits for every text of a large_string array without nulls."""
    if not len(values):
        return np.zeros(0, dtype=np.uint64)
    offsets, data = text_of(values)
    content = np.frombuffer(data, dtype=np.uint8)
    hashes = np.empty(len(values), dtype=np.uint64)
    start = 0
    while start < len(values):
        # Some megabytes at a time: every byte takes 24 of them while it is summed up.
        most = int(np.searchsorted(offsets, offsets[start] + _CHUNK_BYTES, side="right")) - 1
        stop = min(max(most, start + 1), start + _CHUNK_ROWS, len(values))
        bounds = offsets[start : stop + 1]
        hashes[start:stop] = _hash(content[bounds[0] : bounds[-1]], bounds - bounds[0])
        start = stop
    return hashes


def _hash(content: npt.NDArray[np.uint8], offsets: Ints) -> Hashes:
    """The sum of every byte times a power of its place, modulo 2^64."""
    lengths = np.diff(offsets)
    longest = int(lengths.max())
    powers = np.multiply.accumulate(np.full(longest + 1, _BASE, dtype=np.uint64))
    place = np.arange(content.size) - np.repeat(offsets[:-1], lengths)
    sums = np.zeros(content.size + 1, dtype=np.uint64)
    np.cumsum((content.astype(np.uint64) + np.uint64(1)) * powers[place], out=sums[1:])
    hashes: Hashes = (sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64)) * _SPREAD
    return hashes
