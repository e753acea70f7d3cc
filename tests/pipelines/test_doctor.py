"""Each broken environment that `doctor` knows is fed to its checks as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.doctor import Environment
from trainer.ranks import device
from trainer.ranks.device import Gpu, Machine, choose

SOUND = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": None}


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm"),
    [("2.13.0+cpu", "1.8.0", "1.8.0"), ("2.13.1", "1.8.2", "1.8.1"), ("2.11.0+cu130", "1.6.0", "1.6.0")],
)
def test_triple_supported(torch: str, torchrec: str, fbgemm: str) -> None:
    assert [*doctor.check_triple(torch, torchrec, fbgemm)] == []


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm"),
    [
        ("2.13.0+cpu", "1.8.0", "1.7.0"),
        ("2.13.0+cpu", "1.8.0", "1.9.0"),
        ("2.13.0+cpu", "1.9.2", "1.8.0"),
        ("2.11.0", "1.8.0", "1.8.0"),
        ("2.1.3", "1.8.0", "1.8.0"),
    ],
)
def test_triple_wrong_names_all_three_and_the_fix(torch: str, torchrec: str, fbgemm: str) -> None:
    (problem,) = doctor.check_triple(torch, torchrec, fbgemm)
    for version in (torch, torchrec, fbgemm, "2.13.x / 1.8.x / 1.8.x", "make clean install"):
        assert version in str(problem)


def test_triple_missing_part_is_named() -> None:
    (problem,) = doctor.check_triple("2.13.0", None, None)
    assert "torchrec, fbgemm not installed" in str(problem)


def test_both_fbgemm_builds_are_refused() -> None:
    (problem,) = doctor.check_fbgemm_build(cpu="1.8.0", cuda="1.8.0", torch_cuda="13.0")
    assert "both installed" in problem.what
    assert "pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu" in problem.fix


def test_cuda_fbgemm_needs_cuda_torch() -> None:
    (problem,) = doctor.check_fbgemm_build(cpu=None, cuda="1.8.0", torch_cuda=None)
    assert "pip install --no-deps fbgemm-gpu-cpu==1.8.0" in problem.fix
    assert [*doctor.check_fbgemm_build(cpu=None, cuda="1.8.0", torch_cuda="13.0")] == []
    assert [*doctor.check_fbgemm_build(cpu="1.8.0", cuda=None, torch_cuda=None)] == []


def test_failing_import_is_reported_unless_its_cause_is() -> None:
    broken = Environment(versions=SOUND, fbgemm_error="OSError: undefined symbol")
    (problem,) = doctor.check(broken)
    assert "undefined symbol" in str(problem)
    caused = Environment(
        versions={**SOUND, "fbgemm-gpu-cpu": "1.9.0"}, fbgemm_error="OSError: undefined symbol"
    )
    (problem,) = doctor.check(caused)
    assert "do not go together" in str(problem)


def test_cuda_builds_without_a_driver_want_one_and_no_other_environment() -> None:
    cuda = {**SOUND, "fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}
    error = "OSError: libnvidia-ml.so.1: cannot open shared object file: No such file or directory"
    (problem,) = doctor.check(Environment(versions=cuda, torch_cuda="13.0", fbgemm_error=error))
    assert "needs an NVIDIA driver" in problem.what and problem.fix.startswith("install the driver")


def test_foreign_package_hides_ours(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "project", tmp_path / "site-packages" / "trainer" / "__init__.py"
    origins = {"trainer": foreign, "embeddings": ours / "embeddings" / "__init__.py", "pipelines": None}
    hidden, missing = doctor.check_origins(origins, ours)
    assert "'trainer'" in hidden.what
    assert hidden.where == str(foreign)
    assert "rename" in hidden.fix
    assert "'pipelines' not found" in missing.what


def test_a_folder_with_a_longer_name_is_not_ours(tmp_path: Path) -> None:
    assert [*doctor.check_origins({"trainer": tmp_path / "trainer2" / "__init__.py"}, tmp_path)]
    assert not [*doctor.check_origins({"trainer": tmp_path / "trainer" / "__init__.py"}, tmp_path)]


def test_foreign_distribution_with_our_package_name() -> None:
    owners = {"trainer": ["tandemrec", "trainer"], "launch": ["tandemrec"], "pipelines": [], "embeddings": []}
    (problem,) = doctor.check_owners(owners)
    assert problem.what == "trainer also installs a package called 'trainer'"


def test_this_environment_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor() == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = [line.split()[0] for line in out.splitlines()]
    assert {"python", "torch", "torchrec", "torchx", "pyarrow", "device", "ok:"} <= set(names)


def test_what_training_will_use_is_said_with_the_ranks_own_words() -> None:
    gpu = Gpu("NVIDIA H100", (9, 0))
    full = Machine("13.0", "cuda", "1.8.0", (gpu, gpu), ("sm_90",), boards=2)
    assert doctor.device_notes(full) == doctor.device_notes(Machine()) == []
    # PyPI's torch is a CUDA build, and README's fbgemm none.
    (note,) = doctor.device_notes(replace(full, fbgemm="cpu"))
    assert note == choose("auto", replace(full, fbgemm="cpu")).note
    assert "make clean install DEVICE=cuda" in note
    (note,) = doctor.device_notes(replace(full, gpus=(gpu, Gpu("Tesla T4", (7, 5)))))
    assert "Tesla T4 is sm_75, and fbgemm 1.8.0 has code for sm_80, sm_90, sm_100 only" in note
    (note,) = doctor.device_notes(replace(full, gpus=(), problem="The NVIDIA driver is too old"))
    assert "CUDA sees no GPU (The NVIDIA driver is too old)" in note
    (note,) = doctor.device_notes(replace(full, gpus=(gpu,)))
    assert "2 NVIDIA devices are there, and 1 are visible (CUDA_VISIBLE_DEVICES)" in note
    assert doctor.device_words(full, 8) == "cuda (NVIDIA H100, sm_90, NVIDIA H100, sm_90), cpu (8 cores)"


@pytest.mark.parametrize(
    ("fbgemm", "said"), [("cuda", "on 1 GPU(s)"), ("cpu", "on the CPU"), ("unknown", "on the CPU")]
)
def test_the_last_line_says_on_what(
    fbgemm: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine("13.0", fbgemm, "1.8.0", (Gpu("NVIDIA A100", (8, 0)),), ("sm_80",), boards=1)
    sound = Environment(versions=SOUND, machine=machine)
    monkeypatch.setattr(doctor, "observe", lambda: sound)
    assert doctor.doctor() == 0
    *notes, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("note", "ok"))]
    assert last == f"ok: this environment can train, {said}"
    assert [note.startswith("note: computing on the CPU") for note in notes] == [True] * (fbgemm != "cuda")


def test_the_names_of_builds_are_those_of_the_trainer() -> None:
    """Written twice, since `doctor` must run where another package hides the trainer's."""
    assert (doctor.CPU_FBGEMM, doctor.CUDA_FBGEMM) == (device.CPU_FBGEMM, device.CUDA_FBGEMM)
    assert {release for _, _, release in doctor.SUPPORTED_TRIPLES} == set(device.FBGEMM_ARCHES)


def test_problems_go_to_stderr_one_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"torch": "2.12.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
    monkeypatch.setattr(doctor, "observe", lambda: Environment(versions=versions))
    assert doctor.doctor() == 2
    out, err = capsys.readouterr()
    assert "ok" not in out
    assert [line.startswith("tandemrec: error: ") for line in err.splitlines()] == [True, True]


def test_it_is_told_what_the_search_is_done_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.model.ops import top_products

    monkeypatch.setattr(top_products, "kernel", lambda: top_products.Kernel(None, 8))  # type: ignore[arg-type]
    assert doctor.search_words() == "compiled, 8 numbers at once"
    monkeypatch.setattr(top_products, "kernel", lambda: None)
    assert "pip install --no-deps -e ." in doctor.search_words()
    lines = doctor.report_lines(Environment(versions={}, search="compiled"))
    assert any(line.split() == ["search", "on", "cpu", "compiled"] for line in lines)
