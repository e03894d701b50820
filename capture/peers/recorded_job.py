"""A capture job whose states another program computed: what they are is found out before anything is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.peers.conventions import LastState, compare_with_model, judge_last_state
from draftcache.capture.peers.recorded import AFTER, BEFORE, RecordedVerifier
from draftcache.capture.peers.samples import PeerSample
from draftcache.capture.peers.verifier_parts import VerifierParts, parts_of, read_parts
from draftcache.capture.verifier.load import Verifier, load_verifier
from draftcache.capture.verifier.self_check import TOKENS, self_check
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.capture.verifier.weights import weight_files
from draftcache.store.common.errors import InputError

SMALL_BYTES = 4e9
"""Bytes of a verifier's weight files up to which it is loaded and compared unless --no-probe forbids it."""


class RecordedJob(CaptureJob, ABC):
    """A capture job whose states come from a `RecordedVerifier`.

    Subclasses make it in `_verifier_of`, and say in `_findings` what is known of its states.
    """

    def __init__(
        self,
        config: CaptureConfig,
        samples: Sequence[PeerSample],
        *,
        probe: bool | None,
        last_state: str,
        say: Callable[[str], object],
        model: PretrainedConfig | None = None,
    ) -> None:
        """`samples` are some of the conversations, by which it is found out what the states are.

        With `probe` the verifier is loaded and compared, None being: if its weights are small. `last_state` is what a
        user says of the last state, "" for nothing, `say` takes lines for the log, and `model` is the verifier's
        configuration where it is known already.
        """
        self._samples, self._probe, self._last_state, self._say = samples, probe, last_state, say
        self.findings: dict[str, Any] = {}
        """What is known of the states, and how; the manifest's provenance has it too."""
        super().__init__(config, model)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Blocks of the auxiliary states."""
        return self.config.layers[: self._samples[0].taps]

    @abstractmethod
    def _verifier_of(self, parts: VerifierParts, last_state: str) -> RecordedVerifier:
        """The source of the states, whose last state is from `last_state` the final norm."""

    @abstractmethod
    def _findings(self, last: LastState) -> dict[str, Any]:
        """What is known of the states, what a user stated, and what nothing shows."""

    def _load(self) -> None:
        first = self._samples[0]
        parts, last = self._conventions()
        self._require_last_block(parts.layers, last.convention)
        if first.before_norm is not None and first.before_norm != (last.convention == BEFORE):
            raise InputError(
                f"{first.path}: expected a last state as the file says ({BEFORE if first.before_norm else AFTER} the "
                f"final norm), found that it is {last.convention} it"
            )
        self.verifier = self._verifier_of(parts, last.convention)
        self._require_fit(self.verifier)
        self.ssm = None
        self.findings = self._findings(last)
        self._say(f"last state: {last.convention} the final norm ({self.findings['last_state_by']})")
        self._say(f"auxiliary states: {self.findings['auxiliary_states']}")

    def _conventions(self) -> tuple[VerifierParts, LastState]:
        path = self.config.verifier
        size = sum(file.stat().st_size for file in weight_files(path))
        verifier = None
        if size <= SMALL_BYTES if self._probe is None and not self._last_state else self._probe:
            verifier = self._loaded()
        if verifier is not None:
            return self._probed(verifier)
        self.self_check = {}
        parts = self._read_parts()
        self._require_shape(parts.layers, int(parts.embeddings.embedding_dim))
        return parts, self._judge(parts)

    def _read_parts(self) -> VerifierParts:
        """What is needed of the verifier beside its states, without loading it. Raises InputError."""
        config = self.config
        return read_parts(config.verifier, self.dtype, trust_remote_code=config.trust_remote_code)

    def _judge(self, parts: VerifierParts) -> LastState:
        """Where the last state is from, without the verifier. Raises InputError where that can't be told."""
        return judge_last_state(parts, self._samples, self._last_state)

    def _loaded(self) -> Verifier | None:
        """The verifier, to compare with; None where it can't be loaded, and nobody has asked for the comparison."""
        config = self.config
        try:
            return load_verifier(
                config.verifier, device=self.device, dtype=self.dtype, trust_remote_code=config.trust_remote_code,
                max_model_len=config.max_model_len,
            )  # fmt: skip
        except InputError as exc:
            if self._probe:
                raise
            self._say(f"states are not compared with the verifier's own, as it can't be loaded: {exc}")
            return None

    def _probed(self, verifier: Verifier) -> tuple[VerifierParts, LastState]:
        """Prove the verifier as a capture does, compare its states with those of the samples, and let it go."""
        config = self.config
        self._require_shape(len(verifier.blocks), verifier.hidden_size)
        enforce_contract(verifier.model, config.verifier, allow_fallback=True)
        token_ids = np.resize(self._samples[0].token_ids[:TOKENS], TOKENS)
        self.self_check = self_check(verifier, config.layers, torch.from_numpy(token_ids))
        convention, differences = self._compare(verifier)
        self.self_check |= {f"recorded_{name}": value for name, value in differences.items()}
        return parts_of(verifier), LastState(convention=convention, evidence="", rows=0)

    def _compare(self, verifier: Verifier) -> tuple[str, dict[str, float]]:
        """`compare_with_model` of the samples. Raises InputError."""
        return compare_with_model(verifier, self._samples, self.aux_layers)

    def _require_shape(self, blocks: int, hidden_size: int) -> None:
        first, layers = self._samples[0], self.config.layers
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
        taps = self._samples[0].taps
        if convention == AFTER and len(self.config.layers) > taps:
            raise InputError(
                f"--layers: expected blocks of the files' {taps} auxiliary states, found the last block {blocks - 1} "
                "too, whose output is not stored: the last state is from after the final norm"
            )

    def _found_states(self, last: LastState) -> dict[str, Any]:
        """The part of the findings that the comparison, or the evidence, gives."""
        probed = bool(self.self_check)
        return {
            "last_state": last.convention,
            "last_state_by": "compared with the verifier" if probed else last.evidence,
            **({} if probed else {"last_state_evidence": last.to_json()}),
            "auxiliary_states": "compared with the verifier" if probed else "not compared: --layers is taken as given",
        }
