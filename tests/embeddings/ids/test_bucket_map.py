"""Maps from ids to rows are what dicts give, for any rules and streams, whole and in parts."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.ids.bucket_map import BucketMap, Counts, Sightings
from embeddings.ids.hashing import hashed
from embeddings.ids.parts import MapPart, State, frozen, part_for
from embeddings.ids.rules import IdRules, part_of
from embeddings.ids.stage import IdStage, Taken
from tests.embeddings.ids.streams import IDS, Part, all_maps, all_rules, streams
from tests.helpers.slow_ids import SlowStage, bucket_of, hash_of, merged, sightings_of

WANTED = np.array([*IDS, *IDS[:3], 99], dtype=np.int64)


def take(stage: IdStage, parts: list[Part], keep: bool = False) -> tuple[Sightings, Taken]:
    seen = sightings_of(merged([part.seen for part in parts]))
    return seen, stage.take({"item": seen}, max(part.newest_request for part in parts), keep)


def copy_of(stage: IdStage) -> State:
    """All that the stage remembers."""
    states = {
        f"{name} {key}": array.copy()
        for name, map_ in stage.maps.items()
        for key, array in map_.state().items()
    }
    return {**states, "clock": stage.clock.copy()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@settings(deadline=None, max_examples=200)
@given(all_maps(), streams())
def test_maps_are_what_dicts_give(rules: dict[str, IdRules], stream: list[list[Part]]) -> None:
    stage, slow = IdStage(rules), SlowStage(rules)
    for parts in stream:
        seen, taken = take(stage, parts)
        new = slow.take(merged([part.seen for part in parts]), max(part.newest_request for part in parts))
        found = stage.look_up({"item": WANTED})
        for name, slow_map in slow.maps.items():
            assert taken.rows[name].tolist() == [slow_map.row_of(id_) for id_ in seen.ids.tolist()]
            assert taken.new_rows[name].tolist() == sorted(new[name])
            assert found[name].tolist() == [slow_map.row_of(id_) for id_ in WANTED.tolist()]
            ids, rows = stage.maps[name].entries()
            assert dict(zip(ids.tolist(), rows.tolist(), strict=True)) == slow_map.rows()
            assert ids.tolist() == sorted(slow_map.rows())
    for name, slow_map in slow.maps.items():
        counts = asdict(stage.maps[name].counts)
        assert counts == {key: slow_map.counts[key] for key in asdict(Counts())}


@settings(deadline=None, max_examples=100)
@given(all_rules(), streams(), st.integers(1, 5), st.integers(1, 5), st.data())
def test_parts_are_the_whole_map_however_they_are_cut(
    rules: IdRules, stream: list[list[Part]], before: int, after: int, data: st.DataObject
) -> None:
    """Half of the stream by some ranks, the rest by others, which go on from the first ones' state."""
    whole, half = IdStage({"item": rules}), data.draw(st.integers(0, len(stream)))
    maps = [BucketMap(rules, part_of(rules.buckets, rank, before)) for rank in range(before)]
    for number, parts in enumerate(stream):
        if number == half:
            maps = cut_again(rules, maps, after)
        ticks_from = whole.now
        seen, taken = take(whole, parts)
        bucket = np.array([bucket_of(id_, rules) for id_ in seen.ids.tolist()], dtype=np.int64)
        rows, new_rows = np.zeros_like(seen.ids), []
        for mine in maps:
            here = np.isin(bucket, mine.buckets)
            ticked = rules.ttl and (ticks_from < 0 or has_ticked(ticks_from, whole.now, rules.ttl))
            sightings = Sightings(seen.ids[here], seen.counts[here], seen.newest[here])
            found = mine.take(sightings, whole.now, int(whole.clock[1]), bool(ticked))
            rows[here] = found.rows
            new_rows += found.new_rows.tolist()
        assert rows.tolist() == taken.rows["item"].tolist()
        assert new_rows == taken.new_rows["item"].tolist()
    (joined,) = cut_again(rules, maps, 1)
    assert same(dict(joined.state()), dict(whole.maps["item"].state()))
    ids = frozen([MapPart(each.buckets, dict(each.state())) for each in maps], rules)
    assert np.array_equal(ids.look_up(WANTED), whole.look_up({"item": WANTED})["item"])
    own = whole.maps["item"].entries()
    assert ids.ids.tolist() == own[0].tolist() and ids.rows.tolist() == own[1].tolist()
    assert ids.knows(WANTED).tolist() == [id_ in own[0] for id_ in WANTED.tolist()]


def cut_again(rules: IdRules, maps: list[BucketMap], ranks: int) -> list[BucketMap]:
    parts, found = [MapPart(each.buckets, each.state()) for each in maps], []
    for rank in range(ranks):
        found.append(BucketMap(rules, part_of(rules.buckets, rank, ranks)))
        found[-1].load(part_for(found[-1].buckets, parts, rules, rules))
    return found


def has_ticked(before: int, now: int, ttl: int) -> bool:
    tick = max(1, ttl // 16)
    return now // tick > before // tick


@settings(deadline=None, max_examples=100)
@given(all_maps(), streams(), st.data())
def test_steps_are_taken_back_and_made_again(
    rules: dict[str, IdRules], stream: list[list[Part]], data: st.DataObject
) -> None:
    """Now and then the newest steps are swapped away and back, or are gone for good and others come."""
    stage, other = IdStage(rules), IdStage(rules)
    undone, states = [], [copy_of(stage)]
    for parts in stream:
        undone.append(take(stage, parts, keep=True)[1])
        states.append(copy_of(stage))
        back = data.draw(st.integers(0, min(3, len(undone))))
        for taken in reversed(undone[len(undone) - back :]):
            taken.swap()
        assert same(copy_of(stage), states[-1 - back])
        if data.draw(st.booleans()):
            del undone[len(undone) - back :], states[len(states) - back :]
        else:
            for taken in undone[len(undone) - back :]:
                taken.swap()
            assert same(copy_of(stage), states[-1])
    # What was taken back has left nothing behind that comes out later.
    other.clock[:] = stage.clock
    for name, map_ in other.maps.items():
        map_.load(stage.maps[name].state())
    for parts in stream:
        mine, theirs = take(stage, parts, keep=True)[1], take(other, parts)[1]
        assert all(np.array_equal(mine.rows[name], theirs.rows[name]) for name in rules)
    assert same(copy_of(stage), copy_of(other))


def test_missing_buckets_and_those_there_twice_are_refused() -> None:
    rules = IdRules(capacity=640)
    first = MapPart(range(0, 4), BucketMap(rules, range(0, 4)).state())
    for parts in ([first], [first, first, MapPart(range(4, 9), BucketMap(rules, range(4, 9)).state())]):
        with pytest.raises(ValueError, match="of buckets 0 to 9"):
            part_for(range(10), parts, rules, rules)


def test_another_kind_of_admission_begins_anew_and_rows_stay() -> None:
    before = IdRules(capacity=640, admission="count")
    sketch, cells = replace(before, counter="sketch"), replace(before, counter="sketch", sketch_cells=999)
    old = BucketMap(before, range(10))
    old.take(seen_once(range(50)), 5, 1, False)
    old.take(seen_once(range(25)), 6, 2, False)
    for rules in (sketch, replace(before, admission="all")):
        new = BucketMap(rules, range(10))
        new.load(part_for(range(10), [MapPart(range(10), old.state())], rules, before))
        assert [each.tolist() for each in new.entries()] == [each.tolist() for each in old.entries()]
        assert len(new.entries()[0]) == 25
    again = BucketMap(cells, range(10))
    again.load(part_for(range(10), [MapPart(range(10), new_sketch(sketch).state())], cells, sketch))
    assert not again.state()["admission.cells"].any()


def new_sketch(rules: IdRules) -> BucketMap:
    found = BucketMap(rules, range(10))
    found.take(seen_once(range(50)), 5, 1, False)
    return found


def seen_once(ids: range) -> Sightings:
    every = np.array(ids, dtype=np.int64)
    return Sightings(every, np.ones_like(every), np.full_like(every, 5))


def test_hashes_are_splitmix() -> None:
    # The first numbers of the generator with seed 0, Vigna's reference implementation.
    assert hash_of(0) == 0xE220A8397B1DCDAF
    ids: npt.NDArray[np.int64] = np.array(IDS, dtype=np.int64)
    assert hashed(ids).tolist() == [hash_of(id_) for id_ in IDS]
