"""What the store benchmark writes: conversations with the statistics of a real residual stream, or a store's own.

Real states compress to 1.44-1.49 of their bf16 bytes because the exponent holds 2.8-3.1 bits and the rest is noise.
What makes them so is copied: log-normal scales per channel, a few massive channels (100-1000 times the others),
a heavy token now and then (the first one most of all), and neighbours and taps that resemble each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.array_spec import LENGTH_ARRAY, ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, id_dtype, tap_name
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import TOKEN_ARRAYS, Conversation
from draftcache.store.format.teacher import draft_teacher
from draftcache.store.reader import StoreReader

LAYERS = (2, 26, 48)
HIDDEN_SIZE = 2688
VOCAB_SIZE = 131072
DRAFT_VOCAB_SIZE = 32000
TOP_K = 64
MEAN_TOKENS = 4096
LONGEST = 16384
_LOSS_SHARE = 0.64
_LENGTH_SIGMA = 0.8  # of log tokens: most are short, some four times the mean
_NOISE_ROWS = 4096
_NEIGHBOUR_SHARE = 0.4  # of a state that its left neighbour has too
_CHANNEL_SIGMA = 0.55  # of log scale: with the rest it gives the exponents 2.9 bits
_TOKEN_SIGMA = 0.15
_MASSIVE_SHARE = 0.002  # of the channels: 5 of 2688
_KEPT = 0.7  # of a tap that comes from the tap before it
_TAP_RMS = 3.0  # each tap over the one before it


@dataclass(frozen=True, kw_only=True)
class Content:
    """Conversations in memory, taps as bf16 bit patterns, and what a manifest has to say of them."""

    conversations: list[Conversation]
    layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    top_k: int
    window: int | None

    @property
    def axes(self) -> dict[str, str]:
        """Axis of every array, by name."""
        return {
            **dict.fromkeys(TOKEN_ARRAYS, TOKENS_AXIS),
            "positions": ROWS_AXIS,
            **dict.fromkeys(self.taps, ROWS_AXIS),
            **dict.fromkeys(
                draft_teacher(draft_vocab_size=self.draft_vocab_size, top_k=self.top_k).array_specs(), TEACHER_AXIS
            ),
        }

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the tap arrays."""
        return tuple(tap_name(layer) for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Logical bytes, as `gigabytes` are counted for every case: bf16 taps and all other arrays."""
        return sum(array.nbytes for item in self.conversations for array in item.arrays.values())

    @property
    def tokens(self) -> int:
        """Tokens of all conversations, whether a state is kept for them or not."""
        return int(self.lengths(TOKENS_AXIS).sum())

    def lengths(self, axis: str) -> NDArray[np.int64]:
        """Length of every conversation's slice on an axis."""
        return np.array([item.arrays[LENGTH_ARRAY[axis]].shape[0] for item in self.conversations], np.int64)

    def packed(self, name: str) -> NDArray[Any]:
        """One array of all conversations, one after the other."""
        return np.concatenate([item.arrays[name] for item in self.conversations])


def generate(gigabytes: float, *, seed: int = 0) -> Content:
    """Conversations of `gigabytes` * 1e9 logical bytes, of 4k tokens on average and up to 16k; at least three."""
    row_bytes = len(LAYERS) * 2 * HIDDEN_SIZE + 9 + _LOSS_SHARE * (4 * TOP_K + 24)
    tokens = gigabytes * 1e9 / row_bytes
    return _generate(_lengths(tokens, max(3, round(tokens / MEAN_TOKENS))), HIDDEN_SIZE, TOP_K, seed)


def generate_tiny(count: int, *, seed: int = 0) -> Content:
    """`count` conversations of 8 to 16 tokens, 128 channels, 4 teacher entries: for the time that opening takes."""
    lengths = np.random.default_rng(seed).integers(8, 17, count)
    return _generate(lengths.tolist(), 128, 4, seed)


def from_store(root: Path) -> Content:
    """A store's conversations, decoded; float32 taps are rounded to bf16. Raises InputError for another teacher."""
    reader = StoreReader(root)
    manifest = reader.manifest
    if manifest.teacher != "draft" or manifest.more_draft_vocabs:
        raise InputError(f"{root}: expected a store of --teacher draft with one draft vocabulary, found another")
    conversations = []
    for number in range(len(reader)):
        item = reader.read(number)
        taps = {name: item.arrays[name] for name in map(tap_name, manifest.layers)}
        bits = {name: float32_to_bf16(tap) if tap.dtype == np.float32 else tap for name, tap in taps.items()}
        conversations.append(replace(item, arrays=item.arrays | bits))
    return Content(
        conversations=conversations,
        layers=manifest.layers,
        hidden_size=manifest.hidden_size,
        vocab_size=int(manifest.verifier["vocab_size"]),
        draft_vocab_size=manifest.draft_vocab_size,
        top_k=manifest.top_k,
        window=manifest.window,
    )


def exponent_entropy(content: Content) -> float:
    """Bits that the exponents of the taps hold, each tap by itself, on average over the taps."""
    entropies = []
    for name in content.taps:
        counts = np.zeros(256, np.int64)
        for item in content.conversations:
            counts += np.bincount(item.arrays[name].ravel() >> 7 & 0xFF, minlength=256)
        share = counts[counts > 0] / counts.sum()
        entropies.append(float(-(share * np.log2(share)).sum()))
    return float(np.mean(entropies))


def _lengths(tokens: float, count: int) -> list[int]:
    """Even quantiles of a log-normal law, so that even a small set has its long conversations; then shuffled."""
    ranks = (np.arange(count) + 0.5) / count
    shape = np.exp([_LENGTH_SIGMA * NormalDist().inv_cdf(float(rank)) for rank in ranks])
    lengths = np.clip(np.round(shape * tokens / shape.sum()), 16, LONGEST).astype(int)
    return [int(length) for length in np.random.default_rng(0).permutation(lengths)]


def _generate(lengths: Sequence[int], hidden_size: int, top_k: int, seed: int) -> Content:
    rng = np.random.default_rng(seed)
    states = _States(rng, hidden_size)
    conversations = []
    for number, length in enumerate(lengths):
        mask = _loss_mask(rng, length)
        token_ids = (VOCAB_SIZE * rng.random(length) ** 4).astype(np.uint32)  # small ids are the frequent ones
        rows = rows_in_reach(mask, None)
        conversations.append(
            Conversation(
                content_hash=hash_bytes(token_ids.tobytes(), mask.astype(np.uint8).tobytes()),
                split=0,
                dataset_index=number,
                arrays={
                    "token_ids": token_ids,
                    "loss_mask": mask.astype(np.uint8),
                    "positions": rows.astype(np.int32),
                    **{tap_name(layer): tap for layer, tap in zip(LAYERS, states.draw(rng, len(rows)), strict=True)},
                    **_teacher(rng, teacher_positions(mask), top_k),
                },
            )
        )
    return Content(
        conversations=conversations,
        layers=LAYERS,
        hidden_size=hidden_size,
        vocab_size=VOCAB_SIZE,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        top_k=top_k,
        window=None,
    )


class _States:
    """States mixed from one block of noise: drawing noise anew would cost more than everything else together."""

    def __init__(self, rng: np.random.Generator, hidden_size: int) -> None:
        noise = rng.standard_normal((_NOISE_ROWS + 1, hidden_size), np.float32)
        fresh = np.float32(np.sqrt(1 - _NEIGHBOUR_SHARE**2))
        self._noise = fresh * noise[1:] + np.float32(_NEIGHBOUR_SHARE) * noise[:-1]
        self._scales = rng.lognormal(0, _CHANNEL_SIGMA, (len(LAYERS), hidden_size)).astype(np.float32)
        massive = rng.choice(hidden_size, max(1, round(_MASSIVE_SHARE * hidden_size)), replace=False)
        self._scales[:, massive] *= 10 ** rng.uniform(2, 3, massive.size).astype(np.float32)
        self._scales *= np.float32(0.05) * np.float32(_TAP_RMS) ** np.arange(len(LAYERS), dtype=np.float32)[:, None]

    def draw(self, rng: np.random.Generator, rows: int) -> Iterator[NDArray[np.uint16]]:
        """[rows, H] bf16 bit patterns, tap by tap, each with something of the one before it."""
        heavy = rng.lognormal(0, _TOKEN_SIGMA, (rows, 1)).astype(np.float32)
        heavy[:1] *= 20
        stream = self._rows(rng, rows)
        for number, scales in enumerate(self._scales):
            if number:
                stream *= np.float32(_KEPT)
                stream += np.float32(np.sqrt(1 - _KEPT**2)) * self._rows(rng, rows)
            yield float32_to_bf16(stream * scales * heavy)

    def _rows(self, rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
        first = int(rng.integers(_NOISE_ROWS))
        return self._noise[np.arange(first, first + rows) % _NOISE_ROWS]


def _loss_mask(rng: np.random.Generator, length: int) -> NDArray[np.bool_]:
    """A few turns of user and assistant, the assistant's about 64 % of the tokens."""
    turns = int(np.clip(length // 600, 1, 6))
    shares = rng.dirichlet(np.full(turns, 4.0))
    mask = np.zeros(length, np.bool_)
    end = 0.0
    for share in shares * length:
        mask[round(end + (1 - _LOSS_SHARE) * share) : round(end + share)] = True
        end += share
    return mask


def _teacher(rng: np.random.Generator, positions: NDArray[np.int64], top_k: int) -> dict[str, NDArray[Any]]:
    """Arrays of the schema's form and order; the numbers stand in for logits of a verifier."""
    count = positions.size
    ids = rng.choice(DRAFT_VOCAB_SIZE, top_k, replace=False) + rng.integers(DRAFT_VOCAB_SIZE, size=(count, 1))
    gaps = np.cumsum(rng.exponential(0.3, (count, top_k)).astype(np.float32), axis=1)
    best = rng.normal(20, 3, count).astype(np.float32)
    return {
        "teacher_positions": positions.astype(np.int32),
        "teacher_ids": (ids % DRAFT_VOCAB_SIZE).astype(id_dtype(DRAFT_VOCAB_SIZE)),
        "teacher_gaps": (gaps - gaps[:, :1]).astype(np.float16),
        "argmax": rng.integers(VOCAB_SIZE, size=count).astype(np.uint32),
        "teacher_max": best,
        "log_z_full": best + np.float32(1.5),
        "log_z_draft": best + np.float32(1),
        "next_token_logit": best - rng.exponential(1, count).astype(np.float32),
    }


def peer_bytes(content: Content, directory: Path) -> dict[str, int]:
    """File bytes of the same conversations as peers store them: a row per token, pruned nowhere, no teacher.

    - `specforge`: torch.save of {input_ids, loss_mask: int64 [L], hidden_state: bf16 [1, L, H], aux_hidden_state:
      bf16 [1, L, taps * H]};
    - `speculators`: safetensors of {token_ids: int64 [L], hidden_states: bf16 [L, taps + 1, H]}, masks elsewhere;
    - `speculators-fp8`: the same as e4m3, with one float32 scale [L, 1, 1].
    None compresses, so only shapes count: states are zeros.
    """
    directory.mkdir(parents=True)
    path = directory / "sample"
    sizes = dict.fromkeys(("specforge", "speculators", "speculators-fp8"), 0)
    for length in content.lengths(TOKENS_AXIS).tolist():
        ids = torch.zeros(length, dtype=torch.int64)
        states = torch.zeros(length, len(content.layers) + 1, content.hidden_size, dtype=torch.bfloat16)
        flat = states.reshape(1, length, -1)
        sample = {
            "input_ids": ids,
            "loss_mask": ids.clone(),
            "hidden_state": flat[..., : content.hidden_size].clone(),
            "aux_hidden_state": flat[..., content.hidden_size :].clone(),
        }
        torch.save(sample, path)
        sizes["specforge"] += path.stat().st_size
        save_file({"token_ids": ids, "hidden_states": states}, path)
        sizes["speculators"] += path.stat().st_size
        quantised = states.to(torch.float8_e4m3fn)
        save_file({"token_ids": ids, "hidden_states": quantised, "scales": torch.zeros(length, 1, 1)}, path)
        sizes["speculators-fp8"] += path.stat().st_size
    path.unlink()
    return sizes
