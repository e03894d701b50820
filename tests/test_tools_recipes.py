"""Recipes: what a file may say, what is refused before the first step, and runs from nothing to an export."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from draftcache.store.common.errors import InputError
from draftcache.tools.cli import main
from draftcache.tools.demo import pipeline
from draftcache.tools.recipes import auto, records
from draftcache.tools.recipes.checks import CheckedStep, check_steps
from draftcache.tools.recipes.recipe import find_recipe, load_recipe, shipped_recipes
from draftcache.tools.recipes.runner import run_steps
from draftcache.tools.recipes.steps import steps_of
from draftcache.tools.recipes.variables import parse_set
from support.capture_jobs import write_rows
from support.paths import ROOT
from support.processes import ONE_THREAD, wait_for
from support.tiny_models import save_model

CLI = [sys.executable, "-m", "draftcache.tools.cli"]
RECIPE = """
about = "a small job"
[needs]
verifier = "a directory"
[set]
data = "rows.jsonl"
window = 20
epochs = 1
long = false
held_out = ""
[when.'epochs > 1']
long = true
[prepare]
tokenizer = "{tokenizer}"
inputs = { train = "{data}" }
held_out = { val = "{held_out}" }
workers = 1
[vocab]
inputs = ["@prepare:train"]
size = 200
[capture]
verifier = "{verifier}"
dataset = "@prepare"
vocab_map = "@vocab"
layers = [0, 1, 2]
top-k = 16
window = "{window}"
shard_tokens = 200
device = "cpu"
[train-first]
store = "@capture"
splits = ["train"]
batch_conversations = 2
ttt_steps = 2
sliding_window = 16
num_attention_heads = 4
head_dim = 4
epochs = "{epochs}"
recompute_mlp = "{long}"
learning_rate = "auto"
device = "cpu"
[eval]
only_if = 'held_out != ""'
store = "@capture"
checkpoint = "@train-first"
splits = "val"
[export]
checkpoint = "@train-first"
engine = "vllm"
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A folder with a recipe, its rows and its verifier. Tests change copies of the recipe's text."""
    root = tmp_path_factory.mktemp("job")
    save_model(root / "verifier", "llama")
    write_rows(root / "rows.jsonl")
    text = RECIPE.replace("{tokenizer}", str(tokenizer_dir)).replace('"rows.jsonl"', f'"{root}/rows.jsonl"')
    (root / "recipe.toml").write_text(text, encoding="utf-8")
    return root


def checked(path: Path, output: Path, *pairs: str) -> dict[str, CheckedStep]:
    return check_steps(steps_of(load_recipe(path, parse_set(pairs), output), output))


def changed(job: Path, tmp_path: Path, old: str, new: str) -> Path:
    text = (job / "recipe.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_killed_run_goes_on_from_nothing_to_an_export(job: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the data is prepared; then the same command to the end, and once more, which runs nothing."""
    command = [*CLI, "run", str(job / "recipe.toml"), "--set", f"verifier={job / 'verifier'}", "--output", "out"]
    prepared = tmp_path / "out" / "prepare" / "manifest.json"
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: prepared.is_file() or process.poll() is not None)
    process.kill()
    process.communicate()  # it lasts until the step that was running has ended too
    assert process.returncode == -signal.SIGKILL
    before = (prepared.stat().st_ino, prepared.stat().st_mtime_ns)

    done = subprocess.run([*command, "--json"], cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = {step["name"]: step["ran"] for step in json.loads(done.stdout)["steps"]}
    assert not steps.pop("prepare")
    assert steps.keys() == {"vocab", "capture", "train-first", "export"}
    assert all(steps[name] for name in ("capture", "train-first", "export"))
    assert (prepared.stat().st_ino, prepared.stat().st_mtime_ns) == before
    assert "$ draftcache train --store out/capture --splits train" in done.stderr
    assert "--learning-rate 0.002" in done.stderr  # six steps
    with safe_open(tmp_path / "out" / "export" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118

    again = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("was done before") == 5
    assert "$ draftcache" not in again.stdout


@pytest.mark.slow
def test_sigterm_reaches_the_step_and_its_code_is_the_runs(job: Path, tmp_path: Path) -> None:
    command = [*CLI, "run", str(job / "recipe.toml"), "--set", f"verifier={job / 'verifier'}", "--output", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: (tmp_path / "out" / "capture" / "manifest.json").is_file())
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143
    assert b"draftcache capture: stopped" in errors
    assert b"[capture] ended with exit code 143; the same command goes on from there" in errors


def in_process(codes: list[str]) -> Any:
    """Run steps in this process, and note their names."""

    def run(step: Any, words: list[str]) -> int:
        codes.append(step.name)
        return main(words)

    return run


SHORT = """
[prepare]
tokenizer = "{tokenizer}"
inputs = {{ train = "{rows}" }}
workers = 1
[vocab]
inputs = ["@prepare:train"]
size = {size}
"""


def short(tmp_path: Path, tokenizer: Path, size: int = 60) -> Path:
    path = tmp_path / "short.toml"
    path.write_text(SHORT.format(tokenizer=tokenizer, rows=tmp_path / "rows.jsonl", size=size), encoding="utf-8")
    return path


def test_a_step_is_done_by_its_output_its_words_and_what_it_reads(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows, out, ran = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", list[str]()

    def again(size: int = 60) -> list[str]:
        ran.clear()
        run_steps(checked(short(tmp_path, tokenizer_dir, size), out), out, in_process(ran))
        return list(ran)

    assert again() == ["prepare", "vocab"]
    assert again() == []
    (out / "vocab.safetensors").unlink()  # an output that is gone
    assert again() == ["vocab"]
    os.utime(rows)  # a file that may have changed: prepare looks, and finds the same content
    assert again() == ["prepare"]
    assert again(size=50) == ["vocab"]  # another setting: the command itself refuses to replace its output
    assert again(size=50) == ["vocab"]  # which is not taken for the output of the new setting
    (out / "vocab.safetensors").unlink()
    assert again(size=50) == ["vocab"]
    assert again(size=50) == []


def test_an_output_made_from_something_else_is_refused(tmp_path: Path) -> None:
    """A second stage that started from other weights than there are now would be mixed."""
    path = tmp_path / "r.toml"
    path.write_text(
        '[train-a]\nstore = "s"\nsplits = "x"\n[train-b]\nstore = "s"\nsplits = "y"\ninit_from = "@train-a"\n'
    )
    steps = {step.name: step for step in steps_of(load_recipe(path, {}, tmp_path), tmp_path)}
    known = records.Records(tmp_path)
    state = tmp_path / "train-a" / "checkpoints" / "step_00000001" / "state.json"
    state.parent.mkdir(parents=True)
    (tmp_path / "train-b").mkdir()
    state.write_text('{"finished": true}')
    known.begin(steps["train-b"], ["train"], steps)
    known.begin(steps["train-b"], ["train"], steps)
    state.write_text('{"finished": true, "other": "weights"}')
    with pytest.raises(
        InputError, match=r"train-b: expected an output of \[train-b\] that was made from what \[train-a\]"
    ):
        known.begin(steps["train-b"], ["train"], steps)


def test_quarantined_rows_do_not_end_a_run_and_a_failure_does(
    tmp_path: Path, tokenizer_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text() + "broken\n")
    command = ["run", str(short(tmp_path, tokenizer_dir)), "--output", str(tmp_path / "out")]
    assert [main(command), main(command)] == [1, 1]
    assert "prepare  was done, quarantine" in capfd.readouterr().out
    command = ["run", str(short(tmp_path, tokenizer_dir, size=10_000)), "--output", str(tmp_path / "other")]
    assert main(command) == 2
    shown = capfd.readouterr()
    assert "draftcache vocab: error: draft vocabulary size: expected 1.." in shown.err
    assert "[vocab] ended with exit code 2" in shown.err


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    steps, out = checked(short(tmp_path, tokenizer_dir), tmp_path / "out"), tmp_path / "out"

    def run(step: Any, words: list[str]) -> int:
        with pytest.raises(InputError, match="expected no other run at work there"):
            run_steps(steps, out, lambda *_: 0)
        return main(words)

    assert [one.exit_code for one in run_steps(steps, out, run)] == [0, 0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs = \"{epochs}\"", "epoch = 2", "expected a flag of `draftcache train`, found 'epoch': did you mean"),
        ("[train-first]", "[trian-first]", "expected [COMMAND] or [COMMAND-NAME], found 'trian': did you mean train?"),
        ("[train-first]", "[train_first]", "found 'train_first': did you mean train?"),
        ('store = "@capture"', 'store = "@captrue"', "in @captrue, found none: did you mean capture?"),
        ('store = "@capture"', 'store = "@export"', "in @export, found one below it, or itself"),
        ('store = "@capture"', 'store = "@prepare"', "expected a capture or convert or import step, found @prepare"),
        ("splits = [\"train\"]", "splits = [\"trian\"]", "one of the splits ['train'], found 'trian': did you"),
        ("sliding_window = 16", "sliding_window = 64", "sliding_window: expected at most 20, the window of the store"),
        ("sliding_window = 16", "sliding_window = 0", "the window of the store, found full attention"),
        ("ttt_steps = 2", "ttt_steps = -1", "line 34, [train-first]: --ttt-steps: expected 0 or more, found -1"),
        ("head_dim = 4", 'head_dim = "4"', "head_dim: expected a whole number, found '4'"),
        ("top-k = 16", "top-k = 201", "top_k: expected at most the draft vocabulary's 200, found 201"),
        ("layers = [0, 1, 2]", "layers = [0, 1, 4]", "expected blocks 0 to 3"),
        ("layers = [0, 1, 2]", "layers = [2, 1]", "--layers: expected ascending"),
        ("size = 200", "size = 641", "expected a draft vocabulary of at most the verifier's 640 ids, found one of 641"),
        ('["@prepare:train"]', '["@prepare:tarin"]', "inputs: expected one of the splits ['train'], found 'tarin'"),
        ('"{data}"', '"{date}"', "inputs: expected a variable in {date}, found none: did you mean data?"),
        ("[when.'epochs > 1']", "[when.'epoch > 1']", "found 'epoch': did you mean epochs?"),
        ("[when.'epochs > 1']", "[when.'epochs ~ 1']", "expected NAME == VALUE"),
        ("long = true", "lang = true", "expected a variable of [set], found 'lang': did you mean long?"),
        ('engine = "vllm"', 'engine = "vlm"', "engine: expected one of ['vllm', 'sglang'], found 'vlm'"),
        ('engine = "vllm"', "", "[export]: the following arguments are required: --engine"),
        ("about =", 'dataset = "x"\nabout =', "line 2: expected dataset in a section"),
        ('learning_rate = "auto"', 'beta1 = "auto"', 'beta1: expected a value, found "auto", which is there for'),
        ('vocab_map = "@vocab"\n', "", "expected a vocab_map, or a draft_vocab_size in [prepare], found neither"),
        ("[export]", '[export]\noutput = "@capture"', "expected an output of its own, found that of [capture]"),
        ("epochs = \"{epochs}\"", "processes = 3", "expected at least one for each of the 3 processes, found 2"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(
    old: str, new: str, said: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(job, tmp_path, old, new)
    out = tmp_path / "out"
    assert main(["run", str(path), "--set", f"verifier={job / 'verifier'}", "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert f"draftcache run: error: {path}" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "expected values for ['verifier'], found none: give --set verifier=... (a directory)"),
        (["verifier=none"], "verifier: expected something at none, found nothing there"),
        (["verifier=V", "epoch=2"], "--set epoch: expected a variable of the recipe, found none: did you mean epochs?"),
        (["verifier=V", "epochs=two"], "--set epochs: expected a value like 1, found 'two'"),
        (["verifier=V", "epochs"], "--set epochs: expected NAME=VALUE"),
        (["verifier=V", "trian.epochs=2"], "--set trian.epochs: expected a step of"),
        (["verifier=V", "vocab.sise=2"], "expected a flag of `draftcache vocab`, found 'sise': did you mean size?"),
        (["verifier=V", "data=none.jsonl"], "inputs: none.jsonl: expected a file, a folder or a glob"),
        (["verifier=V", "window=8"], "sliding_window: expected at most 8, the window of the store, found 16"),
    ],
)
def test_wrong_values_of_set_are_refused(
    pairs: list[str], said: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("=V", f"={job / 'verifier'}") for word in pairs]
    flags = [flag for word in words for flag in ("--set", word)]
    assert main(["run", str(job / "recipe.toml"), *flags, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cascade"]) == 2
    assert "expected a recipe's file or the name of a shipped one: did you mean cascade2?" in capsys.readouterr().err


def test_stages_must_share_shape_and_vocabulary(job: Path, tmp_path: Path) -> None:
    second = '[train-second]\nstore = "@capture"\nsplits = "train"\nsliding_window = 16\nnum_attention_heads = 4\n'
    second += 'head_dim = 4\ninit_from = "@train-first"\n'
    path = changed(job, tmp_path, "[eval]", f"{second}[eval]")
    verifier = f"verifier={job / 'verifier'}"
    assert "train-second" in checked(path, tmp_path / "out", verifier)
    with pytest.raises(InputError, match=r"head_dim: expected 4, as in \[train-first\], whose weights it starts from"):
        checked(path, tmp_path / "out", verifier, "train-second.head_dim=8")
    text = path.read_text()
    capture = text[text.index("[capture]") : text.index("[train-first]")]
    other = capture.replace("[capture]", "[capture-other]").replace(
        'vocab_map = "@vocab"', 'vocab_map = "@vocab-other"'
    )
    other = '[vocab-other]\ninputs = ["@prepare"]\nsize = 100\n' + other
    path.write_text(
        text.replace("[train-first]", f"{other}[train-first]").replace(
            second, second.replace("@capture", "@capture-other")
        )
    )
    with pytest.raises(InputError, match="init_from: expected stores under one draft vocabulary in both stages"):
        checked(path, tmp_path / "out", verifier)


def test_conditions_variables_and_empty_values(job: Path, tmp_path: Path) -> None:
    verifier = f"verifier={job / 'verifier'}"
    plain = checked(job / "recipe.toml", tmp_path, verifier)
    assert list(plain) == ["prepare", "vocab", "capture", "train-first", "export"]
    assert plain["prepare"].arguments.held_out == []
    assert plain["train-first"].arguments.recompute_mlp is False
    longer = checked(job / "recipe.toml", tmp_path, verifier, "epochs=2", f"held_out={job / 'rows.jsonl'}")
    assert "eval" in longer
    assert longer["prepare"].arguments.held_out == [f"val={job / 'rows.jsonl'}"]
    assert longer["train-first"].arguments.recompute_mlp is True
    kept = checked(job / "recipe.toml", tmp_path, verifier, "epochs=2", "long=false")  # what is given wins
    assert kept["train-first"].arguments.recompute_mlp is False
    assert checked(job / "recipe.toml", tmp_path, verifier, "vocab.size=90")["vocab"].arguments.size == 90


def test_dry_run_prints_commands_sizes_hours_and_memory_and_makes_nothing(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(job / "recipe.toml"), "--set", f"verifier={job / 'verifier'}", "--output", str(tmp_path / "o")]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"$ draftcache train --store {tmp_path}/o/capture --splits train" in shown
    assert "--learning-rate auto" in shown  # the number of steps is not known yet
    assert "a guess by the files' sizes" in shown
    assert "GiB of GPU memory at 32,768 tokens" in shown
    assert "left out: eval" in shown
    assert not (tmp_path / "o").exists()
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    estimates = {step["name"]: step["estimate"] for step in plan["steps"]}
    assert estimates["capture"]["bytes"] > 0
    assert estimates["train-first"]["gpu_bytes"] > 0
    assert plan["total"]["hours"] == estimates["capture"]["hours"] + estimates["train-first"]["hours"]
    # Once the data is prepared, counts are exact and the rate is known.
    steps = checked(job / "recipe.toml", tmp_path / "o", f"verifier={job / 'verifier'}")
    run_steps({"prepare": steps["prepare"]}, tmp_path / "o", in_process([]))
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "[prepare] is done" in shown
    assert "--learning-rate 0.002" in shown
    assert shown.count("of the prepared data") == 2


SEED = {
    # The published table's stages (learning rate, epochs, bucketing), then what holds for both.
    "stage1": {"learning_rate": 1e-4, "epochs": 1, "order": "bucketed", "splits": ("stage1",)},
    "stage2": {"learning_rate": 5e-5, "epochs": 3, "order": "shuffle", "splits": ("stage2",)},
    "both": {
        "ttt_steps": 6, "sliding_window": 4096, "warmup_ratio": 0.02, "batch_conversations": 2, "pack_tokens": 0,
        "intermediate_size": 8064, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def cascade2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the 30B verifier's, by its config alone."""
    path = tmp_path_factory.mktemp("cascade2")
    config = {"model_type": "nemotron_h", "num_hidden_layers": 52, "hidden_size": 2688, "vocab_size": 131_072}
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 262_144}))
    return path


@pytest.mark.parametrize("length", [32_768, 65_536])
def test_cascade2_is_the_published_table(length: int, cascade2_model: Path, job: Path, tmp_path: Path) -> None:
    pairs = [f"verifier={cascade2_model}", f"sft={job / 'rows.jsonl'}", f"traces={job / 'rows.jsonl'}"]
    if length != 32_768:
        pairs.append(f"length={length}")
    steps = checked(find_recipe("cascade2"), tmp_path, *pairs)
    assert steps["prepare"].arguments.max_length == length
    assert [pair.partition("=")[0] for pair in steps["prepare"].arguments.inputs] == ["stage1", "stage2"]
    assert steps["vocab"].arguments.size == 32_000
    assert steps["vocab"].arguments.inputs == [f"{tmp_path}/prepare:stage1", f"{tmp_path}/prepare:stage2"]  # the union
    capture = steps["capture"].arguments
    assert (capture.layers, capture.window, str(capture.vocab_map)) == (
        (2, 26, 48),
        4096,
        str(tmp_path / "vocab.safetensors"),
    )
    for stage in ("stage1", "stage2"):
        found = vars(steps[f"train-{stage}"].arguments)
        assert {name: found[name] for name in SEED[stage]} == SEED[stage]
        assert {name: found[name] for name in SEED["both"]} == SEED["both"]
        assert found["recompute_mlp"] is (length == 65_536)  # the published --draft-mlp-grad-checkpoint
        assert found["max_grad_norm"] == 0.5  # what the published optimizer clips at by default
    assert steps["train-stage1"].arguments.init_from is None
    assert steps["train-stage2"].arguments.init_from == tmp_path / "train-stage1"
    assert steps["train-stage2"].arguments.store == steps["train-stage1"].arguments.store
    export = steps["export"].arguments
    assert (export.checkpoint, export.max_position_embeddings, export.engine) == (
        tmp_path / "train-stage2",
        262_144,
        "vllm",
    )


def test_cascade2_on_two_gpus_and_with_held_out_rows(cascade2_model: Path, job: Path, tmp_path: Path) -> None:
    rows = job / "rows.jsonl"
    pairs = [f"verifier={cascade2_model}", f"sft={rows}", f"traces={rows}", f"held_out={rows}", "gpus=2"]
    steps = checked(find_recipe("cascade2"), tmp_path, *pairs)
    assert steps["eval"].arguments.splits == "val"
    assert steps["train-stage1"].arguments.eval_split == "val"
    step = steps["train-stage2"].step
    assert step.launched(["train"])[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "draftcache.tools.cli", "train",
    ]  # fmt: skip


def test_cascade2_generates_its_second_stage_from_prompts(cascade2_model: Path, job: Path, tmp_path: Path) -> None:
    pairs = [f"verifier={cascade2_model}", f"sft={job / 'rows.jsonl'}", f"prompts={job / 'rows.jsonl'}"]
    steps = checked(find_recipe("cascade2"), tmp_path, *pairs)
    assert next(iter(steps)) == "generate"
    assert steps["generate"].arguments.verifier == cascade2_model
    assert f"stage2={tmp_path}/generate/stage2/rows.jsonl" in steps["prepare"].arguments.inputs
    served = checked(find_recipe("cascade2"), tmp_path, *pairs, "server=http://localhost:8000/v1")["generate"].arguments
    assert (served.verifier, served.server) == (None, "http://localhost:8000/v1")
    with pytest.raises(InputError, match="expected one of the splits"):  # neither traces nor prompts
        checked(find_recipe("cascade2"), tmp_path, *pairs[:2])
    with pytest.raises(InputError, match=r"inputs: none\.jsonl: expected a file"):
        checked(find_recipe("cascade2"), tmp_path, *pairs[:2], "prompts=none.jsonl")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_pass_their_checks_and_can_be_shown(
    name: str, cascade2_model: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pipeline.VERIFIER if name != "cascade2" else cascade2_model
    values = {"verifier": model, "sft": job / "rows.jsonl", "traces": job / "rows.jsonl", "data": job / "rows.jsonl"}
    needed = {"demo": (), "any-verifier": ("verifier", "data"), "cascade2": ("verifier", "sft", "traces")}[name]
    steps = checked(find_recipe(name), tmp_path, *(f"{one}={values[one]}" for one in needed))
    assert list(steps)[-1] == "export"
    assert main(["run", name, "--show"]) == 0
    assert capsys.readouterr().out == find_recipe(name).read_text(encoding="utf-8")
    if name == "demo":
        assert steps["capture-real"].arguments.layers == pipeline.LAYERS
        assert steps["eval-stage2-traces"].arguments.splits.split(",") == list(pipeline.TRACE_SPLITS)


def test_defaults_from_the_model(job: Path, tmp_path: Path) -> None:
    rows = f"data={job / 'rows.jsonl'}"
    steps = checked(find_recipe("any-verifier"), tmp_path, f"verifier={pipeline.VERIFIER}", rows)
    train, prepare = steps["train"].arguments, steps["prepare"].arguments
    assert (train.num_attention_heads, train.num_key_value_heads, train.head_dim) == (4, 2, 64)
    assert (prepare.max_length, prepare.draft_vocab_size, train.rope_theta) == (4096, 3072, 10_000.0)
    model = tmp_path / "model"
    model.mkdir()
    config = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 151_936, "rope_theta": 1e6}
    (model / "config.json").write_text(json.dumps({"text_config": config | {"max_position_embeddings": 131_072}}))
    steps = checked(find_recipe("any-verifier"), tmp_path, f"verifier={model}", rows, "length=100000")
    train, prepare = steps["train"].arguments, steps["prepare"].arguments
    assert (train.num_attention_heads, train.num_key_value_heads, train.head_dim) == (32, 32, 128)
    assert (prepare.max_length, prepare.draft_vocab_size, train.rope_theta) == (100_000, 32_000, 1e6)
    (model / "config.json").write_text("{}")
    with pytest.raises(InputError, match="the verifier's config has no vocab_size: give a number"):
        checked(find_recipe("any-verifier"), tmp_path, f"verifier={model}", rows)


def test_the_learning_rate_falls_with_the_steps_between_what_was_measured() -> None:
    assert [auto.learning_rate_for(steps) for steps in (1, 100, 10_000, 10**7)] == [2e-3, 2e-3, 1e-4, 1e-4]
    rates = [auto.learning_rate_for(steps) for steps in range(100, 10_001, 50)]
    assert rates == sorted(rates, reverse=True)
    assert auto.learning_rate_for(1000) == pytest.approx(4.5e-4)  # the geometric mean, half-way
    assert auto.learning_rate_for(10_000, warm_start=True) == 5e-5  # the published second stage's


@pytest.mark.slow
def test_readmes_section_can_be_followed_line_by_line(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Recipes\n")[2].partition("\n## ")[0]
    block = section.partition("```\n")[2].partition("```")[0]
    assert block.count("draftcache run ") == 5
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    function = f'draftcache() {{ {shlex.quote(sys.executable)} -m draftcache.tools.cli "$@"; }}'
    done = subprocess.run(
        ["bash", "-e", "-c", f"{function}\n{block}"],
        cwd=tmp_path,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for run in ("any-verifier", "mine"):
        assert (tmp_path / "runs" / run / "export" / "model.safetensors").is_file()


def test_list_names_the_shipped_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert main(["run", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("any-verifier", "cascade2", "demo"))
    assert time.process_time() - started < 1.0
