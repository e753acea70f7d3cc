"""What ranks tell each other: one computes and all know, or all do their part and all hear of a failure.

Whatever is raised in such a call is told to the ranks that wait for its result, so that none of them waits
in vain and each ends with a line that names the cause.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch.distributed as dist

from embeddings.errors import RankError, TandemError
from embeddings.private import default_store

Value = TypeVar("Value")
# The ranks that agree: all of them, where it is None.
Group = dist.ProcessGroup | None
_PULSE_S, _LOOK_S = 1.0, 0.02


def from_rank_0(compute: Callable[[], Value], group: Group = None, slow: bool = False) -> Value:
    """What rank 0 computes, on every rank; collective.

    Args:
        slow: the call may take longer than a collective waits, see `unhurried`; not possible with a group.

    Raises:
        TandemError: rank 0's, on every rank. Anything else that rank 0 raised is raised there, and is a
            RankError that repeats it on the others; so is a value that cannot be pickled.
    """
    answers, failure = [b""], None
    with unhurried() if slow else nullcontext():
        if dist.get_rank(group) == 0:
            answers[0], failure = _answer_of(compute, 0)
    dist.broadcast_object_list(answers, src=0, group=group)
    if failure is not None:
        raise failure
    value: Value = _value_of(answers[0])
    return value


def from_every_rank(compute: Callable[[], Value], group: Group = None, slow: bool = False) -> list[Value]:
    """What each rank computes, in their order, on every rank; collective.

    Args:
        slow: some ranks may take longer than a collective waits, see `unhurried`; not possible with a group.

    Raises:
        Exception: a rank that failed raises its own; the others what the first of those raised, as
            `from_rank_0` does.
    """
    with unhurried() if slow else nullcontext():
        mine, failure = _answer_of(compute, dist.get_rank(group))
    answers = [b""] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    if failure is not None:
        raise failure
    return [_value_of(answer) for answer in answers]


@contextmanager
def unhurried() -> Iterator[None]:
    """A block for which some ranks may need any length of time; all ranks leave it together.

    A collective waits for a slow rank no longer than the group's time-out. Here each rank says through the
    store every second that it works, and the others wait for as long as anybody does. A rank whose block
    raises leaves it at once, and is not waited for.

    Raises:
        RankError: ranks are missing, and nothing was heard of any for the group's time-out.
    """
    if dist.get_world_size() == 1:
        yield
        return
    rank, whole = dist.get_rank(), default_store()
    # Each rank counts its blocks in the store, which belongs to this start alone, so that names are new.
    store = dist.PrefixStore(f"unhurried/{whole.add(f'unhurried/{rank}', 1)}", whole)
    over = threading.Event()
    pulse = threading.Thread(target=_beat, args=(store, over), name="pulse", daemon=True)
    pulse.start()
    try:
        yield
    finally:
        over.set()
        pulse.join()
        store.set(f"left/{rank}", "")
        store.add("left", 1)
    _wait_for_all(store, whole.timeout.total_seconds())


def _beat(store: dist.Store, over: threading.Event) -> None:
    try:
        while not over.is_set():
            store.add("pulse", 1)
            over.wait(_PULSE_S)
    except RuntimeError:
        # The store went away with the rank that holds it; the next call of this rank's own says so.
        return


def _wait_for_all(store: dist.Store, patience_s: float) -> None:
    world_size, heard, since = dist.get_world_size(), 0, time.monotonic()
    while store.add("left", 0) < world_size:
        now = store.add("pulse", 0)
        if now > heard:
            heard, since = now, time.monotonic()
        if time.monotonic() - since > patience_s:
            silent = [rank for rank in range(world_size) if not store.check([f"left/{rank}"])]
            raise RankError(
                f"rank {dist.get_rank()}: waited in vain for rank {', '.join(map(str, silent))}, which "
                "hangs, is dead or cut off; see train.timeout_s"
            )
        time.sleep(_LOOK_S)


def _answer_of(compute: Callable[[], Any], rank: int) -> tuple[bytes, BaseException | None]:
    """What the other ranks are told, and the error that this rank raises itself.

    It is pickled here, so that a value that cannot be pickled is a failure like any other.
    """
    try:
        return pickle.dumps((compute(), None)), None
    except BaseException as error:
        # Of any kind, an interrupt too: the others wait for this rank's answer.
        if isinstance(error, TandemError):
            with suppress(Exception):
                return pickle.dumps((None, error)), error
        text = " ".join(str(error).split())
        told = RankError(f"rank {rank} failed with {type(error).__name__}{f': {text}' if text else ''}")
        return pickle.dumps((None, told)), error


def _value_of(answer: bytes) -> Any:
    value, problem = pickle.loads(answer)
    if problem is not None:
        raise problem
    return value
