"""What a rank says of others that it can no longer hear."""

from __future__ import annotations

import faulthandler
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.errors import RankError
from trainer.ranks import process_group
from trainer.ranks.heartbeat import Heartbeat
from trainer.ranks.process_group import Ranks, naming_the_lost

LOST = "Gloo connectFullMesh failed with timed out connecting: SO_ERROR: Connection refused, "


class CutOff(dist.HashStore):
    """A store whose machine is cut off: a question to it waits until the kernel gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.mended = threading.Event()

    def check(self, keys: Any) -> bool:
        self.mended.wait()
        return False


def test_a_store_that_does_not_answer_keeps_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_ANSWER_S", 0.1)
    store = CutOff()
    ranks = Ranks(0, 3, 1, torch.device("cpu"), store)
    with (
        pytest.raises(RankError, match="rank 0, after step 7: waited in vain for rank 1, 2, which hangs"),
        naming_the_lost(ranks, lambda: "after step 7"),
    ):
        raise RuntimeError("Timed out waiting 5000ms for send operation to complete")
    store.mended.set()


def test_a_store_that_does_not_answer_keeps_no_heartbeat() -> None:
    beating = Heartbeat(0, 2, dist.HashStore(), 0.2, dict, lambda: None)
    store = CutOff()
    beating._store = store  # type: ignore[assignment]
    beating.start()
    end = time.monotonic() + 30
    while not beating.blame and time.monotonic() < end:
        time.sleep(0.01)
    assert beating.blame.startswith("waited in vain for rank 1, which hangs, is dead or cut off")
    beating.acknowledge(lambda: "")
    beating.stop(well=False)
    faulthandler.cancel_dump_traceback_later()
    store.mended.set()


@pytest.mark.parametrize(("here", "said"), [(1, "GLOO_SOCKET_IFNAME"), (2, "waited in vain for rank 1")])
def test_a_loopback_address_of_another_node_is_named(
    monkeypatch: pytest.MonkeyPatch, here: int, said: str
) -> None:
    monkeypatch.setattr(process_group, "_ANSWER_S", 0.1)
    ranks = Ranks(0, 2, here, torch.device("cpu"), dist.HashStore())
    with pytest.raises(RankError, match=said), naming_the_lost(ranks, lambda: "while the ranks met"):
        raise RuntimeError(LOST + "remote=[127.0.1.1]:4484$1")
