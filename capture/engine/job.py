"""The capture job whose states a running engine computes: prepared conversations -> engine -> gates -> shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from draftcache.capture.engine.client import FLAG, Extracted, StatesClient
from draftcache.capture.engine.config import EngineConfig
from draftcache.capture.engine.extracted import MissingStatesError
from draftcache.capture.engine.likely import judge_by_engine, log_probability_off, require_same_logits
from draftcache.capture.engine.serving import layer_ids, serve_command
from draftcache.capture.engine.states import EngineVerifier
from draftcache.capture.engine.unknown_type import config_of, is_unknown, read_by_names
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.progress import CaptureSummary
from draftcache.capture.job.shard_worker import WorkerRole
from draftcache.capture.job.start_check import with_layers
from draftcache.capture.job.stopping import StopSignals
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.peers.conventions import LastState
from draftcache.capture.peers.index import PROBED, compute_dtype
from draftcache.capture.peers.recorded import AFTER, BEFORE, RecordedVerifier
from draftcache.capture.peers.recorded_job import RecordedJob
from draftcache.capture.peers.samples import PeerSample
from draftcache.capture.peers.verifier_parts import VerifierParts, read_parts
from draftcache.capture.verifier.blocks import block_count
from draftcache.capture.verifier.load import Verifier
from draftcache.store.common.errors import GateError, InputError
from draftcache.store.common.stopping import StopRequest
from draftcache.store.format.manifest import StoreManifest

_TRIED = 32
"""Conversations that are asked for at the start, at most, to find out what the server's states are."""


class EngineJob(RecordedJob):
    """A capture job whose states come from a running engine."""

    def __init__(
        self,
        config: EngineConfig,
        model: PretrainedConfig,
        client: StatesClient,
        first: Sequence[Extracted],
        say: Callable[[str], object],
    ) -> None:
        """`first` are the first conversations, by which it is found out what the engine's states are."""
        self._client, self._first, self._model = client, first, model
        samples = [item.sample for item in first]
        super().__init__(config.capture, samples, probe=config.probe, last_state="", say=say, model=model)

    def _loaded(self) -> Verifier | None:
        if not is_unknown(path := self.config.verifier):
            return super()._loaded()
        if self._probe:
            raise InputError(f"--probe: expected a verifier that transformers knows, found another type in {path}")
        self._say(f"states are not compared with the verifier's own: transformers does not know the type of {path}")
        return None

    def _read_parts(self) -> VerifierParts:
        config = self.config

        def off(parts: VerifierParts) -> float:
            return min(log_probability_off(parts, self._first, name) for name in (BEFORE, AFTER))

        if is_unknown(config.verifier):
            return read_by_names(config.verifier, self._model, self.dtype, off)
        return read_parts(config.verifier, self.dtype, trust_remote_code=config.trust_remote_code, off=off)

    def _judge(self, parts: VerifierParts) -> LastState:
        return judge_by_engine(parts, self._first)

    def _verifier_of(self, parts: VerifierParts, last_state: str) -> RecordedVerifier:
        self._off = require_same_logits(parts, self._first, last_state, f"{FLAG} {self._client.url}")
        return EngineVerifier(
            self._client, parts, self.aux_layers, self._samples[0], last_state=last_state, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip

    def _compare(self, verifier: Verifier) -> tuple[str, dict[str, float]]:
        try:
            return super()._compare(verifier)
        except InputError as exc:
            raise InputError(f"{FLAG} {self._client.url}: {exc}. Start the server with: {self._client.serve}") from exc

    def _findings(self, last: LastState) -> dict[str, Any]:
        probed = bool(self.self_check)
        return {
            "name": self._client.name,
            "version": self._client.version,
            "log_probability_off": self._off,
            "states_dtype": str(self._samples[0].dtype).removeprefix("torch."),
            **self._found_states(last),
            "weights": "compared with the verifier's" if probed else "norm and head compared by the engine's logits",
            "ssm_state_dtype": "unknown",
        }

    def _provenance(self) -> dict[str, Any]:
        return super()._provenance() | {"engine": self.findings}

    def agree_on_manifest(self, role: WorkerRole) -> StoreManifest:
        """As `CaptureJob.agree_on_manifest`; says so where the store was begun with another version of the engine."""
        manifest = super().agree_on_manifest(role)
        begun = StoreManifest.load(self.storage).provenance["engine"]["version"]
        if begun != self._client.version:
            self._say(
                f"the store was begun with {self._client.name} {begun} and goes on with {self._client.version}: states "
                "differ by rounding; each shard's commit record names its own"
            )
        return manifest


def capture_from_engine(config: EngineConfig, say: Callable[[str], object] = lambda line: None) -> CaptureSummary:
    """Capture with the states of a running engine, in the main thread; returns when the store is whole.

    `say` takes lines for the log. Raises Stopped after SIGTERM or SIGINT, InputError where the engine does not extract
    the states that are needed, and ServerError where it is gone.
    """
    model = config_of(config.capture.verifier, trust_remote_code=config.capture.trust_remote_code)
    capture = with_layers(config.capture, model)
    work = WorkPlan.of(capture)
    blocks = block_count(model)
    if blocks is None or blocks <= capture.layers[-1]:
        raise InputError(f"--layers: expected blocks below the verifier's {blocks}, found {list(capture.layers)}")
    ids = layer_ids(capture.layers, blocks)
    serve = serve_command(capture.verifier, model, ids, capture.max_model_len or work.longest + 1)
    stop = StopRequest(capture.grace_seconds)
    client = StatesClient(
        config.url, serve=serve, requests=config.requests, retries=config.retries,
        timeout_seconds=config.timeout_seconds,
    )  # fmt: skip
    with StopSignals(stop), client:
        say(f"engine: {client.name} {client.version} at {client.url}, serving {client.served}")
        first = _first_states(client, work, len(ids))
        settings = replace(config, capture=_in_dtype_of(capture, first[0].sample))
        with EngineJob(settings, model, client, first, say) as job:
            return job.run(stop)


def _first_states(client: StatesClient, work: WorkPlan, states: int) -> list[Extracted]:
    """States of the first conversations, of PROBED tokens where there are so many.

    Raises InputError where the server refuses all of them, or gives another number of states per token.
    """
    rows, tokens = [], 0
    for split, number in work.first(_TRIED):
        token_ids = work.dataset.split(split)[number][0].astype(np.int64)
        if tokens < PROBED:
            rows.append(token_ids)
            tokens += len(token_ids)
    client.read_ahead(rows)
    found: list[Extracted] = []
    refusals: list[str] = []
    for token_ids in rows:
        try:
            found.append(client.states_of(token_ids))
        except MissingStatesError as exc:
            raise InputError(f"{FLAG} {client.url}: {exc}") from exc
        except GateError as exc:
            refusals.append(str(exc))
    if not found:
        raise InputError(
            f"{FLAG} {client.url}: expected the states of at least one of {len(rows)} conversations, found none: "
            f"{refusals[0]}. Start the server with: {client.serve}"
        )
    if (given := found[0].sample.taps + 1) != states:
        raise InputError(
            f"{FLAG} {client.url}: expected {states} states per token, of --layers and the last block, found {given}. "
            f"Start the server with: {client.serve}"
        )
    return found


def _in_dtype_of(config: CaptureConfig, sample: PeerSample) -> CaptureConfig:
    """The settings with the compute dtype that keeps the engine's states. Raises InputError where another is given."""
    dtype = str(compute_dtype(sample.dtype)).removeprefix("torch.")
    if config.compute_dtype not in ("auto", dtype):
        raise InputError(
            f"--compute-dtype: expected auto or {dtype}, in which the engine's states are kept as they are, found "
            f"{config.compute_dtype}: start the server with another --dtype to have others"
        )
    return replace(config, compute_dtype=dtype)
