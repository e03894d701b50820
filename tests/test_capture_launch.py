"""Many workers over one store: real processes, killed and told to stop, and a real local Ray."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from draftcache.capture.job import worker_job as batch_job
from draftcache.capture.job.calibration import StoreCalibration
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.launch import capture
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.store.common.errors import InputError
from draftcache.store.common.stopping import Stopped
from draftcache.store.format.commits import committed_shards, shard_name
from draftcache.store.format.norm_band import bands_from_json, bands_to_json
from draftcache.store.reader import StoreReader
from draftcache.store.shard_in_progress import ShardInProgress
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.campaign.object_server import BUCKET, CREDENTIALS, s3_server
from support.capture_jobs import config, flags, prepare_rows, write_rows
from support.forked import CLI, Forked
from support.processes import ONE_THREAD, children, wait_for
from support.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from support.tiny_models import save_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
DEADLINE_S = 90
KILLS = 12


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """A test that fails leaves no command behind; a stopped one would keep pytest from ending."""
    yield
    for command in Command.started:
        command.process.send_signal(signal.SIGKILL)
    Command.started.clear()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """51 conversations of 11,000 tokens, one of them without loss rows."""
    root = tmp_path_factory.mktemp("dataset")
    rows = write_rows(root / "rows.jsonl", rows=48)
    with rows.open("a") as file:
        file.write('{"token_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 1]}\n')
    return prepare_rows(root / "prepared", tokenizer_dir, rows, write_rows(root / "val.jsonl", rows=3))


@pytest.fixture(scope="module")
def settings(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptureConfig:
    """A job of 18 shards, done by one worker."""
    root = tmp_path_factory.mktemp("job")
    made = config(save_model(root / "nemotron", "nemotron_h"), dataset, root / "whole", shard_tokens=500)
    assert Command(made, root / "whole").exit_code() == 1
    return made


def content(root: Path) -> dict[str, bytes]:
    """Every file that is not about when and by whom it was made."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return {name: (root / name).read_bytes() for name in names if name.split("/")[0] not in (".locks", "commit")}


def require_same_store(settings: CaptureConfig, output: Path) -> None:
    """Byte for byte what one worker makes; nothing left over."""
    whole = content(Path(settings.output))
    found = content(output)
    assert found.keys() == whole.keys()
    assert [name for name in whole if name != "manifest.json" and found[name] != whole[name]] == []
    mine, theirs = StoreReader(output), StoreReader(settings.output)
    assert mine.manifest.hash == theirs.manifest.hash
    for one, two in zip(mine.records(), theirs.records(), strict=True):
        assert {**one, "provenance": None} == {**two, "provenance": None}


def require_nothing_unfinished(output: Path) -> None:
    """No temporary name, and no shard's directory without its commit record."""
    assert [path for path in output.rglob(".*") if path.name.endswith(".partial")] == []
    done = {shard_name(shard) for shard in committed_shards(open_storage(output))}
    assert {path.name for path in (output / "shards").glob("*")} == done


class Command:
    """`draftcache capture` in a process of its own, its main thread as in a shell.

    On a CPU the number of threads decides how sums are cut, so bits are compared at one number of threads.
    """

    started: ClassVar[list[Command]] = []

    def __init__(self, settings: CaptureConfig, output: Path, *more: str) -> None:
        arguments = ["capture", *flags(replace(settings, output=output)), *more]
        self.process = Forked([*CLI, *arguments], os.environ | {"OMP_NUM_THREADS": "1"})
        self.errors = ""
        self.output = output
        self.started.append(self)

    def tell(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        code, _, self.errors = self.process.ended(DEADLINE_S)
        return code


def wait_for_commits(output: Path, count: int, command: Command) -> None:
    """Or until the command has ended."""
    wait_for(lambda: len(list((output / "commit").glob("0*"))) >= count or command.process.poll() is not None)


def begun(output: Path) -> list[int]:
    return [int(path.name.split(".")[1]) for path in (output / "shards").glob(".*.partial")]


@pytest.mark.slow
def test_two_commands_killed_again_and_again_make_the_store_of_one(settings: CaptureConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    output = tmp_path / "cut"
    kills = 0
    kept: dict[str, int] = {}
    while kills < KILLS:
        commands = [Command(settings, output), Command(settings, output)]
        # Most kills fall among the shards, some before the first.
        wait_for_commits(output, len(kept) + int(rng.integers(0, 2)), commands[0])
        time.sleep(float(rng.exponential(0.1)))
        for command in commands:
            command.tell(signal.SIGKILL)
        codes = [command.exit_code() for command in commands]
        assert set(codes) <= {-signal.SIGKILL, 1}
        if 1 in codes:
            break  # they came to the end
        kills += len(codes)
        times = {path.name: path.stat().st_mtime_ns for path in (output / "commit").glob("0*")}
        assert kept.items() <= times.items()  # none lost, none redone
        kept = times
    assert kills >= 4
    commands = [Command(settings, output), Command(settings, output)]
    assert [command.exit_code() for command in commands] == [1, 1]  # both say that something is quarantined
    require_same_store(settings, output)
    require_nothing_unfinished(output)
    assert not verify_store(output).damages


def test_a_command_takes_over_the_shard_of_one_that_dies(settings: CaptureConfig, tmp_path: Path) -> None:
    """It has nothing else left, waits for the other's lock, and does not come back before the store is whole."""
    output = tmp_path / "s"
    first = Command(settings, output)
    wait_for(lambda: (output / "commit" / "00003.json").exists())
    wait_for(lambda: begun(output))
    first.tell(signal.SIGSTOP)
    second = Command(settings, output)
    shards = StoreReader(settings.output).manifest.shards
    # The first holds the shard that it computes, and perhaps the one that it writes.
    wait_for(lambda: len(committed_shards(open_storage(output))) >= shards - 2)
    time.sleep(2.0)
    assert len(committed_shards(open_storage(output))) < shards
    assert second.process.poll() is None
    first.tell(signal.SIGKILL)
    assert second.exit_code() == 1
    require_same_store(settings, output)


@pytest.mark.parametrize("whole_group", [pytest.param(False, marks=pytest.mark.slow), True])
def test_workers_of_one_command_killed_then_run_by_another_number(
    settings: CaptureConfig, tmp_path: Path, whole_group: bool
) -> None:
    """The command dies, or one of its workers. Its workers leave with it; the rest goes on without a dead worker."""
    output = tmp_path / "s"
    command = [
        sys.executable,
        "-m",
        "draftcache.tools.cli",
        "capture",
        *flags(replace(settings, output=output)),
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
        wait_for(lambda: committed_shards(open_storage(output)))
        workers = children(process.pid)
        assert len(workers) == 2
        if whole_group:
            process.kill()
        else:
            os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=DEADLINE_S)
    if whole_group:
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        assert len(committed_shards(open_storage(output))) < StoreReader(settings.output).manifest.shards
        assert Command(settings, output).exit_code() == 1
    else:
        assert process.returncode == 1, errors
        assert "ended early: exit code -9" in errors
        assert errors.count("capture:") > 0
        assert re.search(r"start: [\d.]+ s to load the verifier, [\d.]+ s to check it\n", errors)
        assert re.search(r"calibrated in [\d.]+ s\n", errors)
    require_same_store(settings, output)


def test_sigterm_lets_the_shard_be_finished(settings: CaptureConfig, tmp_path: Path) -> None:
    output = tmp_path / "s"
    command = Command(settings, output)
    wait_for(lambda: (output / "commit" / "00002.json").exists())
    wait_for(lambda: begun(output))
    before = set(committed_shards(open_storage(output)))
    command.tell(signal.SIGTERM)
    assert command.exit_code() == 128 + signal.SIGTERM
    after = set(committed_shards(open_storage(output)))
    assert 1 <= len(after - before) <= 2  # the one that was begun, and perhaps one whose commit was just under way
    assert len(after) < StoreReader(settings.output).manifest.shards
    require_nothing_unfinished(output)
    assert Command(settings, output, "--workers", "2").exit_code() == 1
    require_same_store(settings, output)


@pytest.mark.parametrize(
    ("grace", "signals", "code"),
    [
        ("0.2", [signal.SIGTERM], 128 + signal.SIGTERM),
        ("600", [signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM),
        ("600", [signal.SIGTERM, signal.SIGINT], 128 + signal.SIGTERM),
        ("600", [signal.SIGINT], 128 + signal.SIGINT),
    ],
)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_shard_that_can_not_be_finished_is_left_without_a_trace(
    settings: CaptureConfig, tmp_path: Path, grace: str, signals: list[int], code: int, workers: int
) -> None:
    """One shard of all tokens, so long that no signal finds it finished."""
    if workers == 2 and len(signals) != 2:
        pytest.skip("as with one worker")
    output = tmp_path / "s"
    long = replace(settings, shard_tokens=100_000)
    command = Command(long, output, "--grace-seconds", grace, "--workers", str(workers), "--batch-tokens", "1")
    wait_for(lambda: 0 in begun(output))
    for number in signals:
        command.tell(number)
        time.sleep(0.1)
    assert command.exit_code() == code
    assert [shard for shard in committed_shards(open_storage(output)) if shard == 0] == []
    require_nothing_unfinished(output)


def test_a_signal_while_a_shard_begins_leaves_no_trace_either(
    settings: CaptureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes when the shard's directory is there, and nobody has the shard in hand yet."""
    begin = StoreWriter.shard

    def interrupted(writer: StoreWriter, shard: int) -> ShardInProgress | None:
        started = begin(writer, shard)
        if shard == 1:
            assert 1 in begun(tmp_path / "s")
            signal.raise_signal(signal.SIGINT)
        return started

    monkeypatch.setattr(StoreWriter, "shard", interrupted)
    with pytest.raises(Stopped):
        capture(replace(settings, output=tmp_path / "s", workers=1))
    assert not committed_shards(open_storage(tmp_path / "s"))
    require_nothing_unfinished(tmp_path / "s")


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_other_settings_are_refused_by_name(settings: CaptureConfig, tmp_path: Path, workers: str) -> None:
    """Also where the store is not finished; what it holds is not touched."""
    before = content(Path(settings.output))
    other = Command(replace(settings, window=30), Path(settings.output), "--workers", workers)
    assert other.exit_code() == 2
    assert "(window: store has 20, this job has 30)" in other.errors
    assert content(Path(settings.output)) == before


def test_what_no_worker_can_do_is_said(settings: CaptureConfig, tmp_path: Path) -> None:
    command = Command(replace(settings, layers=(0, 2, 7)), tmp_path / "s", "--workers", "2")
    assert command.exit_code() == 2
    assert "error: --layers: expected blocks 0 to 4" in command.errors
    assert not (tmp_path / "s").exists()


def both_calibrate(monkeypatch: pytest.MonkeyPatch, jobs: int) -> list[StoreCalibration]:
    """Let all jobs measure before one of them creates the store, and let each find norms of its own."""
    measured: list[StoreCalibration] = []
    together, numbers = threading.Barrier(jobs), itertools.count()
    original = batch_job.calibrate

    def calibrate(*arguments: Any) -> StoreCalibration:
        found = original(*arguments)
        together.wait(DEADLINE_S)
        bands = bands_from_json(found.norm_bands)
        bands[0].total += 1e-6 * next(numbers)
        measured.append(replace(found, norm_bands=bands_to_json(bands)))
        return measured[-1]

    monkeypatch.setattr(batch_job, "calibrate", calibrate)
    return measured


def test_jobs_that_start_together_in_a_bucket_end_with_one_calibration(
    settings: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No locks there: both create, both take shards, the first record of each counts, and nothing else is left."""
    with s3_server() as server:
        url = f"http://{server.address[0]}:{server.address[1]}"
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        shared = replace(settings, output=f"s3://{BUCKET}/both")
        measured = both_calibrate(monkeypatch, 2)
        jobs = [CaptureJob(shared), CaptureJob(shared)]
        with ThreadPoolExecutor(2) as pool:
            summaries = list(pool.map(CaptureJob.run, jobs))
        assert len({item.norm_bands["hash"] for item in measured}) == 2
        store = StoreReader(shared.output)
        records = list(store.records())
        assert store.manifest.norm_bands in [item.norm_bands for item in measured]
        assert {record["manifest_hash"] for record in records} == {store.manifest.hash}
        assert sum(item.shards for item in summaries) == len(records) == store.manifest.shards
        assert [len(item.quarantined) for item in summaries] == [1, 1]  # whoever did the shard
        assert np.array_equal(store.index, StoreReader(settings.output).index)
        kept = {name for record in records for name in record["files"]}
        assert set(open_storage(shared.output).list("shards")) == kept
        assert not verify_store(shared.output).damages


def test_on_a_disk_one_job_calibrates_and_the_other_waits_for_it(
    settings: CaptureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = both_calibrate(monkeypatch, 1)
    jobs = [CaptureJob(replace(settings, output=tmp_path / "s")) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert sum(item.shards for item in pool.map(CaptureJob.run, jobs)) == 18
    assert len(measured) == 1
    assert StoreReader(tmp_path / "s").manifest.norm_bands == measured[0].norm_bands


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is an extra")
def test_ray_actors_do_the_job_and_stop_when_told(settings: CaptureConfig, tmp_path: Path) -> None:
    """Told to stop half-way, then finished by another number of actors, one of which is killed."""
    output = tmp_path / "s"
    arguments = [*flags(replace(settings, output=output)), "--launcher", "ray"]
    command = [sys.executable, "-m", "draftcache.tools.cli", "capture", *arguments]
    with ray_cluster() as address:
        environment = {**RAY_ENVIRONMENT, "RAY_ADDRESS": address}
        with subprocess.Popen([*command], env=environment, stderr=subprocess.PIPE, text=True) as process:
            wait_for(lambda: committed_shards(open_storage(output)))
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 128 + signal.SIGTERM, errors
        require_nothing_unfinished(output)
        assert 0 < len(committed_shards(open_storage(output))) < 18
        with subprocess.Popen(
            [*command, "--workers", "2"], env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 1, errors
    require_same_store(settings, output)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is an extra")
def test_without_a_cluster_ray_is_refused(
    settings: CaptureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(InputError, match=r"expected a running cluster at 127\.0\.0\.1:9"):
        capture(replace(settings, output=tmp_path / "s", launcher="ray"))


def test_without_ray_the_extra_is_named(
    settings: CaptureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"install draftcache\[ray\]"):
        capture(replace(settings, output=tmp_path / "s", launcher="ray"))
