"""`draftcache capture --engine`: states that a server extracts, over real HTTP and files, become a capture's store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcache.capture.engine import extracted
from draftcache.capture.engine.config import EngineConfig
from draftcache.capture.engine.job import capture_from_engine
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.launch import capture
from draftcache.capture.job.progress import CaptureSummary
from draftcache.capture.verifier.load import Verifier
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError, ManifestMismatchError, ServerError
from draftcache.store.common.stopping import Stopped
from draftcache.store.format.commits import committed_shards
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from support import training_runs
from support.capture_jobs import config, flags, prepare_rows
from support.peer_files import load, record, save_predictable, write_masks
from support.processes import ONE_THREAD, wait_for
from support.scaled_models import save_scaled
from support.states_server import StatesServer, Tensors, states_server

IDS = (1, 2, 3, 4)
"""vLLM's ids of blocks 0, 1 and 2, which are captured, and of the last block."""
ROWS = 8


@pytest.fixture(scope="module")
def verifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictable(tmp_path_factory.mktemp("verifier") / "llama")


@pytest.fixture(scope="module")
def verifier(verifier_dir: Path) -> Verifier:
    return load(verifier_dir)


@pytest.fixture(scope="module")
def dataset(verifier: Verifier, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verifier's own sampled text, so that the token behind a row is likely by its last state."""
    root = tmp_path_factory.mktemp("dataset")
    rows = write_masks(root / "rows.jsonl", record(verifier, count=ROWS))
    return prepare_rows(root / "prepared", tokenizer_dir, rows)


@pytest.fixture(scope="module")
def settings(verifier_dir: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptureConfig:
    """Settings of a job of four shards, by which this process's own verifier has made a store."""
    output = tmp_path_factory.mktemp("captured") / "store"
    made = config(verifier_dir, dataset, output, mode="float32", shard_tokens=80, batch_tokens=1)
    capture(made)
    return made


@pytest.fixture
def server(verifier: Verifier, tmp_path: Path) -> Iterator[StatesServer]:
    with states_server(verifier, tmp_path / "states", IDS) as running:
        yield running


def ask(settings: CaptureConfig, server: StatesServer, output: Path, **changes: Any) -> CaptureSummary:
    values: dict[str, Any] = {"retries": 0, "requests": 4, **changes}
    capture_settings = replace(settings, output=output, **{"batch_tokens": 120} | values.pop("capture", {}))
    return capture_from_engine(EngineConfig(engine=server.url, capture=capture_settings, **values))


def require_equal(
    output: Path, settings: CaptureConfig, *, but: tuple[int, ...] = (), same_verifier: bool = True
) -> None:
    """Every array is that of the store of this process's own verifier, but for conversations left out.

    All are equal to the bit but the next token's logit, a product of its own, which some processors sum in another
    order where other rows are beside it.
    """
    ours, theirs = StoreReader(output), StoreReader(settings.output)
    expected = {int(number): place for place, number in enumerate(theirs.index["dataset_index"])}
    found = {int(number): place for place, number in enumerate(ours.index["dataset_index"])}
    assert found.keys() == expected.keys() - set(but)
    for number, place in found.items():
        values = theirs.read(expected[number]).arrays
        own = ours.read(place).arrays
        assert own.keys() == values.keys()
        for name, value in values.items():
            if name == "next_token_logit":
                np.testing.assert_allclose(own[name], value, rtol=3e-7, atol=3e-7)
            else:
                assert np.array_equal(own[name], value), (number, name)
    assert (ours.manifest.verifier == theirs.manifest.verifier) == same_verifier
    assert (output / "frozen.safetensors").read_bytes() == (settings.output / "frozen.safetensors").read_bytes()


@pytest.mark.parametrize("probe", [None, False])
def test_states_of_an_engine_become_the_store_that_a_capture_is(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path, probe: bool | None
) -> None:
    server.seconds = 0.02  # so that requests are in flight side by side
    summary = ask(settings, server, tmp_path / "store", probe=probe)
    assert not summary.quarantined
    require_equal(tmp_path / "store", settings)
    assert not verify_store(tmp_path / "store").damages
    assert not list(server.folder.iterdir())
    assert 1 < server.most_running <= 4
    found = StoreReader(tmp_path / "store").manifest.provenance
    assert (found["engine"]["name"], found["engine"]["version"], found["forward"]["name"]) == ("vllm", "0.32.0", "vllm")
    assert found["engine"]["last_state"] == "before"
    assert found["engine"]["log_probability_off"] < 1e-5
    assert found["engine"]["auxiliary_states"].startswith("not compared" if probe is False else "compared")
    assert ("recorded_tap_1" in found["self_check"]) == (probe is None)


def test_the_store_trains(settings: CaptureConfig, server: StatesServer, tmp_path: Path) -> None:
    ask(settings, server, tmp_path / "store", probe=False)
    Trainer(training_runs.config(tmp_path, epochs=1)).run()
    assert training_runs.metrics(tmp_path / "run")


def test_requests_come_in_the_order_of_the_shards(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path
) -> None:
    """One at a time, as several may overtake one another on their way. Shortest first in a shard, as batches are."""
    ask(settings, server, tmp_path / "store", requests=1, probe=False, capture={"shard_tokens": 200})
    lengths = [len(prompt) for prompt in server.prompts]
    assert lengths == [40 + 3 * number for number in (*range(ROWS), *range(ROWS), *range(ROWS))]


LENGTHS = [40 + 3 * number for number in range(ROWS)]


def not_finite(tensors: Tensors) -> Tensors:
    tensors["hidden_states"][20, 1, 3] = float("nan")
    return tensors


def of_other_ids(tensors: Tensors) -> Tensors:
    return tensors | {"token_ids": tensors["token_ids"].roll(1)}


def cut(tensors: Tensors) -> Tensors:
    return tensors | {"hidden_states": tensors["hidden_states"][:-2]}


def missing(tensors: Tensors) -> None:
    return None


FAULTS: dict[int, tuple[Callable[[Tensors], Tensors | None], str]] = {
    43: (not_finite, "expected finite"),
    46: (of_other_ids, "expected states of the 46 token ids that were sent, found those of 46 others"),
    49: (cut, "expected states of 49 tokens, as many as token ids, found 47"),
    52: (missing, "found its lock free and no file: the server could not write it"),
}
"""What goes wrong with the conversation of this length, and what is said of it."""


def test_conversations_of_which_states_are_wrong_are_quarantined_alone(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches hold others, which are stored. The first conversations are whole, or the job would not begin."""
    monkeypatch.setattr(extracted, "APPEARING_SECONDS", 0.05)

    def change(number: int, tensors: Tensors) -> Tensors | None:
        length = len(tensors["token_ids"])
        return FAULTS[length][0](tensors) if number > ROWS and length in FAULTS else tensors

    server.change = change
    summary = ask(settings, server, tmp_path / "store")
    found = {LENGTHS[item["dataset_index"]]: item["reason"] for item in summary.quarantined}
    assert found.keys() == FAULTS.keys()
    assert all(reason in found[length] for length, (_, reason) in FAULTS.items())
    require_equal(tmp_path / "store", settings, but=tuple(map(LENGTHS.index, FAULTS)))


def test_conversations_that_the_server_refuses_are_quarantined(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path
) -> None:
    server.max_model_len = 58
    summary = ask(settings, server, tmp_path / "store")
    assert [item["dataset_index"] for item in summary.quarantined] == [6, 7]
    assert all("maximum context length is 58 tokens" in item["reason"] for item in summary.quarantined)
    require_equal(tmp_path / "store", settings, but=(6, 7))
    assert len([prompt for prompt in server.prompts if len(prompt) == 61]) == 3  # at the start, calibrating, once more


def test_a_file_that_failed_once_is_asked_for_again(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extracted, "APPEARING_SECONDS", 0.05)
    server.change = lambda number, tensors: None if number % 7 == 0 else tensors
    assert not ask(settings, server, tmp_path / "store").quarantined
    require_equal(tmp_path / "store", settings)


def test_conversations_of_equal_ids_and_single_slots_do_not_wait_for_one_another(
    settings: CaptureConfig, server: StatesServer, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two equal conversations is asked for while what comes after it has taken every slot."""
    monkeypatch.setattr(extracted, "APPEARING_SECONDS", 0.05)
    rows = (settings.dataset.parent / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([rows[4], *rows, rows[4], rows[7]]) + "\n")
    doubled = replace(settings, dataset=prepare_rows(tmp_path / "prepared", tokenizer_dir, tmp_path / "rows.jsonl"))
    server.change = lambda number, tensors: None if number % 5 == 0 else tensors
    changes = {"batch_tokens": 1, "shard_tokens": 10_000}
    assert not ask(doubled, server, tmp_path / "store", requests=1, capture=changes).quarantined
    assert len(StoreReader(tmp_path / "store")) == ROWS + 3


def test_a_server_that_writes_no_more_ends_the_job_and_the_same_command_goes_on(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each of its conversations' fault: nothing is quarantined that the server will extract again."""
    monkeypatch.setattr(extracted, "APPEARING_SECONDS", 0.05)
    begun = 2 * ROWS + 3  # the start, the calibration and a bit
    server.change = lambda number, tensors: tensors if number <= begun else None
    with pytest.raises(ServerError, match=r"expected files of states, found none, .* Is its folder full"):
        ask(settings, server, tmp_path / "store")
    server.change = lambda _number, tensors: tensors
    assert not ask(settings, server, tmp_path / "store").quarantined
    require_equal(tmp_path / "store", settings)


def shifted(_number: int, tensors: Tensors) -> Tensors:
    return tensors | {"hidden_states": tensors["hidden_states"].roll(1, 0)}


def shifted_last(_number: int, tensors: Tensors) -> Tensors:
    states = tensors["hidden_states"]
    return tensors | {"hidden_states": torch.cat([states[:, :3], states[:, 3:].roll(1, 0)], 1)}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"ids": (1, 3, 2, 4)}, {}, "auxiliary state 1: expected the output of block 1 .* found .* block 2 nearest"),
        ({"ids": (1, 2, 4)}, {}, r"expected 4 states per token, of --layers and the last block, found 3.*\[1, 2, 3, 4"),
        ({"change": shifted}, {}, "auxiliary state 0: expected .* found the output of block 0, one row too late"),
        ({"change": shifted_last}, {"probe": False}, "make the engine's own log probabilities, within 0.001"),
        ({"extracts": False}, {}, "this server does not extract them. Start it with: vllm serve .*extract_hidden"),
        ({"version": None}, {}, "expected a vLLM, which answers at /version and /v1/models"),
        ({"models": ["one", "two"]}, {}, r"expected a server of one model, found \['one', 'two'\]"),
        ({"named_folder": Path("/nowhere")}, {}, "found nothing: both have to see one folder"),
        ({"locks": False}, {}, "found no .lock beside it"),
        ({"max_model_len": 20}, {}, "expected the states of at least one of 8 conversations, found none"),
        ({}, {"capture": {"compute_dtype": "bfloat16"}}, "--compute-dtype: expected auto or float32"),
        ({}, {"capture": {"workers": 2}}, "--workers: expected it without --engine"),
        ({}, {"capture": {"allow_fallback": True}}, "--allow-fallback: expected it without --engine"),
        ({}, {"capture": {"layers": (0, 9)}}, "expected blocks below the verifier's 4"),
        ({}, {"requests": 0}, "--engine-requests: expected at least 1"),
    ],
)
def test_a_server_or_settings_that_do_not_fit_are_refused(
    settings: CaptureConfig,
    server: StatesServer,
    tmp_path: Path,
    change: dict[str, Any],
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is stored. States in the place of others are the negative control of the probe."""
    monkeypatch.setattr(extracted, "APPEARING_SECONDS", 0.05)
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(InputError, match=message):
        ask(settings, server, tmp_path / "store", **options)
    assert not (tmp_path / "store" / "commit").exists()


def test_a_server_that_was_started_otherwise_meanwhile_is_refused(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path
) -> None:
    server.change = lambda number, tensors: (
        tensors if number <= ROWS else tensors | {"hidden_states": tensors["hidden_states"][:, :3]}
    )
    with pytest.raises(InputError, match=r"expected \{'states per token': 4, .* started with other settings since"):
        ask(settings, server, tmp_path / "store")


def test_a_store_goes_on_with_the_engine_that_began_it(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda number: 503 if number > 2 * ROWS + 4 else None
    with pytest.raises(ServerError, match="503"):
        ask(settings, server, tmp_path / "store")
    assert 0 < len(committed_shards(open_storage(tmp_path / "store"))) < 4
    message = "expected states from vllm, as the store has them, found the verifier loaded here"
    with pytest.raises(ManifestMismatchError, match=message):
        capture(replace(settings, output=tmp_path / "store"))
    with pytest.raises(ManifestMismatchError, match="found vllm in this job"):
        ask(settings, server_of_all(server), settings.output)
    server.version = "0.33.0"
    words = ["capture", *flags(replace(settings, output=tmp_path / "store", batch_tokens=120)), "--engine", server.url]
    assert main(words) == 0
    assert "the store was begun with vllm 0.32.0 and goes on with 0.33.0" in capsys.readouterr().err
    require_equal(tmp_path / "store", settings)


def server_of_all(server: StatesServer) -> StatesServer:
    server.fault = lambda _number: None
    return server


def test_a_server_that_is_gone_and_back_and_a_command_that_was_killed(
    settings: CaptureConfig, verifier: Verifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "store"
    words = [str(word) for word in ("capture", *flags(replace(settings, output=output, batch_tokens=120)))]
    with ExitStack() as stack:
        server = stack.enter_context(states_server(verifier, tmp_path / "states", IDS, seconds=0.05))
        command = [sys.executable, "-m", "draftcache.tools.cli", *words, "--engine", server.url + "/v1"]
        with subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.DEVNULL) as process:
            wait_for(lambda: process.poll() is not None or committed_shards(open_storage(output)))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        before = len(committed_shards(open_storage(output)))
        assert 0 < before < 4
    gone = EngineConfig(engine=server.url, capture=replace(settings, output=output), retries=1)
    with pytest.raises(ServerError, match=f"{server.url}/version: expected an answer, found ConnectError .*, 2 times"):
        capture_from_engine(gone)
    port = int(server.url.rpartition(":")[2])
    with states_server(verifier, tmp_path / "again", IDS, port=port):
        capsys.readouterr()
        assert main([*words, "--engine", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards_written"] == 4 - before
    require_equal(output, settings)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Stopped may come before its with
def test_sigterm_ends_the_job_while_it_waits_for_the_server(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path
) -> None:
    def answer_late(number: int) -> None:
        if number == 2 * ROWS + 4:
            os.kill(os.getpid(), signal.SIGTERM)
            server.seconds = 0.3

    server.fault = answer_late
    with pytest.raises(Stopped):
        ask(settings, server, tmp_path / "store", capture={"grace_seconds": 0.05})
    assert len(committed_shards(open_storage(tmp_path / "store"))) < 4
    server.seconds = 0.0
    assert not ask(settings, server, tmp_path / "store").quarantined
    require_equal(tmp_path / "store", settings)


def test_the_last_block_may_be_a_tap_too(settings: CaptureConfig, server: StatesServer, tmp_path: Path) -> None:
    server.ids = (1, 4)
    with_last = replace(settings, layers=(0, 3), output=tmp_path / "captured")
    capture(with_last)
    ask(with_last, server, tmp_path / "store")
    require_equal(tmp_path / "store", with_last)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray"], "--engine ray: expected --launcher ray, the flag's new name"),
        (["--engine", "sglang"], "--engine: expected vllm, which stands for http://localhost:8000, or the URL"),
        (["--probe"], "--probe: expected it with --engine"),
        (["--no-probe"], "--probe: expected it with --engine"),
        (["--engine-requests", "2"], "--engine-requests: expected it with --engine"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    settings: CaptureConfig, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capture", *flags(replace(settings, output=tmp_path / "store")), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_verifier_that_transformers_can_not_load(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path
) -> None:
    """Its blocks are quantised, as the server would have them; embeddings, norm and head are read all the same."""
    quantised = tmp_path / "quantised"
    shutil.copytree(settings.verifier, quantised)
    described = json.loads((quantised / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (quantised / "config.json").write_text(json.dumps(described))
    tensors = load_file(quantised / "model.safetensors")
    packed = {name: value.to(torch.uint8) for name, value in tensors.items() if "_proj" in name}
    save_file(tensors | packed, quantised / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    engine = EngineConfig(engine=server.url, capture=replace(settings, verifier=quantised, output=tmp_path / "store"))
    capture_from_engine(engine, lines.append)
    assert any("not compared with the verifier's own, as it can't be loaded" in line for line in lines)
    require_equal(tmp_path / "store", settings, same_verifier=False)
    found = StoreReader(tmp_path / "store").manifest.provenance["engine"]
    assert found["auxiliary_states"] == "not compared: --layers is taken as given"
    with pytest.raises(InputError, match="quant"):
        capture_from_engine(replace(engine, probe=True))


@pytest.mark.parametrize("added", [0.0, 1.0])
def test_a_verifier_of_a_type_that_transformers_does_not_know(
    settings: CaptureConfig, server: StatesServer, tmp_path: Path, added: float
) -> None:
    """Whether the norm multiplies by w or by 1 + w is found out by the engine's logits."""
    unknown = tmp_path / "unknown"
    shutil.copytree(settings.verifier, unknown)
    described = json.loads((unknown / "config.json").read_text())
    described |= {"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}
    (unknown / "config.json").write_text(json.dumps(described))
    tensors = load_file(unknown / "model.safetensors")
    tensors["model.norm.weight"] -= added
    save_file(tensors, unknown / "model.safetensors", metadata={"format": "pt"})
    engine = EngineConfig(engine=server.url, capture=replace(settings, verifier=unknown, output=tmp_path / "store"))
    capture_from_engine(engine)
    ours, theirs = StoreReader(tmp_path / "store"), StoreReader(settings.output)
    for number in range(ROWS):
        for name, expected in theirs.read(number).arrays.items():
            np.testing.assert_allclose(ours.read(number).arrays[name], expected, rtol=0, atol=1e-5)
    assert (ours.manifest.verifier["architecture"], ours.manifest.verifier["layers"]) == ("BrandNewForCausalLM", 4)
    assert ours.manifest.provenance["engine"]["log_probability_off"] < 1e-4
    with pytest.raises(InputError, match="--probe: expected a verifier that transformers knows"):
        capture_from_engine(replace(engine, probe=True))
    save_file(tensors | {"lm_head.weight": -tensors["lm_head.weight"]}, unknown / "model.safetensors")
    with pytest.raises(InputError, match="expected a last state from which norm and head"):  # negative control
        capture_from_engine(replace(engine, capture=replace(engine.capture, output=tmp_path / "other")))


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_what_scales_or_caps_the_logits_is_told_by_the_engine(
    settings: CaptureConfig, tmp_path: Path, kind: str
) -> None:
    """The verifier is not loaded; its configuration's numbers may multiply or divide."""
    path = save_scaled(tmp_path / kind, kind)
    expected = replace(settings, verifier=path, output=tmp_path / "captured")
    capture(expected)
    with states_server(load(path), tmp_path / "states", IDS) as running:
        ask(replace(settings, verifier=path), running, tmp_path / "store", probe=False)
    ours, theirs = StoreReader(tmp_path / "store"), StoreReader(expected.output)
    assert ours.manifest.verifier == theirs.manifest.verifier
    assert ours.manifest.verifier.keys() & {"logit_scale", "logit_cap"}
    for number in range(ROWS):
        for name, values in theirs.read(number).arrays.items():
            np.testing.assert_allclose(ours.read(number).arrays[name], values, rtol=0, atol=1e-5)
