"""Checks that a checkpoint belongs to a store. Every error names the field that differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.store.common.errors import CheckpointError, ManifestMismatchError
from draftcache.store.format.teacher import DraftVocab
from draftcache.store.reader import StoreReader
from draftcache.store.tap_choice import capture_command


def require_window(window: int | None, store: StoreReader) -> None:
    """Raise ManifestMismatchError if the draft would attend to rows that the store does not keep."""
    kept = store.manifest.window
    if kept is not None and (window is None or window > kept):
        raise ManifestMismatchError(
            f"{store.location}: expected a draft window of at most {kept}, the reach that capture kept, "
            f"found {window or 'full attention'}; capture again with --window {window or 0}"
        )


def require_equal(path: Path, pairs: Mapping[str, tuple[Any, Any]], advice: str) -> None:
    """Raise CheckpointError for the first name whose two values, the checkpoint's and this run's, differ."""
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise CheckpointError(f"{path}: its {name} is {theirs!r}, here it is {ours!r}; {advice}")


def require_fit(path: Path, state: CheckpointState, store: StoreReader) -> DraftVocab:
    """Return the store's draft vocabulary that the checkpoint was trained on.

    Raises CheckpointError where the store has no such vocabulary, another verifier or other taps, and
    ManifestMismatchError where the draft's window is wider than the window that the store was captured for.
    """
    declared = {vocab.hash: vocab for vocab in store.manifest.teacher_form.vocabularies}
    vocab = declared.get(state.draft_vocab_hash, store.manifest.teacher_form.main)
    require_equal(path, {"draft vocabulary": (state.draft_vocab_hash, vocab.hash)}, _elsewhere(store))
    require_verifier(path, state, store)
    require_window(state.shape.sliding_window, store)
    return vocab


def require_verifier(path: Path, state: CheckpointState, store: StoreReader) -> None:
    """Raise CheckpointError where the checkpoint was trained on another verifier or other taps than the store has."""
    manifest = store.manifest
    weights = (state.verifier["weights_hash"], manifest.verifier["weights_hash"])
    require_equal(path, {"verifier weights": weights}, _elsewhere(store))
    taps = (state.taps, [tap.to_json() for tap in manifest.taps])
    if taps[0] != taps[1]:
        require_equal(path, {"taps": taps}, f"{_elsewhere(store)}; {_its_taps(state, store)}")


def _its_taps(state: CheckpointState, store: StoreReader) -> str:
    """Return the command that makes a store with the checkpoint's taps: of this store, or of the verifier."""
    asked, stored = {int(tap["layer"]) for tap in state.taps}, set(store.manifest.layers)
    if asked <= stored:
        chosen = ",".join(map(str, sorted(asked)))
        return f"take its taps out of this one: draftcache convert {store.location} OTHER --layers {chosen}"
    return f"capture its taps too: {capture_command(store.manifest, sorted(asked | stored))}"


def _elsewhere(store: StoreReader) -> str:
    return f"it belongs to another store than {store.location}"
