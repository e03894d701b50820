"""--json of every command: one JSON object on stdout with the figures that the text has, and nothing on a failure."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from draftcache.tools.cli import COMMANDS, main
from draftcache.tools.demo.pipeline import Demo
from draftcache.tools.results import show, stdout_for_result
from support import capture_jobs, peer_files, training_runs
from support.synthetic import write_store
from support.tiny_models import save_model
from support.wrong_words import words_naming

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
UNITS = (1, 1e9, 1e12, 2**30, 3600)
"""GB, TB, GiB and hours, in which texts give bytes and seconds."""
SUMMARY = {
    "tokens": 417398, "bytes_per_token": 1236.1, "tail_mass_mean": 0.048, "draft_tokens": 5,
    "acceptance_length": {stage: {"val": value} for stage, value in (("stage1", 1.393), ("stage2", 1.334))},
    "conditional_acceptance": {"val": [0.25, 0.5]}, "baseline_untrained": {"val": 1.001},
    "baseline_bigram": {"val": 1.227}, "greedy_agreement": {"val": 0.31}, "kind": {"val": "teacher-forced"},
    "speculative_decode_lossless": True, "offline_equals_online": True,
    "truth": {"traces": 8, "tokens": 464, "offline_verify_steps": 243, "online_verify_steps": 243},
    "seconds": {"total": 513.0}, "peak_memory_gib": {"main": 3.3, "workers": 1.6},
}  # fmt: skip


DERIVED = {
    "capture": r"[\d,]+ tokens/s, \d+ % of the time",
    "size": r"[\d.]+x|(?im:^spec.*)",
    "run": r"[\d.,]+ s\b",
    **dict.fromkeys(("inspect", "inspect dataset", "prepare"), r"\.\. [\d,]+"),
    **dict.fromkeys(("inspect dataset --conversation", "inspect dataset --rows"), r"\.\. \d+,?"),
}
"""What a text has that its JSON has not: another run's rate, ratios of two figures, ends that are others less 1."""


SWEEP = """
[train]
store = "{root}/store"
splits = ["train"]
eval_split = "val"
ttt_steps = 2
sliding_window = 16
head_dim = 4
num_attention_heads = 4

[axes]
seed = [0, 1]
"""
TWO_STEPS = """
[vocab-small]
inputs = ["{root}/prepared"]
size = 70
[vocab-smaller]
inputs = ["{root}/prepared"]
size = 60
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """What commands read: a verifier, a prepared dataset, a store with a damaged shard, one without, a checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    save_model(root / "verifier", "nemotron")
    capture_jobs.small_dataset(root, tokenizer_dir)
    (root / "bad.jsonl").write_text((root / "rows.jsonl").read_text() + "broken\n")
    (root / "two-steps.toml").write_text(TWO_STEPS.format(root=root))
    (root / "sweep.toml").write_text(SWEEP.format(root=root))
    write_store(root / "store")
    write_store(root / "damaged")
    path = root / "damaged" / "shards" / "00001" / "token_ids" / "c.0"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    settings = training_runs.config(root, epochs=1)
    assert main(["train", *training_runs.flags(settings)]) == 0
    assert main(["probe", *dump(root, root / "dump.safetensors")]) == 0
    words = ["--checkpoint", str(root / "run"), "--output", str(root / "shifted"), "--engine", "vllm"]
    assert main(["export", *words]) == 0
    written = json.loads((root / "shifted" / "config.json").read_text())
    (root / "shifted" / "config.json").write_text(json.dumps(written | {"eagle_aux_hidden_state_layer_ids": [7, 8, 9]}))
    return root


def dump(inputs: Path, output: Path) -> list[str]:
    ids = ",".join(map(str, range(1, 40)))
    return ["--verifier", str(inputs / "verifier"), "--layers", "0,2", "--output", str(output), "--token-ids", ids]


def captured(inputs: Path, out: Path) -> list[str]:
    return capture_jobs.flags(capture_jobs.config(inputs / "verifier", inputs / "prepared", out / "s"))


def imported(inputs: Path, out: Path, tokenizer: Path) -> list[object]:
    source = peer_files.write_specforge(out / "files", peer_files.record(peer_files.load(inputs / "verifier"), count=2))
    flags = ["--tokenizer", tokenizer, "--layers", "0,1,2", "--draft-vocab-size", 90, "--top-k", 4, "--no-probe"]
    known = ["--last-state", "after"]  # these weights' text is too random to tell
    return [source, "--from", "specforge", "--verifier", inputs / "verifier", "--output", out / "s", *flags, *known]


Words = Callable[[Path, Path, Path], list[object]]
"""The words of a command, by the inputs, an empty directory of its own, and a tokenizer."""
CASES: dict[str, tuple[int, Words]] = {
    "prepare": (
        1,
        lambda inputs, out, tokenizer: [
            "--tokenizer", tokenizer, "--output", out / "p", "--draft-vocab-size", 90, "--workers", 1,
            f"train={inputs / 'bad.jsonl'}",
        ],
    ),
    "generate": (
        1,
        lambda inputs, out, tokenizer: [
            "--tokenizer", tokenizer, "--verifier", inputs / "verifier", "--output", out / "t", "--max-new-tokens", 4,
            f"train={inputs / 'bad.jsonl'}",
        ],
    ),
    "vocab": (0, lambda inputs, out, _: [inputs / "prepared", "--size", 70, "--output", out / "map.safetensors"]),
    "capture": (0, lambda inputs, out, _: captured(inputs, out)),
    "import": (0, lambda inputs, out, tokenizer: imported(inputs, out, tokenizer)),
    "train": (0, lambda inputs, out, _: training_runs.flags(training_runs.config(inputs, output=out / "r", epochs=1))),
    "sweep": (0, lambda inputs, out, _: [inputs / "sweep.toml", "--output", out / "w", "--dry-run"]),
    "eval": (
        0,
        lambda inputs, out, _: [
            "--store", inputs / "store", "--checkpoint", inputs / "run", "--splits", "train,val", "--device", "cpu",
        ],
    ),
    "report": (0, lambda inputs, out, _: [inputs / "run", inputs / "store", "-o", out / "r.html"]),
    "export": (0, lambda inputs, out, _: ["--checkpoint", inputs / "run", "--output", out / "d", "--engine", "vllm"]),
    "export --check": (1, lambda inputs, *_: ["--check", inputs / "shifted", "--verifier", inputs / "verifier"]),
    "size": (0, lambda *_: ["--tokens", "450e6", "--loss-fraction", 0.5, "--hidden-size", 2688, "--mode", "lossless"]),
    "size --train": (0, lambda *_: ["--train", "--length", 4096, "--hidden-size", 512, "--vocab-size", 4096]),
    "inspect": (0, lambda inputs, *_: [inputs / "store"]),
    "inspect --conversation": (0, lambda inputs, *_: [inputs / "store", "--conversation", 1, "--rows", "3,9"]),
    "inspect dataset": (0, lambda inputs, *_: [inputs / "prepared"]),
    "inspect dataset --conversation": (0, lambda inputs, *_: [inputs / "prepared", "--conversation", 1]),
    "inspect dataset --rows": (0, lambda inputs, *_: [inputs / "prepared", "--conversation", 1, "--rows", "2,4"]),
    "probe": (0, lambda inputs, out, _: dump(inputs, out / "states.safetensors")),
    "probe --compare": (0, lambda inputs, *_: ["--compare", inputs / "dump.safetensors", inputs / "dump.safetensors"]),
    "verify": (1, lambda inputs, *_: [inputs / "damaged"]),
    "verify dataset": (0, lambda inputs, *_: [inputs / "prepared"]),
    "convert": (0, lambda inputs, out, _: [inputs / "store", out / "t", "--layout", "webdataset"]),
    "repair": (0, lambda inputs, *_: [inputs / "store"]),
    "run": (0, lambda inputs, out, _: [inputs / "two-steps.toml", "--output", out / "run"]),
    "run --dry-run": (0, lambda inputs, out, _: [inputs / "two-steps.toml", "--output", out / "run", "--dry-run"]),
    "run --list": (0, lambda *_: ["--list"]),
    "demo": (0, lambda inputs, out, _: ["--output", out]),
}  # fmt: skip


@pytest.fixture
def demo_in_a_moment(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that runs one of its commands, which prints, and has a summary at hand; the real one takes ten minutes."""

    def run(demo: Demo) -> dict[str, Any]:
        print("$ draftcache inspect")
        main(["inspect", str(inputs / "store")])
        return SUMMARY

    monkeypatch.setattr(Demo, "run", run)


def test_every_command_is_tested() -> None:
    assert {name.split()[0] for name in CASES} == set(COMMANDS)


@pytest.mark.usefixtures("demo_in_a_moment")
@pytest.mark.parametrize("name", CASES)
def test_json_is_one_object_with_the_figures_of_the_text(
    name: str, inputs: Path, tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, words = CASES[name]
    command = name.split()[0]
    out = tmp_path / "same"  # one path for both: it is in the text
    printed = []
    for flags in ([], ["--json"]):
        out.mkdir()
        assert main([command, *map(str, words(inputs, out, tokenizer_dir)), *flags]) == code
        printed.append(capfd.readouterr())
        out.rename(tmp_path / f"done{len(printed)}")
    text, found = printed[0].out, json.loads(printed[1].out)
    assert isinstance(found, dict)
    if command == "demo":  # its commands print as they run
        assert "shards      2 of 2 committed" in text.partition("\n\nsplit")[0]
        assert "shards      2 of 2 committed" in printed[1].err
        text = text.rpartition("$ draftcache inspect")[2].partition("quarantined 0 conversations")[2]
    if name == "run":  # so do its steps
        assert "loss-masked" in printed[1].err.lower()
        text = text.rpartition("\n\n")[2]
    text = re.sub(DERIVED.get(name, "(?!)"), "", text)
    missing = [number for number in NUMBER.findall(text) if not is_in(number, found)]
    assert not missing, (missing, text, found)
    assert NUMBER.findall(text), text


def is_in(number: str, found: Any) -> bool:
    """Whether JSON values hold what a text says: a number that rounds to it, in one of UNITS; for a percentage, a share
    or two numbers with that ratio; a list of so many items; or a text or key that has it.
    """
    digits = number.replace(",", "").rstrip("%")
    values = list(leaves(found))
    if any(digits in value or number in value for value in values if isinstance(value, str)):
        return True
    numbers = {value for value in values if not isinstance(value, str)}
    if number.endswith("%"):
        shares = numbers | {a / b for a in numbers for b in numbers if 0 <= a <= b and b > 0}
        numbers = {100 * share for share in shares}
    said, mantissa = float(digits), digits.partition("e")[0]
    ulp = 10.0 ** -len(mantissa.partition(".")[2])
    if "e" in digits:
        ulp *= 10.0 ** float(digits.partition("e")[2])
    return any(abs(said - value / unit) <= 0.5000001 * ulp for value in numbers for unit in UNITS)


def leaves(value: Any) -> Iterator[float | str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from leaves(item)
    elif isinstance(value, list):
        yield len(value)
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str | int | float):
        yield value


def test_a_figure_that_is_missing_would_be_noticed() -> None:
    found = {"a": 1234.56, "b": [1, 2, 3], "c": "shards/00012", "d": 0.048}
    assert all(is_in(number, found) for number in ("1,235", "1,234.6", "3", "00012", "4.8%", "4.8e-02", "33.3%"))
    assert not any(is_in(number, found) for number in ("1,236", "1,234.5", "7", "4.9%", "4.9e-02", "5"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_prints_nothing_on_stdout(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("neither JSON nor a directory")
    flags = words_naming(text, tmp_path / "out")[name]
    assert main([name, *map(str, flags), "--json"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert f"draftcache {name}: error: " in err


def test_a_vocabulary_that_is_refused_prints_nothing(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    """A failure after most of the work was done."""
    words = ["vocab", str(inputs / "prepared"), "--output", str(tmp_path / "map.safetensors"), "--size"]
    assert main([*words, "70"]) == 0
    capfd.readouterr()
    for flags in ([], ["--json"]):
        assert main([*words, "60", *flags]) == 2
        assert capfd.readouterr().out == ""


def test_what_is_printed_meanwhile_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        with stdout_for_result(as_json=as_json):
            print("a library says something")
            show(argparse.Namespace(json=as_json), {"a": [math.nan, 1.5, -math.inf]}, "text")
        out, err = capsys.readouterr()
        if as_json:
            assert (json.loads(out), err) == ({"a": [None, 1.5, None]}, "a library says something\n")
        else:
            assert (out, err) == ("a library says something\ntext\n", "")


def test_repair_says_what_it_took_out(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "s")
    (tmp_path / "s" / "shards" / "00001" / "token_ids" / "c.0").unlink()
    assert main(["repair", str(tmp_path / "s"), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert (found["shards"], found["files"], found["index_rebuilt"]) == ([1], [], False)
    assert (tmp_path / "s" / found["directory"] / "commit" / "00001.json").is_file()
    assert {damage["shard"] for damage in found["damages"]} == {1}
