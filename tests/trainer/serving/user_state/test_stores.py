"""The second level of user states: it gives back what was put, or nothing, and never fails a request."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save

from embeddings.errors import ConfigError, UnavailableError
from tests.helpers.redis_server import LACKING, PROGRAM, RedisServer, redis_server
from trainer.log.bags import Bags
from trainer.serving.user_state.codec import MAGIC, DamagedState, ForeignState, decode, encode
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.shared_memory import SharedMemorySettings, SharedMemoryStore
from trainer.serving.user_state.state import BLOCK, Stretch, UserState
from trainer.serving.user_state.stores import AnyStore, open_second_level

SIZE = 1 << 20


def key_of(user: int, snapshot: str = "one") -> bytes:
    return hashlib.sha256(f"{snapshot} {user}".encode()).digest()


def state_of(user: int, behaviors: int = 300, snapshot: str = "one") -> UserState:
    """A made-up state, with rows of several types and lists of ids."""
    rng = np.random.default_rng(user)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 3, behaviors))])
    features = {
        "item_id": Bags(rng.integers(0, 1 << 40, behaviors)),
        "tags": Bags(rng.integers(0, 9, int(offsets[-1])), offsets),
    }
    known = Stretch(5, np.sort(rng.integers(0, 1 << 33, behaviors)), features)
    places = -(-known.last // BLOCK) * BLOCK
    drawing = torch.Generator().manual_seed(user)
    together = torch.randn(places, 8, generator=drawing)
    rows = {
        "key": together[:, :5],
        "beside": together[:, 5:],
        "code": torch.randint(0, 1 << 30, (places, 2), generator=drawing),
        "half": torch.randn(places, 3, generator=drawing).half(),
    }
    return UserState(key_of(user, snapshot), known, 0, rows)


def same(one: UserState | None, other: UserState) -> bool:
    assert one is not None
    return (
        one.key == other.key
        and one.known.equals(other.known)
        and one.origin == other.origin
        and one.rows.keys() == other.rows.keys()
        and all(torch.equal(part, other.rows[name]) for name, part in one.rows.items())
    )


class MemoryStore:
    """A store whose answers a test decides."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.error: Exception | None = None
        self.asked = 0
        self.gate = threading.Event()
        self.gate.set()

    def get(self, key: bytes) -> bytes | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.held.get(key)

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        self.held[key] = b"".join(parts)

    def close(self) -> None:
        self.held.clear()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.integers(0, 1 << 30), st.data())
def test_a_state_comes_back_as_it_was_or_not_at_all(behaviors: int, user: int, data: st.DataObject) -> None:
    state = state_of(user, behaviors)
    content = b"".join(encode(state))
    assert content.startswith(MAGIC) and same(decode(state.key, content), state)
    with pytest.raises(ForeignState):
        decode(key_of(user, "two"), content)
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    for wrong in (bytes(changed), content[:at], content + b"x"):
        with pytest.raises(DamagedState):
            decode(state.key, wrong)


def test_what_has_a_right_digest_may_still_be_no_state() -> None:
    """Who writes into the store may write anything: it is refused, whatever it is."""
    for body in (b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", b"\x10" + bytes(7) + b'{"__metadata__":1'):
        content = MAGIC + hashlib.sha256(body).digest() + body
        with pytest.raises(DamagedState):
            decode(key_of(1), content)
    state = state_of(1)
    parts = state.tensors()
    for tensors in (
        {},
        {**parts, "rows/half": parts["rows/half"][:-1]},
        {**parts, "time": parts["time"][:-1]},
    ):
        body = save(
            {name: part.clone().contiguous() for name, part in tensors.items()}, {"key": state.key.hex()}
        )
        with pytest.raises(DamagedState, match="no user's state"):
            decode(state.key, MAGIC + hashlib.sha256(body).digest() + body)


def test_failures_are_counted_and_the_store_is_left_alone_for_a_while() -> None:
    store, now = MemoryStore(), [100.0]
    level = SecondLevel(store, rest=5.0, clock=lambda: now[0])
    state = state_of(1)
    level.put(state)
    assert level.flush(20) and same(level.get(state.key), state)
    store.held[key_of(2)] = store.held[state.key]
    store.held[key_of(3)] = b"rubbish"
    assert [level.get(key_of(user)) for user in (2, 3, 4)] == [None] * 3
    store.error = UnavailableError("store", "fails")
    assert level.get(state.key) is None and store.asked == 5
    assert level.get(state.key) is None and store.asked == 5
    level.put(state)
    now[0] += 5.0
    store.error = None
    assert same(level.get(state.key), state)
    store.error = OSError(28, "no space left")
    level.put(state)
    assert level.flush(20)
    found = level.statistics()
    assert found.look_ups == {
        "found": 2, "absent": 1, "damaged": 1, "foreign": 1, "failed": 1, "rested": 1
    }  # fmt: skip
    assert found.writes == {"written": 1, "dropped": 1, "failed": 1} and "no space left" in found.problem
    level.close()
    assert not store.held


def test_a_state_of_rows_that_are_no_numbers_is_kept_from_others() -> None:
    """The table was written over, and will be mended; places behind the last behavior mean nothing."""
    store = MemoryStore()
    level = SecondLevel(store)
    for user, place in ((1, 304), (2, 305)):
        state = state_of(user)
        rows = {name: part.clone() for name, part in state.rows.items()}
        wide = next(part for part in rows.values() if part.is_floating_point() and part.shape[0] > 305)
        wide[place] = torch.nan
        level.put(replace(state, rows=rows))
    assert level.flush(20)
    assert list(store.held) == [key_of(2)] and level.statistics().writes["dropped"] == 1
    level.close()


def test_writes_wait_in_a_bounded_queue_where_the_newest_state_of_a_user_counts() -> None:
    store = MemoryStore()
    store.gate.clear()
    large = state_of(1).nbytes
    level = SecondLevel(store, most_waiting=3 * large)
    level.put(state_of(0))
    # The writer has taken the first one, and waits.
    assert not level.flush(0.05)
    older, newer = state_of(1), state_of(1, behaviors=310)
    for state in (older, newer, state_of(2)):
        level.put(state)
    assert level.statistics().waiting <= 3 * large
    level.put(state_of(3, behaviors=2000))
    assert level.statistics().writes["dropped"] == 1
    store.gate.set()
    assert level.flush(20)
    assert same(level.get(key_of(1)), newer) and level.get(key_of(3)) is None
    assert level.statistics().writes["written"] == 3
    level.close()
    level.put(older)
    assert level.statistics().writes["dropped"] == 2


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    if PROGRAM is None:
        pytest.skip(LACKING)
    with redis_server(folder) as running:
        yield running


def redis_level(server: RedisServer, rest: float = 0.0, **more: object) -> SecondLevel:
    settings = {"kind": "redis", "url": server.url, "timeout_ms": 2000, **more}
    return SecondLevel(TypeAdapter(AnyStore).validate_python(settings).open(), rest=rest)


def test_two_processes_share_states_through_a_redis_server(server: RedisServer) -> None:
    one, other = redis_level(server, prefix="test:", ttl_seconds=77), redis_level(server, prefix="test:")
    elsewhere = redis_level(server, prefix="other:")
    state = state_of(1, behaviors=2000)
    one.put(state)
    assert one.flush(20) and same(other.get(state.key), state)
    assert elsewhere.get(state.key) is None and other.get(key_of(1, "two")) is None
    (name,) = server.client.keys()
    assert name == f"test:{state.key.hex()}".encode() and 0 < server.client.ttl(name) <= 77
    # A value of another snapshot, a wrong one, and one of another type.
    server.client.set(f"test:{key_of(1, 'two').hex()}", server.client.get(name))
    server.client.set(f"test:{key_of(2).hex()}", b"x" * 100)
    server.client.rpush(f"test:{key_of(3).hex()}", "x")
    assert [other.get(key) for key in (key_of(1, "two"), key_of(2), key_of(3))] == [None] * 3
    found = other.statistics().look_ups
    assert (found["foreign"], found["damaged"], found["failed"]) == (1, 1, 1)
    for level in (one, other, elsewhere):
        level.close()


def test_a_server_that_is_slow_or_killed_costs_a_look_up_and_no_request(server: RedisServer) -> None:
    level, state = redis_level(server, timeout_ms=100), state_of(1)
    level.put(state)
    assert level.flush(20) and same(level.get(state.key), state)
    server.stop()
    assert level.get(state.key) is None and "Timeout" in level.statistics().problem
    server.go_on()
    assert same(level.get(state.key), state)
    server.kill()
    assert level.get(state.key) is None
    level.put(state)
    assert level.flush(20) and level.statistics().writes["failed"] == 1
    assert level.statistics().look_ups["failed"] == 2
    server.start()
    # It forgot everything.
    assert level.get(state.key) is None
    level.put(state)
    assert level.flush(20) and same(level.get(state.key), state)
    level.close()


def test_nobody_answers_at_the_start(folder: Path) -> None:
    level = open_second_level(
        TypeAdapter(AnyStore).validate_python({"kind": "redis", "url": f"unix://{folder}/none"})
    )
    assert level is not None and level.get(key_of(1)) is None and level.get(key_of(1)) is None
    assert level.statistics().look_ups["failed"] == level.statistics().look_ups["rested"] == 1
    level.close()


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"kind": "memcached"}, "redis"),
        ({"kind": "redis", "url": "http://host"}, "must begin with redis://"),
        ({"kind": "redis", "url": "redis://me:secret@host"}, "has credentials in it"),
        ({"kind": "redis", "url": "redis://host:port"}, "is no address"),
        ({"kind": "redis", "ttl_seconds": 0}, "greater than or equal to 1"),
        ({"kind": "shared_memory", "bytes": 100}, "1048576"),
        ({"kind": "shared_memory", "url": "x"}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(given_settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AnyStore).validate_python(given_settings)


def test_a_password_that_cannot_be_read_is_refused(folder: Path) -> None:
    settings = {"kind": "redis", "password_file": folder / "none"}
    with pytest.raises(ConfigError, match="password_file"):
        TypeAdapter(AnyStore).validate_python(settings).open()


def shared(folder: Path, size: int = SIZE) -> SharedMemoryStore:
    return SharedMemoryStore(folder, size)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, SIZE // 5)), max_size=40))
def test_a_ring_gives_the_last_value_of_a_key_or_none(writes: list[tuple[int, int]]) -> None:
    """Against a dictionary: what fits into the ring behind the last write is there, and it is never stale."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        one, other = shared(Path(name)), shared(Path(name))
        last: dict[int, bytes] = {}
        for number, (user, size) in enumerate(writes):
            value = number.to_bytes(4, "little") * (size // 4 + 1)
            last[user] = value[:size]
            one.put(key_of(user), [value[:3][:size], value[3:size]])
            assert other.get(key_of(user)) == last[user]
            for known, expected in last.items():
                assert one.get(key_of(known)) in (expected, None)
        behind = 0
        seen = set()
        # Half of the ring at least is of use: a value may leave a gap before it at the ring's end.
        for user, size in reversed(writes):
            behind += size + 64
            if behind > SIZE // 2:
                break
            if user not in seen and len(seen) < 4:
                assert other.get(key_of(user)) == last[user]
            seen.add(user)
        one.close(), other.close()


def test_what_is_too_large_or_empty_is_not_kept(folder: Path) -> None:
    store = shared(folder)
    store.put(key_of(1), [bytes(SIZE // 2)])
    store.put(key_of(2), [])
    assert store.get(key_of(1)) is None and store.get(key_of(2)) is None
    assert store.file.stat().st_size < 1.1 * SIZE and store.file.stat().st_blocks * 512 >= SIZE
    store.close()


def _hold_lock(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    store = shared(folder)
    with store._locked():
        ready.set()
        signal.pause()


def test_a_process_that_is_stopped_or_killed_holds_nothing_up(folder: Path) -> None:
    """While another process holds the lock, writes fail and reads do not; once it is dead, all goes on."""
    store, state = shared(folder), state_of(1)
    store.put(state.key, encode(state))
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold_lock, args=(folder, ready))
    holder.start()
    assert ready.wait(20) and holder.pid is not None
    with pytest.raises(UnavailableError, match="locked by a process"):
        store.put(key_of(2), [b"x"])
    content = store.get(state.key)
    assert content is not None and same(decode(state.key, content), state)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(20)
    store.put(key_of(2), [b"x"])
    assert store.get(key_of(2)) == b"x"
    store.close()


def test_half_written_tables_are_misses(folder: Path) -> None:
    """Bytes are changed as a killed process or a power cut may leave them."""
    store = shared(folder)
    values = {key_of(user): os.urandom(1000) for user in range(20)}
    for key, value in values.items():
        store.put(key, [value])
    before = {key for key, value in values.items() if store.get(key) == value}
    at = next(at for at, entry in store._entries(key_of(0)) if entry is not None and entry.key == key_of(0))
    os.pwrite(store._descriptor, b"\xff" * 20, at + 30)
    assert store.get(key_of(0)) is None
    assert all(store.get(key) == values[key] for key in before - {key_of(0)})
    # The tail: nothing is found until somebody writes, and what is written then is.
    os.pwrite(store._descriptor, b"\xff" * 4, 64)
    assert all(store.get(key) is None for key in values)
    store.put(key_of(50), [b"new"])
    assert store.get(key_of(50)) == b"new"
    os.truncate(store.file, 10)
    assert store.get(key_of(50)) is None
    with pytest.raises(UnavailableError, match="cut short"):
        store.put(key_of(50), [b"new"])
    store.close()
    with pytest.raises(ConfigError, match="delete it"):
        shared(folder)


def test_processes_that_start_together_have_one_file(folder: Path) -> None:
    stores: list[SharedMemoryStore] = []
    threads = [threading.Thread(target=lambda: stores.append(shared(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    stores[0].put(key_of(1), [b"value"])
    assert [store.get(key_of(1)) for store in stores] == [b"value"] * 6
    assert [path.name for path in folder.iterdir()] == [stores[0].file.name]
    assert stores[0].file.stat().st_mode & 0o077 == 0
    for store in stores:
        store.close()
    with pytest.raises(ConfigError, match="cannot be made"):
        SharedMemorySettings(kind="shared_memory", folder=stores[0].file).open()


def _write_many(folder: Path, seed: int) -> None:
    store = shared(folder)
    for number in range(300):
        store.put(key_of(number % 7), encode(state_of(number % 7 + 10 * seed, 200, "one")))
    store.close()


def test_writers_at_the_same_time_leave_only_whole_states(folder: Path) -> None:
    """Two processes write the same keys again and again: a reader finds a state of one of them, or none."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(folder, seed)) for seed in (0, 1)]
    store = shared(folder)
    for writer in writers:
        writer.start()
    found = 0
    while any(writer.is_alive() for writer in writers):
        for content in filter(None, (store.get(key_of(user)) for user in range(7))):
            # What was overwritten while it was read has another digest, and is a miss.
            with pytest.raises((ForeignState, DamagedState)) as error:
                decode(key_of(100), content)
            found += error.type is ForeignState
    for writer in writers:
        writer.join(20)
        assert writer.exitcode == 0
    assert found > 0
    for content in filter(None, (store.get(key_of(user)) for user in range(7))):
        with pytest.raises(ForeignState):
            decode(key_of(100), content)
    store.close()
