"""The kernels over rows that candidates keep, and those of stage one in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.helpers.compiling import compiled
from tests.helpers.kept_rows import check, used
from trainer.model.ops import bags, kept_rows
from trainer.model.ops.kernels import has_kernel


def test_the_kernels_do_what_slow_ones_do() -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.programs.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("all held\n"), done.stdout + done.stderr


def test_the_kernels_compile_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from trainer.model.ops.kept_rows_triton import bags_kernel, gathered_kernel, products_kernel

    for kernel, sizes in (
        (products_kernel, {"PAIRS": 16}),
        (bags_kernel, {"BAGS": 16}),
        (gathered_kernel, {"ROWS": 8, "USES": 8}),
    ):
        made = compiled(kernel, {"D": 16, "WIDE": 16, **sizes}, 1, 90)
        assert len(made.asm["cubin"]) > 1000 and "atom" not in made.asm["ptx"]
        assert "v4.b32" in made.asm["ptx"] or "cp.async.cg" in made.asm["ptx"]


def test_only_what_the_kernels_can_do_is_given_to_them() -> None:
    rows, index = torch.ones(10, 16), torch.zeros(4, 5, dtype=torch.int64)
    assert kept_rows.fits(rows, index) and not kept_rows.pays(rows, index)  # on a CPU
    assert not kept_rows.fits(rows.double(), index) and not kept_rows.fits(rows[:, :6], index)
    assert not kept_rows.fits(rows, index[:0]) and not kept_rows.fits(rows, index.flatten())
    many = torch.zeros(100, 7, dtype=torch.int64)
    assert not kept_rows.fits(rows, many) and kept_rows.fits(torch.ones(11, 16), many)


def test_scores_and_sums_use_them_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, whatever autocast made of their factors."""
    rows, index = torch.randn(10, 16).bfloat16(), torch.zeros(4, 5, dtype=torch.int64)
    given_to: list[Any] = []

    def taken(*parts: Tensor) -> Tensor:
        given_to.append([part.dtype for part in parts])
        return parts[0]

    monkeypatch.setattr(kept_rows, "has_kernel", lambda device: True)
    monkeypatch.setattr(kept_rows, "agrees", lambda *asked: True)
    monkeypatch.setattr(kept_rows, "dots", taken)
    monkeypatch.setattr(kept_rows, "weighted_bags", taken)
    bags.dots(torch.randn(4, 16), rows, index)
    bags.weighted_bags(rows, index, torch.rand(4, 5).bfloat16())
    single = torch.float32
    assert given_to == [[single, single, torch.int64], [single, torch.int64, single]]


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(used())
def test_a_device_does_what_torch_does(given_to: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    check(*(part.cuda() for part in given_to))


@pytest.mark.gpu
def test_a_device_is_not_waited_for() -> None:
    part, rows, weight = (torch.randn(*shape, device="cuda") for shape in ((500, 64), (900, 64), (500, 20)))
    index = torch.randint(0, 900, (500, 20), device="cuda")

    def step() -> None:
        leaves = [given.requires_grad_() for given in (part, rows, weight)]
        (bags.dots(part, rows, index).sum() + bags.weighted_bags(rows, index, weight).sum()).backward()
        assert all(leaf.grad is not None for leaf in leaves)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_device_has_kernels_where_there_is_none() -> None:
    """Nor is one asked for: a stand-in for a device goes by its type alone."""
    assert not has_kernel(torch.device("cpu")) and not has_kernel(torch.device("meta"))
    if torch.version.cuda is None:
        assert not has_kernel(torch.device("cuda", 0))
