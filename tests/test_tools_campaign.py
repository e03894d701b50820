"""The campaign: a short form of it finds nothing, and what it looks for it would find."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from draftcache.tools.campaign.inputs import SET_ASIDE, all_cases
from draftcache.tools.campaign.kills import kill_again_and_again
from draftcache.tools.campaign.mutations import Target, change_again_and_again
from draftcache.tools.campaign.processes import Process, call, run
from draftcache.tools.campaign.scenarios import Scenario
from draftcache.tools.campaign.tally import FAULTS, Tally, table
from draftcache.tools.campaign.world import tree_content
from support.processes import ONE_THREAD

SHORT = ["--kills", "10", "--mutations", "8", "--inputs", "6"]


def campaign(tmp_path: Path, *words: str) -> list[dict[str, object]]:
    output = tmp_path / "counts.json"
    command = [sys.executable, "-m", "draftcache.tools.campaign", *words, "--output", str(output)]
    ran = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows: list[dict[str, object]] = json.loads(output.read_text())
    assert all(row[kind] == 0 for row in rows for kind in FAULTS)
    return rows


def test_a_short_campaign_finds_no_fault(tmp_path: Path) -> None:
    rows = campaign(tmp_path, *SHORT, "--only", "prepare: two without locks,mutations,inputs")
    assert len(rows) == 6
    assert all(int(str(row["attempts"])) > 0 for row in rows)


@pytest.mark.slow
def test_a_longer_campaign_finds_no_fault(tmp_path: Path) -> None:
    rows = campaign(tmp_path, "--kills", "200", "--mutations", "400", "--inputs", "1000", "--network", "3")
    assert len(rows) == 25


def files(root: Path, *contents: bytes) -> Path:
    root.mkdir()
    for number, content in enumerate(contents):
        (root / f"{number}.bin").write_bytes(content)
    return root


def test_a_change_that_nothing_notices_is_counted(tmp_path: Path) -> None:
    tree = files(tmp_path / "tree", b"1234567890", b"abcdefghij")
    target = Target(
        name="files",
        tree=tree,
        other=files(tmp_path / "other", b"0987654321", b"jihgfedcba"),
        judge=lambda path: [(call(lambda: None), (1, 2))],
        read=lambda path: str(tree_content(path)),
    )
    tally = change_again_and_again(target, tmp_path, random.Random(0), 10)
    assert (tally.attempts, tally.faults["undetected"]) == (10, 20)  # by what judges, and by what reads
    assert sorted(path.name for path in tree.iterdir()) == ["0.bin", "1.bin"]
    assert (tree / "0.bin").read_bytes() == b"1234567890"


@pytest.mark.parametrize(
    ("error", "fault"), [("raise KeyError('x')", "tracebacks"), ("import os; os._exit(5)", "wrong codes")]
)
def test_other_ends_are_counted_as_what_they_are(tmp_path: Path, error: str, fault: str) -> None:
    def ends() -> int:
        exec(error)
        return 0

    target = Target(
        name="files",
        tree=files(tmp_path / "tree", b"1234567890"),
        other=tmp_path / "none",
        judge=lambda path: [(Process(ends).wait(), (1, 2))],
    )
    tally = change_again_and_again(target, tmp_path, random.Random(0), 3)
    assert (tally.attempts, dict(tally.faults)) == (3, {fault: 3})


def test_a_command_that_loses_what_it_had_is_counted(tmp_path: Path) -> None:
    def forgetful(path: Path) -> list[object]:
        path.unlink(missing_ok=True)
        path.write_text(f"{random.random()}")
        return ["--version"]

    def kept(path: Path) -> dict[str, object]:
        return {"text": path.read_text()}

    reference = tmp_path / "reference"
    reference.write_text("as it should be")
    scenario = Scenario(name="x", words=forgetful, content=Path.read_text, reference=reference, kept=kept)
    tally = kill_again_and_again(scenario, tmp_path, random.Random(0), 4)
    assert tally.attempts == 4
    assert tally.faults["lost"] >= 1
    assert any("an uninterrupted run" in what for what in tally.said)


def test_a_hanging_command_is_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftcache.tools.campaign import processes

    monkeypatch.setattr(processes, "PATIENCE_S", 0.2)
    import time

    ended = Process(lambda: time.sleep(60) or 0).wait()  # type: ignore[func-returns-value]
    assert ended.code is None


def test_processes_end_as_commands_do() -> None:
    assert (run(["--version"]).code, run(["--unknown"]).code) == (0, 2)
    assert run(["--version"]).output.startswith("draftcache ")
    failed = run(["verify", "/nowhere"])
    assert failed.code == 2
    assert not failed.has_trace


def test_the_table_has_a_row_for_each_and_a_sum() -> None:
    one, two = Tally("one", 3), Tally("two", 4)
    one.fault("lost", "a shard")
    assert table([one, two]).splitlines()[2:] == [
        "| one | 3 | 0 | 1 | 0 | 0 |",
        "| two | 4 | 0 | 0 | 0 | 0 |",
        "| all | 7 | 0 | 1 | 0 | 0 |",
    ]
    with pytest.raises(ValueError, match="whatever"):
        one.fault("whatever", "")


def test_there_are_hundreds_of_wrong_inputs_of_each_sort() -> None:
    class Place:
        root = Path("nowhere")

    cases = list(all_cases(Place()))  # type: ignore[arg-type]  # nothing is made of it yet
    assert len(cases) > 700
    assert sum(case.codes == SET_ASIDE for case in cases) > 30
