"""Imports of other projects' caches, and the capture that an import has to be equal to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.peers.config import ImportConfig
from draftcache.capture.peers.job import ImportSummary, run_import
from draftcache.store.reader import StoreReader
from support.peer_files import TAPS


def settings(verifier: Path, tokenizer: Path, source: Path, output: Path, peer: str, **changes: Any) -> ImportConfig:
    capture = CaptureConfig(
        verifier=verifier, dataset=output.parent / f"{output.name}.prepared", output=output,
        layers=changes.pop("layers", TAPS), top_k=16, window=20, device="cpu", shard_tokens=50, mode="float32",
        **changes.pop("capture", {}),
    )  # fmt: skip
    values: dict[str, Any] = {"draft_vocab_size": 100, **changes}
    if peer == "speculators":
        values.setdefault("masks", str(source.parent / f"{source.name}.masks.jsonl"))
    return ImportConfig(peer=peer, source=source, capture=capture, tokenizer=tokenizer, **values)


def imported(config: ImportConfig) -> ImportSummary:
    return run_import(
        config, config.capture.dataset.parent / f"{config.capture.dataset.name}.work", progress=False, workers=1
    )


def require_equal_to_capture(config: ImportConfig, compute_dtype: str = "float32") -> None:
    """Every array of the imported store is that of a capture of its dataset, to the bit."""
    captured = replace(
        config.capture, output=Path(f"{config.capture.output}.captured"), compute_dtype=compute_dtype, device="cpu",
        batch_tokens=1,
    )  # fmt: skip
    CaptureJob(captured).run()
    ours, theirs = StoreReader(config.capture.output), StoreReader(captured.output)
    assert len(ours) == len(theirs) > 0
    for number in range(len(ours)):
        expected, found = theirs.read(number), ours.read(number)
        assert expected.arrays.keys() == found.arrays.keys()
        for name, values in expected.arrays.items():
            assert np.array_equal(values, found.arrays[name]), name
    differ = {key for key, value in ours.manifest.verifier.items() if value != theirs.manifest.verifier[key]}
    assert not differ
    for name in ("frozen.safetensors",):
        assert (config.capture.output / name).read_bytes() == (captured.output / name).read_bytes()
