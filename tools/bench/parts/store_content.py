"""The content of the store benchmark: conversations with the statistics of a real residual stream, or from a store.

Real states compress by a factor of 1.44 to 1.49 against bf16, because the exponent holds 2.8 to 3.1 bits and the rest
is noise. The generated states copy the causes of this: log-normal scales per channel, a few massive channels (100 to
1000 times the others), tokens of different weight (the first one is by far the heaviest), and neighbouring tokens and
taps that resemble each other.
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
_LENGTH_SIGMA = 0.8  # sigma of log tokens: most conversations are short, some have four times the mean
_NOISE_ROWS = 4096
_NEIGHBOUR_SHARE = 0.4  # share of a state that its left neighbour has too
_CHANNEL_SIGMA = 0.55  # sigma of a channel's log scale: with the other parts it gives the exponents 2.9 bits
_TOKEN_SIGMA = 0.15  # sigma of a token's log scale
_MASSIVE_SHARE = 0.002  # share of massive channels: 5 of 2688
_KEPT = 0.7  # share of a tap that comes from the tap before it
_TAP_RMS = 3.0  # ratio of a tap's rms to the rms of the tap before it


@dataclass(frozen=True, kw_only=True)
class Content:
    """Conversations in memory, with taps as bf16 bit patterns, and the settings of them that a manifest holds."""

    conversations: list[Conversation]
    layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    top_k: int
    window: int | None

    @property
    def axes(self) -> dict[str, str]:
        """The axis of every array, by the array's name."""
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
        """The names of the tap arrays."""
        return tuple(tap_name(layer) for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Logical bytes, by which GB are counted for every case: bf16 taps and all other arrays."""
        return sum(array.nbytes for item in self.conversations for array in item.arrays.values())

    @property
    def tokens(self) -> int:
        """Number of tokens of all conversations, with or without a row of states."""
        return int(self.lengths(TOKENS_AXIS).sum())

    def lengths(self, axis: str) -> NDArray[np.int64]:
        """Return the length of every conversation's slice on an axis, [N] int64."""
        return np.array([item.arrays[LENGTH_ARRAY[axis]].shape[0] for item in self.conversations], np.int64)

    def packed(self, name: str) -> NDArray[Any]:
        """Return one array of all conversations, concatenated in order."""
        return np.concatenate([item.arrays[name] for item in self.conversations])


def generate(gigabytes: float, *, seed: int = 0) -> Content:
    """Generate `gigabytes` * 1e9 logical bytes in at least three conversations, 4k tokens on average, 16k at most."""
    row_bytes = len(LAYERS) * 2 * HIDDEN_SIZE + 9 + _LOSS_SHARE * (4 * TOP_K + 24)
    tokens = gigabytes * 1e9 / row_bytes
    return _generate(_lengths(tokens, max(3, round(tokens / MEAN_TOKENS))), HIDDEN_SIZE, TOP_K, seed)


def generate_tiny(count: int, *, seed: int = 0) -> Content:
    """Generate `count` conversations of 8 to 16 tokens, 128 channels and 4 teacher entries, to time how stores open."""
    lengths = np.random.default_rng(seed).integers(8, 17, count)
    return _generate(lengths.tolist(), 128, 4, seed)


def from_store(root: Path) -> Content:
    """Read and decode a store's conversations; float32 taps are rounded to bf16.

    Raises InputError unless the store has teacher "draft" and one draft vocabulary.
    """
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
    """Return the entropy of the taps' exponents in bits, measured per tap and averaged over the taps."""
    entropies = []
    for name in content.taps:
        counts = np.zeros(256, np.int64)
        for item in content.conversations:
            counts += np.bincount(item.arrays[name].ravel() >> 7 & 0xFF, minlength=256)
        share = counts[counts > 0] / counts.sum()
        entropies.append(float(-(share * np.log2(share)).sum()))
    return float(np.mean(entropies))


def _lengths(tokens: float, count: int) -> list[int]:
    """Return `count` lengths: evenly spaced quantiles of a log-normal distribution, shuffled.

    So even a small set has long conversations.
    """
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
    """Makes states from one block of noise: drawing new noise would cost more than everything else together."""

    def __init__(self, rng: np.random.Generator, hidden_size: int) -> None:
        noise = rng.standard_normal((_NOISE_ROWS + 1, hidden_size), np.float32)
        fresh = np.float32(np.sqrt(1 - _NEIGHBOUR_SHARE**2))
        self._noise = fresh * noise[1:] + np.float32(_NEIGHBOUR_SHARE) * noise[:-1]
        self._scales = rng.lognormal(0, _CHANNEL_SIGMA, (len(LAYERS), hidden_size)).astype(np.float32)
        massive = rng.choice(hidden_size, max(1, round(_MASSIVE_SHARE * hidden_size)), replace=False)
        self._scales[:, massive] *= 10 ** rng.uniform(2, 3, massive.size).astype(np.float32)
        self._scales *= np.float32(0.05) * np.float32(_TAP_RMS) ** np.arange(len(LAYERS), dtype=np.float32)[:, None]

    def draw(self, rng: np.random.Generator, rows: int) -> Iterator[NDArray[np.uint16]]:
        """Yield the bf16 bit patterns [rows, H] uint16 of each tap, which holds a share of the tap before it."""
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
    """Return the mask [L] of a few turns of user and assistant; the assistant writes about 64 % of the tokens."""
    turns = int(np.clip(length // 600, 1, 6))
    shares = rng.dirichlet(np.full(turns, 4.0))
    mask = np.zeros(length, np.bool_)
    end = 0.0
    for share in shares * length:
        mask[round(end + (1 - _LOSS_SHARE) * share) : round(end + share)] = True
        end += share
    return mask


def _teacher(rng: np.random.Generator, positions: NDArray[np.int64], top_k: int) -> dict[str, NDArray[Any]]:
    """Return the teacher's arrays in the schema's form and order, with random numbers in place of logits."""
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
    """Return the file bytes of the same conversations as peers store them: a row for every token, and no teacher.

    - `specforge`: torch.save of {input_ids, loss_mask: int64 [L], hidden_state: bf16 [1, L, H], aux_hidden_state:
      bf16 [1, L, taps * H]};
    - `speculators`: safetensors of {token_ids: int64 [L], hidden_states: bf16 [L, taps + 1, H]}, masks elsewhere;
    - `speculators-fp8`: the same as e4m3, with one float32 scale [L, 1, 1].
    None of them compresses, so only shapes matter, and the states are zeros.
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
