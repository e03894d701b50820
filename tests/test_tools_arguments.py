"""Flags made of settings: their help is the fields' own text."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from draftcache.capture.job.config import CaptureConfig
from draftcache.draft_train.config import TrainConfig
from draftcache.tools.arguments import add_settings


@pytest.mark.parametrize("settings", [TrainConfig, CaptureConfig])
def test_help_is_what_the_fields_say(settings: type[Any]) -> None:
    """To the letter, but for where lines break: a percent sign is none of argparse's."""
    parser = argparse.ArgumentParser()
    add_settings(parser, settings)
    shown = "".join(parser.format_help().split())
    for item in dataclasses.fields(settings):
        assert "".join(item.metadata.get("help", "").split()) in shown, item.name
    assert "option_strings" not in shown  # argparse's own picture of a flag, which "8% s" asks for
