"""--config FILE: a command's flags in a TOML file, what the command line changes of them, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from draftcache.store.common.errors import InputError
from draftcache.tools.cli import COMMANDS, main
from draftcache.tools.config_file import actions_of, command_parser, line_of, place_in, with_config, words_of
from support.capture_jobs import write_rows


def parsed(command: str, file: Path, *words: str) -> dict[str, Any]:
    add_arguments = importlib.import_module(COMMANDS[command][0]).add_arguments
    found = with_config(["--config", str(file), *words], lambda: command_parser(add_arguments, command))
    return vars(command_parser(add_arguments, command).parse_args(found))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_keys_are_flags_in_either_case_and_values_have_their_types(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.toml",
        'store = "s"\noutput = "o"\nsplits = ["train", "val"]\nlearning-rate = 1e-3\nttt_steps = 2\n'
        "recompute-mlp = true\nweight_decay = 0\n",
    )
    found = parsed("train", file)
    assert (found["store"], found["splits"], found["learning_rate"]) == ("s", ("train", "val"), 1e-3)
    assert (found["ttt_steps"], found["recompute_mlp"], found["weight_decay"]) == (2, True, 0.0)


def test_the_command_line_wins(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.toml", 'store = "s"\noutput = "o"\nsplits = ["a"]\nepochs = 2\nrecompute_mlp = true\nseed = 4\n'
    )
    found = parsed("train", file, "--epochs", "3", "--no-recompute-mlp", "--splits=b")
    assert (found["epochs"], found["recompute_mlp"], found["splits"], found["seed"]) == (3, False, ("b",), 4)


def test_lists_and_tables_stand_for_repeated_flags_and_positionals(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.toml",
        'tokenizer = "t"\noutput = "o"\nheld-out = ["val=v.jsonl"]\nstrict = false\n'
        'inputs = { a = "x", b = ["y", "z"] }\n[template_arg]\nenable_thinking = false\nname = "n"\n',
    )
    found = parsed("prepare", file)
    assert found["inputs"] == ["a=x", "b=y", "b=z"]
    assert (found["held_out"], found["strict"]) == (["val=v.jsonl"], False)
    assert found["template_arg"] == ["enable_thinking=false", "name=n"]
    # What the command line gives takes the place of the file's, and is not added to it.
    again = parsed("prepare", file, "c=w", "--held-out", "other=u")
    assert (again["inputs"], again["held_out"]) == (["c=w"], ["other=u"])


def test_a_flag_that_excludes_one_of_the_file_takes_its_place(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'dataset = "d"\nverifier = "v"\n')
    found = parsed("size", file, "--tokens", "450e6", "--hidden-size", "8")
    assert (found["dataset"], found["tokens"], found["verifier"], found["hidden_size"]) == (None, 450_000_000, None, 8)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_every_command_may_stand_in_a_file(name: str) -> None:
    """By the words that a value of its type becomes: the parser knows each of them again."""
    parser = command_parser(importlib.import_module(COMMANDS[name][0]).add_arguments, name)
    for key, action in actions_of(parser).items():
        if action.dest == "==SUPPRESS==":
            continue
        chosen = [next(iter(action.choices))] if action.choices else []
        candidates: list[Any] = [*chosen, True, 1, "1", ["a=1"], ["a", "b"], [1, 2]]
        for candidate in candidates:
            try:
                words = words_of({key: action}, {key: candidate}, place_in(Path(__file__)), name)
            except InputError:
                continue
            assert words or candidate is False
            break
        else:
            raise AssertionError(f"{name} {key}: no value stands for it")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "epochs = 1\nlearning_rat = 1",
            "line 2: expected a flag of `draftcache train`, found 'learning_rat': did you",
        ),
        ("qqqqqq = 1", "known: anchor, "),
        ('epochs = "2"', "line 1: epochs: expected a whole number, found '2'"),
        ("epochs = 2.5", "epochs: expected a whole number, found 2.5"),
        ("learning_rate = true", "learning_rate: expected a number, found true"),
        ("learning_rate = nan", "learning_rate: expected a finite number, found 'nan'"),
        ("recompute_mlp = 1", "recompute_mlp: expected true or false, found 1"),
        ("store = 3", "store: expected text in quotes, found 3"),
        ('draft = ["a", "b"]', "draft: expected text in quotes, found ['a', 'b']"),
        ("epochs = 1\nepochs = 2", "expected TOML, found something else"),
        ("beta-1 = 0.5", "did you mean beta1?"),
        ("ttt-steps = 1\nttt_steps = 2", "line 2: expected each flag once, found 'ttt-steps' and 'ttt_steps'"),
        ('config = "b.toml"', "found 'config'"),
        ("[train]\nepochs = 2", "found 'train'"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "wrong.toml", text)
    assert main(["train", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"draftcache train: error: {file}" in line
    assert said in line


def test_former_names_are_refused_by_their_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.toml", "shard = 2")
    assert main(["capture", "--config", str(file)]) == 2
    assert "line 1: expected the new name tensor-parallel, found 'shard'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config", "--conf"])
def test_a_file_that_is_missing_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", flag, str(tmp_path / "none.toml")]) == 2
    assert f"{tmp_path / 'none.toml'}: expected a TOML file, found nothing there" in capsys.readouterr().err


def test_a_required_flag_may_come_from_the_file(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that really run, with nothing but the file."""
    rows = write_rows(tmp_path / "rows.jsonl")
    prepare = write(
        tmp_path / "prepare.toml",
        f'tokenizer = "{tokenizer_dir}"\noutput = "{tmp_path}/p"\nworkers = 1\njson = true\n[inputs]\na = "{rows}"\n',
    )
    assert main(["prepare", "--config", str(prepare)]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"]["splits"].keys() == {"a"}
    vocab = write(
        tmp_path / "vocab.toml", f'inputs = ["{tmp_path}/p:a"]\nsize = 60\noutput = "{tmp_path}/m.safetensors"\n'
    )
    assert main(["vocab", "--config", str(vocab)]) == 0
    assert (tmp_path / "m.safetensors").is_file()


def test_lines_are_found_by_section() -> None:
    text = 'a = 1\n[x]\n"b" = 2 # c = 3\n  a = 4\n[[y]] # more\na = 5\n[when."a > 1"]\na = 6\n'
    assert [line_of(text, "a"), line_of(text, "a", "x"), line_of(text, "a", "y")] == [1, 4, 6]
    assert (line_of(text, "b", "x"), line_of(text, "c", "x"), line_of(text, "z")) == (3, 2, None)
