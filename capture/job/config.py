"""Settings of one capture job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from draftcache.store.common.errors import InputError
from draftcache.store.common.settings import require_finite
from draftcache.store.format.manifest import LAYOUTS
from draftcache.store.format.tap_codecs import MODES
from draftcache.store.format.teacher import TEACHERS
from draftcache.store.storage.base import Location

LAUNCHERS = ("local", "ray")


def _doc(text: str) -> dict[str, str]:
    return {"help": text}


def layers_by_depth(blocks: int, model_type: str = "") -> tuple[int, ...]:
    """Return an early, a middle and a late block of a model of so many blocks, as the published recipes take them."""
    if (model_type, blocks) == ("nemotron_h", 52):
        return 2, 26, 48
    early, middle, late = 2, blocks // 2, blocks - 3
    if early < middle < late:
        return early, middle, late
    return tuple(sorted({0, blocks // 2, blocks - 1}))


def require_ascending(layers: tuple[int, ...]) -> None:
    """Raise InputError unless these are ascending, distinct block numbers."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise InputError(f"--layers: expected ascending, distinct block numbers >= 0, found {list(layers)}")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Which verifier to run over which dataset, what to keep of its outputs, and where to write it."""

    verifier: Path = field(metadata=_doc("directory of a Hugging Face causal language model"))
    dataset: Path = field(metadata=_doc("prepared dataset: the --output of `draftcache prepare`"))
    output: Location = field(metadata=_doc("store to create or resume"))
    layers: tuple[int, ...] = field(
        default=(),
        metadata=_doc(
            "blocks whose outputs are kept, counted from 0, ascending; auto (the same: early,middle,late) takes 2, "
            "n//2 and n-3 of n blocks, and 2,26,48 for Nemotron-Cascade-2 (default: auto)"
        )
        | {"words": {"auto": (), "early,middle,late": ()}},
    )
    vocab_map: Path | None = field(
        default=None, metadata=_doc("draft-vocabulary map (default: the dataset's vocab_map.safetensors)")
    )
    more_vocab_maps: tuple[Path, ...] = field(
        default=(), metadata=_doc("further draft vocabularies, of other sizes, that drafts will be trained with")
    )
    splits: tuple[str, ...] = field(default=(), metadata=_doc("splits to capture, in order (default: all)"))
    window: int = field(
        default=4096,
        metadata=_doc("drop rows that no start row within this window reads; 0 keeps every earlier row"),
    )
    teacher: str = field(
        default="draft",
        metadata=_doc(
            "what is kept of the verifier's distribution: draft (top-k over the draft vocabulary), full (top-k over "
            "the verifier's), or hidden (the final-norm state, in the compute dtype: exact, for reference)"
        ),
    )
    top_k: int = field(default=64, metadata=_doc("teacher logits kept per position; none with --teacher hidden"))
    mode: str = field(
        default="lossless",
        metadata=_doc("stored taps: bf16, lossless (the same bits, about 1.45 times smaller), int8, fp8 or float32"),
    )
    layout: str = field(default="zarr", metadata=_doc("form of the shards: zarr or webdataset"))
    calibration_tokens: int = field(
        default=65_536, metadata=_doc("int8: tokens that the verifier reads first, to scale the channels by")
    )
    compute_dtype: str = field(
        default="auto",
        metadata=_doc("verifier weights: bfloat16, float32, or auto (bfloat16 on a GPU, else float32)"),
    )
    device: str = field(default="auto", metadata=_doc("cuda, cuda:N, cpu, or auto"))
    shard_tokens: int = field(default=65_536, metadata=_doc("tokens per shard: the unit that is redone after a kill"))
    head_slice: int = field(default=4096, metadata=_doc("rows per slice of the head, so that no [L, V] tensor exists"))
    batch_tokens: int = field(
        default=32_768,
        metadata=_doc("tokens that the verifier reads at once, padding included: conversations of like length"),
    )
    prefill_chunk: int = field(
        default=32_768,
        metadata=_doc("longer conversations are read in pieces of this size, state carried in float32"),
    )
    buffer_gb: float = field(
        default=8.0, metadata=_doc("host memory for what is computed and not written yet, in 1e9 bytes")
    )
    allow_fallback: bool = field(
        default=False,
        metadata=_doc("on a GPU, run Mamba blocks without mamba-ssm's kernels (about 15 times slower)"),
    )
    launcher: str = field(
        default="local",
        metadata=_doc("local (all visible GPUs of this machine) or ray (the running cluster at RAY_ADDRESS, or auto)"),
    )
    workers: int = field(
        default=0,
        metadata=_doc(
            "worker processes; 0: one per GPU, or a single one in this process without GPUs (several on a CPU need "
            "OMP_NUM_THREADS, each would take all cores)"
        ),
    )
    tensor_parallel: int = field(
        default=1, metadata=_doc("GPUs of one node over which each worker's verifier is split, where one is too small")
    )
    max_model_len: int | None = field(
        default=None,
        metadata=_doc(
            "length that the verifier will be served with, as the engine's flag of this name: LongRoPE models choose "
            "their factors by it, and no longer conversation is taken (default: max_position_embeddings)"
        ),
    )
    grace_seconds: float = field(
        default=25.0, metadata=_doc("after SIGTERM, time to finish the shard in; a second SIGTERM ends it at once")
    )
    ignore_free_space: bool = field(
        default=False, metadata=_doc("begin although the disk has less room than the store is estimated to take")
    )
    full_hash: bool = field(
        default=False,
        metadata=_doc(
            "also record the hash of every byte of the verifier's weight files; all jobs on a store need the same"
        ),
    )
    trust_remote_code: bool = field(default=False, metadata=_doc("run the model code that the checkpoint brings along"))

    def __post_init__(self) -> None:
        require_finite(self)
        if self.layers:  # none: they are chosen by depth
            require_ascending(self.layers)
        for name, choices in (("mode", MODES), ("layout", LAYOUTS), ("launcher", LAUNCHERS), ("teacher", TEACHERS)):
            if getattr(self, name) not in choices:
                raise InputError(f"--{name}: expected one of {list(choices)}, found {getattr(self, name)!r}")
        if self.compute_dtype not in ("auto", "bfloat16", "float32"):
            raise InputError(f"--compute-dtype: expected auto, bfloat16 or float32, found {self.compute_dtype!r}")
        at_least_one = ("top_k", "shard_tokens", "head_slice", "calibration_tokens", "batch_tokens", "prefill_chunk")
        for name in (*at_least_one, "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise InputError(f"--max-model-len: expected at least 1, found {self.max_model_len}")
        for name in ("workers", "grace_seconds", "buffer_gb"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 0, found {getattr(self, name)}")
        if self.window < 0:
            raise InputError(f"--window: expected 0 (keep all) or a number of rows, found {self.window}")

    @property
    def buffer_bytes(self) -> int:
        """`buffer_gb` in bytes."""
        return round(self.buffer_gb * 1e9)
