"""Settings of an import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from draftcache.capture.job.config import CaptureConfig
from draftcache.store.common.errors import InputError

PEERS = ("speculators", "specforge", "modelopt")
UNREADABLE = {
    "deepspec": "its raw shards have no public description, and its code is in no package: convert them to one of the "
    "other forms with DeepSpec's own reader",
    "automodel": "its cache holds renormalised probabilities over its own draft vocabulary and no last state, so that "
    "neither log Z over the verifier's vocabulary nor the tail can be known: capture its conversations with "
    "`draftcache capture`",
}
"""Projects whose caches can't become a store, and why."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Which cache of which project to read, and what its files don't say."""

    peer: str
    source: Path
    capture: CaptureConfig
    """Its `dataset` is the folder in which rows are prepared, its `layers` the blocks of the stored states."""
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
        if self.peer in UNREADABLE:
            raise InputError(f"--from {self.peer}: {UNREADABLE[self.peer]}")
        if self.peer not in PEERS:
            raise InputError(f"--from: expected one of {list(PEERS)}, found {self.peer!r}")
        if self.last_state not in ("", "before", "after"):
            raise InputError(f"--last-state: expected before or after (the final norm), found {self.last_state!r}")
        if self.last_state and self.probe:
            raise InputError("--last-state: expected it without --probe, which finds it out")
        if not self.capture.layers:
            raise InputError("--layers: expected the blocks whose outputs the files hold, found none")
        if self.draft_vocab_size is None and self.capture.vocab_map is None:
            raise InputError("expected --draft-vocab-size N, to count a vocabulary, or --vocab-map, found neither")
        names = [self.split, *(name for name, _ in self.held_out)]
        if len(set(names)) != len(names):
            raise InputError(f"--held-out: expected splits of other names, found {names}")
