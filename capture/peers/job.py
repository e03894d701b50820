"""The import of a peer's cache: its rows are prepared, and captured with the states of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftcache.capture.job.progress import CaptureSummary
from draftcache.capture.job.stopping import StopSignals
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.peers.config import ImportConfig
from draftcache.capture.peers.conventions import LastState, compare_with_model, judge_last_state
from draftcache.capture.peers.index import Masks, PeerIndex, SetAside, compute_dtype
from draftcache.capture.peers.recorded import AFTER, BEFORE, RecordedVerifier
from draftcache.capture.peers.safetensors_files import SpeculatorsReader
from draftcache.capture.peers.samples import PeerReader
from draftcache.capture.peers.torch_files import MODELOPT, SPECFORGE
from draftcache.capture.peers.verifier_parts import VerifierParts, parts_of, read_parts
from draftcache.capture.prepare.job import PrepareConfig, PrepareResult, prepare
from draftcache.capture.prepare.token_dataset import is_prepared
from draftcache.capture.verifier.load import load_verifier
from draftcache.capture.verifier.self_check import TOKENS, self_check
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.capture.verifier.weights import weight_files
from draftcache.store.common.errors import InputError
from draftcache.store.common.progress import progress_bar
from draftcache.store.common.stopping import StopRequest

READERS: dict[str, PeerReader] = {reader.name: reader for reader in (SpeculatorsReader(), SPECFORGE, MODELOPT)}
_SMALL = 4e9
"""Bytes of a verifier's weight files up to which it is loaded and compared unless --no-probe forbids it."""


@dataclass(frozen=True)
class ImportSummary:
    """What an import did."""

    capture: CaptureSummary
    files: int
    set_aside: list[SetAside]
    prepared_rows_quarantined: int
    findings: dict[str, Any]
    """What is known of the states' conventions, and how; the manifest's provenance has it too."""


class ImportJob(CaptureJob):
    """A capture job whose states come from files."""

    def __init__(self, config: ImportConfig, index: PeerIndex, say: Callable[[str], object]) -> None:
        self._import, self._index, self._say = config, index, say
        self.findings: dict[str, Any] = {}
        super().__init__(config.capture)

    def _load(self) -> None:
        config, first = self._import, self._index.first
        parts, last = self._conventions()
        self._require_last_block(parts.layers, last.convention)
        if first.before_norm is not None and first.before_norm != (last.convention == BEFORE):
            raise InputError(
                f"{first.path}: expected a last state as the file says ({BEFORE if first.before_norm else AFTER} the "
                f"final norm), found that it is {last.convention} it"
            )
        aux = config.capture.layers[: first.taps]
        self.verifier = RecordedVerifier(
            parts,
            self._index.loads,
            aux,
            last_state=last.convention,
            dtype=self.dtype,
            device=self.device,
            peer=config.peer,
        )
        self._require_fit(self.verifier)
        self.ssm = None
        self.findings = self._findings(last)
        self._say(f"last state: {last.convention} the final norm ({self.findings['last_state_by']})")
        self._say(f"auxiliary states: {self.findings['auxiliary_states']}")

    def _conventions(self) -> tuple[VerifierParts, LastState]:
        config = self._import
        path, remote = config.capture.verifier, config.capture.trust_remote_code
        size = sum(file.stat().st_size for file in weight_files(path))
        if size <= _SMALL if config.probe is None and not config.last_state else config.probe:
            return self._probed()
        self.self_check = {}
        parts = read_parts(path, self.dtype, trust_remote_code=remote)
        self._require_shape(parts.layers, int(parts.embeddings.embedding_dim))
        last = judge_last_state(parts, self._index.first_samples, config.last_state)
        return parts, last

    def _probed(self) -> tuple[VerifierParts, LastState]:
        """Load the verifier, prove it as a capture does, compare its states with those of the files, and let it go."""
        config, samples = self._import.capture, self._index.first_samples
        verifier = load_verifier(
            config.verifier, device=self.device, dtype=self.dtype, trust_remote_code=config.trust_remote_code,
            max_model_len=config.max_model_len,
        )  # fmt: skip
        self._require_shape(len(verifier.blocks), verifier.hidden_size)
        enforce_contract(verifier.model, config.verifier, allow_fallback=True)
        aux = config.layers[: self._index.first.taps]
        token_ids = np.resize(self._index.first.token_ids[:TOKENS], TOKENS)
        self.self_check = self_check(verifier, config.layers, torch.from_numpy(token_ids))
        convention, differences = compare_with_model(verifier, samples, aux)
        self.self_check |= {f"recorded_{name}": value for name, value in differences.items()}
        return parts_of(verifier), LastState(convention=convention, evidence="", rows=0)

    def _require_shape(self, blocks: int, hidden_size: int) -> None:
        first, layers = self._index.first, self.config.layers
        if first.hidden_size != hidden_size:
            raise InputError(
                f"{first.path}: expected states of the verifier's {hidden_size} channels, found {first.hidden_size}"
            )
        with_last = layers[-1] == blocks - 1 and first.taps == len(layers) - 1
        if first.taps != len(layers) and not with_last:
            raise InputError(
                f"{first.path}: expected --layers for the {first.taps} auxiliary states per token of the files (and, "
                f"where their last state is from before the final norm, the last block {blocks - 1}), found "
                f"{list(layers)}"
            )

    def _require_last_block(self, blocks: int, convention: str) -> None:
        if convention == AFTER and len(self.config.layers) > self._index.first.taps:
            raise InputError(
                f"--layers: expected blocks of the files' {self._index.first.taps} auxiliary states, found the last "
                f"block {blocks - 1} too, whose output is not stored: the last state is from after the final norm"
            )

    def _findings(self, last: LastState) -> dict[str, Any]:
        """What is known of the states, what a user stated, and what nothing shows."""
        config, probed = self._import, bool(self.self_check)
        how = "compared with the verifier" if probed else last.evidence
        return {
            "from": config.peer,
            "files": self._index.files,
            "files_set_aside": len(self._index.set_aside),
            "states_dtype": str(self._index.first.dtype).removeprefix("torch."),
            "last_state": last.convention,
            "last_state_by": how,
            "last_state_of_the_project": READERS[config.peer].last_state,
            **({} if probed else {"last_state_evidence": last.to_json()}),
            "auxiliary_states": "compared with the verifier" if probed else "not compared: --layers is taken as given",
            "loss_masks": Masks.origin_of(config.masks),
            "tokenizer": "of --tokenizer or the verifier's directory; the files don't name theirs",
            "weights": "compared with the verifier's" if probed else "taken as given: the files don't name theirs",
            "ssm_state_dtype": "unknown",
        }

    def _provenance(self) -> dict[str, Any]:
        return super()._provenance() | {"import": self.findings}


def read_index(config: ImportConfig, folder: Path, *, progress: bool) -> PeerIndex:
    """Read the heads of all files, and write their rows to `folder`.

    Raises InputError where there is no file, or loss masks are missing.
    """
    index, masks, reader = PeerIndex(folder), Masks(config.masks), READERS[config.peer]
    with progress_bar(total=None, unit="files", desc="reading heads", disable=not progress) as bar:
        for name, source in ((config.split, config.source), *config.held_out):
            index.add_split(name, reader, source, masks, lambda: bar.update(1))
    index.write_set_aside()
    return index


def run_import(
    config: ImportConfig,
    work: Path,
    *,
    say: Callable[[str], object] = lambda line: None,
    progress: bool = True,
    workers: int = 0,
) -> ImportSummary:
    """Read a peer's cache, prepare its rows below `work`, and write the store; the same call again goes on.

    Rows are prepared by `workers` processes, 0 being one per core. Raises InputError where the files and the
    verifier don't fit together, and Stopped after SIGTERM or SIGINT.
    """
    index = read_index(config, work / "rows", progress=progress)
    prepared = _prepare(config, index, workers=workers, progress=progress)
    dtype = str(compute_dtype(index.first.dtype)).removeprefix("torch.")
    settings = replace(config, capture=replace(config.capture, compute_dtype=dtype))
    stop = StopRequest(settings.capture.grace_seconds)
    with StopSignals(stop), ImportJob(settings, index, say) as job:
        summary = job.run(stop)
    return ImportSummary(summary, index.files, index.set_aside, prepared.quarantined_rows, job.findings)


def _prepare(config: ImportConfig, index: PeerIndex, *, workers: int, progress: bool) -> PrepareResult:
    held_out = {name for name, _ in config.held_out}
    settings = PrepareConfig(
        tokenizer=config.tokenizer,
        output=config.capture.dataset,
        splits={name: [path] for name, path in index.rows.items() if name not in held_out},
        held_out={name: [path] for name, path in index.rows.items() if name in held_out},
        max_length=max(index.longest, 2),
        draft_vocab_size=config.draft_vocab_size,
        trust_remote_code=config.capture.trust_remote_code,
        workers=workers,
        progress=progress,
    )
    try:
        return prepare(settings)
    except InputError as exc:
        if not is_prepared(settings.output):
            raise
        raise InputError(
            f"{settings.output}: expected the rows of an import that was begun with these files and settings, found "
            f"others: files were changed, added or taken away since; give another --output and --work ({exc})"
        ) from exc
