"""Users by the names that the raw tables gave them: in requests of raw values, on the page, beside scores."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from pipelines.score import write_named_scores
from pipelines.serve.service import Service
from tests.helpers.logs import FEATURES, Shape, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import Client, bodies, service_of, serving, snapshot_of
from tests.helpers.vocabularies import all_large
from trainer.log.known_values import KnownValues
from trainer.log.schema import FeatureInfo, read_manifest
from trainer.log.writer import write_manifest
from trainer.quality.scored import Scored, read_scores
from trainer.serving.histories import HistoryStore

ARROW = "application/vnd.apache.arrow.stream"
# Digits are names like others, and no numbers; the last one has no row.
NAMES = ["", "01", "2", "3", "a/b", "u 7", "u_0017", "ü", "z"]
ROWS = [{**row, "user_id": row["user_id"] + 1} for row in random_rows(5, Shape(users=8))]
USER = NAMES.index("u_0017") + 1


def with_names(log: Path, values: Sequence[Any], digest: str | None = None) -> Path:
    """The log with a vocabulary of users."""
    count = len(values)
    table = pa.table({"value": values, "id": range(1, count + 1), "count": [1] * count})
    pq.write_table(table, log / "vocab" / "user_id.parquet")
    digest = digest or hashlib.sha256("".join(f"{value}\n" for value in values).encode()).hexdigest()
    named = {"user_id": FeatureInfo(rows=count + 1, vocabulary=digest)}
    write_manifest(log, read_manifest(log).model_copy(update={"named": named}))
    return log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log", {"train": ROWS})


def served(log: Path, monkeypatch: pytest.MonkeyPatch, stored: bool = True) -> Service:
    """Every raw value of a feature is its id, so that users alone are told apart."""
    service = service_of(snapshot_of(preset("dare", log)), monkeypatch, log if stored else None)
    raw = {name: KnownValues.of(pa.array(range(1, rows))) for name, rows in FEATURES.items()}
    service.versions.scorer.vocabularies = raw
    return service


def asked(log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request of USER with its history, and the same without history or user."""
    full = next(body for (user, _), body in bodies(read_manifest(log), ROWS) if user == USER)
    return full, {key: part for key, part in full.items() if key not in ("history", "user_id")}


async def refused(client: Client, user: Any, plain: dict[str, Any], ids: str = "raw") -> tuple[int, str]:
    answer = await client.http.post("/score", json={"requests": [{**plain, "user_id": user}], "ids": ids})
    return answer.status_code, answer.json()["error"].removeprefix("requests[0].user_id: ")


async def by_arrow(client: Client, plain: dict[str, Any], user: pa.Array, ids: str = "raw") -> Any:
    row = {f"candidate_{name}": values for name, values in plain["candidates"].items()}
    table = pa.Table.from_pylist([{"request_timestamp": plain["time"], **row}] * len(user))
    table = table.append_column("user_id", user).replace_schema_metadata({"ids": ids})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    headers = {"content-type": ARROW}
    return (await client.http.post("/score", content=sink.getvalue().to_pybytes(), headers=headers)).json()


def test_a_user_is_found_by_name(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In JSON, and in Arrow with text plain, in views and in dictionaries; dense ids stay numbers."""
    full, plain = asked(with_names(log, NAMES))

    async def run() -> None:
        async with serving(served(log, monkeypatch)) as client:
            assert (await client.http.get("/healthz")).json()["users"] == "text"
            (expected,) = (await client.score(full))["results"]
            assert expected["history_used"] > 0
            (dense,) = (await client.score({**plain, "user_id": USER}))["results"]
            (found,) = (await client.score({**plain, "user_id": "u_0017"}, ids="raw"))["results"]
            assert found["scores"] == dense["scores"] == expected["scores"]
            # Of two users, so that each row has its own; no number is meant by the digit.
            (other,) = (await client.score({**plain, "user_id": NAMES.index("3") + 1}))["results"]
            assert other["scores"] != expected["scores"]
            names = pa.array(["u_0017", "3"])
            for user in (names, names.cast(pa.string_view()), names.dictionary_encode()):
                first, second = (await by_arrow(client, plain, user))["results"]
                assert first["scores"]["click"] == pytest.approx(expected["scores"]["click"], abs=1e-6)
                assert second["scores"]["click"] == pytest.approx(other["scores"]["click"], abs=1e-6)
            unknown = (404, "no stored history of user 'nobody'")
            assert await refused(client, "nobody", plain) == unknown
            assert await refused(client, "z", plain) == (404, "no stored history of user 'z'")
            assert await refused(client, "x" * 99, plain) == (404, f"no stored history of user '{'x' * 80}'")
            answer = await by_arrow(client, plain, pa.array(["u_0017", "nobody"]))
            assert answer["error"] == "requests[1], column user_id: no stored history of user 'nobody'"
            integer = "is an integer, and the users of the histories' log are text"
            assert await refused(client, USER, plain) == (422, integer)
            assert integer in (await by_arrow(client, plain, pa.array([USER])))["error"]
            status, problem = await refused(client, "u_0017", plain, "dense")
            assert status == 422 and "dense ids are integers" in problem
            assert "say `ids: raw`" in (await by_arrow(client, plain, names, "dense"))["error"]
            assert "give a history, or a user_id" in (await refused(client, None, plain))[1]
            for wrong in (1.5, True, ["u_0017"]):
                kinds = "must be a valid integer, or text in a body of raw values"
                assert await refused(client, wrong, plain) == (422, kinds)
            assert "must be less than 92" in (await refused(client, 2**63, plain))[1]
            missing = await by_arrow(client, plain, pa.array([None], pa.string()).dictionary_encode())
            assert "give a history, or a user_id" in missing["error"]

    asyncio.run(run())


def test_users_without_names_are_integers(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a history that is sent, a name need not be known."""
    full, plain = asked(log)

    async def run() -> None:
        async with serving(served(log, monkeypatch)) as client:
            assert (await client.http.get("/healthz")).json()["users"] == "integers"
            (expected,) = (await client.score({**plain, "user_id": USER}, ids="raw"))["results"]
            (named,) = (await client.score({**full, "user_id": "u_0017"}, ids="raw"))["results"]
            assert named["scores"] == expected["scores"]
            text = "is text, and the users of the histories' log are integers"
            assert await refused(client, str(USER), plain) == (422, text)
            assert text in (await by_arrow(client, plain, pa.array(["u_0017"])))["error"]
            assert await refused(client, 99, plain) == (404, "no stored history of user 99")
        async with serving(served(log, monkeypatch, stored=False)) as client:
            assert (await client.http.get("/healthz")).json()["users"] is None
            assert "started without --histories" in (await refused(client, "u_0017", plain))[1]

    asyncio.run(run())


def test_names_may_be_integers(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are other integers than the numbers that stand for them."""
    full, plain = asked(with_names(log, [10 * number for number in range(1, 10)]))

    async def run() -> None:
        async with serving(served(log, monkeypatch)) as client:
            (expected,) = (await client.score(full))["results"]
            (found,) = (await client.score({**plain, "user_id": 10 * USER}, ids="raw"))["results"]
            assert found["scores"] == expected["scores"]
            (found,) = (await by_arrow(client, plain, pa.array([10 * USER], pa.int32())))["results"]
            assert found["history_used"] == expected["history_used"]
            assert await refused(client, USER, plain) == (404, f"no stored history of user {USER}")
            text = "is text, and the users of the histories' log are integers"
            assert await refused(client, str(10 * USER), plain) == (422, text)
            (line,) = (await client.http.get("/users", params={"name": 10 * USER})).json()["users"]
            assert (line["user_id"], line["name"]) == (USER, str(10 * USER))

    asyncio.run(run())


@pytest.mark.parametrize("named", [True, False])
def test_the_page_shows_and_finds_names(log: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = NAMES if named else [str(row["user_id"]) for row in ROWS]
    if named:
        with_names(log, NAMES)

    async def run() -> None:
        async with serving(served(log, monkeypatch)) as client:
            listed = (await client.http.get("/users")).json()
            assert [line["name"] for line in listed["users"]] == names[: len(ROWS)]
            for line in listed["users"]:
                found = await client.http.get("/users", params={"name": line["name"]})
                assert found.json() == {"total": len(ROWS), "users": [line]}
                user = (await client.http.get(f"/users/{line['user_id']}")).json()
                assert user["name"] == line["name"]
            answer = await client.http.get("/users", params={"name": "nobody"})
            problem = "no stored history of user 'nobody'"
            if not named:
                problem = "is text, and the users of the histories' log are integers"
            assert answer.status_code == (404 if named else 422)
            assert answer.json() == {"error": f"name: {problem}"}
            assert (await client.http.get("/users", params={"name": "99"})).status_code == 404

    asyncio.run(run())


def test_names_that_are_not_the_logs_are_refused(log: Path) -> None:
    digest = read_manifest(with_names(log, NAMES)).named["user_id"].vocabulary
    with_names(log, [*NAMES[:-1], "y"], digest)
    with pytest.raises(DataError, match=r"user_id\.parquet.*is not the vocabulary in the log's manifest"):
        HistoryStore(log)
    (log / "vocab" / "user_id.parquet").unlink()
    with pytest.raises(DataError, match="missing"):
        HistoryStore(log)


@pytest.mark.parametrize("large", [False, True])
def test_scores_have_names_beside_the_numbers(log: Path, tmp_path: Path, large: bool) -> None:
    """A number without a name has none; names that cannot be read are told of, and cost no scores."""
    with_names(log, NAMES)
    manifest, file = read_manifest(log), tmp_path / "scores.parquet"
    users, zeros = np.array([USER, 1, 0, 10]), np.zeros(4, dtype=np.int64)
    score = np.zeros((4, 1), dtype=np.float32)
    scored = Scored(score, score, users, zeros, zeros, zeros, zeros, ("click",))
    with all_large() if large else nullcontext():
        assert write_named_scores(scored, file, log, manifest) == []
    assert not list(tmp_path.glob("*tmp*"))
    table = pq.read_table(file)
    assert table["user"].to_pylist() == ["u_0017", "", None, None] and "request" not in table.column_names
    assert table["user_id"].to_pylist() == read_scores(file).user_id.tolist() == users.tolist()
    (log / "vocab" / "user_id.parquet").unlink()
    (said,) = write_named_scores(scored, file, log, manifest)
    assert said.startswith("the scores have no column user: ") and "missing" in said
    assert "user" not in pq.read_table(file).column_names and read_scores(file).tasks == ("click",)
