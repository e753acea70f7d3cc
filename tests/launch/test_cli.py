"""Exit codes and messages of the command line; the pipelines behind it are replaced by stand-ins."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embeddings.errors import ConfigError, DataError
from launch.cli import main
from launch.reporting import report

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions in the place of `pipelines.<verb>`."""

    def replace(verb: str, **functions: Any) -> None:
        module = ModuleType(f"pipelines.{verb}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def _raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


TRAIN = ["train", "--config", "c.toml", "--out", "run"]


def test_success_is_0_and_arguments_arrive(pipeline: Callable[..., None]) -> None:
    calls: list[tuple[object, ...]] = []
    pipeline("train", train=lambda *args: calls.append(args))
    assert main([*TRAIN, "--set", "train.max_steps=3", "--set", "data.log=x y"]) == 0
    assert main([*TRAIN, "--profile"]) == 0
    assert calls == [
        (Path("c.toml"), Path("run"), ["train.max_steps=3", "data.log=x y"], False),
        (Path("c.toml"), Path("run"), [], True),
    ]


def test_every_verb_calls_its_pipeline(pipeline: Callable[..., None], capsys: Capture) -> None:
    calls: dict[str, tuple[object, ...]] = {}

    def note(verb: str, result: object = None) -> Callable[..., object]:
        def called(*args: object, **options: object) -> object:
            calls[verb] = (*args, *options.values())
            return result

        return called

    pipeline("fetch.fetch", fetch=note("fetch", [Path("d/events.parquet")]))
    pipeline(
        "ingest.ingest",
        ingest=note("ingest", "manifest"),
        load_ingest_config=lambda path, overrides: (path, overrides),
        report_lines=lambda manifest: [f"report of {manifest}"],
    )
    pipeline(
        "plan.plan", plan=note("plan"), PlanOptions=lambda world, local, device, hbm, *rest: (world, hbm)
    )
    for verb in ("evaluate", "export", "score"):
        pipeline(verb, **{verb: note(verb)})
    ingest = "ingest --events e.parquet --out log --config i.toml --set users=9 --overwrite"
    plan = "plan --config c.toml --set model.k=5 --world-size 8 --hbm 141GB"
    score = "score --snapshot snap --requests log --split validation --limit 7 --out s.parquet"
    for line in (
        "fetch --out d",
        ingest,
        plan,
        "evaluate --run r --device cpu",
        "export --run r --out snap",
        score,
    ):
        assert main(line.split()) == 0, line
    assert calls == {
        "fetch": (Path("d"), "demo"),
        "ingest": (Path("e.parquet"), Path("log"), (Path("i.toml"), ["users=9"]), True),
        "plan": (Path("c.toml"), ["model.k=5"], (8, "141GB")),
        "evaluate": (Path("r"), "test", "", "cpu", 0, "raw", 0),
        "export": (
            *(Path("r"), Path("snap"), "fp32", "fp16", "", 0),
            *(1000, False, None, "", None, "none", "raw", None, 0),
        ),
        "score": (Path("snap"), Path("log"), "validation", 7, Path("s.parquet"), None, None, False),
    }
    assert capsys.readouterr().out.splitlines() == ["events: d/events.parquet", "report of manifest"]


@pytest.mark.parametrize(
    "error", [ConfigError("k is wrong\n  set model.k"), DataError("no such column", file="a.parquet", row=3)]
)
def test_user_error_is_2_and_one_line(
    pipeline: Callable[..., None], capsys: Capture, error: Exception
) -> None:
    pipeline("train", train=_raiser(error))
    assert main(TRAIN) == 2
    assert capsys.readouterr().err == f"tandemrec: error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("words", [["--debug", *TRAIN], [*TRAIN, "--debug"]])
def test_debug_shows_the_traceback(pipeline: Callable[..., None], capsys: Capture, words: list[str]) -> None:
    pipeline("train", train=_raiser(ConfigError("k is wrong")))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("tandemrec: error: k is wrong\n")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_anything_else_is_1(pipeline: Callable[..., None], capsys: Capture, error: BaseException) -> None:
    pipeline("train", train=_raiser(error))
    assert main(TRAIN) == 1
    assert ("boom" in capsys.readouterr().err) == isinstance(error, RuntimeError)


def test_rank_is_named_where_there_are_several(
    pipeline: Callable[..., None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline("train", train=_raiser(ConfigError("k is wrong")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(TRAIN) == 2
    assert capsys.readouterr().err == "[rank 1] tandemrec: error: k is wrong\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(TRAIN) == 2
    assert capsys.readouterr().err == "tandemrec: error: k is wrong\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        ([], "Missing command"),
        (["train", "--config", "c.toml"], "Missing option '--out'"),
        (["plan", "--config", "c.toml", "--world-size", "0"], "--world-size"),
        (["train", "--confg", "c.toml"], "No such option"),
    ],
)
def test_wrong_usage_is_2_and_one_line(capsys: Capture, words: list[str], part: str) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.startswith("tandemrec: error: ")
    assert err.count("\n") == 1


def test_help_and_version_are_0(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    verbs = capsys.readouterr().out
    for verb in ("doctor", "fetch", "ingest", "plan", "train", "evaluate", "export", "score"):
        assert verb in verbs
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tandemrec ")


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=100)


def test_doctor_names_a_foreign_trainer_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    done = _run(["doctor"], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "hides tandemrec's own" in done.stderr
    assert str(tmp_path / "trainer") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_foreign_pipelines_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    done = _run(["doctor"], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "hides tandemrec's own" in done.stderr
    assert done.stderr.count("\n") == 1


def test_fbgemm_is_quiet_about_its_own_table_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """The older pair says so 14 times at each import, as a warning of the root logger."""
    # Whatever ran before may have left that logger to errors alone.
    caplog.set_level(logging.WARNING)
    assert main(["--version"]) == 0
    logging.warning("\n_fbgemm_torch_compat_table has no entry for 1.6.0 of FBGEMM")
    logging.warning("FBGEMM_GPU version is 1.9.0, which is not guaranteed to be compatible")
    assert [record.message for record in caplog.records] == [
        "FBGEMM_GPU version is 1.9.0, which is not guaranteed to be compatible"
    ]


def test_help_does_not_import_torch() -> None:
    code = "import sys; from launch.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_completion_is_installed_and_fast(tmp_path: Path) -> None:
    """What a shell runs at every press of a key must not wait for torch."""
    home = {**os.environ, "HOME": str(tmp_path), "PYTHONPROFILEIMPORTTIME": "1"}
    tandemrec = str(Path(sys.executable).with_name("tandemrec"))
    # Typer looks for a shell among the processes above.
    install = '"$0" --install-completion bash; exit $?'
    done = subprocess.run(
        ["bash", "-c", install, tandemrec], env=home, capture_output=True, text=True, check=True
    )
    script = tmp_path / ".bash_completions" / "tandemrec.sh"
    assert f"bash completion installed in {script}" in done.stdout
    # The function as bash calls it, but for the program, which is that of this environment.
    line = f'source {script}; COMP_WORDS=(tandemrec {{words}}); COMP_CWORD={{at}}; _tandemrec_completion "$0"'
    for words, at, wanted in (
        ("tr", 1, "train"),
        ("export --attention-dtype fp", 3, "fp32\nfp16"),
        ("cluster --gr", 2, "--group-by"),
    ):
        asked = line.format(words=words, at=at) + '; printf "%s\\n" "${COMPREPLY[@]}"'
        found = subprocess.run(
            ["bash", "-c", asked, tandemrec], env=home, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == wanted
        assert "launch.cli" in found.stderr
        assert " torch" not in found.stderr and "pipelines" not in found.stderr


def test_a_full_disk_is_no_internal_error(capfd: pytest.CaptureFixture[str]) -> None:
    """The system names no file where a write fails."""
    assert report(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), debug=False) == 2
    assert "error: a file cannot be written: No space left on device" in capfd.readouterr().err
    missing = "libnvidia-ml.so.1: cannot open shared object file: No such file or directory"
    assert report(OSError(missing), debug=False) == 2
    assert report(OSError(errno.EBADF, os.strerror(errno.EBADF)), debug=False) == 1
    assert "internal error" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "ingest --config c --events a.csv b.csv.gz",
            "unexpected b.csv.gz: an option takes one value; repeat --events before each, "
            "or quote the pattern; see `tandemrec ingest --help`",
        ),
        (
            "ingest --config c --events a.csv --set seed=1 users=2",
            "unexpected users=2: an option takes one value; repeat --set before each"
            "; see `tandemrec ingest --help`",
        ),
        (
            "plan --config c --world-size 2 data.log=runs/log",
            "unexpected data.log=runs/log: put --set before each; see `tandemrec plan --help`",
        ),
        ("doctor a b", "unexpected a b: an option takes one value; see `tandemrec doctor --help`"),
        ("frobnicate", "No such command 'frobnicate'; see `tandemrec --help`"),
        ("train --config c.toml", "Missing option '--out'; see `tandemrec train --help`"),
    ],
)
def test_wrong_usage_says_what_to_do(capsys: Capture, words: str, message: str) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"tandemrec: error: {message}\n"


def test_our_own_sentences_have_no_prefix(pipeline: Callable[..., None], capsys: Capture) -> None:
    pipeline("ingest.ingest", ingest=None, report_lines=None, load_ingest_config=lambda *_: None)
    assert main(["ingest", "--config", "c.toml", "--events", "e.csv"]) == 2
    assert capsys.readouterr().err.startswith("tandemrec: error: name the log to write with --out")


def test_torchrec_is_quiet_about_tables_without_a_cache(caplog: pytest.LogCaptureFixture) -> None:
    """It says so in every step, as an error of the root logger."""
    assert main(["--version"]) == 0
    logging.error("Invalid setting on <class 'B'> modules. prefetch_pipeline must be set to True.\n")
    logging.error("Invalid setting on <class 'B'> modules. another")
    assert [record.message for record in caplog.records] == [
        "Invalid setting on <class 'B'> modules. another"
    ]
