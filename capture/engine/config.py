"""Settings of a capture whose states a running engine computes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from draftcache.capture.job.config import LAUNCHERS, CaptureConfig
from draftcache.store.common.errors import InputError

VLLM = "vllm"
"""The value of --engine that stands for a vLLM at DEFAULT_URL."""
DEFAULT_URL = "http://localhost:8000"
_OF_A_LOADED_VERIFIER = ("workers", "launcher", "tensor_parallel", "prefill_chunk", "allow_fallback")
"""Settings of a capture that say how this program runs a verifier, which it does not do here."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine computes the states, and what capture keeps of them."""

    engine: str
    """ "vllm", or the URL of a running vLLM, with or without /v1."""
    capture: CaptureConfig
    requests: int = 32
    """Conversations that are asked for, or whose files lie there unread, at one time."""
    probe: bool | None = None
    """Whether to load the verifier and compare; None: if its weights are small."""
    retries: int = 6
    """How often a request is sent again while the server fails; the waits between double, from half a second on."""
    timeout_seconds: float = 1800.0
    """Longest time that one answer may take, waiting in the server's queue included."""

    def __post_init__(self) -> None:
        if self.engine in LAUNCHERS:
            raise InputError(f"--engine {self.engine}: expected --launcher {self.engine}, the flag's new name")
        if self.engine != VLLM and not self.engine.startswith(("http://", "https://")):
            raise InputError(
                f"--engine: expected {VLLM}, which stands for {DEFAULT_URL}, or the URL of a running vLLM, found "
                f"{self.engine!r}"
            )
        if self.requests < 1:
            raise InputError(f"--engine-requests: expected at least 1, found {self.requests}")
        for item in fields(self.capture):
            value = getattr(self.capture, item.name)
            one_worker = item.name == "workers" and value == 1
            if item.name in _OF_A_LOADED_VERIFIER and value != item.default and not one_worker:
                raise InputError(
                    f"--{item.name.replace('_', '-')}: expected it without --engine, where the engine runs the "
                    "verifier; one process asks it, with --engine-requests conversations at a time"
                )

    @property
    def url(self) -> str:
        """Where the server answers, without /v1."""
        return DEFAULT_URL if self.engine == VLLM else self.engine.rstrip("/").removesuffix("/v1")
