"""Flags made of settings: their help is the fields' own text."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from draftcache.capture.job.config import CaptureConfig
from draftcache.draft_train.config import TrainConfig
from draftcache.tools.arguments import add_settings
from draftcache.tools.cli import main
from draftcache.tools.commands import capture


@pytest.mark.parametrize("settings", [TrainConfig, CaptureConfig])
def test_help_is_what_the_fields_say(settings: type[Any]) -> None:
    """To the letter, but for where lines break: a percent sign is none of argparse's."""
    parser = argparse.ArgumentParser()
    add_settings(parser, settings)
    shown = "".join(parser.format_help().split())
    for item in dataclasses.fields(settings):
        assert "".join(item.metadata.get("help", "").split()) in shown, item.name
    assert "option_strings" not in shown  # argparse's own picture of a flag, which "8% s" asks for


@pytest.mark.parametrize("words", [["--shard", "2"], ["--shard=2"], ["--shard"]])
def test_captures_former_flags_are_refused_by_their_new_name(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2, also beside nothing else; `--shard` is no abbreviation of `--shard-tokens`."""
    assert main(["capture", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "draftcache capture: error: " in line
    assert "--tensor-parallel" in line


def test_former_flags_are_not_shown_and_take_nothing_from_longer_ones() -> None:
    parser = argparse.ArgumentParser()
    capture.add_arguments(parser)
    shown = parser.format_help().replace("--shard-tokens", "")
    assert "--shard" not in shown
    required = ["--verifier", "v", "--dataset", "d", "--output", "o", "--layers", "1"]
    parsed = parser.parse_args([*required, "--shard-tokens", "5", "--tensor-parallel", "2", "--launcher", "ray"])
    settings = {item.name for item in dataclasses.fields(CaptureConfig)}
    of_an_engine = {"engine", "engine_requests", "probe"}
    assert vars(parsed).keys() == settings | of_an_engine | {"json"}
    assert (parsed.shard_tokens, parsed.tensor_parallel, parsed.launcher) == (5, 2, "ray")
