"""Every row of the table of what is installed, what is there and what is asked for; no GPU is needed."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import pipelines.train
from embeddings.errors import ConfigError
from launch.reporting import USER_ERROR, report
from pipelines.evaluate import evaluate
from pipelines.export import export
from tests.helpers.launching import SETTINGS, overrides, tandemrec
from tests.helpers.logs import small_log
from trainer.ranks import device
from trainer.ranks import process_group as distributed
from trainer.ranks.device import (
    Choice,
    DeviceReport,
    Gpu,
    Machine,
    check_together,
    choose,
    fbgemm_build,
    has_code,
    missing_code,
)
from trainer.ranks.process_group import process_group

H100, T4 = Gpu("NVIDIA H100", (9, 0)), Gpu("Tesla T4", (7, 5))
ARCHES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
FULL = Machine("13.0", "cuda", "1.8.0", (H100, H100), ARCHES, boards=2)
# What a workstation has that follows the README with PyPI's torch.
README = replace(FULL, fbgemm="cpu")
OLD_DRIVER = replace(
    FULL, gpus=(), problem="The NVIDIA driver on your system is too old (found version 12040)"
)


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (README, "fbgemm-gpu-cpu is the CPU build of fbgemm; for the GPU install the CUDA builds"),
        (replace(FULL, torch_cuda=None, gpus=()), "torch is a CPU build; for the GPU"),
        (replace(FULL, fbgemm="both"), "both installed and overwrite each other"),
        (replace(FULL, fbgemm="unknown"), "fbgemm is not installed, or does not say for which device it was"),
        (OLD_DRIVER, "CUDA sees no GPU (The NVIDIA driver on your system is too old (found version 12040))"),
        (OLD_DRIVER, "; update NVIDIA's driver (`nvidia-smi` tells which it is)"),
        (
            replace(OLD_DRIVER, problem="Found no NVIDIA driver on your system"),
            "; install NVIDIA's driver; in a container, start it with its GPUs (docker run --gpus all)",
        ),
        (replace(FULL, gpus=()), "CUDA sees no GPU; look at `nvidia-smi`, CUDA_VISIBLE_DEVICES"),
        (replace(FULL, gpus=(T4,)), "Tesla T4 is sm_75, and fbgemm 1.8.0 has code for sm_80, sm_90, sm_100"),
    ],
)
def test_where_cuda_is_impossible_auto_takes_the_cpu_and_says_why(machine: Machine, why: str) -> None:
    choice = choose("auto", machine)
    assert choice.device == torch.device("cpu")
    assert why in choice.note and choice.note.startswith("computing on the CPU: ")
    assert 'train.device = "cpu"' in choice.note and "\n" not in choice.note
    with pytest.raises(ConfigError, match=r'train\.device = "cuda" is not possible here: ') as refused:
        choose("cuda", machine)
    assert why in str(refused.value)
    assert choose("cpu", machine) == Choice(torch.device("cpu"))


@pytest.mark.parametrize("machine", [Machine(), Machine("13.0", "cpu", "1.8.0")])
def test_a_machine_without_a_gpu_is_no_reason_for_a_line(machine: Machine) -> None:
    assert choose("auto", machine) == Choice(torch.device("cpu"))
    with pytest.raises(ConfigError, match="make clean install DEVICE=cuda"):
        choose("cuda", machine)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_each_rank_takes_the_gpu_of_its_local_rank(wanted: Any) -> None:
    assert [choose(wanted, FULL, rank, 2) for rank in range(2)] == [
        Choice(torch.device("cuda", rank)) for rank in range(2)
    ]
    # Each task of Slurm may see a GPU of its own, as device 0.
    alone = replace(FULL, gpus=(H100,))
    assert choose(wanted, alone, 5, 8) == Choice(torch.device("cuda", 0))
    with pytest.raises(
        ConfigError, match=r"local rank 2 of 3 has no GPU: 2 are visible; .*make train NPROC=2"
    ):
        choose(wanted, FULL, 2, 3)


def test_it_is_the_ranks_own_gpu_that_must_have_code() -> None:
    mixed = replace(FULL, gpus=(H100, T4))
    assert choose("auto", mixed, 0, 2).device.type == "cuda"
    assert "Tesla T4 is sm_75" in choose("auto", mixed, 1, 2).note


@pytest.mark.parametrize(
    ("capability", "arches", "fits"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((10, 3), ("sm_100",), True),
        ((12, 0), ("sm_80", "sm_90", "sm_100"), False),
        ((7, 5), ("sm_80",), False),
        ((12, 1), ("sm_90", "compute_90"), True),
        ((8, 0), ("compute_90",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),
        ((9, 0), ("gfx942",), False),
        ((9, 0), (), False),
    ],
)
def test_which_code_runs_on_which_device(capability: Any, arches: Any, fits: bool) -> None:
    assert has_code(capability, arches) is fits


@given(st.tuples(st.integers(5, 12), st.integers(0, 9)), st.tuples(st.integers(5, 12), st.integers(0, 9)))
def test_machine_code_stays_within_a_major_number_and_ptx_goes_upwards(a: Any, b: Any) -> None:
    number = f"{b[0]}{b[1]}"
    assert has_code(a, [f"sm_{number}"]) == (a[0] == b[0] and a >= b)
    assert has_code(a, [f"compute_{number}"]) == (a >= b)


def test_a_release_that_no_table_knows_may_do() -> None:
    unknown = replace(FULL, fbgemm_version="1.9.0", gpus=(T4,))
    assert missing_code(unknown, T4) == ""
    assert "torch has code for" in missing_code(unknown, Gpu("V100", (7, 0)))


def test_the_build_of_fbgemm_is_known_by_its_distribution() -> None:
    names = (device.CPU_FBGEMM, device.CUDA_FBGEMM)
    for cpu, cuda, build in (("1", None, "cpu"), (None, "1", "cuda"), ("1", "1", "both")):
        assert fbgemm_build(dict(zip(names, (cpu, cuda), strict=True)), "cuda") == build
    # Nightly builds have names of their own, and say themselves what they are.
    for variant, build in (("cuda", "cuda"), ("cpu", "cpu"), ("INTERNAL", "unknown"), ("", "unknown")):
        assert fbgemm_build({}, variant) == build


def told(*gpus: str, kind: str = "cuda") -> list[DeviceReport]:
    return [DeviceReport(rank, kind, gpu) for rank, gpu in enumerate(gpus)]


def test_ranks_must_not_share_a_gpu() -> None:
    check_together(told("a/1 0000:3b:00", "a/1 0000:5e:00", "b/2 0000:3b:00"))
    check_together(told("", "", kind="cpu"))
    with pytest.raises(ConfigError) as refused:
        check_together(told("a/1 0000:3b:00", "b/2 0000:3b:00", "a/1 0000:3b:00"))
    message = str(refused.value)
    assert message.startswith("ranks 0 and 2 would share one GPU (0000:3b:00 of a)")
    assert "make train NPROC=1" in message and 'train.device = "cpu"' in message


def test_ranks_take_one_kind_of_device() -> None:
    with pytest.raises(
        ConfigError, match=r"rank 0 takes cuda and rank 1 cpu \(because\); make the nodes alike"
    ):
        check_together([DeviceReport(0, "cuda", "a 1"), DeviceReport(1, "cpu", why="because")])
    note = choose("auto", OLD_DRIVER).note
    with pytest.raises(ConfigError, match=r"rank 1 cpu \(CUDA sees no GPU .*; update .*\); make the nodes"):
        check_together([DeviceReport(0, "cuda", "a 1"), DeviceReport(1, "cpu", why=note)])
    with pytest.raises(ConfigError, match=r"^rank 1: what rank 1 said"):
        check_together([DeviceReport(0, "cuda", "a 1"), DeviceReport(1, "", problem="what rank 1 said")])
    with pytest.raises(ConfigError, match=r"^what both said"):
        check_together([DeviceReport(rank, "", problem="what both said") for rank in range(2)])


def test_why_cuda_sees_no_gpu_is_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13 says it (c10/cuda/CUDAFunctions.cpp)."""
    old = (
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by"
    )

    def init() -> None:
        raise RuntimeError(f"{old}\ndownloading one.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    machine = device.observe()
    assert machine.problem == "The NVIDIA driver on your system is too old (found version 12040)"
    assert (machine.torch_cuda, machine.gpus) == ("13.0", ())
    assert machine.problem in choose("auto", replace(machine, fbgemm="cuda")).note


def test_ranks_that_will_not_work_together_stay_until_all_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no launcher keeps the store, it goes with rank 0."""
    monkeypatch.setattr(device, "_HEAR_S", 30.0)
    store, heard = dist.HashStore(), []

    def rank(number: int, delay: float) -> None:
        time.sleep(delay)
        with pytest.raises(ConfigError, match="would share one GPU"):
            device.agree(store, DeviceReport(number, "cuda", "a/1 0"), 2)
        heard.append((number, store.check(["heard/1"])))

    threads = [threading.Thread(target=rank, args=each) for each in ((0, 0.0), (1, 0.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(heard) == [(0, True), (1, True)]
    # One that has said what it took, and has not heard yet.
    store = dist.HashStore()
    store.set("device/1", json.dumps(asdict(DeviceReport(1, "cuda", "a/1 0"))))
    first = threading.Thread(target=rank, args=(0, 0.0))
    first.start()
    first.join(0.2)
    assert first.is_alive()
    store.set("heard/1", "")
    first.join(60)
    assert not first.is_alive()


def test_a_gpu_is_told_from_others_by_its_bus_or_else_by_its_own_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = {"pci_domain_id": 0, "pci_bus_id": 0x1A, "pci_device_id": 2, "uuid": "GPU-7"}
    for known, place in ((numbers, "0000:1a:02"), ({"uuid": "GPU-7", "pci_bus_id": 0x1A}, "GPU-7")):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, known=known: SimpleNamespace(**known)
        )
        assert device.gpu_place(0).endswith(f" {place}")


def test_asked_for_the_cpu_nothing_looks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking is harmless; that nobody looks is how it stays so."""

    def look() -> Machine:
        raise AssertionError("looked")

    monkeypatch.setattr(distributed, "observe", look)
    with process_group(device="cpu") as ranks:
        assert ranks.device == torch.device("cpu") and ranks.heartbeat is None
    with pytest.raises(AssertionError, match="looked"), process_group(device="auto"):
        pass


@pytest.mark.parametrize(
    "said",
    [
        {"LOCAL_RANK": "-1"},
        {"LOCAL_RANK": "one"},
        {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
        {"LOCAL_WORLD_SIZE": "2"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"WORLD_SIZE": ""},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)
def test_a_launcher_that_makes_no_sense_is_one_line(
    said: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in said.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=r"the launcher says RANK=.*torchrun") as refused, process_group():
        pass
    assert all(f"{name}={text}" in str(refused.value) for name, text in said.items())
    assert report(refused.value, debug=False) == USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "said", [{}, {"MASTER_ADDR": "127.0.0.1"}, {"MASTER_ADDR": "::1", "MASTER_PORT": "x"}]
)
def test_ranks_that_are_not_told_where_to_meet_say_so(
    said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"RANK": "0", "WORLD_SIZE": "2", **said}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=r"ranks cannot meet: .*torchrun"), process_group(device="cpu"):
        pass


def test_a_launcher_may_leave_the_ranks_of_a_node_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with process_group(device="cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.local_world_size) == (0, 1, 1)


def test_what_is_said_about_the_choice_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "observe", lambda: README)
    for _ in range(2):
        with process_group(device="auto"):
            pass
    assert capsys.readouterr().err.count("fbgemm-gpu-cpu is the CPU build") == 1
    with pytest.raises(ConfigError, match="fbgemm-gpu-cpu is the CPU build"), process_group(device="cuda"):
        pass
    assert not dist.is_initialized()


def test_a_run_on_the_cpu_of_a_gpu_machine_opens_no_cuda_context(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that opens one goes through torch's lazy initialisation, or asks which device is current."""

    def touch(*_: Any, **__: Any) -> None:
        raise AssertionError("touched the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # Asked by Adam of a CUDA build, without opening one.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in (
        "_lazy_init",
        "current_device",
        "current_stream",
        "set_device",
        "synchronize",
        "mem_get_info",
    ):
        monkeypatch.setattr(torch.cuda, name, touch)
    log, run = small_log(tmp_path / "log", users=6), tmp_path / "run"
    wanted = {"data.log": str(log), **SETTINGS, "train.max_steps": 2, "train.device": "cpu"}
    words = overrides({**wanted, "checkpoint.every_steps": 1})[1::2]
    pipelines.train.train(Path("configs/dare.toml"), run, words)
    evaluate(run, "validation")
    export(run, run / "snap", parity_requests=3)
    assert (run / "checkpoints" / "step-00000002").is_dir() and (run / "snap" / "v00000001").is_dir()


@pytest.mark.skipif(device.observe().gpus != (), reason="this machine has a GPU")
def test_cuda_where_it_is_impossible_is_one_line_for_all_ranks(tmp_path: Any) -> None:
    log, run = small_log(tmp_path / "log", users=6), tmp_path / "run"
    wanted = {"data.log": str(log), **SETTINGS, "train.max_steps": 1}
    words = ["train", "--config", "configs/dare.toml", "--out", str(run)]
    done = tandemrec(*words, *overrides({**wanted, "train.device": "cuda"}), ranks=2)
    assert done.returncode != 0 and not run.exists()
    lines = [line for line in done.stderr.splitlines() if "tandemrec" in line]
    refusal = 'tandemrec: error: train.device = "cuda" is not possible here'
    assert lines and all(refusal in line for line in lines), done.stderr
    assert tandemrec(*words, *overrides({**wanted, "train.device": "cpu"})).returncode == 0
    for verb in (
        lambda: evaluate(run, "test", device="cuda"),
        lambda: export(run, run / "snap", device="cuda"),
    ):
        with pytest.raises(ConfigError, match="is not possible here"):
            verb()


@pytest.mark.gpu
def test_two_ranks_on_one_gpu_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    log, run = small_log(tmp_path / "log", users=6), tmp_path / "run"
    words = overrides({"data.log": str(log), **SETTINGS, "train.max_steps": 1})
    done = tandemrec("train", "--config", "configs/dare.toml", "--out", str(run), *words, ranks=2)
    assert done.returncode != 0 and "ranks 0 and 1 would share one GPU" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_group_is_bound_to_the_device() -> None:
    with process_group(device="cuda") as ranks:
        assert ranks.device == torch.device("cuda", 0)
        assert dist.group.WORLD.bound_device_id == ranks.device  # type: ignore[union-attr]
        total = torch.ones(2, device=ranks.device)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
        assert device.gpu_place(0).count(":") == 2
