"""`engine_check` without an engine: what it compares, how it refuses, and one whole check of a stand-in's answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.drafts.serving_target import FORMS
from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.tools.engine_check import checks, engine, subjects
from draftcache.tools.engine_check.__main__ import CHECK_NAMES, DRAFT_NAMES, FORM_NAMES, main
from draftcache.tools.engine_check.comparison import (
    MOST_STEPS_APART,
    ProposalCounts,
    Walk,
    accepted_by_position,
    first_difference,
    walk,
)
from draftcache.tools.engine_check.drafts import method_of, wrong_export
from draftcache.tools.engine_check.engine import Engine
from draftcache.tools.engine_check.judging import Served, judge_proposals, judge_steps, judge_text, judge_wrong
from draftcache.tools.engine_check.states import judge_states
from draftcache.tools.engine_check.verdicts import Verdict, failed, table
from draftcache.tools.probe.compare import Comparison, Match
from support.stand_in_engine import VERSIONS, StandIn

BROKEN = "no room for the draft"
AUX = "eagle_aux_hidden_state_layer_ids"
TEXT = [10, 11, 12, 13, 14, 15, 16]


def test_names_of_flags_are_those_of_the_checks() -> None:
    """The command's module imports nothing that needs torch, so it repeats them."""
    assert set(DRAFT_NAMES) == set(subjects.DRAFTS)
    assert CHECK_NAMES == checks.CHECKS
    assert FORM_NAMES == FORMS


@pytest.mark.parametrize(
    ("other", "at"), [(TEXT, None), ([10, 11, 9], 2), ([10, 11], 2), ([9, *TEXT[1:]], 0), ([*TEXT, 1], 7)]
)
def test_the_first_difference_of_two_texts(other: list[int], at: int | None) -> None:
    assert first_difference(TEXT, other) == at


def test_the_walk_follows_the_text_and_stops_at_its_end() -> None:
    found = walk(TEXT, [[11, 12, 9], [9, 9, 9], [15, 16, 17], [1, 2, 3]])
    assert [(step.produced, step.accepted) for step in found.steps] == [(1, 2), (4, 0), (5, 2)]
    assert found.whole
    assert accepted_by_position([found], 3) == [2, 2, 0]
    assert not walk(TEXT, [[11, 12, 9]]).whole  # negative control: proposals are missing


def test_proposals_differ_below_the_margin_only() -> None:
    counts = ProposalCounts(margin=0.1)
    counts.add([1, 2, 3], [(1, 0.5), (2, 0.3), (3, 0.05)])
    counts.add([1, 9, 3], [(1, 0.5), (2, 0.04), (7, 9.0)])  # what follows a difference is not compared
    assert (counts.compared, counts.equal, counts.above, counts.equal_above) == (5, 4, 3, 3)
    assert counts.passed
    assert counts.largest_differing == 0.04
    counts.add([8, 2, 3], [(1, 0.5), (2, 0.3), (3, 0.05)])  # negative control
    assert not counts.passed
    assert not ProposalCounts(margin=0.1).passed  # nothing compared is nothing shown


def served(
    texts: Sequence[list[int]] = (TEXT,),
    proposals: Sequence[Any] = ([[11, 12, 9], [9, 9, 9], [15, 16, 17]],),
    margins: dict[int, float] | None = None,
    steps: int = 3,
    hook: str | None = "a hook",
) -> Served:
    outputs = [{"token_ids": text, "proposals": made} for text, made in zip(texts, proposals, strict=True)]
    answer = {"outputs": outputs, "counters": {"vllm:spec_decode_num_drafts": steps}, "hook": hook}
    return Served.of(answer, margins or {}, arithmetic="float32", draft_tokens=3)


COUNTED = {"steps": [3], "accepted": [2, 2, 0], "acceptance_length": 2.0, "greedy_agreement": 1.0}


def test_a_text_may_part_at_a_near_tie_only() -> None:
    assert judge_text("x", served(), COUNTED).passed
    tie = judge_text("x", served(margins={0: 1e-4}), COUNTED)
    assert tie.passed
    assert ("texts_near_tie", 1, "traces") in tie.metrics
    assert not judge_text("x", served(margins={0: 0.5}), COUNTED).passed
    assert not judge_text("x", served(), COUNTED | {"greedy_agreement": 0.9}).passed  # texts of another verifier


def steps_verdict(found: Served, **changes: Any) -> bool | None:
    return judge_steps("x", found, COUNTED | changes, own=False).passed


def test_verify_steps_may_be_one_percent_apart() -> None:
    many = [[[9, 9, 9]] * 6 for _ in range(100)]
    found = served([TEXT] * 100, many, steps=600)
    assert steps_verdict(found, steps=[6] * 100)
    assert steps_verdict(found, steps=[6] * 95 + [7] * 5)  # 0.8 %
    assert not steps_verdict(found, steps=[6] * 90 + [7] * 10)  # 1.6 %
    assert not steps_verdict(found, steps=[6] * 100, accepted=[7, 0, 0])  # more are accepted at a position
    assert not steps_verdict(found, steps=[6] * 100, acceptance_length=1.02)  # too few accepted to say something
    assert judge_steps("x", found, COUNTED | {"steps": [6] * 100, "acceptance_length": 1.02}, own=True).passed
    assert 0.008 < MOST_STEPS_APART < 0.016


def test_traces_with_a_near_tie_are_left_out_of_the_steps() -> None:
    found = served([TEXT, TEXT], [[[11, 12, 9], [9, 9, 9], [15, 16, 17]], [[9, 9, 9]] * 6], {1: 1e-5}, steps=9)
    assert steps_verdict(found, steps=[3, 4])
    assert not steps_verdict(replace(found, near_ties={}), steps=[3, 4])


def test_proposals_that_were_not_seen_are_not_judged() -> None:
    """Neither those of an engine without the hooks, nor some of them only."""
    for found in (served(hook=None), served(steps=4), served(proposals=[[[11, 12, 9]]], steps=1)):
        verdict = judge_proposals("x", found, [], None, Path(), arithmetic="float32")  # type: ignore[arg-type]
        assert verdict.passed is None
        assert steps_verdict(found, steps=[found.steps])  # the engine's own count is judged all the same


def test_a_wrong_export_has_to_cost_steps() -> None:
    right = replace(served(), steps=100)
    assert judge_wrong("x", right, replace(right, steps=110), "a mistake").passed
    assert not judge_wrong("x", right, replace(right, steps=100), "a mistake").passed
    assert not judge_wrong("x", right, replace(right, steps=110, wrong={0: 2.0}), "a mistake").passed


def test_a_wrong_export_that_costs_few_steps_has_to_show_in_the_proposals() -> None:
    right, asked = replace(served(), steps=1000), []

    def proposals(passed: bool | None) -> Callable[[], Verdict]:
        def check() -> Verdict:
            asked.append(passed)
            return Verdict("x", "proposals", passed, "7 of 9 are equal")

        return check

    dear, cheap, free = (replace(right, steps=steps) for steps in (1010, 1009, 1000))
    assert judge_wrong("x", right, dear, "a mistake", proposals(True)).passed
    assert not asked
    noticed = judge_wrong("x", right, cheap, "a mistake", proposals(False))
    assert noticed.passed
    assert "its proposals differ: 7 of 9 are equal" in noticed.found
    assert ("wrong_export_noticed_by_proposals", 1.0, "1 = yes") in noticed.metrics
    assert not judge_wrong("x", right, cheap, "a mistake", proposals(True)).passed
    assert not judge_wrong("x", right, cheap, "a mistake", proposals(None)).passed
    assert not judge_wrong("x", right, cheap, "a mistake").passed
    assert asked == [False, True, None]
    assert not judge_wrong("x", right, free, "a mistake", proposals(False)).passed  # it has to cost steps
    assert asked == [False, True, None]


def states(apart: float, shift: int = 1) -> Comparison:
    matches = [
        Match(name=str(block), number=block + shift, best="b", block=block, difference=apart, second_difference=0.4)
        for block in (1, 3)
    ]
    return Comparison(
        matches=matches, rows=9, offset=shift, taps={1: 1 + shift, 3: 3 + shift}, fits=True, verdict="fits", notes=[]
    )


def test_states_are_near_and_under_their_own_ids() -> None:
    judged: Callable[..., Verdict] = judge_states
    assert judged(states(0.005), (1, 3), {}, "float32").passed
    assert not judged(states(0.02), (1, 3), {}, "float32").passed
    assert judged(states(0.02), (1, 3), {1: 0.018, 3: 0.019}, "float32").passed  # no farther than bfloat16 itself
    assert not judged(states(0.005, shift=0), (1, 3), {}, "float32").passed
    assert not judged(states(0.005), (1, 3, 5), {}, "float32").passed  # a tap is missing


@pytest.mark.parametrize(
    ("config", "mistake", "changed", "kept"),
    [
        ({AUX: [2, 3]}, "tap ids off by one", {AUX: [1, 2]}, {"fc.weight", "fc_norm.0.weight"}),
        (
            {AUX: [2, 3], "norm_output": True, "fc_norm": True},
            "norms left out",
            {"norm_output": False, "fc_norm": False},
            {"fc.weight"},
        ),
        (
            {"dflash_config": {"target_layer_ids": [0, 4]}},
            "tap ids",
            {"dflash_config": {"target_layer_ids": [1, 5]}},
            {"fc.weight", "fc_norm.0.weight"},
        ),
        (
            {"speculators_config": {}, "aux_hidden_state_layer_ids": [1, 5]},
            "tap ids",
            {"aux_hidden_state_layer_ids": [0, 4]},
            {"fc.weight", "fc_norm.0.weight"},
        ),
    ],
)
def test_wrong_exports_differ_in_one_thing(
    tmp_path: Path, config: dict[str, Any], mistake: str, changed: dict[str, Any], kept: set[str]
) -> None:
    config = {"architectures": ["DFlashDraftModel" if "dflash_config" in config else "Llama"]} | config
    write_json(tmp_path / "right" / "config.json", config)
    weights = {name: torch.ones(2) for name in ("fc.weight", "fc_norm.0.weight")}
    save_tensors(tmp_path / "right" / "model.safetensors", weights)
    path, words = wrong_export(tmp_path / "right", tmp_path / "wrong")
    assert mistake in words
    assert read_json(path / "config.json") == config | changed
    assert set(load_file(path / "model.safetensors")) == kept
    assert method_of(path) == ("dflash" if "dflash_config" in config else "eagle3")


def test_a_python_without_vllm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--vllm", sys.executable, "--work", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "expected a Python that has vLLM, found none in it (ModuleNotFoundError: No module named 'vllm')" in printed
    assert "environment of its own" in printed


@pytest.mark.parametrize(("program", "reason"), [("no/such/python", "no program"), ("true", "it printed nothing")])
def test_what_is_no_python_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, reason: str
) -> None:
    assert main(["--vllm", program, "--work", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": Path("v")}, "--run and --store missing"),
        ({"verifier": Path("v"), "run": Path("r"), "store": "s", "drafts": ["eagle3"]}, "--drafts"),
        ({"tokens": 1}, "--tokens: expected at least 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checks.Settings(vllm="python", work=Path("w"), **changes)


def script(path: Path, body: str) -> Path:
    path.write_text(f"import json, sys, time\nfrom pathlib import Path\n{body}\n")
    return path


ANSWER = 'Path(sys.argv[2]).write_text(json.dumps({"seconds": {"start": 1, "work": 2}, "asked": sys.argv[1]}))'


def test_an_engine_that_fails_is_quoted_and_one_that_answers_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    asked = Engine(sys.executable, tmp_path / "engine", {"dtype": "float32"}, batched=True)
    monkeypatch.setattr(engine, "SCRIPT", script(tmp_path / "a.py", "raise ValueError('no room for the cache')"))
    with pytest.raises(
        WorkerError, match=r"found exit code 1: ValueError: no room for the cache; its log is .*plain.log"
    ):
        asked.answers("plain", "decoding", tmp_path, [[1]], 8)
    monkeypatch.setattr(engine, "SCRIPT", script(tmp_path / "b.py", ANSWER))
    found = asked.answers("plain", "decoding", tmp_path, [[1]], 8, seed=3)
    assert read_json(Path(found["asked"]))["options"] == {"dtype": "float32", "seed": 3}
    monkeypatch.setattr(engine, "SCRIPT", script(tmp_path / "c.py", "sys.exit(5)"))
    assert asked.answers("plain", "decoding", tmp_path, [[1]], 8) == found  # it is kept
    monkeypatch.setattr(engine, "SCRIPT", script(tmp_path / "d.py", "time.sleep(60)"))
    monkeypatch.setattr(engine, "START_SECONDS", 0.1)
    with pytest.raises(WorkerError, match=r"expected vLLM to start within 0 s"):
        asked.answers("late", "decoding", tmp_path, [[1]], 8)


def test_the_engine_ends_with_the_check(tmp_path: Path) -> None:
    waits = script(tmp_path / "waits.py", f"Path({str(tmp_path / 'here')!r}).write_text('')\ntime.sleep(60)")
    code = (
        "import os, sys; from pathlib import Path; from draftcache.tools.engine_check import engine\n"
        f"engine.SCRIPT = Path({str(waits)!r})\n"
        f"asked = engine.Engine(sys.executable, Path({str(tmp_path)!r}), {{}}, batched=True)\n"
        "asked.answers('x', 'x', Path(), [[1]], 8)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "here").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    running = subprocess.run(["pgrep", "-f", str(waits)], capture_output=True, text=True).stdout.split()
    assert not running


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine-check")


@pytest.fixture
def stand_in(small: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in takes vLLM's place behind the subprocess; all else is the command."""
    made = StandIn(small / "work" / "run-eagle3", small / "work" / "traces" / "store")
    monkeypatch.setattr(checks, "engine_versions", lambda _: VERSIONS)
    monkeypatch.setattr(
        Engine, "_run", lambda self, name, _, result: made.answer(self.directory / f"{name}.request.json", result)
    )
    monkeypatch.setattr(checks, "llama_subject", lambda path, prompts: subjects.llama_subject(path, prompts, steps=20))
    return made


def run(small: Path, *words: str, work: str = "work") -> int:
    flags = ["--vllm", sys.executable, "--work", str(small / work), "--prompts", "4", "--tokens", "16"]
    return main([*flags, "--device", "cpu", *words])


def test_a_whole_check_and_what_it_keeps(
    small: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--drafts", "eagle3", "--checks", "text,steps,proposals,wrong")
    assert run(small, *words, "--output", str(small / "rows.json")) == 0, capsys.readouterr().out.out
    assert stand_in.starts == ["plain", "eagle3", "eagle3-wrong"]
    rows = {row["metric"]: row for row in json.loads((small / "rows.json").read_text())}
    assert rows["steps_passed"]["value"] == 1
    assert rows["verify_steps_apart"]["value"] == 0
    assert rows["proposals_equal"]["value"] == 1
    assert rows["texts_equal"]["value"] == 4
    assert rows["verify_steps"]["versions"] == VERSIONS
    printed = capsys.readouterr().out
    assert printed.count(" ok ") == 4
    assert run(small, *words) == 0
    assert len(stand_in.starts) == 3  # everything was kept
    assert run(small, *words, "--draft-tokens", "4") == 2
    assert "found those of one with other draft_tokens" in capsys.readouterr().err


def test_rows_of_what_was_found_survive_an_interruption(
    small: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Verdict:
        raise KeyboardInterrupt

    words = ("--drafts", "eagle3", "--checks", "text,states", "--output", str(small / "so-far.json"))
    with monkeypatch.context() as patch:
        patch.setattr(checks, "check_states", interrupt)
        assert run(small, *words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    rows = {row["metric"]: row["value"] for row in json.loads((small / "so-far.json").read_text())}
    assert (rows["text_passed"], rows["texts_equal"]) == (1, 4)
    assert "states_passed" not in rows


def test_the_speculators_form_is_served_by_its_own_name(
    small: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes texts, draft and count of the classic form's check, which were kept, and exports again."""
    words = ("--drafts", "eagle3", "--checks", "text,steps,proposals,wrong", "--format", "speculators")
    assert run(small, *words) == 0, capsys.readouterr().out.out
    assert stand_in.starts == ["eagle3-speculators", "eagle3-speculators-wrong"]
    request = read_json(small / "work" / "engine" / "eagle3-speculators.request.json")
    assert request["model"] == str(small / "work" / "draft-eagle3-speculators")
    assert "speculative_config" not in request["options"]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [
        ["eagle3-speculators", check, "ok"] for check in ("text", "steps", "proposals", "wrong")
    ]


@pytest.mark.parametrize(("version", "checked"), [("0.26.0", False), ("0.27.0", True)])
def test_an_older_vllm_is_given_no_form_that_it_misreads(version: str, checked: bool) -> None:
    settings = checks.Settings(vllm="python", work=Path("w"), form="speculators")
    assert ("dspark" in checks._drafts_of(settings, on_gpu=True, version=version)) == checked
    assert "dspark" in checks._drafts_of(replace(settings, form="classic"), on_gpu=True, version=version)


def test_an_engine_that_errs_fails_the_check(
    small: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked again for what it did before."""
    kept = small / "work" / "engine" / "eagle3.json"
    words = ("--drafts", "eagle3", "--checks", "text,steps,proposals")
    kept.unlink()
    stand_in.changed_text = True
    assert run(small, *words) == 1
    assert "3 of 4 texts are plain decoding's, 0 part at a near-tie, 1 at a margin" in capsys.readouterr().out
    kept.unlink()
    stand_in.changed_text, stand_in.changed_proposals = False, True
    assert run(small, *words) == 1
    lines = {line.split()[1]: line.split()[2] for line in capsys.readouterr().out.splitlines()}
    assert (lines["text"], lines["steps"], lines["proposals"]) == ("ok", "FAILED", "FAILED")
    kept.unlink()
    stand_in.broken = True
    assert run(small, *words) == 1
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=3) == ["eagle3", "engine", "FAILED", BROKEN]


def test_a_draft_of_ones_own(small: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    work = small / "work"
    own = ("--verifier", str(work / "verifier"), "--run", str(work / "run-eagle3"), "--store", str(stand_in.store))
    assert run(small, *own, "--checks", "text,steps,proposals", work="own") == 0, capsys.readouterr().out.out
    assert capsys.readouterr().out.count(" ok ") == 3
    assert stand_in.starts == ["plain", "own"]
    subjects.save_llama(small / "other", seed=1)
    other = ("--verifier", str(small / "other"), *own[2:])
    assert run(small, *other, work="other-work") == 2
    assert "expected the weights of" in capsys.readouterr().err


def test_the_table_says_what_failed() -> None:
    verdicts = [Verdict("a", "text", True, "fine"), Verdict("b", "states", None, "not seen")]
    assert not failed(verdicts)
    assert "not checked" in table(verdicts)
    assert failed([*verdicts, Verdict("c", "steps", False, "apart")])
    assert Walk((), True).whole
