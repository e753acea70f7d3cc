"""Ids that come and go, as clients send them: 64-bit integers as numbers or text, or the text they hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.log.arrow import is_text
from trainer.log.bags import Bags, Ints
from trainer.log.hashed_ids import hash_text
from trainer.serving.request import Needs, Request, RequestError
from trainer.serving.vocabulary import check_text
from trainer.snapshot.id_maps import LayeredIds

_WHOLE = r"^-?[0-9]{1,19}$"


def raw_ids(given: pa.Array, hashes: bool, place: str) -> Ints:
    """Ids of the log for what a client sent.

    Args:
        given: integers or text, also as a dictionary.
        hashes: whether text is what ids are hashes of. Else it spells an integer, for clients whose own
            numbers of JSON are exact to 2^53 alone.
        place: of the values in the body, for messages.

    Raises:
        RequestError: 422 for anything that is no integer of 64 bits; 413 for too much text.
    """
    if pa.types.is_dictionary(given.type):
        check_text(given.dictionary, place)
        # Each value that is referred to is looked at once.
        used, places = np.unique(given.indices.to_numpy(zero_copy_only=False), return_inverse=True)
        values = given.dictionary
        values = (values.cast(pa.large_string()) if is_text(values.type) else values).take(pa.array(used))
        return raw_ids(values, hashes, place)[places]
    if pa.types.is_null(given.type) and not len(given):
        return np.zeros(0, dtype=np.int64)
    if is_text(given.type):
        check_text(given, place)
        text = given.cast(pa.large_string())
        if hashes:
            return hash_text(text)
        other = pc.index(pc.match_substring_regex(text, _WHOLE), False).as_py()
        if other >= 0:
            spelled = repr(text[other].as_py()[:40])
            hint = 'text that ids are hashes of needs "ids": "raw"'
            raise RequestError(
                422, f"{place}[{other}]: {spelled} is no integer; ids of this feature are; {hint}"
            )
        given = text
    elif not pa.types.is_integer(given.type):
        raise RequestError(422, f"{place}: holds {given.type}, expected integers or text")
    try:
        # A copy, which does not keep the body.
        ids: Ints = given.cast(pa.int64()).to_numpy(zero_copy_only=False).copy()
    except pa.ArrowInvalid:
        raise RequestError(422, f"{place}: holds an integer beyond 64 bits with a sign") from None
    return ids


def with_unknown(request: Request, needs: Needs, id_maps: Mapping[str, LayeredIds]) -> Request:
    """The request, with those ids counted that have no row of their own, by place."""
    if not id_maps:
        return request
    unknown = dict(request.unknown)
    sides = (request.candidates, request.history.features, request.context)
    parts = (needs.candidates, needs.history, needs.context)
    for part, given in zip(parts, sides, strict=True):
        for name, bags in given.items():
            if name in id_maps and (missing := _missing(bags, id_maps[name])):
                # Raw values that are in no vocabulary are among them, with the id 0.
                unknown[f"{part.name}.{name}"] = missing
    return replace(request, unknown=unknown)


def _missing(bags: Bags, known: LayeredIds) -> int:
    return int((~known.knows(bags.values.astype(np.int64))).sum())
