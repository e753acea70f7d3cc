"""Places: local paths stay what they are; addresses with credentials are refused; stores keep the rules."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from embeddings.errors import ConfigError, DataError, TandemError
from launch.cli import main
from launch.reporting import report
from pipelines.ingest.config import load_ingest_config
from pipelines.ingest.downloads import Downloads
from trainer.config.sections import DataConfig
from trainer.run_config import load_config
from trainer.run_folder import RunFolder
from trainer.sealed_folder import (
    DIGEST,
    MANIFEST,
    Seal,
    locked,
    publish,
    replacing,
    retire,
    scratch,
    write_text,
)
from trainer.storage import is_remote, objects, place, refuse_secrets, without_secrets

pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
SEAL = Seal(lambda path, problem: TandemError(f"{path}: {problem}"), "write it again")


def test_local_text_is_a_path_and_nothing_else(tmp_path: Path) -> None:
    for text in ("runs/demo", "/data/log", "a:b", "./s3:/bucket", str(tmp_path)):
        assert place(text) == Path(text) and type(place(text)) is type(Path())
    for text in (f"file://{tmp_path}", f"file://localhost{tmp_path}", f"local://{tmp_path}"):
        assert place(text) == tmp_path and type(place(text)) is type(Path())
    assert not is_remote(tmp_path) and is_remote(place("memory://a/b"))
    assert str(place("memory://a/b/") / "c") == "memory://a/b/c" or str(place("memory:///a/b") / "c")


def test_local_runs_load_no_package_of_a_store() -> None:
    code = (
        "import sys, pipelines.train, pipelines.export, pipelines.score, trainer.storage.ranges\n"
        "from trainer.run_config import Config\n"
        "Config.model_validate({'data': {'log': 'runs/log'}})\n"
        "print({name.split('.')[0] for name in sys.modules} & {'s3fs', 'upath', 'aiobotocore', 'aiohttp'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIDX:hush%2Fhush@bucket/log",
        "s3://AKIDX:hush/hush@bucket/log",
        "s3://hush@bucket",
        "gs://me:hush@bucket/x",
        "s3://bucket/log?X-Amz-Signature=hush",
        "s3://bucket/log?secret_key=hush",
        "https://bucket.s3.amazonaws.com/k?X-Amz-Credential=hush%2Fx&X-Amz-Security-Token=hush",
        "https://account.blob.core.windows.net/c/b?sv=2022&sig=hush",
        "https://hush@host/x",
        "s3:/AKIDX:hush@bucket/log",
        "s3:AKIDX:hush/hush@bucket",
        "S3:///hush@bucket",
        "simplecache::s3://AKIDX:hush@bucket",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        place(text)
    assert "AWS_PROFILE" in str(caught.value) and "hush" not in str(caught.value)
    for words in (["train", "--config", "c.toml", "--out", text], ["train", "--set", f"data.log={text}"]):
        assert main(words) == 2
    shown = "".join(capsys.readouterr())
    assert "hush" not in shown and shown.count("credentials in an address") == 2
    assert "error: --out " in shown and "error: --set data.log=" in shown
    assert "hush" not in without_secrets(f"data.log: {text} is wrong")
    # In a config, whatever the key is for: a run would keep it.
    for key, tree in (
        ("data.log", "[data]\nlog"),
        ("data.domain", "[data]\ndomain"),
        ("extends:", "extends"),
    ):
        (tmp_path / "c.toml").write_text(f'{tree} = "{text}"\n')
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "c.toml")
        assert str(caught.value).startswith(f"{tmp_path / 'c.toml'}: {key}")
        assert "hush" not in str(caught.value) and "credentials in an address" in str(caught.value)
    for override in (f"data.log={text}", text, f"plan.file='{text}'"):
        with pytest.raises(ConfigError, match=r"^--set .*credentials in an address") as caught:
            load_config(tmp_path / "none.toml", [override])
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3://KEY:hush@bucket/log", "give them by AWS_PROFILE"),
        ("postgresql://me:hush@host/db", "give them to the database's driver, in ~/.pgpass or ~/.my.cnf"),
        ("mysql+pymysql://me:hush@host:3306/db", "give them to the database's driver"),
        ("postgresql+psycopg://host/db?user=me&password=hush", "give them to the database's driver"),
    ],
)
def test_credentials_go_to_what_reads_them(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(text)
    assert told in str(caught.value) and "***" in str(caught.value) and "hush" not in str(caught.value)


def test_what_is_blotted_out_reads_like_an_address() -> None:
    for text, says in (
        ("got s3://KEY:a/b@bucket/x.", "got s3://***@bucket/x."),
        ("'https://h/k?a=1&X-Amz-Signature=00&b=2'", "'https://h/k?a=1&X-Amz-Signature=***&b=2'"),
        ("s3:/KEY:SECRET@bucket, s3://a/b", "s3:/***@bucket, s3://a/b"),
        ("http://u:p@h:1 and http://h:2/a", "http://***@h:1 and http://h:2/a"),
    ):
        assert without_secrets(text) == says and without_secrets(says) == says


def test_packages_that_repeat_credentials_are_blotted_out(capsys: pytest.CaptureFixture[str]) -> None:
    told = "Failed to connect to proxy URL: http://me:hush@proxy:80"
    for error, code in ((OSError(5, told, "s3://b/x"), 2), (RuntimeError(told), 1)):
        assert report(error, debug=True) == code
    shown = capsys.readouterr().err
    assert "hush" not in shown and shown.count("http://***@proxy:80") >= 3


def test_addresses_without_credentials_stay() -> None:
    for text in (
        *(
            "s3://bucket/a@b/c:d",
            "abfs://box@account.dfs.core.windows.net/x",
            "a b@c://",
            "s3://b/x?versionId=1",
        ),
        *("logs:a@b", '["s3://b/x","me@host"]', "sftp://me@host/x", "s3://bucket/day:1/x@y"),
    ):
        refuse_secrets(text)
        assert without_secrets(text) == text


def test_what_is_no_place_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nosuch://x/y: is no place"):
        place("nosuch://x/y")
    with pytest.raises(ConfigError, match="names no bucket"):
        place("s3:///log")
    with pytest.raises(ConfigError, match="gs://: names no place"):
        place("gs://")
    with pytest.raises(ConfigError, match="addresses inside addresses"):
        place("simplecache::s3://bucket/log")
    with pytest.raises(ConfigError, match=r"machine called 'runs'.* file:///FOLDER"):
        place("file://runs/demo")
    # A key and a secret without a bucket, or an endpoint: not repeated.
    with pytest.raises(ConfigError, match=r"^s3://\.\.\.: a bucket's name has no colon.*AWS_ENDPOINT_URL"):
        place("s3://AKIDX:hush/log")
    # What would be lost on the way to a config.
    other = place("memory://x")
    monkeypatch.setattr("upath.UPath", lambda text: other)
    with pytest.raises(
        ConfigError, match="sftp://host/x: the package for sftp:// keeps no more of it than memory://x"
    ):
        place("sftp://host/x")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules, "trainer.storage.s3", raising=False)
    with pytest.raises(ConfigError, match=r"not installed.*requirements/s3\.txt"):
        place("s3://bucket/log")


@pytest.mark.parametrize(
    "text", ["s3:/bucket/log", "s3:bucket/log", "S3:/bucket/log", Path("s3://bucket/log")]
)
def test_a_slash_too_few_makes_no_local_folder(text: str | Path) -> None:
    with pytest.raises(ConfigError, match=r"two slashes: s3://bucket/log; a local folder .* \./[sS]3:"):
        place(text)


def test_a_missing_package_of_a_store_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"^gs://b/x: a package for gs:// is missing: `pip install gcsfs"):
        place("gs://b/x")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    for protocol in ("abfs", "abfss", "az"):
        with pytest.raises(ConfigError, match=rf"^{protocol}://b@c/x: .*`pip install adlfs .*`$"):
            place(f"{protocol}://b@c/x")


def test_a_bad_address_is_told_with_its_file_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.toml"
    for key, tree in (
        ("data.log", '[data]\nlog = "s3:/bucket/log"'),
        ("train.init_from", '[train]\ninit_from = "s3:/bucket/run"'),
        ("plan.file", '[plan]\nfile = "s3:/bucket/plan.json"'),
        ("extends", 'extends = "s3:/bucket/base.toml"'),
        ("plan.mapped_folder", '[plan]\nmapped_folder = "s3:/bucket/tables"'),
    ):
        file.write_text(tree)
        with pytest.raises(
            ConfigError, match=rf"^{re.escape(f'{file}: {key}: s3:/bucket/')}.*two slashes"
        ) as caught:
            load_config(file)
        assert "given:" not in str(caught.value)
    file.write_text('[plan]\nmapped_folder = "s3://bucket/tables"')
    with pytest.raises(ConfigError, match=r"bad\.toml: plan\.mapped_folder: s3:.* of this machine"):
        load_config(file)
    assert (
        main(["score", "--snapshot", "s", "--requests", "r", "--out", "o", "--cache", "s3://bucket/c"]) == 2
    )
    assert "'--cache': s3://bucket/c: must be a folder of this machine" in capsys.readouterr().err
    file.write_text("")
    with pytest.raises(ConfigError, match=r"^--set data\.log=nosuch://x: data\.log: nosuch://x: is no place"):
        load_config(file, ["data.log=nosuch://x"])
    file.write_text(
        '[item_table]\nfiles = ["a.csv", "s3:/bucket/items.csv"]\n[vocabulary]\nlog = "gs:/bucket/x"'
    )
    with pytest.raises(ConfigError, match=r"item_table\.files\.1: s3:/bucket.*vocabulary\.log: gs:/bucket"):
        load_ingest_config(file)
    for words, says in (
        (["--out", "s3:/bucket/run"], "'--out': s3:/bucket/run: an address has two slashes"),
        (["--out", "memory://run"], "'--out': memory://run: that is the memory of one process"),
        (["--out", "run", "--config", "nosuch://x"], "'--config': nosuch://x: is no place"),
    ):
        assert main(["train", "--config", "c.toml", *words]) == 2
        assert says in capsys.readouterr().err


def test_a_config_may_start_from_one_that_lies_elsewhere(tmp_path: Path) -> None:
    base, here = tmp_path / "base.toml", tmp_path / "here.toml"
    there = place("memory://extending/a/there.toml")
    base.write_text("[train]\nepochs = 7\n")
    there.write_text(f'extends = "{base}"\n')
    here.write_text(f'extends = "{there}"\n')
    above = place("memory://extending/a/b/above.toml")
    above.write_text('extends = "../there.toml"\n')
    for path in (there, here, above):
        assert load_config(path).train.epochs == 7


def test_a_setting_keeps_its_address() -> None:
    config = DataConfig.model_validate({"log": "memory://logs/a"})
    assert is_remote(config.log) and not is_remote(DataConfig().log)
    again = DataConfig.model_validate_json(config.model_dump_json())
    assert str(again.log) == str(config.log) and again == config


def test_a_folder_is_sealed_published_and_retired_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = objects.upload
    monkeypatch.setattr(objects, "upload", lambda file, path: (written.append(path.name), real(file, path)))
    final = place("memory://sealed/one")
    with scratch(final.parent, final.name) as part:
        assert not is_remote(part)
        (part / "b").mkdir()
        (part / "b" / "c.bin").write_bytes(b"content")
        SEAL.write(part, "{}")
        publish(part, final)
        with pytest.raises(FileExistsError):
            publish(part, final)
    assert not part.exists()
    assert written == ["c.bin", MANIFEST, DIGEST]
    assert SEAL.read(final) == b"{}" and (final / "b" / "c.bin").read_bytes() == b"content"
    assert objects.sizes(final) == {"b/c.bin": 7, MANIFEST: 2, DIGEST: len((final / DIGEST).read_bytes())}
    store, deleted = final.fs, []  # type: ignore[attr-defined]
    monkeypatch.setattr(store, "rm_file", lambda path: deleted.append(path.rpartition("/")[2]))
    monkeypatch.setattr(store, "rm", lambda path, recursive=False: deleted.append("rest"))
    retire(final, "x")
    assert deleted[:3] == [MANIFEST, DIGEST, "rest"]


def test_small_files_and_digests() -> None:
    file = place("memory://small/summary.json")
    write_text(file, "one")
    write_text(file, "two")
    with replacing(file.with_name("scores")) as part:
        part.write_bytes(b"x" * 5)
    assert file.read_text() == "two" and (file.parent / "scores").read_bytes() == b"xxxxx"
    with pytest.raises(KeyError), replacing(file.with_name("other")) as part:
        part.write_bytes(b"half")
        raise KeyError
    assert not file.with_name("other").exists()


def test_no_name_leads_out_of_a_local_folder(tmp_path: Path) -> None:
    """Whoever may write objects would else write files of whoever copies them."""
    source = place("memory://names/raw")
    (source / "a" / "b.csv").write_bytes(b"fine")
    objects.copy_folder(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "a" / "b.csv").read_bytes() == b"fine"
    store = source.fs  # type: ignore[attr-defined]
    store.pipe_file("/names/raw/../../../evil.csv", b"bad")
    with pytest.raises(OSError, match="leads out of the folder"):
        objects.copy_folder(source, tmp_path / "copy")
    with Downloads() as downloads, pytest.raises(DataError, match=r"\.\./evil\.csv.*leads out of the folder"):
        downloads.local(str(source))
    assert not list(tmp_path.parent.glob("**/evil.csv"))


def test_a_lock_says_that_it_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with locked(place("memory://run/.lock"), "two of test_places go unnoticed") as held:
        assert not held
    assert "memory://run: a store keeps no locks, so two of test_places" in capsys.readouterr().err


def test_only_old_folders_without_a_manifest_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    root = place("memory://sweep")
    for name in ("step-00000001-aaaaaaaa/x", "step-00000002-bbbbbbbb/x", f"step-00000002-bbbbbbbb/{DIGEST}"):
        (root / name).write_bytes(b"1")
    assert objects.unfinished(root, DIGEST, 60) == []
    now = time.time()
    monkeypatch.setattr("trainer.storage.objects.time.time", lambda: now + 61)
    assert [path.name for path in objects.unfinished(root, DIGEST, 60)] == ["step-00000001-aaaaaaaa"]
    objects.remove_left(root, "step-*-bbbbbbbb", 62)
    assert len(objects.sizes(root)) == 3
    objects.remove_left(root, "step-*-bbbbbbbb", 60)
    assert list(objects.sizes(root)) == ["step-00000001-aaaaaaaa/x"]


def test_a_port_is_no_password() -> None:
    for text in ("hdfs://namenode:9000/logs/user@3/log", "http://host:80/user@3"):
        assert without_secrets(text) == text


def test_a_restarted_job_takes_nothing_back_from_the_one_that_took_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = place("memory://runs/taken-over")

    def start(job: str, restarts: int = 0, variable: str = "TORCHELASTIC_RUN_ID") -> RunFolder:
        with monkeypatch.context() as patch:
            for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
                patch.delenv(name, raising=False)
            patch.setenv(variable, job)
            count = "TORCHELASTIC_RESTART_COUNT" if variable.startswith("TORCH") else "SLURM_RESTART_COUNT"
            patch.setenv(count, str(restarts))
            folder = RunFolder(path)
            folder.check_not_ousted()
            with folder.lock():
                return folder

    # A restart of a job that never came as far as to train here takes over from one of yesterday.
    start("yesterday")
    start("a", restarts=1)
    one = start("a", restarts=2)
    other = start("77", variable="SLURM_JOB_ID")
    with pytest.raises(ConfigError, match=r"another training began .*of Slurm job 77\), so this one ends"):
        one.check_newest()
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"after this one \(.*Slurm job 77\), so this restart of torchrun a"
        ):
            start("a", restarts=3)
        other.check_newest()
    other = start("77", restarts=1, variable="SLURM_JOB_ID")
    # Somebody who starts it anew means it, as does whoever names no job.
    start("a")
    with pytest.raises(ConfigError, match="this restart of Slurm job 77 ends"):
        start("77", restarts=2, variable="SLURM_JOB_ID")
    newest = start("none", restarts=1)
    (path / ".training").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="another training began in this run folder"):
        newest.check_newest()
    start("a", restarts=4).check_newest()


def test_only_what_lies_in_a_folder_is_deleted_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems find by the beginning of names."""
    gone = list[str]()
    names = ["box/run/a", "box/run/b[1]", "box/run-2/a"]
    store = SimpleNamespace(
        find=lambda root: [name for name in names if name.startswith(root)],
        rm=gone.extend,
        rm_file=gone.append,
        exists=lambda root: False,
    )
    monkeypatch.setattr(objects, "store_of", lambda folder: (store, "box/run"))
    objects.remove(Path("box/run"), (), strict=True)
    assert sorted(gone) == names[:2]
