"""Fixtures shared by several test modules."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from draftcache.capture.verifier.ssm_precision import stand_in_for_extension

stand_in_for_extension()  # before any test module imports transformers' NemotronH
pytest.register_assert_rewrite("support")  # before its first import: its failed asserts show their values too

from support.chat_tokenizers import CHATML, save_tokenizer  # noqa: E402

if TYPE_CHECKING:
    from draftcache.tools.campaign.object_server import S3Server

LONGEST = (
    "test_kernels_interpreted", "test_tools_campaign", "test_capture_launch", "test_draft_train_parallel",
    "test_tools_truth", "test_tools_sweep", "test_wheel", "test_capture_engine",
)  # fmt: skip
"""Files of tests that take minutes. Begun last, one of them would keep a single process busy at the end."""


def pytest_configure() -> None:
    """Let tests interrupt their processes where the tests run in the background, in which shells ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # a stable sort


@pytest.fixture
def seeded() -> None:
    """The same random numbers in every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server on loopback, for the tests of a module."""
    from draftcache.tools.campaign.object_server import s3_server  # it takes a second

    with s3_server() as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose ChatML template has generation tags, the end-of-turn token inside, and refuses some rows."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizers") / "chatml", CHATML)


@pytest.fixture(scope="session")
def untagged_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer; its template renders the same text without generation tags."""
    template = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return save_tokenizer(tmp_path_factory.mktemp("tokenizers") / "untagged", template)
