"""Pipes, loops and directories where a file is expected: refused at once, by name. A pipe would be waited for."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcache.capture.prepare.chat.tokenizer_files import choose_template, load_tokenizer
from draftcache.capture.verifier.load import load_config, load_verifier
from draftcache.capture.verifier.weights import weight_files
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.failures import REFUSED, exit_code_of
from draftcache.store.common.files import read_json, require_file
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.storage.local import LocalStorage
from draftcache.tools.probe.files import _load_safetensors
from support.chat_tokenizers import CHATML, save_tokenizer
from support.tiny_models import save_model

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizer."""
    path = tmp_path_factory.mktemp("wrong_paths")
    save_model(path, "llama")
    save_tokenizer(path, CHATML)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/more.jinja",
        "generation_config.json", "config.json",
    ],
)  # fmt: skip
def test_a_pipe_among_a_tokenizers_files_is_refused_at_once(tmp_path: Path, model: Path, name: str) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(
        InputError, match=re.escape(f"{path}: expected a {path.suffix} file, found something that is no")
    ):
        load_tokenizer(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_among_a_verifiers_files_is_refused_at_once(tmp_path: Path, model: Path, name: str) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="no regular file"):
        load_verifier(directory, device=cpu, dtype=torch.float32, trust_remote_code=False)
    with pytest.raises(InputError, match="no regular file"):
        load_config(directory, trust_remote_code=False)


def test_pipes_that_no_library_reads_and_broken_links_do_no_harm(tmp_path: Path, model: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    os.mkfifo(directory / "log")
    (directory / "merges.txt").symlink_to("nowhere")
    files, _ = load_tokenizer(directory)
    assert files.own_template is not None


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
