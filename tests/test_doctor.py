"""Each broken environment that `doctor` knows is fed to its checks as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.doctor import Environment

SOUND = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": None}


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm"),
    [("2.13.0+cpu", "1.8.0", "1.8.0"), ("2.13.1", "1.8.2", "1.8.1"), ("2.11.0+cu130", "1.6.0", "1.6.0")],
)
def test_triple_supported(torch: str, torchrec: str, fbgemm: str) -> None:
    assert doctor.check_triple(torch, torchrec, fbgemm) == []


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
    assert doctor.check_fbgemm_build(cpu=None, cuda="1.8.0", torch_cuda="13.0") == []
    assert doctor.check_fbgemm_build(cpu="1.8.0", cuda=None, torch_cuda=None) == []


def test_failing_import_is_reported_unless_its_cause_is() -> None:
    broken = Environment(versions=SOUND, fbgemm_error="OSError: undefined symbol")
    (problem,) = doctor.check(broken)
    assert "undefined symbol" in str(problem)
    caused = Environment(
        versions={**SOUND, "fbgemm-gpu-cpu": "1.9.0"}, fbgemm_error="OSError: undefined symbol"
    )
    (problem,) = doctor.check(caused)
    assert "do not go together" in str(problem)


def test_foreign_package_hides_ours(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "project", tmp_path / "site-packages" / "trainer" / "__init__.py"
    origins = {"trainer": foreign, "embeddings": ours / "embeddings" / "__init__.py", "pipelines": None}
    hidden, missing = doctor.check_origins(origins, ours)
    assert "'trainer'" in hidden.what
    assert hidden.where == str(foreign)
    assert "rename" in hidden.fix
    assert "'pipelines' not found" in missing.what


def test_a_folder_with_a_longer_name_is_not_ours(tmp_path: Path) -> None:
    assert doctor.check_origins({"trainer": tmp_path / "trainer2" / "__init__.py"}, tmp_path)
    assert not doctor.check_origins({"trainer": tmp_path / "trainer" / "__init__.py"}, tmp_path)


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


def test_problems_go_to_stderr_one_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"torch": "2.12.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
    monkeypatch.setattr(doctor, "observe", lambda: Environment(versions=versions))
    assert doctor.doctor() == 2
    out, err = capsys.readouterr()
    assert "ok" not in out
    assert [line.startswith("tandemrec: error: ") for line in err.splitlines()] == [True, True]
