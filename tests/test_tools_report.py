"""The report's page: what it says of runs, sweeps, evaluations and stores, read as HTML and in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.files import write_json
from draftcache.tools.cli import main
from draftcache.tools.reports.page.runs import read_run
from draftcache.tools.reports.page.scales import round_ticks, tick_labels
from draftcache.tools.reports.page.trials import group_trials
from support.chromium import look_at
from support.synthetic import VOCAB, write_store
from support.training_runs import config

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!-- ' &amp;"


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, two runs of which one has its evaluation beside it, and a tokenizer with tokens that look like HTML."""
    made = tmp_path_factory.mktemp("report")
    write_store(made / "store", per_shard=6)
    for seed, name in enumerate(("one", "two")):
        Trainer(config(made, output=made / name, seed=seed, eval_split="val", eval_every=4)).run()
        figures = evaluate(
            store=made / "store", checkpoint=made / name, splits=["val"], draft_tokens=3, length_buckets=[12, 30],
            bigram_splits=["train"], temperature=1.0, show_conversations=2, resamples=200, device="cpu",
        )  # fmt: skip
        write_json(made / name / "eval.json" if seed == 0 else made / "of-two.json", figures)
    (made / "two" / "run.json").unlink()  # as runs of earlier versions
    vocabulary = {f"{HOSTILE}{number}" if number % 2 else f"word{number}\n\x07": number for number in range(VOCAB)}
    (made / "tokenizer").mkdir()
    Tokenizer(models.WordLevel(vocabulary, unk_token="word0\n\x07")).save(str(made / "tokenizer" / "tokenizer.json"))
    return made


def report(output: Path, *inputs: object) -> str:
    assert main(["report", *map(str, inputs), "-o", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def test_a_page_has_all_of_runs_evaluations_and_store(root: Path, tmp_path: Path) -> None:
    text = report(tmp_path / "r.html", root / "one", root / "two", root / "of-two.json", root / "store")
    page = Page(text)
    headings = "Acceptance,Comparison,Position and length,Training,Store,Conversations,Provenance"
    for heading in headings.split(","):
        assert f">{heading}</h2>" in text
    figures = json.loads((root / "one" / "eval.json").read_text())["splits"]["val"]
    for name in ("draft", "untrained", "bigram"):
        assert f"{figures[name]['acceptance_length']:.3f}" in page.text
    assert "one on val under speculative sampling at T = 1.0: acceptance between" in page.text
    assert page.text.count("finished at step") == 2
    kept = json.loads((root / "one" / "run.json").read_text())
    assert kept["commands"][0] in page.text
    assert f"commit {kept['commit']}" in page.text
    assert "draftcache train --store STORE --splits train" in page.text  # of the run without run.json
    assert "--learning-rate 0.01" in page.text
    assert "as token ids; --tokenizer DIR shows text" in page.text
    assert "still going" not in page.text


def test_the_page_is_alone(root: Path, tmp_path: Path) -> None:
    """Nothing is fetched and no script can run: the page holds none, and forbids them and all connections."""
    page = Page(report(tmp_path / "r.html", root / "one", root / "store"))
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "video", "audio"}
    values = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert values
    assert all(value.startswith("#") or value == "data:," for value in values)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_text_of_conversations_and_names_stays_text(root: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    trials = [{"name": HOSTILE, "axes": {HOSTILE: HOSTILE}, "run": os.path.relpath(root / "one", sweep)}]
    (sweep / "sweep.json").write_text(json.dumps({"trials": trials}))
    page = Page(report(tmp_path / "r.html", sweep, "--tokenizer", root / "tokenizer"))
    assert not page.tags & {"script", "img"}
    assert page.text.count(HOSTILE.partition(" &amp;")[0]) > 20
    assert "word2 ⏎ ␇" in page.text or "word2⏎ ␇" in page.text
    assert any(name == "title" and HOSTILE[:9] in str(value) for name, value in page.attributes)


def unfinished(path: Path, *, steps: int, age: float = 0.0, torn: bool = True) -> Path:
    """Write the log of a run that has no checkpoint yet, whose last line is half written."""
    path.mkdir(parents=True)
    lines = [
        json.dumps({"step": step, "loss": 9.0 / step, "step_accuracy": [0.1, 0.2]}) for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + ('{"step": 9, "lo' if torn else ""))
    os.utime(path / "metrics.jsonl", (time.time() - age,) * 2)
    return path


def test_a_run_that_is_still_going_is_called_so(tmp_path: Path) -> None:
    going = unfinished(tmp_path / "going", steps=8)
    stopped = unfinished(tmp_path / "stopped", steps=3, age=7200)
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    text = Page(report(tmp_path / "r.html", going, stopped, tmp_path / "begun")).text
    assert "going : still going: step 8, last record " in text
    assert "stopped : not finished: step 3, last record 120 min ago" in text
    assert "begun : not begun: no step is logged yet" in text
    assert "0 finished" in text


def test_damaged_lines_of_a_log_are_said(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "run", steps=4)
    log = path / "metrics.jsonl"
    log.write_bytes(b"\xff\xfe\n[1]\n" + log.read_bytes())
    run = read_run(path, "run")
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert run.notes == [f"{log}: 2 lines are no records of steps, and are left out"]


def test_trials_are_grouped_with_intervals_over_seeds(tmp_path: Path) -> None:
    """Intervals by Student's t, against the formula written out for three seeds."""
    values, trials = [1.50, 1.56, 1.53, 1.20, 1.22], []
    for number, value in enumerate(values):
        rate = 0.003 if number < 3 else 0.001
        path = unfinished(tmp_path / "runs" / str(number), steps=2, torn=False)
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3, "eval_acceptance_length": value, "loss": 1.0}) + "\n")
        trials.append({"name": f"t{number}", "axes": {"learning_rate": rate, "seed": number}, "run": f"runs/{number}"})
    trials.append({"name": "late", "axes": {"learning_rate": 0.01, "seed": 0}, "run": "runs/none"})
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": trials}))
    text = Page(report(tmp_path / "r.html", tmp_path)).text
    half = 4.303 * np.std(values[:3], ddof=1) / np.sqrt(3)
    assert f"0.003 1.530 {1.53 - half:.3f} .. {1.53 + half:.3f} 3 0 of 3 t0, t1, t2" in text
    assert "0.001 1.210" in text
    assert "0.01 - - 0 0 of 1 late" in text
    assert "6 of 6 runs are not finished; their figures are of this moment." in text
    assert "acceptance length at the last evaluation; mean over the seeds" in text
    runs = [read_run(tmp_path / "runs" / str(number), str(number), {"seed": number}) for number in range(2)]
    (group,) = group_trials(runs, {"0": 1.0})
    assert (group.mean, group.interval) == (1.0, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "expected a training run, a sweep (sweep.json), a store or a file of"),
        (lambda path: path, "found something else"),
        (lambda path: written(path / "x.json", {"splits": {}}), "expected a file of `draftcache eval --output`"),
        (lambda path: written(path / "s" / "sweep.json", {"trials": [{}]}).parent, "expected trials, each with name"),
    ],
)
def test_what_is_no_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    assert main(["report", str(make(tmp_path)), "-o", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_ticks_are_round_and_hold_the_values() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, width = rng.normal() * 10 ** rng.uniform(-5, 6), 10 ** rng.uniform(-5, 6)
        ticks = round_ticks(low, low + width)
        assert ticks[0] <= low + 1e-6 * width
        assert ticks[-1] >= low + width * (1 - 1e-6)
        assert 2 <= len(ticks) <= 7
        labels = tick_labels(ticks)
        assert len(set(labels)) == len(labels)
    assert tick_labels(round_ticks(1.0, 2.0, 4)) == ["1.00", "1.25", "1.50", "1.75", "2.00"]
    assert tick_labels(round_ticks(0, 1000, 4)) == ["0", "250", "500", "750", "1000"]
    assert tick_labels([0, 20_000, 40_000]) == ["0", "20k", "40k"]


def test_in_chromium_it_is_quiet_fits_a_phone_and_darkens(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    report(page, root / "one", root / "two", root / "of-two.json", root / "store", "--tokenizer", root / "tokenizer")
    light, console, asked = look_at(page, tmp_path / "profile")
    assert console == []
    assert sorted(asked) == ["/frame-of-r.html", "/r.html"]
    assert light["title"] == "one, two - draftcache report"
    assert light["width"] <= 390
    assert light["small"] == 0  # no text of a chart is too small to be read
    assert "script" not in light["tags"]
    assert HOSTILE.partition(" &amp;")[0] in light["text"]
    dark, console, _ = look_at(page, tmp_path / "profile", width=1200, dark=True)
    assert console == []
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(21, 23, 26)")


def test_chromium_would_say_what_is_wrong(tmp_path: Path) -> None:
    """Negative control: a page with a script that fails, a picture that is not there, and a box that is too wide."""
    page = tmp_path / "wrong.html"
    page.write_text(
        "<title>t</title><div style='width: 900px'>wide</div><svg viewBox='0 0 900 20'>"
        "<text y='9' font-size='9'>x</text></svg><img src='none.png'><script>nothing.here()</script>"
    )
    found, console, asked = look_at(page, tmp_path / "profile")
    assert found["width"] > 390
    assert found["small"] == 1
    assert any(re.search("ReferenceError", line) for line in console)
    assert "/none.png" in asked
