"""Settings of an import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from draftcache.capture.job.config import CaptureConfig
from draftcache.store.common.errors import InputError

PEERS = ("speculators", "specforge", "modelopt", "deepspec", "automodel")
NAMING_LAYERS = ("deepspec", "automodel")
"""Projects whose caches say themselves of which blocks their states are."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Which cache of which project to read, and what its files don't say."""

    peer: str
    source: Path
    capture: CaptureConfig
    """Its `dataset` is the folder in which rows are prepared, its `layers` the blocks of the stored states: those that
    the cache names where there are none."""
    tokenizer: Path
    split: str = "train"
    held_out: tuple[tuple[str, Path], ...] = ()
    """Further caches by split, which are not counted into the draft vocabulary."""
    masks: str = ""
    last_state: str = ""
    """ "before" or "after" the final norm, where the evidence leaves it open and the user knows it."""
    probe: bool | None = None
    """Whether to load the verifier and compare; None: if its weights are small."""
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.peer not in PEERS:
            raise InputError(f"--from: expected one of {list(PEERS)}, found {self.peer!r}")
        if self.last_state not in ("", "before", "after"):
            raise InputError(f"--last-state: expected before or after (the final norm), found {self.last_state!r}")
        if self.last_state and self.probe:
            raise InputError("--last-state: expected it without --probe, which finds it out")
        if not self.capture.layers and self.peer not in NAMING_LAYERS:
            raise InputError(f"--layers: expected the blocks whose outputs {self.peer}'s files hold, found none")
        if self.draft_vocab_size is None and self.capture.vocab_map is None:
            raise InputError("expected --draft-vocab-size N, to count a vocabulary, or --vocab-map, found neither")
        names = [self.split, *(name for name, _ in self.held_out)]
        if len(set(names)) != len(names):
            raise InputError(f"--held-out: expected splits of other names, found {names}")
