"""Pipes, loops and directories where a file is expected: refused at once, by name. A pipe would be waited for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from draftcache.capture.prepare.chat.tokenizer_files import choose_template
from draftcache.capture.verifier.weights import weight_files
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.failures import REFUSED, exit_code_of
from draftcache.store.common.files import read_json, require_file
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.storage.local import LocalStorage
from draftcache.tools.probe.files import _load_safetensors

READERS: dict[str, Callable[[Path], Any]] = {
    "JSON": read_json,
    "vocabulary map": VocabMap.load,
    "chat template": lambda path: choose_template(None, path),  # type: ignore[arg-type]  # the tokenizer is not asked
    "probe": _load_safetensors,
    "weights": lambda path: weight_files(path.parent),
    "store": lambda path: LocalStorage(path.parent).read(path.name),
    "store's array": lambda path: LocalStorage(path.parent).open(path.name),
}


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Whatever waits is killed: SIGALRM ends the process unless it is handled."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_no_regular_file_is_refused_at_once(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(DraftcacheError, match="no regular file") as caught:
        READERS[name](path)
    assert str(path) in str(caught.value)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to(path)
    with pytest.raises(InputError, match="symbolic links"):
        require_file(path, "a file")
    with pytest.raises(OSError, match="symbolic links") as caught:
        path.read_bytes()
    assert exit_code_of(caught.value) == REFUSED
    for read in (LocalStorage(tmp_path).read, LocalStorage(path).read):  # a file of a store, and the store itself
        with pytest.raises(InputError, match="symbolic links"):
            read("loop")


def test_a_file_and_a_link_to_one_are_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {}
