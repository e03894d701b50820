"""Checks of a stored conversation's values, which verify makes besides those of sizes, hashes and checksums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.files import hash_bytes
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import states_to_float32
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import Conversation

_ROUNDING = 0.02
"""How far a logit may be off: gaps are float16, and sums of exponentials are float32."""
_STORED = math.log(1.1)
"""How far the log rms of stored rows may be from the one that capture saw: fp8 keeps 4 bits."""


def check_conversation(item: Conversation, manifest: StoreManifest) -> list[str]:
    """Return what is wrong with a conversation that was read whole and decoded; [] where nothing is."""
    return [
        *_check_tokens(item, manifest),
        *_check_taps(item, manifest),
        *_check_teacher(item, manifest),
    ]


def _check_tokens(item: Conversation, manifest: StoreManifest) -> list[str]:
    arrays, mask = item.arrays, item.loss_mask
    problems = []
    found = hash_bytes(arrays["token_ids"].astype("<u4").tobytes(), arrays["loss_mask"].tobytes())
    if found != item.content_hash:
        problems.append(f"expected tokens and mask of hash {item.content_hash}, found {found}")
    if arrays["token_ids"].size and int(arrays["token_ids"].max()) >= int(manifest.verifier["vocab_size"]):
        problems.append(f"expected token ids below {manifest.verifier['vocab_size']}, found larger ones")
    if not np.array_equal(arrays["positions"], rows_in_reach(mask, manifest.window)):
        problems.append("expected the rows in reach of the loss mask, found others")
    if not np.array_equal(arrays["teacher_positions"], teacher_positions(mask)):
        problems.append("expected teacher positions of the loss mask, found others")
    return problems


def _check_taps(item: Conversation, manifest: StoreManifest) -> list[str]:
    problems = []
    taps = {layer: item.arrays[tap_name(layer)] for layer in manifest.layers}
    for layer, stored in taps.items():
        states = states_to_float32(stored)
        if not np.isfinite(states).all():
            problems.append(f"tap {layer}: expected finite values, found NaN or infinity")
            continue
        squares = np.einsum("rh,rh->r", states, states, dtype=np.float64) / states.shape[1]
        if (squares == 0).any():
            problems.append(f"tap {layer}: expected non-zero rows, found {int((squares == 0).sum())} rows of zeros")
            continue
        if layer in manifest.bands and squares.size:
            problem = manifest.bands[layer].problem(float(np.log(squares).mean()) / 2, _STORED)
            problems += [f"tap {layer}: {problem}"] if problem else []
    for first, second in itertools.pairwise(manifest.layers):
        if taps[first].size and np.array_equal(taps[first], taps[second]):
            problems.append(f"taps {first} and {second}: expected different states, found equal ones")
    return problems


def _check_teacher(item: Conversation, manifest: StoreManifest) -> list[str]:
    arrays, form = item.arrays, manifest.teacher_form
    if not arrays["teacher_positions"].size:
        return []
    hidden = form.kind == "hidden"
    problems = _check_states(arrays["teacher_hidden"]) if hidden else []
    for name in (*form.scalars, *(() if hidden else ("teacher_gaps",))):
        if not np.isfinite(arrays[name]).all():
            problems.append(f"{name}: expected finite values, found NaN or infinity")
    if problems:
        return problems
    if not hidden:
        problems += _check_entries(arrays, form.ids_below)
    largest_of = "log_z_full" if form.kind == "full" else form.main.log_z
    order = [
        (largest_of, "teacher_max"),
        ("log_z_full", "next_token_logit"),
        *(("log_z_full", vocab.log_z) for vocab in form.vocabularies),
    ]
    for larger, smaller in order:
        if (arrays[larger] < arrays[smaller] - _ROUNDING).any():
            problems.append(f"expected {larger} >= {smaller}, found less")
    return problems


def _check_states(stored: NDArray[Any]) -> list[str]:
    states = states_to_float32(stored)
    if not np.isfinite(states).all():
        return ["teacher_hidden: expected finite values, found NaN or infinity"]
    zeros = int((~states.any(axis=1)).sum())
    return [f"teacher_hidden: expected non-zero rows, found {zeros} rows of zeros"] if zeros else []


def _check_entries(arrays: dict[str, NDArray[Any]], ids_below: int) -> list[str]:
    problems = []
    gaps = arrays["teacher_gaps"]
    if (gaps[:, 0] != 0).any() or (np.diff(gaps.astype(np.float32), axis=1) < 0).any():
        problems.append("teacher_gaps: expected 0 first, then ascending, found another order")
    ids = np.sort(arrays["teacher_ids"], axis=1)
    if ids[:, -1].max() >= ids_below or (ids[:, 1:] == ids[:, :-1]).any():
        problems.append(f"teacher_ids: expected distinct ids below {ids_below}, found others")
    return problems
