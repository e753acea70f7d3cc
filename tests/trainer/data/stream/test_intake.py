"""What becomes of the windows of a stream: each is trained once, in order, and what is not is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError, DataError
from tests.helpers.streams import add_window, rows_of, write_stream
from trainer.data.stream.folder import WINDOWS, WindowFolder
from trainer.data.stream.intake import Intake, Taken
from trainer.data.stream.ledger import REMEMBERED, Entry, Ledger
from trainer.data.stream.source import SPLIT, Stamp, Window
from trainer.log.schema import SplitInfo, read_manifest


def intake(stream: Path, skip: bool = False, retry_s: float = 60.0) -> Intake:
    return Intake(WindowFolder(stream), stream, stream / "order.json", skip, retry_s)


def trained(taken: Taken) -> Ledger:
    """The ledger once the window is trained."""
    window = taken.window
    assert window is not None
    entry = Entry(taken.ledger.taken, window.name, window.digest, window.stamp, "trained")
    return taken.ledger.with_entry(entry, window.newest)


def take_all(stream: Path, ledger: Ledger, skip: bool = False) -> tuple[Ledger, list[str], list[str]]:
    """Train all that is there -> ledger, names in order, lines."""
    source, names, lines = intake(stream, skip), list[str](), list[str]()
    while True:
        taken = source.next(ledger, step=len(names))
        ledger = taken.ledger
        lines += taken.lines
        if taken.window is None:
            return ledger, names, lines
        names.append(taken.window.name)
        ledger = trained(taken)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = write_stream(tmp_path / "stream")
    for number in (2, 1, 3):
        add_window(path, f"w{number}", rows_of(number))
    return path


def test_windows_come_in_the_order_of_their_names_and_know_what_they_hold(stream: Path) -> None:
    rows = rows_of(1)
    window = intake(stream).next(Ledger(), 0).window
    assert window is not None and window.name == "w1"
    assert window.newest == max(time for row in rows for time in row["request_timestamp"])
    assert window.info.candidates == sum(row["num_candidates"] for row in rows)
    assert window.info.requests == sum(row["num_requests"] for row in rows)
    assert window.info.behaviors == sum(row["num_behaviors"] for row in rows)
    manifest = window.manifest(read_manifest(stream))
    assert [*manifest.splits] == [SPLIT] and manifest.splits[SPLIT].files[0].path == "windows/w1.parquet"
    ledger, names, lines = take_all(stream, Ledger())
    assert (names, lines, ledger.counts) == (["w1", "w2", "w3"], [], {"trained": 3})
    assert take_all(stream, ledger)[1:] == ([], [])


def test_what_waits_is_counted_and_the_newest_event_is_known(stream: Path) -> None:
    first = intake(stream).next(Ledger(), 0)
    newest = max(time for row in rows_of(3) for time in row["request_timestamp"])
    assert (first.waiting, first.newest) == (2, newest)


def test_files_that_somebody_still_writes_are_no_windows(stream: Path) -> None:
    for name in (".w4.parquet", "w4.parquet.tmp", "w4.tmp", "notes.txt"):
        shutil.copy(stream / WINDOWS / "w1.parquet", stream / WINDOWS / name)
    assert [*WindowFolder(stream).listed()] == ["w1", "w2", "w3"]
    assert not WindowFolder(stream / "nowhere").listed()
    with pytest.raises(ConfigError, match="must be a folder of this machine"):
        from trainer.storage import place

        WindowFolder(place("memory://bucket/stream"))


def test_a_late_window_is_said_once_and_never_trained(stream: Path) -> None:
    ledger, _, _ = take_all(stream, Ledger())
    add_window(stream, "w15", rows_of(15))
    ledger, names, lines = take_all(stream, ledger)
    assert names == [] and lines == ["window w15 came late: w3 was taken before, so it is not trained"]
    assert ledger.counts == {"trained": 3, "late": 1} and ledger.newest == "w3"
    assert take_all(stream, ledger)[1:] == ([], [])


def test_the_same_bytes_under_another_name_are_not_trained_again(stream: Path) -> None:
    ledger, _, _ = take_all(stream, Ledger())
    shutil.copy(stream / WINDOWS / "w2.parquet", stream / WINDOWS / "w4.parquet")
    ledger, names, lines = take_all(stream, ledger)
    assert names == [] and lines == ["window w4 has the bytes of w2, so it is not trained again"]
    assert ledger.counts == {"trained": 3, "twice": 1} and ledger.newest == "w4"


def test_other_bytes_under_a_name_that_was_trained_are_said_once(stream: Path) -> None:
    ledger, _, _ = take_all(stream, Ledger())
    add_window(stream, "w2", rows_of(9))
    ledger, names, lines = take_all(stream, ledger)
    assert names == [] and len(lines) == 1 and lines[0].startswith("window w2 has other bytes")
    # Another time of change alone is not worth a word.
    (stream / WINDOWS / "w3.parquet").touch()
    assert take_all(stream, ledger)[1:] == ([], [])


def test_a_window_without_rows_is_done_with(stream: Path) -> None:
    add_window(stream, "w0", [])
    ledger, names, lines = take_all(stream, Ledger())
    assert names == ["w1", "w2", "w3"] and lines == ["window w0 is empty"]
    assert ledger.counts == {"empty": 1, "trained": 3}


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else", None])
def test_a_damaged_window_ends_the_run_or_is_skipped(stream: Path, content: bytes | None) -> None:
    file = stream / WINDOWS / "w2.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r'w2 is damaged: .*w2\.parquet.*replace it.*data\.on_bad = "skip"'):
        take_all(stream, Ledger())
    ledger, names, lines = take_all(stream, Ledger(), skip=True)
    assert names == ["w1", "w3"] and len(lines) == 1 and "w2 is damaged and skipped" in lines[0]
    # Mended in place it is not taken any more: it would come late.
    file.write_bytes(whole)
    assert take_all(stream, ledger, skip=True)[1] == []


def test_what_cannot_be_read_now_is_tried_again_for_a_while(
    stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: WindowFolder) -> dict[str, Stamp]:
        raise OSError(5, "Input/output error")

    patient, hasty = intake(stream), intake(stream, retry_s=-1.0)
    with monkeypatch.context() as patch:
        patch.setattr(WindowFolder, "listed", broken)
        first, second = patient.next(Ledger(), 0), patient.next(Ledger(), 0)
        assert first.again and first.window is None and "is tried again" in first.lines[0]
        assert second.again and not second.lines
        with pytest.raises(DataError, match="could not be read for"):
            hasty.next(Ledger(), 0)
    assert patient.next(Ledger(), 0).window is not None


def test_a_killed_run_takes_the_same_windows_again_whatever_has_arrived(stream: Path) -> None:
    first = intake(stream).next(Ledger(), 0)
    ledger = trained(first)
    taken = intake(stream).next(ledger, 1)
    assert taken.window is not None and taken.window.name == "w2"
    # The run is killed while it trains w2; what arrives meanwhile sorts before it.
    add_window(stream, "w11", rows_of(11))
    again = intake(stream).next(ledger, 1)
    assert again.window == taken.window and json.loads((stream / "order.json").read_text()) == ["w1", "w2"]
    _, names, lines = take_all(stream, ledger)
    assert names == ["w2", "w3"] and "w11 came late" in lines[0]


def test_a_checkpoint_inside_a_window_needs_that_very_window(stream: Path) -> None:
    ledger = trained(intake(stream).next(Ledger(), 0))
    inside = intake(stream).next(ledger, 1).window
    assert inside is not None
    again = intake(stream).next(ledger, 2, inside.digest)
    assert again.window == inside
    add_window(stream, "w2", rows_of(9))
    with pytest.raises(DataError, match="has other bytes; put it back"):
        intake(stream).next(ledger, 2, inside.digest)
    for name in ("w2", "w3"):
        (stream / WINDOWS / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match="is gone; put it back"):
        intake(stream).next(ledger, 2, inside.digest)


def entry(number: int, name: str) -> Entry:
    return Entry(number, name, f"digest {name}", Stamp(1, 2), "trained", number)


def test_a_ledger_remembers_the_newest_windows_and_counts_all() -> None:
    ledger = Ledger()
    for number in range(REMEMBERED + 5):
        ledger = ledger.with_entry(entry(number, f"{number:06d}"), event=number)
    assert len(ledger.entries) == REMEMBERED and ledger.taken == REMEMBERED + 5
    assert ledger.with_bytes("digest 000004") is None and ledger.with_bytes("digest 000005") is not None
    # Of what sorts before all that is remembered, nobody knows whether it was trained.
    assert ledger.late(["000003", "000005x"]) == ["000005x"]
    assert Ledger.of_state(json.loads(json.dumps(ledger.state()))) == ledger


class Arrivals:
    """A source in memory, whose windows arrive as a test says."""

    def __init__(self) -> None:
        self.there: dict[str, Stamp] = {}

    def listed(self) -> dict[str, Stamp]:
        return dict(self.there)

    def digest(self, name: str) -> str:
        return f"digest {name}"

    def open(self, name: str, stamp: Stamp) -> Window:
        info = SplitInfo(files=[], rows=1, requests=1, candidates=1, positives=0, behaviors=0)
        return Window(name, stamp, self.digest(name), 0, info)

    def newest(self, name: str) -> int:
        return 0


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=12),
    kills=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_any_arrivals_and_kills_train_each_window_once_in_rising_order(
    tmp_path_factory: pytest.TempPathFactory, arrivals: Sequence[Sequence[int]], kills: Sequence[bool]
) -> None:
    folder, source, dies = tmp_path_factory.mktemp("stream"), Arrivals(), iter(kills)
    ledger, names, spoken = Ledger(), list[str](), list[str]()
    running = Intake(source, folder, folder / "order.json", False, 60)
    for batch in [*arrivals, [], []]:
        source.there |= {f"{number:02d}": Stamp(1, 1) for number in batch}
        while True:
            taken = running.next(ledger, 0)
            if taken.window is not None and next(dies, False):
                # Nothing of it was saved: the next start takes the same one.
                running = Intake(source, folder, folder / "order.json", False, 60)
                source.there |= {f"{number:02d}": Stamp(1, 1) for number in range(0, 30, 7)}
                assert running.next(ledger, 0).window == taken.window
                continue
            spoken += taken.lines
            ledger = taken.ledger
            if taken.window is None:
                break
            names.append(taken.window.name)
            ledger = trained(taken)
    assert names == sorted(set(names))
    late = {each.name for each in ledger.entries if each.outcome == "late"}
    assert late | set(names) == set(source.there) and not late & set(names)
    assert len(spoken) == len(late)


def test_what_a_late_window_leaves_behind_does_not_make_forgotten_ones_late() -> None:
    ledger, late = Ledger(), replace(entry(0, "000500x"), outcome="late")
    for number in range(2 * REMEMBERED - 10):
        ledger = ledger.with_entry(entry(number, f"{number:06d}"))
        if number == REMEMBERED:
            ledger = ledger.with_entry(late)
    # It is remembered, and many that sort behind it are not.
    assert late in ledger.entries and ledger.entries[0].name > "000501"
    assert ledger.late([f"{number:06d}" for number in range(2 * REMEMBERED)]) == []
    # Nor does anybody know where all that is remembered came late.
    for _ in range(REMEMBERED):
        ledger = ledger.with_entry(late)
    assert ledger.late(["000001", "001500"]) == []


def test_a_folder_is_no_window_and_a_name_that_no_manifest_may_hold_is_damage(stream: Path) -> None:
    (stream / WINDOWS / "w0.parquet").mkdir()
    add_window(stream, "w1\\x", rows_of(7))
    ledger, names, lines = take_all(stream, Ledger(), skip=True)
    assert names == ["w1", "w2", "w3"] and len(lines) == 1 and "has a name that" in lines[0]
    assert ledger.counts == {"trained": 3, "damaged": 1}
