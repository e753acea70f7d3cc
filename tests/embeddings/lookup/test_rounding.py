"""Half precision between ranks: nothing is clipped unnoticed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from embeddings.errors import DataError
from embeddings.lookup.rounding import HALF_MAX, Comms, GradientScale, codecs_of
from tests.helpers.launching import launched
from tests.helpers.logs import small_log
from tests.programs.step_cases import job, spoil_vectors
from trainer.ranks.process_group import process_group


@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.3, 15.9, 16.0, 70_000.0, 3e30])
def test_gradients_of_any_size_travel_unclipped(largest: float) -> None:
    comms = Comms("fp32", "fp16")
    codecs = codecs_of(comms)
    assert codecs is not None
    gradient = largest * torch.linspace(-1, 1, 1001)
    comms.scale.fit(gradient.abs().max())
    for codec in codecs.values():
        found = codec.backward.decode(codec.backward.encode(gradient))
        assert (found - gradient).abs().max() <= 2.0**-11 * largest
    assert comms.scale.value == 4096 or largest > 15.99


def plain_scale(largest: float) -> float:
    """The largest power of two that clips nothing, by logarithms."""
    room = HALF_MAX / largest if largest else math.inf
    return 2.0 ** min(12, math.floor(math.log2(room))) if room < math.inf else 4096.0


@given(st.floats(0, float(torch.finfo(torch.float32).max), width=32))
@example(65504.0 / 16)
@example(0.0)
def test_the_scale_is_found_without_logarithms(largest: float) -> None:
    """From the bits of a float, which a device does without being asked for a number."""
    scale = GradientScale()
    scale.fit(torch.tensor(largest))
    assert isinstance(scale.value, torch.Tensor) and scale.value.dtype == torch.float32
    assert float(scale.value) == plain_scale(largest)


def test_large_gradients_and_vectors_on_two_ranks(tmp_path: Path) -> None:
    """The tables after a step with huge gradients, and what is said of vectors that fp16 cannot hold."""
    log = small_log(tmp_path / "log", seed=1)
    done = launched("tests.embeddings.lookup.test_rounding", str(log), str(tmp_path / "found.json"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    exact, half = (torch.tensor(found[kind]) for kind in ("fp32", "fp16"))
    assert exact.abs().max() > 100
    assert (half - exact).abs().max() <= 2e-3 * exact.abs().max()
    assert "the vectors of group representation" in found["said"] and "clips at 65,504" in found["said"]
    assert found["before"] == found["after"]


def main(log: Path, out: Path) -> None:
    """By plain gradient descent, so that tables move as far as their gradients are large."""
    found = {}
    descent = ["groups.representation.optimizer=sgd", "groups.representation.learning_rate=1"]
    descent += ['groups.representation.sharding=["row_wise"]']
    with process_group(60) as ranks:
        for kind in ("fp32", "fp16"):
            made = job(ranks, log, out.parent, "none", f"comms.backward={kind}", *descent)
            spoil_vectors(made, 1e5)
            next(made.train(made.reader.steps()))
            weights = made.sharded.model.state_dict()
            moved = [weight for name, weight in weights.items() if "representation__item" in name]
            part = moved[0].local_shards()[0].tensor.flatten().tolist()
            parts: list[list[float]] = [[], []]
            torch.distributed.all_gather_object(parts, part)
            found[kind] = [*parts[0], *parts[1]]
        made = job(ranks, log, out.parent, "none", "comms.forward=fp16", *descent)
        for name, weight in made.sharded.model.state_dict().items():
            if "representation__item" in name:
                weight.local_shards()[0].tensor.fill_(1e5)
        before, said = made.digests(), ""
        try:
            next(made.train(made.reader.steps()))
        except DataError as error:
            said = str(error)
        found |= {"said": said, "before": before, "after": made.digests()}
        if ranks.speaks:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
