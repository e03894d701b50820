"""The capture job on real small models: content, resume after SIGKILL, quarantine, refusals."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from draftcache.capture.job import calibration, space_check
from draftcache.capture.job.shard_capture import ShardCapture
from draftcache.capture.job.shard_worker import WorkerRole
from draftcache.capture.job.start_check import check_tokens
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.verifier.forward import Piece
from draftcache.capture.verifier.load import load_verifier
from draftcache.capture.verifier.self_check import TOKENS
from draftcache.capture.verifier.ssm_precision import lift_dt_limit, mamba_mixers
from draftcache.capture.verifier.weights import former_fingerprint, full_weights_hash
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.common.stopping import StopRequest
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.commits import committed_shards, read_record
from draftcache.store.format.norm_band import NormBand
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import Conversation
from draftcache.store.format.teacher_stats import tail_mass
from draftcache.store.reader import StoreReader
from draftcache.store.shard_in_progress import ShardInProgress
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from support.capture_jobs import LAYERS, ROWS, config, flags, small_dataset, write_rows
from support.tiny_models import KINDS, VOCAB, save_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), tokenizer_dir)


@pytest.fixture(scope="module", params=KINDS)
def verifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("nemotron"), "nemotron_h")


@pytest.mark.parametrize("mode", ["float32", "bf16", "lossless"])
def test_store_holds_what_the_model_says(verifier: Path, dataset: Path, tmp_path: Path, mode: str) -> None:
    job = CaptureJob(config(verifier, dataset, tmp_path / "s", mode=mode))
    summary = job.run()
    store = StoreReader(tmp_path / "s")
    assert (len(store), summary.quarantined) == (ROWS + 3, [])
    model = load_verifier(verifier, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=False).model
    lift_dt_limit(mamba_mixers(model))
    targets = torch.from_numpy(store.vocab_map().target_ids)
    for number, member in enumerate(store.members("train")):
        item = store.read(int(member))
        ids = torch.from_numpy(item.arrays["token_ids"].astype(np.int64))
        assert item.content_hash == job.work.dataset.split("train")[number][2]
        with torch.inference_mode():
            output = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        rows, places = rows_in_reach(item.loss_mask, 20), teacher_positions(item.loss_mask)
        assert item.arrays["positions"].tolist() == rows.tolist()
        assert len(rows) < len(ids) - 1
        for layer in LAYERS:
            expected = output.hidden_states[layer + 1][0][rows]
            found = torch.from_numpy(item.arrays[tap_name(layer)])
            if mode != "float32":  # a float32 value near the middle between two may be rounded to either
                torch.testing.assert_close(found.view(torch.bfloat16).float(), expected, rtol=2**-8, atol=1e-5)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        logits = output.logits[0][places].double()
        assert item.arrays["argmax"].tolist() == logits.argmax(-1).tolist()
        np.testing.assert_allclose(item.arrays["log_z_full"], logits.logsumexp(-1), rtol=1e-5)
        inside = torch.softmax(logits[:, targets], -1).topk(16).values
        np.testing.assert_allclose(tail_mass(item.arrays), 1 - inside.sum(-1), atol=2e-3)


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
@pytest.mark.parametrize(("mode", "bound"), [("lossless", 2**-8), ("int8", 0.05), ("fp8", 2**-3)])
def test_modes_and_layouts_hold_the_same_states(
    nemotron: Path, dataset: Path, tmp_path: Path, mode: str, bound: float, layout: str
) -> None:
    """`bound` is of the largest value: bf16 and e4m3 round to 8 and 4 bits, int8 to 1/127 of its block's largest."""
    CaptureJob(config(nemotron, dataset, tmp_path / "exact", mode="float32")).run()
    CaptureJob(config(nemotron, dataset, tmp_path / "s", mode=mode, layout=layout)).run()
    exact, store = StoreReader(tmp_path / "exact"), StoreReader(tmp_path / "s")
    assert store.manifest.layout == layout
    assert len(store) == len(exact) == ROWS + 3
    for number in range(len(exact)):
        expected, found = exact.read(number).arrays, store.read(number).arrays
        for layer in LAYERS:
            states = expected.pop(tap_name(layer))
            error = np.abs(bf16_to_float32(found.pop(tap_name(layer))) - states)
            assert error.max() <= bound * np.abs(states).max()
            assert error.max() > 0
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_a_resumed_int8_capture_keeps_its_calibration(
    nemotron: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LEAST_CONVERSATIONS", 1)
    settings = config(nemotron, dataset, tmp_path / "s", mode="int8", calibration_tokens=300)
    CaptureJob(settings).run()
    before = StoreReader(settings.output)
    files = [record["files"] for record in before.records()]
    for name in ("commit/00001.json", "commit/index.json"):
        (tmp_path / "s" / name).unlink()
    # Scales are the store's, whatever this job would have measured.
    assert CaptureJob(replace(settings, calibration_tokens=10_000)).run().shards == 1
    assert [record["files"] for record in StoreReader(settings.output).records()] == files
    # Scales come from the corpus: other tokens give others.
    CaptureJob(config(nemotron, dataset, tmp_path / "t", mode="int8", calibration_tokens=10_000)).run()
    assert StoreReader(tmp_path / "t").manifest.channel_scales != before.manifest.channel_scales


def test_manifest_records_the_contract_and_conventions(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    CaptureJob(config(nemotron, dataset, tmp_path / "s")).run()
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["ssm"]["dt_limit"] == [0.0, "inf"]
    assert manifest["ssm"]["canary_min"] == 264.0
    assert manifest["ssm"]["carry_dtype"] == manifest["ssm"]["snapshot_dtype"] == "float32"
    assert (manifest["ssm"]["forward"], manifest["ssm"]["prefill_chunk"]) == ("draftcache", 32_768)
    assert manifest["provenance"]["forward"]["experts"] == "one after the other"
    assert [tap["vllm_aux_id"] for tap in manifest["taps"]] == [1, 2, 3]
    assert manifest["provenance"]["self_check"]["logits"] < 1e-5
    record = read_record(open_storage(tmp_path / "s"), "00000")
    assert record is not None
    assert 0 < record["tail_mass"]["mean"] <= record["tail_mass"]["p99"]


def test_sigkill_then_the_same_command_gives_the_same_store(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    CaptureJob(config(nemotron, dataset, tmp_path / "whole")).run()
    settings = config(nemotron, dataset, tmp_path / "cut")
    command = [sys.executable, "-m", "draftcache.tools.cli", "capture", *flags(settings)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (settings.output / "commit").is_dir() or not committed_shards(open_storage(settings.output)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert read_record(open_storage(settings.output), "index") is None
    done = committed_shards(open_storage(settings.output))
    kept = {shard: (settings.output / "commit" / f"{shard:05d}.json").stat().st_mtime_ns for shard in done}
    subprocess.run(command, check=True, capture_output=True)
    redone, whole = (list(StoreReader(place).records()) for place in (settings.output, tmp_path / "whole"))
    assert [record["files"] for record in redone] == [record["files"] for record in whole]
    for shard, time_ns in kept.items():  # committed work was not redone
        assert (settings.output / "commit" / f"{shard:05d}.json").stat().st_mtime_ns == time_ns
    assert np.array_equal(StoreReader(settings.output).index, StoreReader(tmp_path / "whole").index)


def test_the_check_at_start_up_reads_how_the_data_begins(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    work = WorkPlan.of(config(nemotron, dataset, tmp_path / "s"))
    first = work.dataset.split("train")[0][0].tolist()
    found = check_tokens(work).tolist()
    assert len(found) == TOKENS
    assert found == (first * (TOKENS // len(first) + 1))[:TOKENS]
    for chunk, checked in ((8192, False), (112, True)):  # the longest conversation has 127 tokens
        job = CaptureJob(config(nemotron, dataset, tmp_path / "s", prefill_chunk=chunk))
        assert ("pieces" in job.self_check) == checked


def break_conversation(job: CaptureJob, token_ids: Any, tap: Any) -> None:
    """Make the verifier give `tap(states)` as tap 2 of the conversation with these ids, however it is batched."""
    original = job.verifier

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        def states(self, ids: torch.Tensor, lengths: list[int], layers: tuple[int, ...], chunk: int) -> Iterator[Piece]:
            head = torch.from_numpy(token_ids[:20].astype(np.int64))
            broken = (ids[:, :20] == head).all(dim=1)
            for piece in original.states(ids, lengths, layers, chunk):
                states = piece.taps[2].clone()
                states[broken] = tap(states[broken])
                yield replace(piece, taps=piece.taps | {2: states})

    job.verifier = Broken()  # type: ignore[assignment]


def test_failed_gate_quarantines_one_conversation_and_keeps_the_rest(
    nemotron: Path, dataset: Path, tmp_path: Path
) -> None:
    job = CaptureJob(config(nemotron, dataset, tmp_path / "s"))
    break_conversation(job, job.work.dataset.split("train")[2][0], lambda states: states * math.nan)
    summary = job.run()
    assert [(item["split"], item["dataset_index"]) for item in summary.quarantined] == [("train", 2)]
    assert "tap 2: expected finite values" in summary.quarantined[0]["reason"]
    # What the calibration read of it counts for nothing.
    assert {band.count for band in StoreReader(tmp_path / "s").manifest.bands.values()} == {ROWS + 2}
    store = StoreReader(tmp_path / "s")
    assert store.index["dataset_index"][store.members("train")].tolist() == [0, 1, *range(3, ROWS)]
    # The command line says so, by its exit code too, whenever it runs again.
    result = subprocess.run(
        [sys.executable, "-m", "draftcache.tools.cli", "capture", *flags(job.config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "quarantined train[2]" in result.stdout


def test_norms_are_judged_by_the_calibration_whatever_the_order(
    nemotron: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """The outlier is the very first conversation; running bands would have passed it. verify finds it as well."""
    prepare(
        PrepareConfig(
            tokenizer=tokenizer_dir,
            output=tmp_path / "prepared",
            splits={"train": [write_rows(tmp_path / "rows.jsonl", rows=40)]},
            held_out={},
            draft_vocab_size=200,
            workers=1,
            progress=False,
        )
    )
    settings = config(nemotron, tmp_path / "prepared", tmp_path / "s", shard_tokens=1000)
    job = CaptureJob(settings)
    job.agree_on_manifest(WorkerRole(report=lambda _: None, stop=StopRequest(0)))  # measured before it breaks
    break_conversation(job, job.work.dataset.split("train")[0][0], lambda states: states * 50)
    (found,) = job.run().quarantined
    assert (found["dataset_index"], found["reason"][:40]) == (0, "tap 2: expected a typical rms of its row")
    assert not verify_store(settings.output).damages
    bands = StoreReader(settings.output).manifest.bands
    assert {band.count for band in bands.values()} == {calibration.LEAST_CONVERSATIONS}

    stray = replace(settings, output=tmp_path / "t")
    job = CaptureJob(stray)
    job.agree_on_manifest(WorkerRole(report=lambda _: None, stop=StopRequest(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormBand, "limits", lambda _: None)
        break_conversation(job, job.work.dataset.split("train")[1][0], lambda states: states * 50)
        assert not job.run().quarantined
    (damage,) = verify_store(stray.output).damages
    assert "tap 2: expected a typical rms" in damage.problem
    assert [item["dataset_index"] for item in damage.conversations] == [1]


def test_the_summary_says_how_long_the_device_waited_for_the_files(
    nemotron: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same pause for each conversation, once before it is computed and once before it is written: without a pause
    # this small model is faster than its files, and by how much depends on what else the machine does. Shares of 0.00
    # and 0.75 are usual; where other programs take the machine, computing takes longer and the second is smaller.
    compute, append = ShardCapture.compute_piece, ShardInProgress.append

    def slow_compute(*arguments: Any) -> None:
        time.sleep(0.5)
        compute(*arguments)

    def slow_append(shard: ShardInProgress, item: Conversation) -> None:
        time.sleep(0.5)
        append(shard, item)

    with monkeypatch.context() as patch:
        patch.setattr(ShardCapture, "compute_piece", slow_compute)
        quick = CaptureJob(config(nemotron, dataset, tmp_path / "quick")).run()
    monkeypatch.setattr(ShardInProgress, "append", slow_append)
    slow = CaptureJob(config(nemotron, dataset, tmp_path / "slow")).run()
    assert 0 <= quick.waiting_share < 0.3 < slow.waiting_share <= 1
    # With room for one conversation, the device waits for each one before.
    small = CaptureJob(config(nemotron, dataset, tmp_path / "small", buffer_gb=1e-9, shard_tokens=10**6)).run()
    assert 0.5 < small.waiting_share <= 1


def test_conversation_without_loss_rows_is_quarantined(nemotron: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rows=2)
    with rows.open("a") as file:
        file.write(json.dumps({"token_ids": list(range(20)), "loss_mask": [0] * 19 + [1]}) + "\n")
    prepare(
        PrepareConfig(
            tokenizer=tokenizer_dir,
            output=tmp_path / "prepared",
            splits={"train": [rows]},
            held_out={},
            draft_vocab_size=100,
            workers=1,
            progress=False,
        )
    )
    summary = CaptureJob(config(nemotron, tmp_path / "prepared", tmp_path / "s")).run()
    assert len(summary.quarantined) == 1
    assert "at least two tokens" in summary.quarantined[0]["reason"]
    assert len(StoreReader(tmp_path / "s")) == 2


def test_what_does_not_fit_is_refused_before_anything_is_written(
    nemotron: Path, dataset: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = tmp_path / "s"
    for change, message in (
        ({"layers": (0, 2, 5)}, r"expected blocks 0 to 4 .* found \[0, 2, 5\]"),
        ({"prefill_chunk": 24}, "expected a multiple of the scan's chunk of 16 tokens"),
        ({"top_k": 201}, "at most the draft vocabulary's 200"),
        ({"splits": ("train", "train")}, "--splits: expected every split once, found train,train"),
        ({"buffer_gb": math.nan}, "--buffer-gb: expected a finite number"),
        ({"splits": ("test",)}, r"expected splits among \['train', 'val'\]"),
        ({"vocab_map": tmp_path / "none"}, "expected a vocabulary map"),
        ({"dataset": tmp_path}, "expected a prepared dataset"),
        ({"verifier": tmp_path}, r"no config\.json"),
    ):
        with pytest.raises(InputError, match=message):
            CaptureJob(replace(config(nemotron, dataset, output), **change))  # type: ignore[arg-type]
    for layers in ((2, 1), (1, 1), (-1, 2)):
        with pytest.raises(InputError, match="--layers"):
            config(nemotron, dataset, output, layers=layers)
    assert not output.exists()


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_a_disk_that_is_too_small_is_refused_before_weights_are_read(
    nemotron: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    job = CaptureJob(config(nemotron, dataset, tmp_path / "whole", layout=layout))
    job.run()
    written = sum(path.stat().st_size for path in (tmp_path / "whole" / "shards").rglob("*") if path.is_file())
    verifier = shutil.copytree(nemotron, tmp_path / "verifier")
    (verifier / "model.safetensors").write_bytes(b"no weights: reading them would fail")
    asked: list[Path] = []

    def disk_of(free: int) -> None:
        def disk_usage(path: Path) -> Any:
            asked.append(path)
            return SimpleNamespace(free=free)

        monkeypatch.setattr(space_check.shutil, "disk_usage", disk_usage)

    settings = config(verifier, dataset, tmp_path / "new" / "s", layout=layout)
    disk_of(int(0.7 * written))  # the states of this verifier are random, and compress less than is estimated
    with pytest.raises(InputError, match=r"new/s: expected about 0.0 GB of free space.* --ignore-free-space"):
        CaptureJob(settings)
    assert asked == [tmp_path]
    disk_of(2 * written + 1_000_000)
    with pytest.raises(InputError, match="could not be loaded"):  # it goes on to the weights
        CaptureJob(settings)
    disk_of(0)
    with pytest.raises(InputError, match="could not be loaded"):
        CaptureJob(replace(settings, ignore_free_space=True))
    CaptureJob(config(nemotron, dataset, tmp_path / "whole", layout=layout))  # nothing is left to be written


def test_no_weights_are_read_for_a_job_that_the_config_rules_out(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    verifier = shutil.copytree(nemotron, tmp_path / "verifier")
    (verifier / "model.safetensors").write_bytes(b"no weights: reading them would fail")
    longest = WorkPlan.of(config(verifier, dataset, tmp_path / "s")).longest
    written = json.loads((verifier / "config.json").read_text())
    (verifier / "config.json").write_text(json.dumps(written | {"max_position_embeddings": longest - 1}))
    with pytest.raises(InputError, match=rf"at most the {longest - 1} tokens .*found one of {longest}"):
        CaptureJob(config(verifier, dataset, tmp_path / "s"))
    (verifier / "config.json").write_text(json.dumps(written | {"max_position_embeddings": longest}))
    with pytest.raises(InputError, match="could not be loaded"):  # negative control: it goes on to the weights
        CaptureJob(config(verifier, dataset, tmp_path / "s"))
    with pytest.raises(InputError, match="expected blocks 0 to 4"):
        CaptureJob(config(verifier, dataset, tmp_path / "s", layers=(0, 9)))


def test_damaged_prepared_data_is_refused_and_not_captured(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(dataset, tmp_path / "prepared")
    path = damaged / "val" / "token_ids.npy"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    settings = config(nemotron, damaged, tmp_path / "s")
    with pytest.raises(InputError, match=r"val: expected conversation \d+ to have the content hash .* is damaged"):
        CaptureJob(settings).run()
    data[-4] ^= 1
    path.write_bytes(data)
    CaptureJob(settings).run()  # the same command goes on once the data is whole
    assert verify_store(settings.output).damages == []


def test_a_capture_that_a_former_version_began_goes_on(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    """Its manifest names the weights by the former fingerprint. Of other weights it would be another one."""
    settings = config(nemotron, dataset, tmp_path / "s")
    whole = CaptureJob(replace(settings, output=tmp_path / "whole"))
    whole.run()
    storage = open_storage(tmp_path / "s")
    manifest = StoreReader(tmp_path / "whole").manifest
    former = manifest.verifier | {"weights_hash": former_fingerprint(nemotron)}
    assert former != manifest.verifier
    assert replace(manifest, verifier=former | {"weights_hash": "0" * 32}).create(open_storage(tmp_path / "other"))
    assert replace(manifest, verifier=former).create(storage)
    with pytest.raises(ManifestMismatchError, match="weights_hash"):
        CaptureJob(replace(settings, output=tmp_path / "other")).run()
    CaptureJob(settings).run()
    assert verify_store(tmp_path / "s").damages == []
    assert StoreReader(tmp_path / "s").manifest.verifier == former


def test_the_full_hash_is_recorded_and_asked_for_again(nemotron: Path, dataset: Path, tmp_path: Path) -> None:
    settings = config(nemotron, dataset, tmp_path / "s", full_hash=True)
    CaptureJob(settings).run()
    assert StoreReader(tmp_path / "s").manifest.verifier["full_weights_hash"] == full_weights_hash(nemotron)
    with pytest.raises(ManifestMismatchError, match="full_weights_hash"):
        CaptureJob(replace(settings, full_hash=False)).run()


def test_dataset_of_a_larger_vocabulary_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.tiny_models.VOCAB", 64)
    small = save_model(tmp_path / "small", "llama")
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        CaptureJob(config(small, dataset, tmp_path / "s"))
    assert VOCAB > 64


def test_other_settings_on_one_store_are_refused_by_name(
    nemotron: Path, dataset: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    CaptureJob(config(nemotron, dataset, tmp_path / "s")).run()
    with pytest.raises(ManifestMismatchError, match="window: store has 20, this job has 30"):
        CaptureJob(config(nemotron, dataset, tmp_path / "s", window=30)).run()
    other = save_model(tmp_path_factory.mktemp("other"), "llama")
    with pytest.raises(ManifestMismatchError, match="verifier: store has"):
        CaptureJob(config(other, dataset, tmp_path / "s")).run()
