"""The import of a peer's cache: its rows are prepared, and captured with the states of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftcache.capture.job.progress import CaptureSummary
from draftcache.capture.job.stopping import StopSignals
from draftcache.capture.peers.automodel_files import AutomodelReader, require_same_weights
from draftcache.capture.peers.config import NAMING_LAYERS, ImportConfig
from draftcache.capture.peers.conventions import LastState
from draftcache.capture.peers.deepspec_files import DeepSpecReader
from draftcache.capture.peers.index import Masks, PeerIndex, compute_dtype
from draftcache.capture.peers.recorded import RecordedVerifier, states_of_files
from draftcache.capture.peers.recorded_job import RecordedJob
from draftcache.capture.peers.safetensors_files import SpeculatorsReader
from draftcache.capture.peers.samples import PeerReader, SetAside
from draftcache.capture.peers.torch_files import MODELOPT, SPECFORGE
from draftcache.capture.peers.verifier_parts import VerifierParts
from draftcache.capture.prepare.job import PrepareConfig, PrepareResult, prepare
from draftcache.capture.prepare.token_dataset import is_prepared
from draftcache.store.common.errors import InputError
from draftcache.store.common.progress import progress_bar
from draftcache.store.common.stopping import StopRequest

READERS: dict[str, PeerReader] = {
    reader.name: reader for reader in (SpeculatorsReader(), SPECFORGE, MODELOPT, DeepSpecReader(), AutomodelReader())
}


@dataclass(frozen=True)
class ImportSummary:
    """What an import did."""

    capture: CaptureSummary
    files: int
    set_aside: list[SetAside]
    prepared_rows_quarantined: int
    findings: dict[str, Any]
    """What is known of the states' conventions, and how; the manifest's provenance has it too."""


class ImportJob(RecordedJob):
    """A capture job whose states come from files."""

    def __init__(self, config: ImportConfig, index: PeerIndex, say: Callable[[str], object]) -> None:
        self._import, self._index = config, index
        super().__init__(config.capture, index.first_samples, probe=config.probe, last_state=config.last_state, say=say)

    def _verifier_of(self, parts: VerifierParts, last_state: str) -> RecordedVerifier:
        if (weights := self._index.description.weights) is not None:
            require_same_weights(parts, weights)
        return RecordedVerifier(
            parts, states_of_files(self._index.loads), self.aux_layers, last_state=last_state, dtype=self.dtype,
            device=self.device, origin=f"{self._import.peer}'s files",
        )  # fmt: skip

    def _findings(self, last: LastState) -> dict[str, Any]:
        """What is known of the states, what a user stated, and what nothing shows."""
        config, cache = self._import, self._index.description
        states = self._found_states(last)
        if cache.layers and not self.self_check:
            states["auxiliary_states"] = "not compared: the blocks are those that the cache names"
        return {
            "from": config.peer,
            "files": self._index.files,
            "set_aside": len(self._index.set_aside),
            "states_dtype": str(self._index.first.dtype).removeprefix("torch."),
            "states_left_out": list(cache.left_out),
            "last_state_of_the_project": READERS[config.peer].last_state,
            **states,
            "loss_masks": Masks.origin_of(config.masks),
            "tokenizer": "of --tokenizer or the verifier's directory; the files don't name theirs",
            "weights": self._known_weights(),
            "ssm_state_dtype": "unknown",
        }

    def _known_weights(self) -> str:
        """How it is known that the states are of this verifier's weights."""
        cache = self._index.description
        if self.self_check:
            return "compared with the verifier's"
        if cache.weights is not None:
            return f"embeddings and head compared with {cache.weights.name} of the cache, which names {cache.verifier}"
        return f"taken as given: the files {f'name {cache.verifier}' if cache.verifier else 'do not name theirs'}"

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
    layers = _layers_of(config, index, say)
    prepared = _prepare(config, index, workers=workers, progress=progress)
    dtype = str(compute_dtype(index.first.dtype)).removeprefix("torch.")
    settings = replace(config, capture=replace(config.capture, layers=layers, compute_dtype=dtype))
    stop = StopRequest(settings.capture.grace_seconds)
    with StopSignals(stop), ImportJob(settings, index, say) as job:
        summary = job.run(stop)
    return ImportSummary(summary, index.files, index.set_aside, prepared.quarantined_rows, job.findings)


def _layers_of(config: ImportConfig, index: PeerIndex, say: Callable[[str], object]) -> tuple[int, ...]:
    """The blocks of the states: those that the cache names, else those of --layers. Raises InputError."""
    given, named = config.capture.layers, index.description.layers
    if config.peer not in NAMING_LAYERS:
        return given
    for name in index.description.left_out:
        say(f"left out of the auxiliary states: {name}, which is no block's output")
    if not named or given not in ((), named):
        raise InputError(
            f"--layers: expected the blocks that {config.source} names, {list(named)}, or nothing, found {list(given)}"
            + ("" if named else ": no state of this cache is a block's output")
        )
    return named


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
